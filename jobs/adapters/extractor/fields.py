"""Tables as rows, and pairs of a key and a value: lines such as `Invoice number: 123`, and tables that hold such pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from jobs.adapters.markdown import Structure, Table, cells, page_at, plain
from models.documents import PageMark

MAX_TABLES = 100
MAX_ROWS = 500
"""Of one table; `row_count` tells how many it has."""
MAX_COLUMNS = 100
MAX_CELL_CHARACTERS = 500
MAX_TABLE_CHARACTERS = 500_000
"""Of all cells of a document together."""
MAX_KEY_CHARACTERS = 60
MAX_KEY_WORDS = 6
MAX_VALUE_CHARACTERS = 300
MAX_LINE_CHARACTERS = 600
"""Longer lines are prose; no pairs are looked for in them."""
MAX_PAIR_ROWS = 60
"""A table of two columns with more rows is data, not a form."""

_LIST_MARK = re.compile(r"(?:[-*+•]|[0-9]{1,3}[.)])[ \t]++")
_COLUMN_GAP = re.compile(r"[ \t]{2,}+")
_PAIR = re.compile(r"([^\W\d_][^:|]{0,59}?)[ \t]{0,3}:[ \t]++(\S.{0,299})")


def read_tables(markdown: str, structure: Structure, pages: Sequence[PageMark]) -> tuple[list[dict[str, Any]], bool]:
    """Return the tables as {page, header, rows, row_count}, and whether a limit left something out."""
    tables: list[dict[str, Any]] = []
    characters, cut = 0, len(structure.tables) > MAX_TABLES
    for table in structure.tables[:MAX_TABLES]:
        header, *rows = _rows(markdown, table, MAX_ROWS + 1)
        kept: list[list[str]] = []
        for row in rows:
            characters += sum(map(len, row))
            if characters > MAX_TABLE_CHARACTERS:
                break
            kept.append(row)
        count = len(table.lines) - 2
        cut = cut or len(kept) < count
        tables.append({"page": page_at(pages, table.start), "header": header, "rows": kept, "row_count": count})
        if characters > MAX_TABLE_CHARACTERS:
            return tables, True
    return tables, cut


def pairs_in_tables(tables: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, int | None]]:
    """Yield (key, value, page) of tables with two columns, and of any row in which a cell that ends with a colon stands before a value."""
    for table in tables:
        header, rows = table["header"], table["rows"]
        if len(header) == 2 and 0 < len(rows) <= MAX_PAIR_ROWS and len({row[0] for row in rows if row}) == len(rows):
            looks_like_pair = header[0].endswith(":") or any(character.isdigit() for character in header[1])
            candidates = [header, *rows] if looks_like_pair else rows
            for row in candidates:
                if len(row) == 2 and _is_key(key := row[0].rstrip(": ")) and row[1]:
                    yield key, row[1][:MAX_VALUE_CHARACTERS], table["page"]
            continue
        for row in (header, *rows):
            for left, right in pairwise(row):
                if left.endswith(":") and right and not right.endswith(":") and _is_key(key := left.rstrip(": ")):
                    yield key, right[:MAX_VALUE_CHARACTERS], table["page"]


def pairs_in_lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of lines, also of several pairs on one line that two or more spaces part."""
    for line in text.split("\n"):
        if ":" not in line or len(line) > MAX_LINE_CHARACTERS or "|" in line:
            continue
        item = line.strip()
        if mark := _LIST_MARK.match(item):
            item = item[mark.end() :]
        pieces = _COLUMN_GAP.split(item)
        if len(pieces) > 1 and not all(_PAIR.match(piece) for piece in pieces):
            pieces = [" ".join(pieces)]
        for piece in pieces:
            if (match := _PAIR.fullmatch(piece)) and _is_key(key := plain(match[1])) and (value := plain(match[2])):
                yield key, value


def _is_key(text: str) -> bool:
    return (
        0 < len(text) <= MAX_KEY_CHARACTERS
        and len(text.split()) <= MAX_KEY_WORDS
        and text[0].isalpha()
        and not any(mark in text for mark in '.!?;"“„')
    )


def _rows(markdown: str, table: Table, limit: int) -> list[list[str]]:
    ends = (*table.lines[1:], table.end)
    found = []
    for number, (start, end) in enumerate(zip(table.lines, ends, strict=True)):
        if number != 1:
            found.append(
                [plain(cell[: 2 * MAX_CELL_CHARACTERS])[:MAX_CELL_CHARACTERS] for cell in cells(markdown[start:end])[:MAX_COLUMNS]]
            )
        if len(found) == limit:
            break
    return found
