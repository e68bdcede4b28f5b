"""The plots of docs/performance.md: drawn from measured rows, legible on both papers, and shown with words beside them."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.plots import HOME, PLOTS, conditions, rows_of
from bench.results import read_rows, write_row
from bench.svg import COLOURS, PAPERS
from tests.contrast import ratio

REPORT = Path(__file__).parents[2] / "docs" / "performance.md"
SHOWN = {name: alternative for alternative, name in re.findall(r"!\[([^\]]+)\]\(images/([\w-]+)\.svg\)", REPORT.read_text("utf-8"))}


EVERY = list(read_rows(sorted((HOME / "data").glob("*.jsonl"))))


def parsed(colour: str) -> tuple[float, float, float, float]:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue, 1.0


def test_a_row_says_when_and_at_which_load_it_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    write_row(None, "nothing")
    write_row(file, "backlog", waiting=1000, worker_ms=4.666666, ms=[1.23456])
    write_row(file, "backlog", waiting=0)
    first, second = read_rows([file])
    assert (first["waiting"], first["worker_ms"], first["ms"], second["waiting"]) == (1000, 4.667, [1.235], 0)
    assert re.fullmatch(r"load [\d.]+ on \d+ cores, \d{4}-\d\d-\d\d", conditions([first])) is not None


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_still_the_same_each_time_and_says_what_it_shows(name: str) -> None:
    rows = rows_of(name, EVERY)
    drawn = PLOTS[name][1](rows)
    assert drawn == PLOTS[name][1](rows), "two drawings of the same rows are equal, so that a difference is one in the rows"
    root = ElementTree.fromstring(drawn)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    written = [element.text or "" for element in root.iter() if (element.get("class") or "").split()[:1] == ["title"]]
    assert "script" not in tags and "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", drawn), "GitHub shows no more than a picture"
    assert root.get("aria-label") == written[0] and len(written) >= 2, "a title, and what the axes count"
    assert "CONDITIONS" in drawn and "NaN" not in drawn and "None" not in drawn


@pytest.mark.parametrize("name", PLOTS)
def test_the_report_shows_each_plot_with_a_text_alternative(name: str) -> None:
    picture = (HOME / f"{name}.svg").read_text("utf-8")
    assert conditions(rows_of(name, EVERY)) in picture and len(picture) < 60_000
    assert len(SHOWN[name]) > 60, "what is seen, for those who do not see it"


def test_what_the_plots_are_drawn_from_is_small() -> None:
    assert sum(file.stat().st_size for file in (HOME / "data").glob("*.jsonl")) < 50_000


@pytest.mark.parametrize("colour", COLOURS)
def test_a_bar_is_told_from_both_papers_and_its_figure_from_it(colour: str) -> None:
    assert min(ratio(parsed(colour), parsed(paper)) for paper in PAPERS) >= 3
    assert ratio(parsed(colour), parsed("#000000")) >= 4.5
