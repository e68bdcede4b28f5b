"""The job that gives every passage its wanted vectors, a slice of some seconds at a time, and brings a re-embedding to its end.

What is due next is asked of the database before each step (`reembedding_steps`), and each step is a small transaction. So a worker may die
anywhere, two may work at once, and a pause takes effect after the batch in hand. Between slices waiting documents go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import psycopg
from loguru import logger
from procrastinate import JobContext
from psycopg_pool import AsyncConnectionPool

from jobs import clock, faults
from jobs.filling import AGAIN_SECONDS, FAILED_SECONDS, Filling
from jobs.maintenance import NOT_ALLOWED, Table, drop_index, look_after_index
from jobs.making import Row
from jobs.pipeline.claims import Connection, one, rows
from jobs.pipeline.company import Company
from jobs.redaction import describe
from jobs.serving import embedder_of
from jobs.stages import Embedder
from jobs.tasks import company, services
from models.errors import ConfigurationError
from models.settings import Settings
from models.stages import EMBED_QUEUE
from procrastinate_app import app
from sql import query

SLICE_SECONDS = 5.0
MOVED = 256
"""Vectors that one transaction moves."""
CLEARED = 5000
"""Vectors that one transaction deletes."""
LEAVE_SECONDS = 5.0
"""What this worker cannot do waits so long for another, which may fetch it as well."""


class Slice:
    """A few seconds of re-embedding in one worker."""

    def __init__(
        self,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        *,
        worker: str,
        stopping: Callable[[], bool],
        find_embedder: Callable[[Settings, str], Embedder] = embedder_of,
        company: Company | None = None,
    ) -> None:
        self._settings, self._pool, self._worker, self._stopping = settings, pool, worker, stopping
        self._find_embedder = find_embedder
        self._filling = Filling(settings, pool, worker, stopping, company or Company())
        self._moved_to = ""
        self._not_before: dict[tuple[str, str | None], float] = {}

    async def run(self, seconds: float = SLICE_SECONDS) -> float | None:
        """Do what is due until the time is up; return after how many seconds the next slice is worth it, None if nothing is left to do."""
        end = clock.seconds() + seconds
        while True:
            steps = await self._rows("reembedding_steps")
            if not steps:
                return None
            pause = await self._first_possible(steps)
            if pause is not None:
                return pause
            if clock.seconds() >= end or self._stopping():
                return 0.0

    async def _first_possible(self, steps: Iterable[Row]) -> float | None:
        """Do the first step that can be done here and now; return None to go on, or seconds to wait. A step that waits keeps no other."""
        waits = []
        for step in steps:
            key = step["step"], step["embedding_model"]
            wait = self._not_before.get(key, 0.0) - clock.seconds()
            if wait <= 0:
                pause = await self._do_step(step)
                if pause is None:
                    return None
                wait, self._not_before[key] = pause, clock.seconds() + pause
            waits.append(wait)
        return min(waits)

    async def _do_step(self, step: Row) -> float | None:
        """Do a step; return None to go on, or seconds to wait."""
        await faults.at(f"reembed:{step['step']}")
        run = step["reembedding_id"]
        if step["step"] not in ("fill", "index"):
            return await self._do_without_embedder(step["step"], run)
        try:
            embedder = self._find_embedder(self._settings, step["embedding_model"])
        except ConfigurationError as error:
            await self._tell(step["embedding_model"], f"worker {self._worker} leaves it to others: {error}")
            return LEAVE_SECONDS
        if step["step"] == "index":
            return await self._index(embedder, run)
        return await self._filling.batch(embedder, only_urgent=run is None)

    async def _do_without_embedder(self, step: str, run: int) -> float | None:
        """Do a step that needs no embedder."""
        try:
            match step:
                case "list":
                    row = (await self._rows("find_reembedding", reembedding_id=run))[0]
                    if row["switched_at"] is not None:
                        # Its passages are about to go, and taking them out of it one by one would be dear.
                        pause = await self._drop(row["to_model"], row["from_model"], row["from_dimensions"], "document_chunks")
                        if pause is not None:
                            return pause
                    await self._do("await_passage_writers")
                    await self._do("list_documents_to_embed", reembedding_id=run)
                case "switch":
                    state = (await self._rows("switch_reembedding", despite_lacking=False))[0]["state"]
                    if state == "switched":
                        logger.success("Searches are served by the new model from now on")
                case "move":
                    return await self._move()
                case "settle":
                    return await self._settle(run)
                case "clear":
                    await self._do("clear_embeddings", most=CLEARED)
                case _:
                    return await self._end(step, run)
        except psycopg.errors.LockNotAvailable:
            return AGAIN_SECONDS
        return None

    async def _index(self, embedder: Embedder, run: int) -> float | None:
        """Index the new set and say that it is ready."""
        await self._do("set_reembedding_dimensions", reembedding_id=run, dimensions=embedder.dimensions)
        pause = await self._build(embedder.model, embedder.dimensions, "chunk_embeddings")
        if pause is None:
            await self._do("make_reembedding_ready", reembedding_id=run)
        return pause

    async def _build(self, model: str, dimensions: int, table: Table) -> float | None:
        try:
            outcome = await look_after_index(self._settings, model, dimensions, table=table, even_under_load=True)
        except psycopg.Error as error:
            await self._tell(model, f"its vector index could not be built: {describe(error)}")
            return FAILED_SECONDS
        if outcome == "not allowed":
            await self._tell(model, NOT_ALLOWED)
            return FAILED_SECONDS
        return LEAVE_SECONDS if outcome == "busy elsewhere" else None

    async def _move(self) -> float | None:
        row = (await self._rows("move_embeddings", after=self._moved_to, most=MOVED))[0]
        await faults.at("reembed:moved", row["last_doc"] or "")
        if row["last_doc"] is None:
            # What is left is held by somebody, unless all is done.
            started, self._moved_to = self._moved_to == "", ""
            return None if started else AGAIN_SECONDS
        if row["moved"] < MOVED:
            self._moved_to = row["last_doc"]
        return None

    async def _settle(self, run: int) -> float | None:
        """Index the set where it lies now, in document_chunks, and let searches go there."""
        row = (await self._rows("find_reembedding", reembedding_id=run))[0]
        pause = await self._build(row["to_model"], row["dimensions"], "document_chunks")
        if pause is None:
            await self._do("settle_embeddings", reembedding_id=run)
        return pause

    async def _end(self, step: str, run: int) -> float | None:
        """Drop the index of what lay aside, and close the run."""
        row = (await self._rows("find_reembedding", reembedding_id=run))[0]
        if row["dimensions"] is not None:
            pause = await self._drop(row["to_model"], row["to_model"], row["dimensions"], "chunk_embeddings")
            if pause is not None:
                return pause
        await self._do("complete_reembedding" if step == "finish" else "forget_reembedding", reembedding_id=run)
        return None

    async def _drop(self, goes_to: str, model: str, dimensions: int, table: Table) -> float | None:
        """Drop a model's index for the run that goes over to a model; return None, or seconds to wait where this worker may not."""
        if await drop_index(self._settings, model, dimensions, table):
            return None
        await self._tell(goes_to, NOT_ALLOWED)
        return FAILED_SECONDS

    async def _tell(self, model: str, message: str) -> None:
        """Say in the run's row what keeps it."""
        logger.warning("Re-embedding to {}: {}", model, message)
        await self._do("note_reembedding_trouble", embedding_model=model, message=message[:1000], worker=self._worker)

    async def _rows(self, name: str, **params: Any) -> list[Row]:
        async with self._pool.connection() as conn:
            return await rows(conn, name, params)

    async def _do(self, name: str, **params: Any) -> None:
        async with self._pool.connection() as conn:
            await conn.execute(query(name), params)


@app.task(name="reembed", queue=EMBED_QUEUE, queueing_lock="reembed", priority=-10, pass_context=True)
async def reembed(context: JobContext) -> None:
    """Work on re-embedding for a slice and queue the next one. A lost job is made up for by the reconciler of any worker."""
    part = Slice(
        app.settings,
        app.pool,
        worker=app.worker_name,
        stopping=app.stopping,
        find_embedder=lambda settings, model: embedder_of(settings, model, services.caller("embedding")),
        company=company,
    )
    delay = await part.run()
    if delay is not None:
        async with app.pool.connection() as conn:
            await one(conn, "queue_reembedding", {"delay": delay, "job_id": context.job.id})
