"""Files that are characters: plain text, Markdown, JSON and XML as they are, CSV and TSV as a table."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator

from jobs.adapters.encoding import Decoded, decode
from jobs.adapters.parsers.source import NoText, Parser, Source
from jobs.adapters.parsers.tables import markdown_table
from models.documents import ParsedFile, ParsedPage

_XML_ENCODING = re.compile(rb"""<\?xml[^>]{0,100}\bencoding\s*=\s*["']([A-Za-z0-9._-]{1,40})""")
_DELIMITERS = ";\t|,"
"""Among equals the first: commas stand in German amounts and in prose, the others hardly anywhere but between cells."""
_MANY_LINES = 20
"""A cell of more may be rows behind a quote that never closes."""


def read_text(source: Source, declared: str | None = None) -> Decoded:
    """Return the decoded file."""
    return decode(source.file.read_bytes(), declared)


def about_encoding(decoded: Decoded) -> dict[str, object]:
    """Return what a parsed file's metadata says of its encoding."""
    noticed: dict[str, object] = {"encoding": decoded.encoding}
    if decoded.damaged:
        noticed["undecodable_bytes"] = decoded.damaged
    return noticed


def parse_text(source: Source) -> ParsedFile:
    """Return the text unchanged but for its encoding and line ends."""
    declared = None
    if source.mime_type in ("application/xml", "image/svg+xml"):
        with source.file.open() as file:
            match = _XML_ENCODING.match(file.read(200).lstrip())
        declared = match[1].decode("ascii") if match else None
    decoded = read_text(source, declared)
    return ParsedFile((ParsedPage(1, decoded.text),), "docmill text", paged=False, metadata=about_encoding(decoded))


def parse_csv(source: Source) -> ParsedFile:
    """Return the rows as one markdown table, rows without any content left out. Cells stay text, whatever they begin with."""
    decoded = read_text(source)
    delimiter = "\t" if source.mime_type == "text/tab-separated-values" else find_delimiter(decoded.text)
    rows = [row for row in _read_rows(decoded.text, delimiter) if any(cell.strip() for cell in row)]
    if not rows:
        raise NoText("it has no cell with content")
    metadata = about_encoding(decoded) | {"rows": len(rows), "delimiter": delimiter}
    return ParsedFile((ParsedPage(1, markdown_table(rows)),), "docmill csv", paged=False, metadata=metadata)


def find_delimiter(text: str) -> str:
    """Return the delimiter that cuts the first lines most evenly, outside quotes; among equals see `_DELIMITERS`; a comma if none does."""
    lines = [re.sub(r'"[^"]*+"', "", line) for line in text[:20_000].split("\n")[:50] if line.strip()]
    best, best_score = ",", 0.0
    for delimiter in _DELIMITERS:
        counts = [line.count(delimiter) for line in lines[:-1] or lines]
        usual = max(set(counts), key=counts.count, default=0)
        if usual:
            score = counts.count(usual) / len(counts) + min(usual, 5) / 100
        else:
            score = sum(bool(count) for count in counts) / (2 * len(counts)) if counts else 0
        if score > best_score:
            best, best_score = delimiter, score
    return best


def _read_rows(text: str, delimiter: str) -> list[list[str]]:
    """Read with quotes; without them where a quote seems to have eaten rows, and there are as even ones without."""
    csv.field_size_limit(sys.maxsize)  # a field is at most the file, which the sandbox bounds
    lines = text.split("\n")
    try:
        rows = list(_quoted(lines, delimiter))
    except csv.Error:
        rows = []
    if rows and (not _has_long_cell(rows, len(lines)) or _is_well_formed(lines, delimiter)):
        return rows
    plain = list(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE))
    return plain if not rows or _evenness(plain) >= _evenness(rows) else rows


def _evenness(rows: list[list[str]]) -> float:
    """Return the share of rows that have as many cells as most have."""
    sizes = Counter(len(row) for row in rows if row)
    return max(sizes.values(), default=0) / max(1, sizes.total())


def _quoted(lines: list[str], delimiter: str, strict: bool = False) -> Iterator[list[str]]:
    return csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=strict)


def _has_long_cell(rows: list[list[str]], lines: int) -> bool:
    return lines - len(rows) >= _MANY_LINES and any(cell.count("\n") >= _MANY_LINES for row in rows for cell in row)


def _is_well_formed(lines: list[str], delimiter: str) -> bool:
    """Tell whether each quote that opens a cell is closed at a delimiter or line end, to the end of the file.

    So are the quotes around a long text. A stray one is closed by the end of the file, or by the quote that should open a later cell,
    behind which there are words; and if it is closed in its place by chance, the quotes behind it no longer come in pairs.
    """
    try:
        for _ in _quoted(lines, delimiter, strict=True):
            pass
    except csv.Error:
        return False
    return True


TEXT = Parser("text", parse_text)
CSV = Parser("csv", parse_csv)
