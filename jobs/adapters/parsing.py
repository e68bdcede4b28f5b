"""Parsing in the sandbox, with the next parser's turn when one takes its process down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from jobs.adapters.parsers import parse_file, parser_count
from jobs.adapters.sandbox_child import Crashed
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile
from models.errors import ParseError

P = ParamSpec("P")
R = TypeVar("R")


class Runner(Protocol):
    """What is needed of a sandbox."""

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in a child."""
        ...


async def parse_isolated(
    sandbox: Runner, path: Path, file_name: str, file_type: FileType, mime_type: str, *, page_limit: int = 10_000
) -> ParsedFile:
    """Return what `parse_file` returns. A crash or the memory limit goes on with the type's next parser, a time limit does not."""
    crashes: list[str] = []
    for skip in range(max(1, parser_count(file_type, mime_type))):
        try:
            parsed = await sandbox.run(parse_file, StoredFile(path), file_name, file_type, mime_type, page_limit, skip=skip)
        except Crashed as crash:
            crashes.append(str(crash))
            continue
        return replace(parsed, metadata={**parsed.metadata, "crashes": crashes}) if crashes else parsed
    raise ParseError(f"'{file_name}' cannot be parsed: {' '.join(dict.fromkeys(crashes))}")
