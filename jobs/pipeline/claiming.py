"""How a job gets its document, and with it others that wait like it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.pipeline.claims import Connection, NotClaimed, claim_document, take_along
from jobs.pipeline.durable import LAST_WAIT, Locked, when_free
from jobs.pipeline.work import Work
from models.errors import PermanentError
from models.settings import Settings
from models.stages import STAGE_BY_NAME, Stage
from sql import query

_LOCK_MS = 200
_SMALL_KB = 64
"""What a document may weigh that is taken along."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the runner needs to know of the procrastinate job that it runs for."""

    id: int
    stage: str
    queues: frozenset[str] | None
    """The queues that this worker listens to; None for all."""

    def listens_to(self, stage: Stage) -> bool:
        """Say whether this worker runs such a stage."""
        return self.queues is None or stage.queue in self.queues


class NotPutOff(Exception):
    """Another transaction is putting the document into the queue, and may end well or not. `delay` is what was asked for, in seconds."""

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.delay = delay


class Claiming:
    """Claims for one worker."""

    def __init__(
        self,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        *,
        worker: str,
        stopping: Callable[[], bool],
        may_share: bool,
        claimed: Callable[[], None],
    ) -> None:
        """`may_share`: whether working on several small documents at once is quick, or waits for requests that they share. `claimed` is
        called once a job has its documents, or gets none."""
        self._settings, self._pool, self._worker, self._stopping = settings, pool, worker, stopping
        self._claimed = claimed
        self.takes_along = frozenset(STAGE_BY_NAME) if may_share and settings.small_documents_together > 1 else frozenset[str]()
        """Stages for which small documents are taken up together."""

    async def claim(self, job: Job, doc_id: str) -> tuple[list[Work], bool]:
        """Return the document, and after it those that are taken along, or nothing where it cannot be had and its job has no more to do.

        And whether this was cancelled meanwhile: a claim that nobody knows of would pass for a crash when its lease ends.
        PermanentError: there is no such document. NotPutOff: it is to be looked at again, and its job could not be put off.
        """
        claiming = asyncio.ensure_future(self._claim(job, doc_id))
        try:
            return await asyncio.shield(claiming), False
        except asyncio.CancelledError:
            if not (await asyncio.wait([claiming], timeout=LAST_WAIT))[0]:
                claiming.cancel()  # the database does not answer, and this worker must stop
                raise
            if claiming.cancelled() or claiming.exception() or not claiming.result():
                raise
            return claiming.result(), True
        finally:
            self._claimed()

    async def _claim(self, job: Job, doc_id: str) -> list[Work]:
        settings = self._settings
        async with self._pool.connection() as conn:
            if self._stopping():
                await self._put_off(conn, job, doc_id, 0.0)
                return []
            work = await claim_document(
                conn,
                doc_id,
                job_id=job.id,
                worker=self._worker,
                lease_seconds=settings.lease_seconds,
                reconcile_seconds=settings.reconcile_seconds,
                serialise=settings.duplicate_policy != "process",
            )
            if not isinstance(work, NotClaimed):
                await faults.at("claimed", doc_id)
                return [work, *await self._take_along(conn, job, work)]
            if work.deleted:
                return []
            if work.state is None:
                raise PermanentError(f'There is no document with doc_id "{doc_id}".')
            if work.wait_seconds is not None:
                await self._put_off(conn, job, doc_id, work.wait_seconds)
                why = f"waits for {work.waits_for}, which is equal" if work.waits_for else "cannot be had now"
                logger.bind(doc_id=doc_id, stage=job.stage).info("The document {}; looking again in {:.0f} s", why, work.wait_seconds)
            return []

    async def say_alone(self, work: Work) -> None:
        """Note that the document has its worker to itself from now on. Locked: another transaction holds it."""

        async def say() -> None:
            async with self._pool.connection() as conn:
                await conn.execute(query("claim_alone"), {"doc_id": work.document.doc_id, "claim": work.claim})

        try:
            await when_free(work, say, give_up=lambda: True)
        except Locked as error:
            raise Locked(f"{work.document.file_name}: another transaction holds the document.") from error

    async def _take_along(self, conn: Connection, job: Job, work: Work) -> list[Work]:
        """Claim small documents that wait like this one."""
        settings = self._settings
        if job.stage not in self.takes_along or work.suspect or work.retry_count or self._stopping():
            return []
        if work.document.milestone is not STAGE_BY_NAME[job.stage].due_at or (work.document.file_size or 0) > _SMALL_KB * 1000:
            return []
        works = await take_along(
            conn,
            work,
            worker=self._worker,
            lease_seconds=settings.lease_seconds,
            serialise=settings.duplicate_policy != "process",
            at_most=settings.small_documents_together - 1,
            max_kb=_SMALL_KB,
            max_documents=settings.max_documents_per_user,
        )
        for taken in works:
            await faults.at("claimed", taken.document.doc_id)
        return works

    async def _put_off(self, conn: Connection, job: Job, doc_id: str, delay: float) -> None:
        try:
            async with conn.transaction():
                await conn.execute(query("limit_lock_waits"), {"milliseconds": _LOCK_MS})
                await conn.execute(query("put_off_stage"), {"doc_id": doc_id, "stage": job.stage, "delay": delay})
        except Locked as error:
            raise NotPutOff(delay) from error

    async def give_back(self, job: Job, doc_id: str) -> None:
        """Let another worker have the document. NotPutOff: as of `claim`."""
        self._claimed()
        async with self._pool.connection() as conn:
            await self._put_off(conn, job, doc_id, LAST_WAIT)
        logger.bind(doc_id=doc_id, stage=job.stage).info("The document goes back into the queue: another one is alone in this worker")

    async def put_off_later(self, job: Job, doc_id: str, delay: float) -> None:
        """Put the job off once that transaction has ended, or leave it to the reconciler where this worker stops before.

        Until then the job is one that was fetched, so that its document is not taken for one whose job was lost.
        """
        while not self._stopping():
            await asyncio.sleep(LAST_WAIT)
            with suppress(NotPutOff):
                async with self._pool.connection() as conn:
                    await self._put_off(conn, job, doc_id, delay)
                return
