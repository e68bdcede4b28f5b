"""A passage of a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Chunk:
    """One passage, as it will be searched. Offsets are code points into the document's checked markdown, end exclusive."""

    id: UUID
    """UUIDv5 of doc_id, index and content: the same input gives the same id."""
    index: int
    """Position in the document, from 0 without gaps."""
    content: str
    content_sha256: str
    """Lowercase hex of the UTF-8 content."""
    heading_path: tuple[str, ...] = ()
    """The headings above the passage, outermost first."""
    page_start: int | None = None
    """Number of the page (slide, sheet) where the passage begins, from 1; None where the format has no pages."""
    page_end: int | None = None
    char_start: int = 0
    char_end: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
