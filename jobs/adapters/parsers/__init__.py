"""From a stored file to markdown. `parse_file` runs inside the sandbox's child; its imports stay light until a parser is chosen."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace

from jobs.adapters.parsers import email, html, office, ooxml, pdf, text, xberg
from jobs.adapters.parsers.source import NoText, Parser, Source, cut_off, storable_file, with_text
from jobs.adapters.sandbox_child import keep
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile, ParsedPage
from models.errors import DocmillError, ParseError, PermanentError

_QUOTED = re.compile(r"`[^`]{4,}+`")
"""How parsers in Rust quote tags and entities that they did not expect."""
_TEXT_SHARE = 0.9
"""Of the output limit; the rest is for what goes along with the text."""

PARSERS: dict[FileType | str, tuple[Parser, ...]] = {
    FileType.PDF: (pdf.LITEPARSE, pdf.PDFIUM),
    FileType.WORD: (xberg.DOCUMENT, office.MAMMOTH, ooxml.BARE),
    FileType.EXCEL: (xberg.SHEETS, office.CALAMINE, ooxml.BARE),
    FileType.POWERPOINT: (xberg.SLIDES, ooxml.BARE),
    FileType.HTML: (html.HTML,),
    FileType.EMAIL: (email.EMAIL,),
    FileType.EBOOK: (xberg.DOCUMENT,),
    FileType.TEXT: (text.TEXT,),
    "application/msword": (xberg.DOCUMENT,),
    "application/rtf": (xberg.DOCUMENT,),
    "application/vnd.ms-excel": (xberg.SHEETS, office.CALAMINE),
    "application/vnd.ms-excel.sheet.binary.macroEnabled.12": (office.CALAMINE, xberg.SHEETS),
    "application/vnd.ms-powerpoint": (xberg.SLIDES,),
    "application/vnd.oasis.opendocument.spreadsheet": (xberg.SHEETS, office.CALAMINE),
    "application/vnd.oasis.opendocument.presentation": (xberg.SLIDES,),
    "application/vnd.oasis.opendocument.text": (xberg.DOCUMENT,),
    "application/vnd.ms-outlook": (xberg.DOCUMENT,),
    "application/mbox": (email.MBOX,),
    "text/csv": (text.CSV,),
    "text/tab-separated-values": (text.CSV,),
}
"""The parsers of a type, best first; a MIME type goes before its coarse type. The next one is tried when one raises."""


def parse_file(
    file: StoredFile,
    file_name: str,
    file_type: FileType,
    mime_type: str,
    page_limit: int = 10_000,
    *,
    skip: int = 0,
    partial: bool = False,
    output_mb: int = 256,
) -> ParsedFile:
    """Return the file as markdown by page, in characters that Postgres can store.

    `skip` leaves out the first parsers of the type, for another try after one of them crashed its process. With `partial` a file with
    more than `page_limit` pages or `output_mb` MB of text is cut off there, which the metadata says (`source.cut_off`), and pages are
    handed over as they are done. Raises PermanentError for an encrypted or missing file and ParseError with each parser's reason when
    none could read it.
    """

    def hand_over(part: ParsedFile) -> None:
        if partial:
            keep(storable_file(part))

    source = Source(file, file_name, mime_type, page_limit, partial, hand_over)
    parsers = _chosen(source, file_type)
    reasons: list[tuple[str, BaseException]] = []
    for parser in parsers[skip:]:
        try:
            parsed = _within_output(with_text(parser.parse(source)), output_mb) if partial else with_text(parser.parse(source))
        except (PermanentError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # libraries' own errors have no common class, and a panic in Rust is no Exception
            reasons.append((parser.name, error))
            continue
        if not reasons:
            return parsed
        return replace(parsed, metadata={**parsed.metadata, "failed_parsers": {name: _reason(error) for name, error in reasons}})
    raise _nothing_worked(file_name, reasons)


def _chosen(source: Source, file_type: FileType) -> list[Parser]:
    """Return the parsers to try, in order, after the checks that need no parser."""
    parsers = PARSERS.get(source.mime_type) or PARSERS.get(file_type, ())
    try:
        size = source.file.size
    except FileNotFoundError as error:
        raise PermanentError(f"'{source.file_name}' cannot be parsed: its stored file is gone.") from error
    if size == 0:
        raise ParseError(f"'{source.file_name}' is empty (0 bytes).")
    if not parsers:
        raise ParseError(f"'{source.file_name}' cannot be parsed: files of type {source.mime_type} are not supported.")
    if source.is_ooxml:
        try:
            ooxml.refuse_incomplete(source)
        except ParseError as error:
            raise ParseError(f"'{source.file_name}' cannot be parsed: {error}.") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise ParseError(f"'{source.file_name}' cannot be parsed: the file is damaged ({_reason(error)}).") from error
    return sorted(parsers, key=lambda parser: parser.first_above_bytes is None or size <= parser.first_above_bytes)


def parser_count(file_type: FileType, mime_type: str) -> int:
    """Return how many parsers there are to try for a type."""
    return len(PARSERS.get(mime_type) or PARSERS.get(file_type, ()))


def _within_output(parsed: ParsedFile, output_mb: int) -> ParsedFile:
    """Return the pages that find room, the last one cut at a character; the metadata says so."""
    room = int(output_mb * 1024 * 1024 * _TEXT_SHARE)
    kept: list[ParsedPage] = []
    for page in parsed.pages:
        data = page.markdown.encode()
        if len(data) > room:
            kept.append(replace(page, markdown=data[:room].decode(errors="ignore")))
            cut = cut_off(f"the output limit of {output_mb} MB (PARSE_OUTPUT_MB)", len(kept), len(parsed.pages))
            return replace(parsed, pages=tuple(kept), metadata={**parsed.metadata, **cut})
        room -= len(data)
        kept.append(page)
    return parsed


def _nothing_worked(file_name: str, reasons: list[tuple[str, BaseException]]) -> ParseError:
    """Say in one message why no parser could read the file; a file without text is told from one that is broken."""
    if not reasons:
        return ParseError(f"'{file_name}' cannot be parsed: no parser is left to try.")
    empty = [error for _, error in reasons if isinstance(error, NoText)]
    if empty:
        return ParseError(f"'{file_name}' has no text to read: {empty[0]}.")
    tried = "; ".join(f"{name}: {_reason(error)}" for name, error in reasons)
    return ParseError(f"'{file_name}' cannot be parsed ({tried}).")


def _reason(error: BaseException) -> str:
    """Return an error in a line of at most 300 characters, with its class unless it is ours, and without what it quotes from the file."""
    message = _QUOTED.sub("`...`", " ".join(str(error).split()))[:300].rstrip(".")
    if isinstance(error, DocmillError):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
