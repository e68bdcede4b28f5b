"""Making the vectors that passages lack: a batch from the list is embedded, then kept. Failures are sorted by whose fault they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import psycopg
from loguru import logger
from numpy.typing import NDArray
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.pipeline.claims import Connection, rows
from jobs.redaction import describe
from jobs.retry import calculate_backoff, classify_error
from jobs.stages import Embedder
from jobs.stages.embed import refuse_vectors
from models.errors import ErrorType, RateLimitError, ServiceUnavailable
from models.settings import Settings
from sql import query

PASSAGES = 256
"""Passages of one batch: embedded together, then kept in one transaction."""
DOCUMENTS = 64
"""Most documents of one batch."""
AGAIN_SECONDS = 1.0
"""Until the next look at documents that somebody's transactions hold."""
FAILED_SECONDS = 60.0
"""Wait of a document that cannot be embedded; doubled with each failure."""

_OF_THE_DOCUMENT = frozenset({ErrorType.PERMANENT, ErrorType.UNKNOWN})
"""Errors that may be about one text; all others are about the service or the database."""

Row = dict[str, Any]


class Filling:
    """Works off the list of documents that lack vectors, from front to end, for one slice."""

    def __init__(self, settings: Settings, pool: AsyncConnectionPool[Connection], worker: str) -> None:
        self._settings, self._pool, self._worker = settings, pool, worker
        self._after: dict[str, str] = {}
        self._got_on: set[str] = set()
        self._failures = 0

    async def batch(self, embedder: Embedder, *, only_urgent: bool) -> float | None:
        """Embed one batch and keep it; return None to go on, or seconds to wait. `only_urgent`: not of what a run listed."""
        model = embedder.model
        after = self._after.get(model, "")
        wanted = {"embedding_model": model, "after": after, "only_urgent": only_urgent}
        batch = await self._rows("passages_to_embed", **wanted, documents=DOCUMENTS, passages=PASSAGES)
        if not batch:
            if model not in self._got_on:
                return AGAIN_SECONDS
            self._after.pop(model, None)
            self._got_on.discard(model)
            return None
        names = list(dict.fromkeys(row["doc_id"] for row in batch))
        last = names[-1]
        # The last document may have more passages than came along.
        whole = names if len(batch) < PASSAGES else names[:-1]
        held = {row["doc_id"] for row in await self._rows("held_documents", doc_ids=names)}
        names, batch = [name for name in names if name not in held], [row for row in batch if row["doc_id"] not in held]
        try:
            got_on = bool(names) and await self._embed(embedder, names, batch)
        except Exception as error:
            return await self._failed(embedder, names, batch, error)
        if got_on:
            self._got_on.add(model)
        if whole or not got_on:
            self._after[model] = whole[-1] if whole else last
        self._failures = 0
        return None

    async def _embed(self, embedder: Embedder, names: list[str], batch: list[Row]) -> bool:
        """Embed passages, each text once a user, and keep their vectors; say whether anything was got on with."""
        passages = [row for row in batch if row["id"] is not None]
        texts = {(row["user_id"], row["content_sha256"]): row["content"] for row in passages}
        vectors = await self._known(embedder.model, texts)
        missing = [key for key in texts if key not in vectors]
        if missing:
            async with asyncio.timeout(self._settings.stage_timeout_seconds):
                made = await embedder.embed([texts[key] for key in missing])
            refuse_vectors(f"Re-embedding with {embedder.model}", made, len(missing), embedder.dimensions)
            vectors.update(zip(missing, made, strict=True))
        await faults.at("reembed:embedded", names[0])
        kept = await self._rows(
            "store_embeddings",
            embedding_model=embedder.model,
            doc_ids=names,
            chunk_ids=[row["id"] for row in passages],
            embeddings=[vectors[row["user_id"], row["content_sha256"]] for row in passages],
        )
        await faults.at("reembed:stored", names[0])
        if not (kept[0]["stored"] or kept[0]["settled"]):
            return False
        told = {"embedding_model": embedder.model, "dimensions": embedder.dimensions, "got_on": kept[0]["got_on"], "worker": self._worker}
        await self._do("note_reembedding_progress", **told)
        return True

    async def _known(self, model: str, texts: Iterable[tuple[str, str]]) -> dict[tuple[str, str], NDArray[np.float32]]:
        """Return what users already have under the model: (user_id, content_sha256) -> vector."""
        by_user: dict[str, list[str]] = {}
        for user, sha256 in texts:
            by_user.setdefault(user, []).append(sha256)
        found: dict[tuple[str, str], NDArray[np.float32]] = {}
        for user, hashes in by_user.items():
            for row in await self._rows("find_known_vectors", user_id=user, hashes=hashes, embedding_model=model):
                found[user, row["content_sha256"]] = row["embedding"].to_numpy()
        return found

    async def _failed(self, embedder: Embedder, names: list[str], batch: list[Row], error: Exception) -> float | None:
        """Wait out what is the service's fault; find the document whose fault it is, and let it wait alone."""
        logger.warning("Re-embedding {} documents with {} failed: {}", len(names), embedder.model, describe(error))
        if isinstance(error, psycopg.OperationalError):
            raise error
        if classify_error(error) not in _OF_THE_DOCUMENT:
            attempts = await self._put_off(embedder.model, names, error, 0.0)
            if isinstance(error, RateLimitError | ServiceUnavailable) and error.retry_after is not None:
                return error.retry_after
            return calculate_backoff(attempts, self._settings.retry_base_delay_seconds, self._settings.retry_max_delay_seconds)
        if len(names) == 1:
            await self._put_off(embedder.model, names, error, FAILED_SECONDS)
            self._failures += 1
            # When one after the other fails alone it is not the documents.
            return FAILED_SECONDS if self._failures >= 3 else None
        for name in names:
            part = [row for row in batch if row["doc_id"] == name]
            try:
                await self._embed(embedder, [name], part)
                self._failures = 0
            except Exception as own:
                pause = await self._failed(embedder, [name], part, own)
                if pause is not None:
                    return pause
        return None

    async def _put_off(self, model: str, names: list[str], error: Exception, delay: float) -> int:
        message = describe(error)[:1000]
        put_off = await self._rows("put_off_embeddings", embedding_model=model, doc_ids=names, message=message, delay=delay)
        await self._do("note_reembedding_trouble", embedding_model=model, message=message, worker=self._worker)
        return int(put_off[0]["attempts"] or 0)

    async def _rows(self, name: str, **params: Any) -> list[Row]:
        async with self._pool.connection() as conn:
            return await rows(conn, name, params)

    async def _do(self, name: str, **params: Any) -> None:
        async with self._pool.connection() as conn:
            await conn.execute(query(name), params)
