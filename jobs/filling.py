"""Making the vectors that passages lack: a batch from the list is embedded, then kept. Failures are sorted by whose fault they are.

A hosted model is paid a request at a time, and each finished request is kept before the next one begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.adapters.embedders import HostedEmbedder
from jobs.adapters.usage import in_thread
from jobs.outages import outlive
from jobs.pipeline.claims import Connection, rows
from jobs.pipeline.company import Company
from jobs.redaction import describe
from jobs.retry import calculate_backoff, classify_error
from jobs.stages import Embedder
from jobs.stages.embed import refuse_vectors
from models.calls import CallShare
from models.errors import ErrorType, RateLimitError, ServiceUnavailable
from models.settings import Settings
from sql import query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = dict[tuple[str, str], NDArray[np.float32]]
    """Of a Text."""

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

Row = dict[str, Any]
Text = tuple[str, str]
"""A user and the content_sha256 of a text of theirs."""


class Filling:
    """Works off the list of documents that lack vectors, from front to end, for one slice."""

    def __init__(
        self, settings: Settings, pool: AsyncConnectionPool[Connection], worker: str, stopping: Callable[[], bool], company: Company
    ) -> None:
        self._settings, self._pool, self._worker, self._stopping, self._company = settings, pool, worker, stopping, company
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
        texts: dict[Text, str] = {_text(row): row["content"] for row in passages}
        known = await self._known(embedder.model, texts)
        waiting = {key: content for key, content in texts.items() if key not in known}
        unfinished = {row["doc_id"] for row in passages if _text(row) in waiting}
        # What is known already, and documents that lack nothing, wait for no service.
        got_on = await self._keep(embedder, passages, known, [name for name in names if name not in unfinished])
        async for made in self._make(embedder, passages, waiting):
            await faults.at("reembed:embedded", names[0])
            kept = await self._keep(embedder, passages, made, [])
            got_on = got_on or kept
            await faults.at("reembed:stored", names[0])
            if not kept or self._stopping():
                break  # the run was cancelled, or its documents are held: nothing more is paid for them now
        return got_on

    async def _make(self, embedder: Embedder, passages: list[Row], texts: dict[Text, str]) -> AsyncIterator[Vectors]:
        """Yield vectors until there is one a text: those of a request at a time where each one is paid for."""
        keys, contents = list(texts), list(texts.values())
        if not keys:
            return
        # A document that must be alone in this worker waits for what is computed here, but for nothing that waits for others' transactions.
        async with self._company.shared():
            sized = await in_thread(embedder.size, contents) if isinstance(embedder, HostedEmbedder) else []
        for part in embedder.plan(sized) if isinstance(embedder, HostedEmbedder) else [slice(0, len(keys))]:
            async with self._company.shared(), asyncio.timeout(self._settings.stage_timeout_seconds):
                if isinstance(embedder, HostedEmbedder):
                    made = (await embedder.embed_sized(sized[part], shares=_shares(passages, set(keys[part])))).value
                else:
                    made = await embedder.embed(contents[part])
            refuse_vectors(f"Re-embedding with {embedder.model}", made, len(keys[part]), embedder.dimensions)
            yield dict(zip(keys[part], made, strict=True))

    async def _keep(self, embedder: Embedder, passages: list[Row], vectors: Vectors, whole: list[str]) -> bool:
        """Store the vectors of the passages that have one now; say whether anything was got on with. `whole`: documents that lack none."""
        kept = [row for row in passages if _text(row) in vectors]
        names = list(dict.fromkeys([*whole, *(row["doc_id"] for row in kept)]))
        if not names:
            return False
        params = {"embedding_model": embedder.model, "doc_ids": names, "chunk_ids": [row["id"] for row in kept]}
        embeddings = [vectors[_text(row)] for row in kept]
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


def _text(row: Row) -> Text:
    return row["user_id"], row["content_sha256"]


def _shares(passages: Iterable[Row], texts: Collection[Text]) -> tuple[CallShare, ...]:
    """Return whom the ledger names for a request with these texts, by length; a text that several documents have is the first one's.

    A re-embedding is no cost of the batch that a document once came with, so none is named.
    """
    left, lengths, users = set(texts), dict[str, int](), dict[str, str]()
    for row in passages:
        if _text(row) in left:
            left.remove(_text(row))
            lengths[row["doc_id"]] = lengths.get(row["doc_id"], 0) + len(row["content"])
            users[row["doc_id"]] = row["user_id"]
    total = sum(lengths.values())
    return tuple(CallShare(name, users[name], share=length / total) for name, length in lengths.items())
