"""What steps in where xberg fails, or is slow: mammoth for docx, calamine for spreadsheets."""

from __future__ import annotations

import datetime
import re
from dataclasses import replace
from decimal import Decimal
from io import BytesIO
from typing import Any

from jobs.adapters.parsers.html import html_to_markdown
from jobs.adapters.parsers.ooxml import has_drawings
from jobs.adapters.parsers.source import NoText, Parser, Source, versioned
from jobs.adapters.parsers.tables import markdown_table
from jobs.adapters.parsers.word_margins import with_margins
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

_DEFAULT_NAME = re.compile(r"[^\W\d_]+ ?\d{1,3}")
"""What programs call a new sheet, in any language."""
MAX_CELLS = 20_000_000
"""Largest rectangle of a sheet that calamine may lay out; two filled cells can span the whole sheet."""


def parse_docx(source: Source) -> ParsedFile:
    """Return a Word document by way of HTML."""
    import mammoth  # noqa: PLC0415 - loaded in the child only

    file = BytesIO(source.file.read_bytes())  # one without a name: mammoth would look for pictures beside it
    html = mammoth.convert_to_html(file, convert_image=mammoth.images.img_element(lambda _image: {"src": ""})).value
    markdown, _ = html_to_markdown(html)
    markdown, warnings = with_margins(source, markdown)
    return ParsedFile((ParsedPage(1, markdown),), versioned("mammoth"), paged=False, metadata={"warnings": warnings} if warnings else {})


def parse_workbook(source: Source) -> ParsedFile:
    """Return a workbook: a page for each sheet that has content, labelled and headed by its name."""
    from python_calamine import CalamineWorkbook  # noqa: PLC0415 - loaded in the child only

    pages = []
    with source.file.open() as file, CalamineWorkbook.from_filelike(file) as workbook:
        names = workbook.sheet_names
        for number, name in enumerate(names[: source.pages_to_read(len(names), "sheets")], start=1):
            sheet = workbook.get_sheet_by_index(number - 1)
            if sheet.height * sheet.width > MAX_CELLS:
                raise ParseError(f"sheet '{name}' spans {sheet.height * sheet.width:,} cells, more than the limit of {MAX_CELLS:,}")
            rows = (row for row in map(_row, sheet.iter_rows()) if row)
            table = markdown_table(rows)
            pages.append(ParsedPage(number, f"## {name}\n\n{table}\n" if table else "", name))
    _, cut = source.within_limit(tuple(pages), len(names), "sheets")
    return ParsedFile(with_content(source, pages), versioned("python-calamine"), metadata=cut)


def with_content(source: Source, sheets: list[ParsedPage]) -> tuple[ParsedPage, ...]:
    """Return the sheets without the empty ones.

    A name that somebody chose stays as a heading, and so do all names of a workbook that has nothing but drawings: they are the
    only text in it. NoText for a workbook that is blank.
    """
    blank = not any(sheet.markdown for sheet in sheets)
    pictures = blank and source.is_ooxml and has_drawings(source)
    kept = [
        sheet if sheet.markdown else replace(sheet, markdown=f"## {sheet.label}\n")
        for sheet in sheets
        if sheet.markdown or (sheet.label and (pictures or not _DEFAULT_NAME.fullmatch(sheet.label)))
    ]
    if not kept:
        raise NoText("it has no cell with content")
    return tuple(kept)


def _row(values: list[Any]) -> list[str]:
    """Return a row's cells as text, without the empty ones at its end; an empty list for an empty row."""
    cells = [_cell(value) for value in values]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _cell(value: Any) -> str:
    """Return a value as xberg writes it, so that a workbook reads the same whatever its size decides on."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _digits(value)
    if isinstance(value, datetime.timedelta):
        return _duration(value)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ", "seconds")
    if isinstance(value, datetime.time):
        return value.isoformat("seconds")
    return str(value).strip()


def _digits(value: float) -> str:
    """Return a number without exponent: people look for a card or account number by its digits."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")


def _duration(value: datetime.timedelta) -> str:
    """Return hours, which may be more than a day has, minutes and seconds."""
    seconds = round(abs(value).total_seconds())
    sign = "-" if value < datetime.timedelta() and seconds else ""
    return f"{sign}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


MAMMOTH = Parser("mammoth", parse_docx)
CALAMINE = Parser("calamine", parse_workbook, first_above_bytes=1024 * 1024)
