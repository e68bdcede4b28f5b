"""Making the vectors that passages lack: a batch from the list is embedded, then kept. Failures are sorted by whose fault they are.

A hosted model is paid a request at a time, and each finished request is kept before the next one begins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.adapters.embedders import HostedEmbedder
from jobs.making import MOST_REFUSED, Making, Row, Text, Vectors, text_of
from jobs.outages import outlive
from jobs.pipeline.claims import Connection, rows
from jobs.pipeline.company import Company
from jobs.redaction import describe
from jobs.retry import calculate_backoff, classify_error
from jobs.stages import Embedder
from jobs.vector_array import VectorArray
from models.errors import CostLimitReached, ErrorType, RateLimitError, ServiceUnavailable
from models.settings import Settings
from sql import query

PASSAGES = 256
"""Passages of one batch: embedded together, then kept in one transaction."""
DOCUMENTS = 256
"""Most documents of one batch: as many as passages, or requests for small documents would be less than full."""
AGAIN_SECONDS = 1.0
"""Until the next look at documents that somebody's transactions hold."""
FAILED_SECONDS = 60.0
"""Wait of a document that cannot be embedded; doubled with each failure."""

_KEEP_SECONDS = (0.2, 0.5, 1.0)
"""Before vectors that were paid for are stored again: somebody may have held a document for a moment."""

_OF_THE_DOCUMENT = frozenset({ErrorType.PERMANENT, ErrorType.UNKNOWN})
"""Errors that may be about one text; all others are about the service or the database."""

_MOST_IN_A_ROW = {ErrorType.UNKNOWN: 3, ErrorType.PERMANENT: MOST_REFUSED}
"""Documents that fail, and none is got on with, before it is not taken for their fault."""


class Filling:
    """Works off the list of documents that lack vectors, from front to end, for one slice."""

    def __init__(
        self, settings: Settings, pool: AsyncConnectionPool[Connection], worker: str, stopping: Callable[[], bool], company: Company
    ) -> None:
        self._settings, self._pool, self._worker, self._stopping, self._company = settings, pool, worker, stopping, company
        self._after: dict[str, str] = {}
        self._got_on: set[str] = set()
        self._failures: Counter[ErrorType] = Counter()

    async def batch(self, embedder: Embedder, *, only_urgent: bool) -> float | None:
        """Embed one batch and keep it; return None to go on, or seconds to wait. `only_urgent`: not of what a run listed."""
        model = embedder.model
        after = self._after.get(model, "")
        wanted = {"embedding_model": model, "after": after, "only_urgent": only_urgent}
        batch = await self._rows("passages_to_embed", **wanted, documents=DOCUMENTS, passages=PASSAGES)
        if not batch:
            self._after.pop(model, None)
            got_on, self._got_on = model in self._got_on, self._got_on - {model}
            return None if got_on else AGAIN_SECONDS
        names = list(dict.fromkeys(row["doc_id"] for row in batch))
        last = names[-1]
        # The last document may have more passages than came along.
        whole = names if len(batch) < PASSAGES else names[:-1]
        held = {row["doc_id"] for row in await self._rows("held_documents", doc_ids=names)}
        names, batch = [name for name in names if name not in held], [row for row in batch if row["doc_id"] not in held]
        try:
            got_on = await self._embed_affordable(embedder, names, batch)
        except Exception as error:
            return await self._failed(embedder, names, batch, error)
        if got_on:
            self._got_on.add(model)
        if whole or not got_on:
            self._after[model] = whole[-1] if whole else last
        return self._pause()

    def _pause(self) -> float | None:
        """Return how long to wait where one document after the other has failed."""
        return FAILED_SECONDS if any(self._failures[kind] >= most for kind, most in _MOST_IN_A_ROW.items()) else None

    async def _embed_affordable(self, embedder: Embedder, names: list[str], batch: list[Row]) -> bool:
        """Embed the documents of a batch that may cost it, and let the others wait; say whether anything was got on with."""
        while names:
            try:
                return await self._embed(embedder, names, batch)
            except CostLimitReached as error:
                over = [name for name in names if name in error.over]
                if not over:
                    raise
                for name in over:
                    await self._put_off(embedder.model, [name], CostLimitReached({name: error.over[name]}), FAILED_SECONDS)
                names, batch = [name for name in names if name not in over], [row for row in batch if row["doc_id"] not in over]
        return False

    async def _embed(self, embedder: Embedder, names: list[str], batch: list[Row]) -> bool:
        """Embed passages, each text once a user, and keep their vectors; say whether anything was got on with."""
        passages = [row for row in batch if row["id"] is not None]
        texts: dict[Text, str] = {text_of(row): row["content"] for row in passages}
        known = await self._known(embedder.model, texts)
        waiting = {key: content for key, content in texts.items() if key not in known}
        unfinished = {row["doc_id"] for row in passages if text_of(row) in waiting}
        # What is known already, and documents that lack nothing, wait for no service.
        got_on = await self._keep(embedder, passages, known, [name for name in names if name not in unfinished])
        making = Making(embedder, passages, waiting, seconds=self._settings.stage_timeout_seconds, company=self._company)
        async for made in making.run():
            await faults.at("reembed:embedded", names[0])
            kept = await self._keep(embedder, passages, made, [])
            got_on = got_on or kept
            await faults.at("reembed:stored", names[0])
            if not kept or self._stopping():
                break  # the run was cancelled, or its documents are held: nothing more is paid for them now
        if got_on:
            self._failures.clear()
        refused = {row["doc_id"]: making.refused[text_of(row)] for row in passages if text_of(row) in making.refused}
        unread = batch[-1]["doc_id"] if len(batch) == PASSAGES and got_on else None  # may have more that can be embedded
        for name, error in refused.items():
            logger.warning("A passage cannot be embedded with {}: {}", embedder.model, describe(error))
            await self._put_off(embedder.model, [name], error, 0.0 if name == unread else FAILED_SECONDS)
        if not got_on:
            self._failures[ErrorType.PERMANENT] += len(refused)
        return got_on

    async def _keep(self, embedder: Embedder, passages: list[Row], vectors: Vectors, whole: list[str]) -> bool:
        """Store the vectors of the passages that have one now; say whether anything was got on with. `whole`: documents that lack none."""
        kept = [row for row in passages if text_of(row) in vectors]
        names = list(dict.fromkeys([*whole, *(row["doc_id"] for row in kept)]))
        if not names:
            return False
        params = {"embedding_model": embedder.model, "doc_ids": names, "chunk_ids": [row["id"] for row in kept]}
        embeddings = VectorArray.of(vectors[text_of(row)] for row in kept)
        stored = settled = got_on = 0
        for pause in (*_KEEP_SECONDS, None) if isinstance(embedder, HostedEmbedder) else (None,):
            found = await self._store(embedder, **params, embeddings=embeddings)
            stored, settled, got_on = stored + found["stored"], settled + found["settled"], got_on + found["got_on"]
            if stored >= len(kept) or pause is None:
                break
            await asyncio.sleep(pause)
        if not (stored or settled):
            return False
        told = {"embedding_model": embedder.model, "dimensions": embedder.dimensions, "got_on": got_on, "worker": self._worker}
        await self._do("note_reembedding_progress", **told)
        return True

    async def _store(self, embedder: Embedder, **params: Any) -> Row:
        """Store vectors; those that were paid for wait for a database that is away, unless this worker stops."""
        if not isinstance(embedder, HostedEmbedder):
            return (await self._rows("store_embeddings", **params))[0]
        kept = await outlive("Keeping what was paid for", lambda: self._rows("store_embeddings", **params), until=self._stopping)
        return {"stored": 0, "settled": 0, "got_on": 0} if kept is None else kept[0]

    async def _known(self, model: str, texts: Iterable[Text]) -> Vectors:
        """Return what users already have under the model."""
        by_user: dict[str, list[str]] = {}
        for user, sha256 in texts:
            by_user.setdefault(user, []).append(sha256)
        found: Vectors = {}
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
            self._failures[classify_error(error)] += 1
            return self._pause()
        for name in names:
            part = [row for row in batch if row["doc_id"] == name]
            try:
                await self._embed_affordable(embedder, [name], part)
            except Exception as own:
                pause = await self._failed(embedder, [name], part, own)
                if pause is not None:
                    return pause
        return self._pause()

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
