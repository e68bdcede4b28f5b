"""What a stage pays for, made durable while the stage goes on: a finished request before the next one begins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from jobs import clock, faults
from jobs.adapters.embedders import HostedEmbedder, SizedText
from jobs.adapters.llm import PartAnswer
from jobs.outages import outlive
from jobs.pipeline.checkpoint import FencedOff, store_vectors
from jobs.pipeline.claims import Connection, one, rows
from jobs.pipeline.completing import hold_free
from jobs.pipeline.durable import connection, when_free
from jobs.pipeline.sharing import Guarded, Sharing
from jobs.pipeline.together import NotTogether
from jobs.pipeline.work import Work
from jobs.stages import Embedded, HostedJob, JobPart
from models.calls import Caller, CallPurpose, CallShare, Reply
from models.errors import NotSent
from sql import query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
_MARGIN = 0.1
"""Share of LEASE_SECONDS that a lease must still hold for a paid call to start."""
_LOOK_SECONDS = 0.05


class Keeping:
    """One document's way to outside services, and to what they have been paid for already. See jobs.stages.Paid."""

    def __init__(
        self,
        pool: AsyncConnectionPool[Connection],
        work: Work,
        *,
        lease_seconds: float,
        checkpoint: Callable[[Work], Awaitable[None]],
        stopping: Callable[[], bool],
        sharing: Sharing,
        keeps_vectors: bool = True,
    ) -> None:
        """`checkpoint` makes durable what the stages before have made; `sharing` is the worker's. Without
        `keeps_vectors` those that are kept already, of another model, stay as they are."""
        self._pool, self._work, self._sharing = pool, work, sharing
        self._margin = _MARGIN * lease_seconds
        self._checkpoint, self._stopping = checkpoint, stopping
        self._keeps_vectors = keeps_vectors

    @property
    def shares(self) -> tuple[CallShare, ...]:
        """Whom the ledger names for a call: this document alone."""
        document = self._work.document
        return (CallShare(document.doc_id, document.user_id, document.batch_id, document.correlation_id),)

    def through(self, caller: Caller) -> Caller:
        """Return a way to a service on which no call starts without a good lease, or before all earlier stages are durable."""
        return _Ready(self, caller)

    async def embed(self, embedder: HostedEmbedder, texts: Sequence[SizedText], *, alone: bool = False) -> Embedded:
        """Embed the first of the texts with one request that other documents may share, once this one may pay for it."""
        told: Embedded | None = None
        # By all of its passages: it holds vectors for those too that it need not ask for.
        filled = min(1.0, len(self._work.document.chunks or texts) / embedder.limits.max_texts)
        while told is None:
            await self.ready()
            others = self._work.together
            with self._work.place.waiting(filled), nullcontext() if others is None else others.away():
                told = await self._sharing.embed(embedder, texts, share=self.shares[0], may_call=self.may_call, alone=alone)
        return told

    async def ready(self) -> None:
        """Return when something may be paid for. FencedOff: the claim has moved on. CheckpointFailed: earlier results cannot be stored."""
        work = self._work
        if work.document is not work.saved:
            # A passage that is embedded now must be the same passage after a crash.
            await self._checkpoint(work)
        while True:
            if self.may_call():
                work.paid = True
                return
            # It is renewed, or its loss or the stage's deadline cancels this task.
            await asyncio.sleep(_LOOK_SECONDS)

    def may_call(self) -> bool:
        """Say whether the claim is ours for long enough to start a call, as far as can be known without asking."""
        return not self._work.fenced and clock.seconds() < self._work.lease.good_until - self._margin

    async def kept_vectors(self, model: str) -> dict[int, NDArray[np.float32]]:
        """Return what is durable of this version's vectors of a model: number of the passage -> vector."""
        if not (self._keeps_vectors and self._work.buffered):
            return {}
        document = self._work.document
        params = {"doc_id": document.doc_id, "version": document.version, "embedding_model": model}
        async with self._pool.connection() as conn:
            found = await rows(conn, "find_kept_vectors", params)
        self._work.kept_model, self._work.kept_vectors = model, {row["chunk_index"] for row in found}
        return {row["chunk_index"]: row["embedding"].to_numpy() for row in found}

    async def keep_vectors(self, model: str, vectors: Mapping[int, NDArray[np.float32]]) -> None:
        """Store vectors of passages, named by their numbers, or raise FencedOff."""
        if not self._keeps_vectors:
            return
        work, others = self._work, self._work.together
        made = (work, vectors)

        async def store(conn: Connection) -> None:
            await store_vectors(conn, model, [(work.document, vectors.items())])

        keep_all = partial(_keep_all, self._pool, self._stopping, model)
        # At once: what is paid for and not kept yet is lost with this worker.
        with_others = None if others is None else partial(others.ask, ("kept vectors", model), made, keep_all, at_once=True)
        if await self._write(store, with_others, advances=bool(vectors)):
            if work.kept_model != model:
                work.kept_model, work.kept_vectors = model, set()
            work.kept_vectors |= set(vectors)
            work.paid = False  # all of it is durable: nothing else could be under way

    async def kept_jobs(self, service: str) -> dict[str, HostedJob]:
        """Return the jobs that were started for this version at a service: part -> job."""
        document = self._work.document
        params = {"doc_id": document.doc_id, "version": document.version, "service": service}
        async with self._pool.connection() as conn:
            found = await rows(conn, "find_hosted_jobs", params)
        self._work.buffered = self._work.buffered or bool(found)
        return {row["part"]: HostedJob(row["job_id"], row["seconds"]) for row in found}

    async def keep_job(self, service: str, part: JobPart, job_id: str) -> None:
        """Store a job's id, or raise FencedOff."""
        await self._write(partial(self._do, "store_hosted_job", part=part, job_id=job_id, service=service))

    async def drop_job(self, part: JobPart) -> None:
        """Forget a job, or raise FencedOff."""
        await self._write(partial(self._do, "drop_hosted_job", part=part))

    async def kept_answers(self) -> dict[str, PartAnswer]:
        """Return a model's answers for parts of this version: asked_sha256 -> answer."""
        document = self._work.document
        async with self._pool.connection() as conn:
            found = await rows(conn, "find_kept_answers", {"doc_id": document.doc_id, "version": document.version})
        self._work.buffered = self._work.buffered or bool(found)
        return {row.pop("asked_sha256"): PartAnswer(**row) for row in found}

    async def keep_answer(self, part: int, asked_sha256: str, answer: PartAnswer) -> None:
        """Store a model's answer for a part, or raise FencedOff."""
        params = {**asdict(answer), "data": Jsonb(answer.data)}
        await self._write(partial(self._do, "store_answer", part=part, asked_sha256=asked_sha256, **params), advances=True)

    async def drop_answers(self) -> None:
        """Forget a model's answers for this version, or raise FencedOff."""
        await self._write(partial(self._do, "drop_answers"))

    async def _do(self, name: str, conn: Connection, **params: Any) -> None:
        document = self._work.document
        await conn.execute(query(name), {"doc_id": document.doc_id, "version": document.version, **params})

    async def _write(
        self,
        store: Callable[[Connection], Awaitable[None]],
        with_others: Callable[[], Awaitable[None]] | None = None,
        *,
        advances: bool = False,
    ) -> bool:
        """Write in a transaction that is fenced by the claim; say whether it was written, which it is not where the worker stops while
        the database is away or another transaction holds the document. A cancellation waits for its end. `with_others` does the same for
        several documents, or raises NotTogether. `advances`: it is a part of the stage's result, of which each is kept once."""
        work = self._work

        async def write() -> bool:
            async with connection(self._pool, self._stopping) as conn, conn.transaction():
                if await one(conn, "lock_claim", {"doc_id": work.document.doc_id, "claim": work.claim}) is None:
                    raise FencedOff
                await store(conn)
                await faults.at("keeping", work.document.doc_id)
            return True

        async def write_when_free() -> bool:
            return await when_free(work, write, lambda: self._stopping() and work.hurried)

        async def with_others_or_alone() -> bool:
            if with_others is not None:
                with suppress(NotTogether):
                    await with_others()
                    return True
            return bool(await outlive("Keeping what was paid for", write_when_free, until=self._stopping))

        written, cancelled = await unbroken(work, with_others_or_alone(), self._stopping)
        # There may be rows of it even where nobody said so.
        work.buffered = True
        work.gained = work.gained or bool(written)
        work.advanced = work.advanced or (advances and bool(written))
        if cancelled:
            raise asyncio.CancelledError
        await faults.at("kept", work.document.doc_id)
        return bool(written)


async def _keep_all(
    pool: AsyncConnectionPool[Connection],
    stopping: Callable[[], bool],
    model: str,
    made: Sequence[tuple[Work, Mapping[int, NDArray[np.float32]]]],
) -> Sequence[NotTogether | None]:
    """Store vectors of several documents. Who is fenced off, or locked by somebody's transaction, asks alone."""
    async with connection(pool, stopping) as conn, conn.transaction():
        free = {work.document.doc_id for work in await hold_free(conn, [work for work, _ in made])}
        await store_vectors(conn, model, [(work.document, vectors.items()) for work, vectors in made if work.document.doc_id in free])
        for doc_id in free:
            await faults.at("keeping", doc_id)
    return [None if work.document.doc_id in free else NotTogether() for work, _ in made]


class _Ready:
    def __init__(self, keeping: Keeping, caller: Caller) -> None:
        self._keeping, self._caller = keeping, Guarded(caller, keeping.may_call)

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Make a call once the work may pay for it. Who has lost the lease meanwhile is being cancelled."""
        while True:
            await self._keeping.ready()
            with suppress(NotSent):
                return await self._caller.call(send, purpose)


async def unbroken(work: Work, action: Awaitable[Any], stopping: Callable[[], bool]) -> tuple[Any, bool]:
    """Wait for what the work needs to its end, also where this task is cancelled meanwhile; return what it returned and whether it was."""
    running = asyncio.ensure_future(action)
    cancelled = False
    while not running.done():
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            if running.cancelled():
                raise
            cancelled, work.hurried = True, stopping()
        except Exception:
            break
    return running.result(), cancelled
