"""What stages may ask the database for."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from psycopg.rows import DictRow
from psycopg_pool import AsyncConnectionPool

from jobs.pipeline.claims import Connection, one, page_marks, rows
from models.documents import Document, OriginalExtraction, OriginalText

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_HASHES_AT_ONCE = 1000
"""Passages that are asked for at once; a parameter and its parts lie in memory several times."""


class Reading:
    """Short reads for stages; each takes a connection only while it asks."""

    def __init__(self, pool: AsyncConnectionPool[Connection]) -> None:
        self._pool = pool

    async def known_vectors(self, *documents: Document) -> dict[str, NDArray[np.float32]]:
        """Return the vectors that a user already has for passages of their documents under one model: content_sha256 -> vector."""
        hashes = iter({chunk.content_sha256 for document in documents for chunk in document.chunks or ()})
        params = {"user_id": documents[0].user_id, "embedding_model": documents[0].embedding_model}
        known: dict[str, NDArray[np.float32]] = {}
        async with self._pool.connection() as conn:
            while part := list(islice(hashes, _HASHES_AT_ONCE)):
                found = await rows(conn, "find_known_vectors", {**params, "hashes": part})
                known |= {row["content_sha256"]: row["embedding"].to_numpy() for row in found}
        return known

    async def find_original(self, document: Document) -> str | None:
        """Return the doc_id of the user's first complete document with the same content, other than this one."""
        row = await self._original("find_original", document)
        return row["doc_id"] if row else None

    async def original_text(self, document: Document) -> OriginalText | None:
        """Return the text of such a document that has the same type: the type decides how a file is parsed."""
        row = await self._original("find_original_text", document)
        if row is None:
            return None
        return OriginalText(row["doc_id"], row["markdown"], page_marks(row["page_map"]), row["parser"], row["parse_metadata"])

    async def original_extraction(self, document: Document) -> OriginalExtraction | None:
        """Return what was extracted from the newest such document whose text is the same and whose extraction did not fail."""
        row = await self._original("find_original_extraction", document)
        return None if row is None else OriginalExtraction(row["doc_id"], row["file_name"], row["raw_extraction"])

    async def _original(self, name: str, document: Document) -> DictRow | None:
        params = {
            "user_id": document.user_id,
            "content_sha256": document.content_sha256,
            "doc_id": document.doc_id,
            "file_type": document.file_type,
            "mime_type": document.mime_type,
            "markdown_sha256": document.markdown_sha256,
        }
        async with self._pool.connection() as conn:
            return await one(conn, name, params)
