"""The document in hand: what one stage passes to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from models.chunks import Chunk
from models.stages import Milestone

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FileType(StrEnum):
    """The coarse type of a file, decided by its content. The MIME type says the rest."""

    PDF = "pdf"
    WORD = "word"
    EXCEL = "excel"
    POWERPOINT = "powerpoint"
    HTML = "html"
    EMAIL = "email"
    EBOOK = "ebook"
    TEXT = "text"
    """Plain text, Markdown, CSV, JSON, XML: whatever is characters and nothing more special."""
    ZIP = "zip"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PageMark:
    """Where a page begins in the markdown."""

    number: int
    """From 1."""
    start: int
    """Code-point offset into the markdown."""
    label: str | None = None
    """The sheet's or slide's own name, where it has one."""


@dataclass(frozen=True, slots=True)
class ParsedPage:
    """One page, slide or sheet as a parser returned it."""

    number: int
    markdown: str
    label: str | None = None


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """What a parser made of a file. A format without pages is one page, number 1, and `paged` is False."""

    pages: tuple[ParsedPage, ...]
    parser: str
    """Name and version, for example `liteparse 2.18.0`."""
    paged: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the file says of itself (title, author, ...) and what the parser noticed (warnings, pages without text). JSON-safe."""


@dataclass(frozen=True, slots=True)
class OriginalText:
    """The checked text of a complete document of the same user with the same content and type."""

    doc_id: str
    markdown: str
    pages: tuple[PageMark, ...]
    parser: str | None
    parse_metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OriginalExtraction:
    """What was extracted from the same text in a complete document of the same user."""

    doc_id: str
    file_name: str
    raw_extraction: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """One version of one document on its way. Stages fill it with `dataclasses.replace`; only the checkpoint writes."""

    doc_id: str
    version: int
    user_id: str
    file_name: str
    """The submitter's name for it: data, never a path."""
    file_path: str
    """Where the stored upload lies, relative to the storage base path."""
    milestone: Milestone
    batch_id: str | None = None
    correlation_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The submitter's own, JSON-safe."""

    file_size: int | None = None
    content_sha256: str | None = None
    file_type: FileType | None = None
    mime_type: str | None = None

    markdown: str | None = None
    pages: tuple[PageMark, ...] = ()
    """Empty for a format without pages."""
    parser: str | None = None
    parse_metadata: Mapping[str, Any] = field(default_factory=dict)
    markdown_sha256: str | None = None
    """Set by `check`."""
    duplicate_of: str | None = None
    """doc_id of the same user's complete document with the same content, if there was one."""
    reused_from: str | None = None
    """doc_id of the document that the last stage copied its result from, if it made none of its own."""

    chunks: tuple[Chunk, ...] | None = None
    vectors: NDArray[np.float32] | None = None
    """Shape (len(chunks), dimensions), rows L2-normalised, in chunk order."""
    embedding_model: str | None = None
    embedded_count: int = 0
    """How many texts `embed` really sent to the model; the others kept known vectors."""

    raw_extraction: Mapping[str, Any] | None = None
