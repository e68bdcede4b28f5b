"""The colours of the dashboard can be told apart by weak eyes, and the check of its pages finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.accessibility import problems
from tests.contrast import contrasts, ratio

CSS = (Path(__file__).parents[2] / "jobs" / "serve" / "static" / "style.css").read_text(encoding="utf-8")
GOOD = """<!DOCTYPE html><html lang="en"><head><title>Page</title><meta name="viewport" content="width=device-width"></head><body>
<a href="#main">Skip</a><header><nav aria-label="Pages"><a href="/">Home</a></nav></header>
<main id="main"><h1>Page</h1><h2 id="h">Part</h2>
<form><label for="q">Search</label><input id="q" name="q"><label>All <input type="checkbox"></label><button>Go</button></form>
<section aria-labelledby="h"><div class="scroll" tabindex="0"><table><thead><tr><th scope="col">a</th><th scope="col">b</th></tr></thead>
<tbody><tr><th scope="row">1</th><td>2</td></tr></tbody></table></div></section>
<svg role="img" aria-label="A chart"></svg></main><footer>End</footer></body></html>"""
BREAKS = {
    "language": ('<html lang="en">', "<html>"),
    "title": ("<title>Page</title>", "<title></title>"),
    "cannot be enlarged": ("width=device-width", "width=device-width, maximum-scale=1"),
    "no h1": ("<h1>Page</h1>", "<p>Page</p>"),
    "two h1": ("<h2 id", "<h1>Other</h1><h2 id"),
    "a level is left out": ("<h2", "<h3>Deep</h3><h2"),
    "a field without a label": ('<label for="q">Search</label>', ""),
    "an empty label": ("<label>All <input", "<label> <input"),
    "a header cell without a scope": ('<th scope="row">1</th>', "<th>1</th>"),
    "a row without a header": ('<th scope="row">1</th>', "<td>1</td>"),
    "a cell too few": ("<td>2</td>", ""),
    "a column without a name": ('<th scope="col">b</th>', '<th scope="col"></th>'),
    "a button without a name": ("<button>Go</button>", "<button></button>"),
    "a link without words": ('<a href="/">Home</a>', '<a href="/"></a>'),
    "a picture without words": ('<svg role="img" aria-label="A chart">', '<svg role="img">'),
    "a picture without a role": ('<svg role="img" aria-label="A chart">', "<svg>"),
    "an image without alt": ("<svg", '<img src="/x"><svg'),
    "a section without a name": ('<section aria-labelledby="h">', "<section>"),
    "no main": ('<main id="main">', '<div id="main">'),
    "a reference that leads nowhere": ('aria-labelledby="h"', 'aria-labelledby="x h"'),
    "an id twice": ('<h2 id="h">', '<h2 id="h"><i id="q">x</i>'),
    "scrolled with the mouse alone": (' tabindex="0"', ""),
    "an order of its own": ('tabindex="0"', 'tabindex="2"'),
    "nothing skips the beginning": ('<a href="#main">Skip</a>', ""),
    "tags that cross": ("<h1>Page</h1>", "<h1><b>Page</h1></b>"),
}


def test_a_page_without_faults_has_none() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize("fault", BREAKS)
def test_each_fault_is_found(fault: str) -> None:
    before, after = BREAKS[fault]
    assert before in GOOD
    html = GOOD.replace(before, after, 1)
    assert problems(html.replace("</main>", "</div>") if fault == "no main" else html) != []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_charts_can_be_told_from_their_ground(dark: bool) -> None:
    found = contrasts(CSS, dark=dark)
    assert {"a", ".status.bad", ".error", "svg.plot text", "--plot-3"} <= set(found), "as many rules as there are"
    assert {name: round(has, 2) for name, (has, least) in found.items() if has < least} == {}


def test_contrast_is_that_of_the_formula() -> None:
    black, white = (0.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0, 1.0)
    assert ratio(black, white) == pytest.approx(21)
    assert ratio(white, white) == pytest.approx(1)
    grey = (0x76 / 255, 0x76 / 255, 0x76 / 255, 1.0)
    assert ratio(grey, white) == pytest.approx(4.54, abs=0.01)


def test_a_colour_too_weak_is_found_in_either_scheme() -> None:
    weak = CSS.replace("--soft: #59656e", "--soft: #99a5ae")
    assert contrasts(weak, dark=False)[".none"][0] < 4.5 < contrasts(weak, dark=True)[".none"][0]
