"""Stage `chunk`: markdown into passages with ids, hashes, headings and pages.

A passage is an exact slice of the checked markdown: nothing is repeated, repaired or rendered, so offsets always hold.

Size and overlap, in characters (code points): a passage has at most `size`. The text is first cut into spans of about `size - overlap`
that follow each other without gaps; then each passage begins up to `overlap` characters earlier, at a sentence or word (in a table: at a
row), where room is left. It never reaches back over a heading, so a passage that opens a section begins with its heading. What a passage
repeats is `chunk[i].char_start .. chunk[i - 1].char_end`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid5

from jobs.adapters.markdown import Structure, cells, page_at, plain, read_structure, table_at
from jobs.adapters.sniff_types import has_headings
from jobs.adapters.usage import beside
from jobs.stages import Tools
from jobs.stages.chunk.spans import Span, body_start, overlap_start, spans
from models.chunks import Chunk
from models.documents import Document, PageMark
from models.errors import ConfigurationError, PermanentError

CHUNK_NAMESPACE = UUID("6d0c6f5e-2b1f-5d0a-9a55-0f6f1c1f7c11")
"""Of the UUIDv5 of a passage. Changing it, or the canonical string, gives every passage of every document a new id."""
MIN_CHUNK_SIZE = 50
MAX_HEADER_CELLS = 20
MAX_HEADER_CELL_CHARACTERS = 100
MAX_HEADER_CHARACTERS = 10_000
_NOTHING: Mapping[str, Any] = MappingProxyType({})
"""One for all passages: a large document has tens of thousands."""


def chunk_id(doc_id: str, index: int, content_sha256: str) -> UUID:
    r"""Return the UUIDv5 of the canonical string `<doc_id>\n<index>\n<content_sha256>`; a doc_id has no control characters."""
    return uuid5(CHUNK_NAMESPACE, f"{doc_id}\n{index}\n{content_sha256}")


def cut(markdown: str, pages: Sequence[PageMark], *, doc_id: str, size: int, overlap: int, headings: bool = True) -> tuple[Chunk, ...]:
    """Return the passages of a text in order, none for one without a visible character. The same input gives the same passages.

    `pages` are in order of offset. Without `headings` no line is one, as in program code. Raises ConfigurationError for a size or
    overlap that makes no sense, PermanentError if the result is not whole (see `verify`).
    """
    if size < MIN_CHUNK_SIZE or not 0 <= overlap < size:
        raise ConfigurationError(
            f"CHUNK_SIZE is {size} and CHUNK_OVERLAP is {overlap} characters: "
            f"the size must be at least {MIN_CHUNK_SIZE}, the overlap from 0 to less than the size"
        )
    if not markdown.strip():
        return ()
    structure = read_structure(markdown, headings=headings)
    trail = _HeadingTrail(structure)
    chunks: list[Chunk] = []
    headers: dict[int, list[str]] = {}
    earliest = 0
    for span in spans(markdown, structure, size, overlap):
        start, end = _trimmed(markdown, span)
        room = min(overlap, size - (end - start))
        begins = overlap_start(markdown, structure, earliest, start, room) if chunks and room > 0 else start
        begins, _ = _trimmed(markdown, (begins, end))
        content = markdown[begins:end]
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        chunks.append(
            Chunk(
                id=chunk_id(doc_id, len(chunks), digest),
                index=len(chunks),
                content=content,
                content_sha256=digest,
                heading_path=trail.at(body_start(markdown, structure, start, end)),
                page_start=page_at(pages, begins),
                page_end=page_at(pages, end - 1),
                char_start=begins,
                char_end=end,
                metadata=_metadata(markdown, structure, start, end, headers),
            )
        )
        earliest = start
    verify(chunks, markdown, doc_id)
    return tuple(chunks)


def verify(chunks: Sequence[Chunk], markdown: str, doc_id: str) -> None:
    """Raise PermanentError unless the passages are numbered from 0, visible, exact, in order, and leave out nothing but white space."""
    covered = begun = 0
    for number, chunk in enumerate(chunks):
        if chunk.index != number or not chunk.content.strip():
            raise PermanentError(f"chunking {doc_id}: passage {number} of {len(chunks)} is empty or out of order")
        if chunk.content != markdown[chunk.char_start : chunk.char_end] or chunk.char_start < begun or chunk.char_end <= covered:
            raise PermanentError(f"chunking {doc_id}: passage {number} of {len(chunks)} does not match its place in the text")
        if markdown[covered : chunk.char_start].strip():
            raise PermanentError(f"chunking {doc_id}: text before passage {number} of {len(chunks)} would be lost")
        begun, covered = chunk.char_start, chunk.char_end
    if markdown[covered:].strip():
        raise PermanentError(f"chunking {doc_id}: text after the last of {len(chunks)} passages would be lost")


class _HeadingTrail:
    """The headings above an offset. Offsets must be asked for in ascending order."""

    def __init__(self, structure: Structure) -> None:
        self._headings = structure.headings
        self._next = 0
        self._open: list[tuple[int, str]] = []
        self._above: tuple[str, ...] = ()

    def at(self, offset: int) -> tuple[str, ...]:
        """Return the headings above an offset, outermost first; the same object for all passages below the same ones."""
        before = self._next
        while self._next < len(self._headings) and self._headings[self._next].start < offset:
            heading = self._headings[self._next]
            while self._open and self._open[-1][0] >= heading.level:
                self._open.pop()
            self._open.append((heading.level, heading.text))
            self._next += 1
        if self._next != before:
            self._above = tuple(text for _, text in self._open if text)
        return self._above


def _trimmed(markdown: str, span: Span) -> Span:
    """Without blank lines before and white space after; the indentation of the first line stays (it means something in code and lists)."""
    start, end = span
    inner = markdown[start:end]
    first = start + len(inner) - len(inner.lstrip())
    line = markdown.rfind("\n", 0 if start == 0 else start - 1, first) + 1
    return (line if line or start == 0 else first), start + len(inner.rstrip())


def _metadata(markdown: str, structure: Structure, start: int, end: int, headers: dict[int, list[str]]) -> Mapping[str, Any]:
    """`has_table`; and `table_header`, the column names, for a passage that begins below the header of its table.

    `headers` keeps the names by where their table begins, for the next passages of the same table.
    """
    at = bisect_right(structure.tables, end - 1, key=lambda table: table.start) - 1
    if at < 0 or structure.tables[at].end <= start:
        return _NOTHING
    table = table_at(structure, start)
    if table is None or start <= table.start:
        return {"has_table": True}
    if table.start not in headers:
        line = markdown[table.start : min(table.lines[1], table.start + MAX_HEADER_CHARACTERS)]
        headers[table.start] = [plain(cell)[:MAX_HEADER_CELL_CHARACTERS] for cell in cells(line)[:MAX_HEADER_CELLS]]
    return {"has_table": True, "table_header": headers[table.start]}


async def run(document: Document, tools: Tools) -> Document:
    """Cut the checked markdown into passages. A text without a visible character is a PermanentError."""
    assert document.markdown is not None, "the stage `check` leaves a markdown"
    settings = tools.settings

    text, size, overlap = document.markdown, settings.chunk_size, settings.chunk_overlap
    headings = has_headings(document.file_name, document.mime_type)
    chunks = await beside(text, cut, text, document.pages, doc_id=document.doc_id, size=size, overlap=overlap, headings=headings)
    if not chunks:
        raise PermanentError(f"{document.file_name} has no text to cut into passages")
    return replace(document, chunks=chunks)
