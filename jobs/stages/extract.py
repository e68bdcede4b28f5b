"""extract: markdown into `raw_extraction`, by the local extractor in a child process and by a model, or known already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jobs.adapters.extractor import EXTRACTOR, extract_locally
from jobs.adapters.llm import ModelExtractor, with_extraction
from jobs.adapters.sniff_types import has_headings, is_code
from jobs.stages import Tools
from models.documents import Document, OriginalExtraction
from models.errors import DocmillError


def fits(document: Document, original: OriginalExtraction) -> bool:
    """Say whether the extraction of the same text under another name is this document's too.

    The local extractor falls back on the file's name for a title, and costs nothing: where that, or its version, differs, it runs again.
    So it does where only one of the names is that of program code, which has no headings.
    """
    found = original.raw_extraction
    extractor = found.get("extractor") or {}
    if extractor.get("name") != EXTRACTOR["name"]:
        return True
    names_file = (found.get("title") or {}).get("source", "file_name") == "file_name"
    same_kind = is_code(original.file_name) == is_code(document.file_name)
    return bool(extractor == EXTRACTOR and same_kind and (not names_file or original.file_name == document.file_name))


def paid_part(original: OriginalExtraction, extractor: ModelExtractor) -> Mapping[str, Any] | None:
    """Return what a model found in the same text with the same schema, if it did."""
    found = original.raw_extraction.get("model_extraction")
    return found if isinstance(found, Mapping) and (found.get("schema") or {}).get("sha256") == extractor.shape.sha256 else None


async def run(document: Document, tools: Tools) -> Document:
    """Read facts off the checked markdown. Raises what the sandbox raises (ParseError for a crash or a limit, TimeoutError for a wait),
    and with a model what ModelExtractor.extract raises.

    Unless DUPLICATE_POLICY is process what was extracted from the same text in a complete document of the same user is copied.
    """
    assert document.markdown is not None, "the stage `check` leaves a markdown"
    extractor, known, reused_from = tools.extractor, None, None
    if document.duplicate_of is not None and tools.settings.duplicate_policy != "process":
        original = await tools.original_extraction(document)
        if original is not None:
            known = None if extractor is None else paid_part(original, extractor)
            if fits(document, original) and (extractor is None or known is not None):
                return replace(document, raw_extraction=original.raw_extraction, reused_from=original.doc_id)
            reused_from = None if known is None else original.doc_id
    found = await tools.sandbox.run(
        extract_locally,
        document.markdown,
        document.pages,
        document.file_name,
        dict(document.parse_metadata),
        headings=has_headings(document.file_name, document.mime_type),
    )
    if known is not None:
        found = {**found, "model_extraction": known}
    elif extractor is not None:
        shares, caller = ((), None) if tools.paid is None else (tools.paid.shares, tools.paid.through(extractor.caller))
        found = with_extraction(found, await extractor.extract(document.markdown, shares=shares, caller=caller, kept=tools.paid))
    return replace(document, raw_extraction=found, reused_from=reused_from)


async def run_without(document: Document, tools: Tools, failure: Mapping[str, Any]) -> Document:
    """Return the document with what can be had of its extraction, and why there is not more: for EXTRACTION_REQUIRED=false."""
    try:
        document = await run(document, replace(tools, extractor=None))
        found = document.raw_extraction or {}
    except DocmillError:
        found = extract_locally("", (), document.file_name, {})
    return replace(document, raw_extraction={**found, "failure": dict(failure)})
