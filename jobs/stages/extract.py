"""Stage `extract`: markdown into `raw_extraction`, by the deterministic local extractor in a child process."""

from __future__ import annotations

from dataclasses import replace

from jobs.adapters.extractor import extract_locally
from jobs.stages import Tools
from models.documents import Document


async def run(document: Document, tools: Tools) -> Document:
    """Read facts off the checked markdown. Raises what the sandbox raises: ParseError for a crash or a limit, TimeoutError for a hang."""
    assert document.markdown is not None, "the stage `check` leaves a markdown"
    found = await tools.sandbox.run(extract_locally, document.markdown, document.pages, document.file_name, dict(document.parse_metadata))
    return replace(document, raw_extraction=found)
