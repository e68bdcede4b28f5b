"""Rows of cells as a markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Return a pipe table; the first row is the header. Empty without rows.

    Cells are brought onto one line and their pipes escaped. A short row is not filled up (markdown allows that), so a single
    wide row does not multiply by the number of rows; the header is as wide as the widest row.
    """
    lines: list[str] = []
    header: Sequence[str] = ()
    widest = 0
    for row in rows:
        if widest == 0:
            header = row
        widest = max(widest, len(row))
        lines.append(_line(row))
    if not widest:
        return ""
    lines[0] = _line([*header, *[""] * (widest - len(header))])
    lines.insert(1, "|" + " --- |" * widest)
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    if "|" in text:
        text = text.replace("|", "\\|")
    return text if text.isprintable() and text == text.strip() else " ".join(text.split())
