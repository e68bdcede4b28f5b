"""PDF by liteparse, and as plain text by pdfium where liteparse fails. Neither renders a page nor recognises characters in images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from jobs.adapters.parsers.pdf_edges import PageEdges
from jobs.adapters.parsers.pdf_streams import refuse_bombs
from jobs.adapters.parsers.source import NoText, Parser, Source, versioned
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError, PermanentError

PART_PAGES = 200
"""Of a longer file so many pages are read at a time, and handed over. Running titles are recognised within a part."""
MIN_PAGES_TO_DOUBT = 1000
LEAST_PAGE_BYTES = 4
"""What a page takes at least in any file: its entry in the page tree and in the table of objects, also where these are compressed."""
_EMPTY_FENCE = re.compile(r"```(?:text)?\s*```")
_WRONG_PASSWORD, _UNKNOWN_ENCRYPTION = 4, 5
"""FPDF_ERR_PASSWORD and FPDF_ERR_SECURITY of pdfium."""


def parse_with_liteparse(source: Source) -> ParsedFile:
    """Return markdown by page, with headings and tables as liteparse finds them."""
    from liteparse import LiteParse  # noqa: PLC0415 - native code, loaded in the child only

    data = source.file.read_bytes()
    with _opened(source, data) as pdf:
        count, metadata = len(pdf), _metadata(pdf)
    parser = LiteParse(
        ocr_enabled=False,
        output_format="markdown",
        image_mode="off",
        extract_links=False,
        keep_headers_footers=True,  # its own rule takes rows of tables for repetitions, as it ignores digits
        continue_on_page_error=True,
        max_pages=source.page_limit,
        quiet=True,
    )
    data = _from_header(data)  # given a path it goes by the extension, and uploads have none
    parts = [parser.parse(data)] if count <= PART_PAGES else (part.result for part in parser.parse_batches(data, PART_PAGES))
    pages: list[ParsedPage] = []
    failed: list[int] = []
    edges = PageEdges()
    for part in parts:
        made = [ParsedPage(page.page_num, _without_empty_fence(page.markdown) or page.text) for page in part.pages]
        made = edges.without_running_lines(made)
        failed += [error.page_num for error in part.page_errors]
        if count > PART_PAGES:
            source.hand_over(ParsedFile(tuple(made), versioned("liteparse"), metadata={"page_count": count}))
        pages += made
    return _checked(source, pages, versioned("liteparse"), metadata, failed)


def parse_with_pdfium(source: Source) -> ParsedFile:
    """Return plain text by page."""
    pages: list[ParsedPage] = []
    failed: list[int] = []
    with _opened(source, source.file.read_bytes()) as pdf:
        metadata = _metadata(pdf)
        for index in range(source.pages_to_read(len(pdf))):
            try:
                page = pdf[index]
                text = page.get_textpage().get_text_bounded()
                page.close()
            except RuntimeError:  # PdfiumError: this page is broken, others may not be
                failed.append(index + 1)
                text = ""
            pages.append(ParsedPage(index + 1, text))
            source.hand_over(ParsedFile((pages[-1],), versioned("pypdfium2"), metadata={"page_count": len(pdf)}))
    return _checked(source, pages, versioned("pypdfium2"), metadata, failed)


def _from_header(data: bytes) -> bytes:
    """Return the file without what stands before its header, which liteparse would take for another type."""
    start = data.find(b"%PDF-", 0, 1024 + 5)
    return data[start:] if start > 0 else data


@contextmanager
def _opened(source: Source, data: bytes) -> Iterator[Any]:
    """Open by pdfium, which tells encrypted from broken and counts the pages before anything is read."""
    import pypdfium2  # noqa: PLC0415 - native code, loaded in the child only

    refuse_bombs(data)
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if error.err_code == _WRONG_PASSWORD:
            raise PermanentError(f"'{source.file_name}' is encrypted: a password is needed to open the PDF.") from error
        if error.err_code == _UNKNOWN_ENCRYPTION:
            raise PermanentError(f"'{source.file_name}' is encrypted in a way that is not supported.") from error
        raise ParseError("it is no readable PDF") from error
    try:
        _refuse_impossible(len(pdf), len(data))
        source.pages_to_read(len(pdf))
        yield pdf
    finally:
        pdf.close()


def _metadata(pdf: Any) -> dict[str, Any]:
    """Return title, author and the like, and the number of pages."""
    found: dict[str, Any] = {}
    names = {
        "Title": "title",
        "Author": "author",
        "Subject": "subject",
        "Keywords": "keywords",
        "CreationDate": "created",
        "ModDate": "modified",
    }
    with suppress(RuntimeError, UnicodeError):
        found = {names[key]: value for key, value in pdf.get_metadata_dict(skip_empty=True).items() if key in names}
    return found | {"page_count": len(pdf)}


def _refuse_impossible(pages: int, size: int) -> None:
    """Refuse a page tree that counts the same pages over and over: no file has more pages than it has room for."""
    if pages > MIN_PAGES_TO_DOUBT and pages > size / LEAST_PAGE_BYTES:
        raise ParseError(f"it claims {pages:,} pages, more than {size:,} bytes can hold")


def _checked(source: Source, pages: list[ParsedPage], parser: str, metadata: dict[str, Any], failed: list[int]) -> ParsedFile:
    """Name the pages without text, and refuse a file that has nothing else."""
    kept, cut = source.within_limit(tuple(pages), max(len(pages), metadata["page_count"]))
    if not kept:
        raise NoText("it has no pages")
    empty = [page.number for page in kept if not page.markdown.strip()]
    if len(empty) == len(kept):
        raise NoText(f"no text layer on any of its {len(kept)} pages (a scan?), and OCR is not configured")
    if empty:
        metadata["pages_without_text"] = empty
    if failed:
        metadata["pages_failed"] = failed
    return ParsedFile(kept, parser, metadata=metadata | cut)


def _without_empty_fence(markdown: str) -> str:
    """Return nothing for a page whose only content is the empty code fence that liteparse writes for images."""
    return "" if len(markdown) < 100 and _EMPTY_FENCE.fullmatch(markdown.strip()) else markdown


LITEPARSE = Parser("liteparse", parse_with_liteparse)
PDFIUM = Parser("pypdfium2", parse_with_pdfium)
