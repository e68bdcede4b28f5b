"""What a parser gets, how it says that a file has no text, and what is taken out of every text. Parsers run in the sandbox's child, one
file at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jobs.adapters.encoding import storable, storable_value
from jobs.adapters.stored_file import StoredFile
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

_DATA_URI = re.compile(r"data:[A-Za-z0-9.+/-]{0,100}(?:;[A-Za-z0-9=_-]{1,60}){0,5};base64,[A-Za-z0-9+/=%]{40,}+")


@dataclass(frozen=True, slots=True)
class Source:
    """The file to parse. `file_name` is the submitter's name for it, used in messages only."""

    file: StoredFile
    file_name: str
    mime_type: str
    page_limit: int
    partial: bool = False
    """Whether what lies within the limits is to be kept of a file that is over one; see `cut_off`."""
    hand_over: Callable[[ParsedFile], None] = lambda _pages: None
    """Makes sure of pages that are done: whoever waits has them even if a limit ends this process before the others are."""

    @property
    def is_ooxml(self) -> bool:
        """Whether it is a zip package of the Office kind."""
        return "openxmlformats" in self.mime_type or "macroEnabled" in self.mime_type

    def pages_to_read(self, count: int, what: str = "pages") -> int:
        """Return how many pages may be read of so many: all, or those within the limit. ParseError where that is not wanted."""
        if count > self.page_limit and not self.partial:
            raise ParseError(f"it has {count:,} {what}, more than the limit of {self.page_limit:,}")
        return min(count, self.page_limit)

    def within_limit(self, pages: tuple[ParsedPage, ...], count: int | None = None, what: str = "pages") -> PageCut:
        """Return the pages within the limit of a file that has `count`, and what its metadata says of the others."""
        count = len(pages) if count is None else count
        kept = self.pages_to_read(count, what)
        return pages[:kept], cut_off(f"the page limit of {self.page_limit:,} (MAX_PAGES)", kept, count) if kept < count else {}


PageCut = tuple[tuple[ParsedPage, ...], dict[str, Any]]


def cut_off(by: str, pages: int, of: int | None) -> dict[str, Any]:
    """Return what the metadata of an incomplete text says: which limit cut it, and how many pages of how many are there."""
    return {"cut_by": by, "pages_kept": pages, "pages_of": of}


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


def with_text(parsed: ParsedFile) -> ParsedFile:
    """Return the parsed file as `storable_file` does; NoText if nothing is left."""
    parsed = storable_file(parsed)
    if not any(page.markdown.strip() for page in parsed.pages):
        raise NoText("it holds no text")
    return parsed


def storable_file(parsed: ParsedFile) -> ParsedFile:
    """Return the parsed file without characters that Postgres refuses and without base64 data."""
    pages = tuple(
        ParsedPage(page.number, _DATA_URI.sub("data:", storable(page.markdown)), None if page.label is None else storable(page.label))
        for page in parsed.pages
    )
    metadata = storable_value(dict(parsed.metadata))
    assert isinstance(metadata, dict)
    return replace(parsed, pages=pages, metadata=metadata)
