"""Parsing in the sandbox, with the next parser's turn when one takes its process down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ParamSpec, Protocol, TypeVar

from jobs.adapters.parsers import parse_file, parser_count
from jobs.adapters.parsers.source import cut_off
from jobs.adapters.sandbox import Exhausted
from jobs.adapters.sandbox_child import Crashed
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile
from models.errors import ParseError, TimeoutError

P = ParamSpec("P")
R = TypeVar("R")


class Runner(Protocol):
    """What is needed of a sandbox."""

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in a child."""
        ...


async def parse_isolated(
    sandbox: Runner,
    file: StoredFile,
    file_name: str,
    file_type: FileType,
    mime_type: str,
    *,
    page_limit: int = 10_000,
    output_mb: int = 256,
    partial: bool = False,
) -> ParsedFile:
    """Return what `parse_file` returns. A crash or the memory limit goes on with the type's next parser, and so does a time limit that was
    spent computing and left no page; one that was spent waiting is a TimeoutError.

    With `partial` the pages that were handed over before such a limit are returned where there are any, and the metadata says so.
    """
    crashes: list[str] = []
    kept: Sequence[object] = ()
    for skip in range(max(1, parser_count(file_type, mime_type))):
        try:
            parsed = await sandbox.run(
                parse_file, file, file_name, file_type, mime_type, page_limit, skip=skip, partial=partial, output_mb=output_mb
            )
        except (Crashed, Exhausted, TimeoutError) as limit:
            kept = max(kept, limit.kept, key=len)
            crashes.append(str(limit))
            if isinstance(limit, Crashed) or (isinstance(limit, Exhausted) and not kept):
                continue
            if not kept:
                raise
            break
        return replace(parsed, metadata={**parsed.metadata, "crashes": crashes}) if crashes else parsed
    reasons = " ".join(dict.fromkeys(crashes))
    return _joined([part for part in kept if isinstance(part, ParsedFile)], file_name, reasons)


def _joined(parts: list[ParsedFile], file_name: str, reasons: str) -> ParsedFile:
    """Return the parts of a file that a limit has cut as one; ParseError if they hold no text."""
    pages = tuple(page for part in parts for page in part.pages)
    if not any(page.markdown.strip() for page in pages):
        raise ParseError(f"'{file_name}' cannot be parsed: {reasons}")
    about = parts[0].metadata
    return replace(parts[0], pages=pages, metadata={**about, **cut_off(reasons, len(pages), about.get("page_count"))})
