"""parse: a file becomes markdown with page marks, by a service or in a child process with limits, or is known under another id."""

from __future__ import annotations

from dataclasses import replace

from jobs.adapters.folders import is_own_upload, refuse_foreign_file
from jobs.adapters.parsing import parse_isolated
from jobs.stages import Tools
from jobs.stages.parse.hosted import parse_hosted
from models.documents import Document, OriginalText, PageMark, ParsedFile
from models.errors import PermanentError

PAGE_BREAK = "\n\n"


def join_pages(parsed: ParsedFile) -> tuple[str, tuple[PageMark, ...]]:
    """Return the whole markdown and where each page begins in it; no marks for a format without pages."""
    parts: list[str] = []
    marks: list[PageMark] = []
    at = 0
    for page in parsed.pages:
        marks.append(PageMark(page.number, at, page.label))
        parts.append(page.markdown)
        at += len(page.markdown) + len(PAGE_BREAK)
    return PAGE_BREAK.join(parts), tuple(marks) if parsed.paged else ()


def copied(document: Document, original: OriginalText) -> Document:
    """Return the document with the text of its original."""
    return replace(
        document,
        markdown=original.markdown,
        pages=original.pages,
        parser=original.parser,
        parse_metadata=original.parse_metadata,
        duplicate_of=original.doc_id,
        reused_from=original.doc_id,
    )


async def run(document: Document, tools: Tools) -> Document:
    """Return the document with markdown, page marks, parser and what the parser noticed; ParseError or TimeoutError where it fails.

    Unless DUPLICATE_POLICY is process all of it is copied from a complete document of the same user with the same content and type: with
    skip from one that does not stay, because its file has been moved here.
    """
    if document.file_type is None or document.mime_type is None:
        raise PermanentError(f"{document.file_name}: parse needs the file type that validate finds out.")
    if tools.settings.duplicate_policy != "process" and (original := await tools.original_text(document)) is not None:
        return copied(document, original)
    file = tools.storage.file(document.file_path)
    if not is_own_upload(tools.settings, document.file_path, document.doc_id):  # asked again: an application may change its own rows
        await tools.in_thread(lambda: refuse_foreign_file(tools.settings, file.path, document.file_path, document.doc_id))
    found = await parse_hosted(document, file, tools)
    if isinstance(found, str):
        parsed = await parse_isolated(
            tools.sandbox,
            file,
            document.file_name,
            document.file_type,
            document.mime_type,
            page_limit=tools.settings.max_pages,
            output_mb=tools.settings.parse_output_mb,
            partial=tools.settings.partial_parse == "keep",
        )
        parsed = replace(parsed, metadata={**parsed.metadata, "parsed_locally": found}) if found else parsed
    else:
        parsed = found
    markdown, marks = join_pages(parsed)
    return replace(document, markdown=markdown, pages=marks, parser=parsed.parser, parse_metadata=parsed.metadata, reused_from=None)
