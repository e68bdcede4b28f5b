"""Passages of a document as plain binary COPY takes them: the floor under what docmill stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.types.json import Jsonb

from models.documents import Document

COPY = b"""COPY %b (
    id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, page_start, page_end, char_start, char_end,
    language, metadata, embedding, embedding_model
) FROM STDIN (FORMAT BINARY)"""
TYPES = [
    "uuid", "text", "text", "int4", "int4", "text", "text", "text[]", "int4", "int4", "int4", "int4", "text", "jsonb", "vector", "text",
]  # fmt: skip


def rows_of(document: Document) -> Iterator[tuple[Any, ...]]:
    """Yield a document's passages as rows of TYPES."""
    assert document.chunks is not None and document.vectors is not None
    for chunk, vector in zip(document.chunks, document.vectors, strict=True):
        yield (
            chunk.id, document.doc_id, document.user_id, document.version, chunk.index, chunk.content, chunk.content_sha256,
            list(chunk.heading_path),
            chunk.page_start, chunk.page_end, chunk.char_start, chunk.char_end, "en", Jsonb({}), vector, document.embedding_model,
        )  # fmt: skip
