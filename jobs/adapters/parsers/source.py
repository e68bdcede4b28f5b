"""What a parser gets and how it says that a file has no text. Parsers run in the sandbox's child, one file at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from jobs.adapters.stored_file import StoredFile
from models.documents import ParsedFile
from models.errors import ParseError


@dataclass(frozen=True, slots=True)
class Source:
    """The file to parse. `file_name` is the submitter's name for it, used in messages only."""

    file: StoredFile
    file_name: str
    mime_type: str
    page_limit: int

    @property
    def is_ooxml(self) -> bool:
        """Whether it is a zip package of the Office kind."""
        return "openxmlformats" in self.mime_type or "macroEnabled" in self.mime_type

    def check_pages(self, count: int, what: str = "pages") -> None:
        """Refuse a file with more pages than the limit."""
        if count > self.page_limit:
            raise ParseError(f"it has {count:,} {what}, more than the limit of {self.page_limit:,}")


@dataclass(frozen=True, slots=True)
class Parser:
    """One way to turn a file into markdown. `parse` raises whatever its library raises; `NoText` when there is nothing to read."""

    name: str
    parse: Callable[[Source], ParsedFile]
    first_above_bytes: int | None = None
    """For files larger than this the parser is tried before the others."""


class NoText(ParseError):
    """The file opened, and holds no text."""


def versioned(package: str) -> str:
    """Return `package version`, as stored in `ParsedFile.parser`."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
