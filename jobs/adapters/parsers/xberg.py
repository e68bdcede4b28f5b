"""Office files, old and new, and e-books by xberg: one configuration for all, without OCR, network, cache or recursion."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Any

from jobs.adapters.parsers.office import with_content
from jobs.adapters.parsers.slide_runs import run_joiner
from jobs.adapters.parsers.source import Parser, Source, versioned
from jobs.adapters.parsers.word_margins import with_margins
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

_UNDERLINE = re.compile(r"\\</?u\\>")
"""What xberg makes of underlined text on slides: a tag that it then escapes."""
_COMMENT_MARK = re.compile(r"\[cmt:(\d+)\]")
"""How xberg marks a comment's place; the comment itself it writes as a footnote of the name used here."""
_SAME_MARKS = re.compile(r"(\[\^[\w-]{1,40}\])\1+")
"""xberg marks a note's place once for each run of text that the mark is split into."""
_FRAME = re.compile(r"(?:[\s|]|(?<![^\s|])-{3,}(?![^\s|]))*+")
"""What a sheet of blank cells becomes: the lines of a table around nothing. A blank slide stays the rule that stands for its title."""
_ESCAPED = re.compile(r"(?m)^(?P<indent> {0,3})(?P<mark>(?:\\#){1,6}+)(?=[ \t]|$)|^\\(?=-)|\\(?P<needless>#)|\\.")
"""What xberg escapes. The last branch steps over a backslash of the text itself, which is written as two."""
_EPUB = "application/epub+zip"
MAX_CELLS = 20_000_000
MAX_CONTENT_BYTES = 400 * 1024 * 1024


def parse_document(source: Source) -> ParsedFile:
    """Return a flowing document (Word, RTF, OpenDocument text, EPUB, Outlook message) as one piece; its pages are not reliable."""
    escaped = source.mime_type != _EPUB  # in a book xberg escapes what could be a heading anyway, and no program code
    found = _extract(source, pages=False, escaped=escaped)
    content = _ESCAPED.sub(_as_needed, found.content) if escaped else found.content
    content = _SAME_MARKS.sub(r"\1", _COMMENT_MARK.sub(r"[^cmt\1]", content))
    metadata = _metadata(found)
    content, warnings = with_margins(source, content)  # xberg reads the body of a Word file alone, whatever its content filter says
    if warnings:
        metadata["warnings"] = [*metadata.get("warnings", []), *warnings]
    return ParsedFile((ParsedPage(1, content),), versioned("xberg"), paged=False, metadata=metadata)


def parse_sheets(source: Source) -> ParsedFile:
    """Return a workbook: a page for each sheet, labelled and headed by its name."""
    found = _extract(source, pages=True)
    pages = []
    for page in found.pages or []:
        name = page.sheet_name or f"Sheet {page.page_number}"
        heading = f"## {name}"
        body = page.content.strip().removeprefix(heading).strip()
        body = "" if _FRAME.fullmatch(body) else body
        pages.append(ParsedPage(page.page_number, f"{heading}\n\n{body}\n" if body else "", name))
    kept, cut = source.within_limit(tuple(pages), what="sheets")
    return ParsedFile(with_content(source, list(kept)), versioned("xberg"), metadata=_metadata(found) | cut)


def parse_slides(source: Source) -> ParsedFile:
    """Return a presentation: a page for each slide, its speaker notes at the end."""
    found = _extract(source, pages=True)
    joined = run_joiner(source)
    pages = []
    for page in found.pages or [None]:
        if page is None:
            pages.append(ParsedPage(1, joined(found.content)))
            continue
        notes = (page.speaker_notes or "").strip()
        content = _UNDERLINE.sub("", page.content)
        if notes and notes not in content:
            content = f"{content.rstrip()}\n\n{notes}\n".lstrip("\n")
        pages.append(ParsedPage(page.page_number, joined(content), page.section_name))
    kept, cut = source.within_limit(tuple(pages), what="slides")
    return ParsedFile(kept, versioned("xberg"), metadata=_metadata(found) | cut)


def _as_needed(escape: re.Match[str]) -> str:
    """Return an escape as it stays: one backslash where a paragraph would become a heading, none in `C#`, `#1` and `- dash`."""
    if escape["mark"]:
        return f"{escape['indent']}\\{escape['mark'].replace(chr(92), '')}"
    if escape[0] == "\\":
        return ""
    return escape["needless"] or escape[0]


def _extract(source: Source, *, pages: bool, escaped: bool = False) -> Any:
    import xberg  # noqa: PLC0415 - 100 MB of native code, loaded in the child only

    config = xberg.ExtractionConfig(
        use_cache=False,
        disable_ocr=True,
        output_format="markdown",
        escape_markdown=escaped,
        images=xberg.ImageExtractionConfig(extract_images=False, inject_placeholders=False, run_ocr_on_images=False),
        content_filter=xberg.ContentFilterConfig(
            include_headers=True, include_footers=True, include_footnotes=True, strip_repeating_text=False
        ),
        pages=xberg.PageConfig(extract_pages=True) if pages else None,
        security_limits=xberg.SecurityLimits(
            max_table_cells=MAX_CELLS,
            max_iterations=10 * MAX_CELLS,
            max_content_size=MAX_CONTENT_BYTES,
            max_pages=None if source.partial else source.page_limit,
        ),
        max_archive_depth=0,
    )
    given = xberg.ExtractInput(kind="bytes", bytes=source.file.read_bytes(), mime_type=source.mime_type)
    result = asyncio.run(xberg.extract(given, config))
    if result.errors or not result.results:
        reasons = "; ".join(f"{error.error_type}: {error.message}" for error in result.errors)
        raise ParseError(reasons or "no result")
    return result.results[0]


def _metadata(found: Any) -> dict[str, Any]:
    """Return what the file says of itself, and the parser's warnings."""
    about = found.metadata
    values = {
        "title": about.title,
        "author": ", ".join(about.authors or []),
        "subject": about.subject,
        "keywords": about.keywords,
        "language": about.language,
        "created": about.created_at,
        "modified": about.modified_at,
        "warnings": [warning.message for warning in found.processing_warnings][:20],
    }
    with suppress(ValueError, TypeError):
        names = json.loads(str(about.format)).get("slide_names")
        values["slide_names"] = names
    return {key: value for key, value in values.items() if value}


DOCUMENT = Parser("xberg", parse_document)
SHEETS = Parser("xberg", parse_sheets)
SLIDES = Parser("xberg", parse_slides)
