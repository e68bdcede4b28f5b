"""Printing: what comes from outside (names, passages, errors) is shown as text and never obeyed by the terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.visible import visible

_WIDE_ENOUGH = 110
_MOST_BROKEN = 1.2  # of a terminal's width: a table that would need more to break no word is hard to read
_GAP = 3  # between two columns
WIDTH_OF_FILES = 160
"""Columns of a table that goes into a file or a pipe, where there is no terminal to ask; COLUMNS overrules."""


def printable(value: object, *, lines: bool = False) -> str:
    """Return text that a terminal only shows: escapes and controls become visible. Without `lines` it is one line."""
    text = visible(str(value).replace("\r\n", "\n"))
    return text.expandtabs(4) if lines else re.sub(r"[\t\n]+", " ", text)


def _console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        made = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=WIDTH_OF_FILES)
    return made


def out() -> Console:
    """Return the console for results."""
    return _console()


def aside() -> Console:
    """Return the console for everything that is no result: progress, hints, complaints. It is stderr, so that results can be piped."""
    return _console(stderr=True)


def say(*parts: object, style: str = "", console: Console | None = None) -> None:
    """Print one line of results (or of something else, on another console), however long it is."""
    (console or out()).print(Text(" ".join(printable(part) for part in parts), style=style), soft_wrap=True)


def complain(message: str, *, prefix: str = "docmill: ") -> None:
    """Print an error to stderr."""
    aside().print(Text(prefix, style="bold red") + Text(printable(message, lines=True).rstrip()), soft_wrap=True)


STATE_STYLES = {
    "complete": "green", "duplicate": "green", "completed": "green", "failed": "red", "refused": "red", "cancelled": "magenta",
    "completed_with_errors": "yellow", "retrying": "yellow", "working": "cyan", "processing": "cyan",
}  # fmt: skip


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table. None is an empty cell; columns named in `numbers` are set to the right; a state has its colour. Nothing is cut off.

    On a narrow terminal, where ids and paths would be broken into pieces, each row is a list of names and values instead, as in psql.
    """
    cells = [[Text("" if cell is None else printable(cell)) for cell in row] for row in rows]
    for text in (text for row in cells for text in row):
        text.style = STATE_STYLES.get(text.plain, "")
    console = out()
    if console.width < _WIDE_ENOUGH and _narrowest(columns, cells) > _MOST_BROKEN * console.width:
        _print_lists(console, title, columns, cells)
        return
    made = Table(title=printable(title) or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold", no_wrap=column in numbers)
    for row in cells:
        made.add_row(*row)
    console.print(made)


def _narrowest(columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> int:
    """Return how wide a table must be for no word to be broken."""
    words = [[column, *(text.plain for row in cells for text in row[place : place + 1])] for place, column in enumerate(columns)]
    widths = [max(cell_len(word) for told in column for word in told.split() or [""]) for column in words]
    return sum(widths) + _GAP * (len(columns) - 1)


def _print_lists(console: Console, title: str, columns: Sequence[str], cells: Sequence[Sequence[Text]]) -> None:
    if title:
        console.print(Text(printable(title), style="bold"), soft_wrap=True)
    longest = max(map(len, columns))
    for row in cells:
        for column, text in zip(columns, row, strict=False):
            if text.plain:
                console.print(Text(f"  {column:<{longest}}  ", style="dim") + text, soft_wrap=True)
        console.print()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def print_json(value: Any) -> None:
    """Print JSON alone, in ASCII: control characters of file names and passages arrive as escapes."""
    print(json.dumps(value, default=_plain, indent=2, allow_nan=False))


def print_json_line(value: Any) -> None:
    """Print JSON as one line, at once, for output that goes on."""
    print(json.dumps(value, default=_plain, allow_nan=False), flush=True)


def duration(seconds: float | None) -> str:
    """Return a time span for people, for example `0.4 s`, `12.5 s` or `3 min 20 s`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def moment(at: datetime | None) -> str:
    """Return a point in time in the local zone, to the second."""
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
