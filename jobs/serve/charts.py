"""Charts as SVG, drawn on the server by pygal. The style sheet colours them, so they are right in light and dark and need no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast
from xml.etree import ElementTree

from markupsafe import Markup

_WIDTH, _HEIGHT = 560, 200


def stacked_bars(labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, title: str) -> Markup:
    """Draw counts over time, one bar a label. The names of the series become classes: `series-failed`."""
    import pygal  # noqa: PLC0415 - only pages with charts need it

    return _drawn(pygal.StackedBar, labels, series, title=title)


def lines(labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, title: str) -> Markup:
    """Draw values over time; None leaves a gap."""
    import pygal  # noqa: PLC0415 - as above

    return _drawn(pygal.Line, labels, series, title=title, show_dots=False, stroke_style={"width": 2})


def _drawn(kind: Any, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, title: str, **options: Any) -> Markup:
    from pygal.style import Style  # noqa: PLC0415 - as above

    chart = kind(
        width=_WIDTH,
        height=_HEIGHT,
        margin=4,
        margin_right=24,
        spacing=6,
        style=Style(label_font_size=15),  # as large as a phone needs; the style sheet has less on wide screens
        css=[],
        js=[],
        classes=["plot"],
        show_legend=False,
        show_minor_x_labels=False,
        x_labels_major_count=5,
        truncate_label=-1,
        min_scale=3,
        max_scale=5,
        include_x_axis=True,
        no_data_text="Nothing yet",
        value_formatter=_short,
        **options,
    )
    chart.x_labels = list(labels)
    if not any(value for values in series.values() for value in values):
        chart.range = (0, 1)
    for name, values in series.items():
        chart.add(name, list(values))
    return _cleaned(chart.render_tree(), list(series), title)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or float(value).is_integer() else f"{value:.2g}"


_FOR_SCRIPTS = frozenset({"style", "script", "desc", "defs"})


def _is_for_scripts(element: ElementTree.Element) -> bool:
    classes = (element.get("class") or "").split()
    return (
        element.tag in _FOR_SCRIPTS or "overlay" in " ".join(classes) or element.get("class") == "titles" or element.get("height") == "0.0"
    )


def _tell(element: ElementTree.Element) -> None:
    """Turn pygal's notes on a bar into a title, which browsers show to a pointer that rests on it."""
    notes = {note.get("class"): note.text or "" for note in element.findall("desc")}
    if "value" in notes and "x_label" in notes:
        ElementTree.SubElement(element, "title").text = f"{notes['x_label']}: {notes['value']}"


def _cleaned(tree: Any, names: Sequence[str], title: str) -> Markup:
    """Take out styles, scripts and what only scripts would read; name the series by class and the whole by its title."""
    root = cast(ElementTree.Element, tree)
    for parent in list(root.iter()):
        _tell(parent)
        for child in list(parent):
            if not isinstance(child.tag, str) or _is_for_scripts(child):
                parent.remove(child)
        for number, name in enumerate(names):
            if f"serie-{number}" in (parent.get("class") or "").split():
                parent.set("class", f"series series-{name}")
    heading = root.find("title")
    if heading is not None:
        heading.text = title
    root.attrib.pop("id", None)
    root.set("role", "img")
    root.set("aria-label", title)
    # Everything in it was escaped when the tree was made into text.
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704
