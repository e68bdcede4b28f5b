"""Stage `extract`: markdown into `raw_extraction`, by the deterministic local extractor in a child process, or known already."""

from __future__ import annotations

from dataclasses import replace

from jobs.adapters.extractor import EXTRACTOR, extract_locally
from jobs.stages import Tools
from models.documents import Document, OriginalExtraction


def fits(document: Document, original: OriginalExtraction) -> bool:
    """Say whether the extraction of the same text under another name is this document's too.

    The local extractor falls back on the file's name for a title, and costs nothing: where that, or its version, differs, it runs again.
    """
    found = original.raw_extraction
    extractor = found.get("extractor") or {}
    if extractor.get("name") != EXTRACTOR["name"]:
        return True
    names_file = (found.get("title") or {}).get("source", "file_name") == "file_name"
    return bool(extractor == EXTRACTOR and (not names_file or original.file_name == document.file_name))


async def run(document: Document, tools: Tools) -> Document:
    """Read facts off the checked markdown. Raises what the sandbox raises: ParseError for a crash or a limit, TimeoutError for a hang.

    With DUPLICATE_POLICY=reuse what was extracted from the same text in a complete document of the same user is copied.
    """
    assert document.markdown is not None, "the stage `check` leaves a markdown"
    if document.duplicate_of is not None and tools.settings.duplicate_policy == "reuse":
        original = await tools.original_extraction(document)
        if original is not None and fits(document, original):
            return replace(document, raw_extraction=original.raw_extraction, reused_from=original.doc_id)
    found = await tools.sandbox.run(extract_locally, document.markdown, document.pages, document.file_name, dict(document.parse_metadata))
    return replace(document, raw_extraction=found, reused_from=None)
