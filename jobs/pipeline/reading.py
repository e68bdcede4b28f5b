"""What stages may ask the database for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from psycopg_pool import AsyncConnectionPool

from jobs.pipeline.claims import Connection, one, rows
from models.documents import Document


class Reading:
    """Short reads for stages; each takes a connection only while it asks."""

    def __init__(self, pool: AsyncConnectionPool[Connection]) -> None:
        self._pool = pool

    async def known_vectors(self, document: Document) -> dict[str, NDArray[np.float32]]:
        """Return the vectors that the user already has for the document's passages under its model: content_sha256 -> vector."""
        hashes = list({chunk.content_sha256 for chunk in document.chunks or ()})
        params = {"user_id": document.user_id, "hashes": hashes, "embedding_model": document.embedding_model}
        async with self._pool.connection() as conn:
            found = await rows(conn, "find_known_vectors", params)
        return {row["content_sha256"]: row["embedding"].to_numpy() for row in found}

    async def find_original(self, document: Document) -> str | None:
        """Return the doc_id of the user's first complete document with the same content, other than this one."""
        params = {"user_id": document.user_id, "content_sha256": document.content_sha256, "doc_id": document.doc_id}
        async with self._pool.connection() as conn:
            row = await one(conn, "find_original", params)
        return row["doc_id"] if row else None
