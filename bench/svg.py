"""Plots as small still SVG pictures that read in light and dark, drawn by pygal like the dashboard's, with a style sheet of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import pygal
from pygal.style import Style

WIDTH, HEIGHT = 720, 360
_BAR, _NOTE = 30, 32
_SVG = "http://www.w3.org/2000/svg"
# Each at least 3:1 against both papers, and 4.5:1 below black figures.
COLOURS = ("#4a94d0", "#d07a22", "#27a092", "#c274b0", "#8a9099", "#d96b63", "#9c8d22")
PAPERS = ("#ffffff", "#0d1117")
_SHEET = """
svg { font-family: system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; color-scheme: light dark;
  --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { svg { --ink: #f0f6fc; --faint: #9198a1; --rule: #3d444d; --paper: #0d1117; } }
.paper { fill: var(--paper); }
.background { fill: none; }
text { fill: var(--ink); font-size: 12px; }
.title { font-size: 15px; font-weight: 600; text-anchor: middle; }
.titles .title ~ .title, .conditions { font-size: 12px; font-weight: 400; fill: var(--faint); text-anchor: middle; }
.conditions { text-anchor: end; font-size: 11px; }
.axis.x text, .text-overlay text { text-anchor: middle; }
.axis.y text { text-anchor: end; }
.axis .line { stroke: var(--rule); fill: none; }
.horizontal .axis.y .guide.line, .vertical .axis.x .guide.line { stroke: none; }
.text-overlay text { font-size: 11px; fill: #000000; }
.nofill { fill: none; stroke-width: 2; }
"""


def bars(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    x: str,
    y: str,
    stacked: bool = False,
    lying: bool = False,
    values: bool = True,
) -> str:
    """Draw bars, one or one of each series a label; `stacked` on each other, `lying` with the first label on top; `values` are written."""
    kind = {
        (False, False): pygal.Bar,
        (True, False): pygal.StackedBar,
        (False, True): pygal.HorizontalBar,
        (True, True): pygal.HorizontalStackedBar,
    }[stacked, lying]
    height = 130 + _BAR * len(labels) if lying else HEIGHT
    # A share that is too narrow for its figure goes without.
    written = (lambda value: f"{value:.0f}" if value >= 5 else "") if lying and stacked else short
    chart = _chart(kind, title, x, y, height, print_values=values, formatter=written)
    chart.x_labels = list(labels)[::-1] if lying else list(labels)
    for name, given in series.items():
        chart.add(name, list(given)[::-1] if lying else list(given))
    return _still(chart, title, height)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float | None]]], *, x: str, y: str) -> str:
    """Draw a line through the points of each series, from zero up."""
    chart = _chart(pygal.XY, title, x, y, HEIGHT, print_values=False, show_dots=False)
    chart.x_value_formatter = short
    chart.range = (0, max(value for points in series.values() for _, value in points if value is not None) * 1.15)
    for name, points in series.items():
        chart.add(name, list(points))
    return _still(chart, title, HEIGHT)


def _chart(kind: Any, title: str, x: str, y: str, height: int, **options: Any) -> Any:
    return kind(
        width=WIDTH,
        height=height,
        title=title,
        x_title=y if kind in (pygal.HorizontalBar, pygal.HorizontalStackedBar) else x,
        y_title=x if kind in (pygal.HorizontalBar, pygal.HorizontalStackedBar) else y,
        style=Style(title_font_size=15, label_font_size=12, major_label_font_size=12, legend_font_size=12, value_font_size=11),
        css=[],
        js=[],
        margin=12,
        margin_bottom=16,
        legend_at_bottom=True,
        legend_at_bottom_columns=4,
        legend_box_size=10,
        truncate_label=-1,
        truncate_legend=-1,
        no_prefix=True,
        min_scale=4,
        max_scale=8,
        include_x_axis=True,
        print_zeroes=False,
        value_formatter=short,
        **options,
    )


def short(value: float | None) -> str:
    """Return a number with as many digits as a reader can use."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 20 or float(value).is_integer() else f"{value:.1f}"


def _still(chart: Any, title: str, height: int) -> str:
    """Return the picture without what serves pointers and scripts, named by its title, in our colours, on paper of its own."""
    root = ElementTree.fromstring(chart.render())  # without comments, which carry the date
    for parent in list(root.iter()):
        for child in list(parent):
            tag, classes = child.tag.rpartition("}")[2], (child.get("class") or "").split()
            if tag in {"style", "script", "desc", "defs"} or "tooltip" in classes or "tooltip-overlay" in classes:
                parent.remove(child)
    root.attrib.pop("id", None)
    root.set("role", "img")
    root.set("aria-label", title)
    whole = height + _NOTE
    root.set("viewBox", f"0 0 {WIDTH} {whole}")
    root.set("width", str(WIDTH))
    root.set("height", str(whole))
    colours = "".join(
        f".color-{number} {{ fill: {colour}; stroke: {colour}; }}\n.text-overlay .color-{number} {{ stroke: none; }}\n"
        for number, colour in enumerate(COLOURS)
    )
    sheet = ElementTree.Element(f"{{{_SVG}}}style")
    sheet.text = _SHEET + colours
    paper = ElementTree.Element(f"{{{_SVG}}}rect", {"class": "paper", "width": str(WIDTH), "height": str(whole), "rx": "6"})
    note = ElementTree.Element(f"{{{_SVG}}}text", {"class": "conditions", "x": str(WIDTH - 12), "y": str(whole - 7)})
    note.text = "CONDITIONS"
    at = 1 if root[0].tag.endswith("title") else 0
    root.insert(at, sheet)
    root.insert(at + 1, paper)
    root.append(note)
    ElementTree.register_namespace("", _SVG)
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"
