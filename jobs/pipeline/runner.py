"""Runs a document through its stages: claim, run, carry, checkpoint, hand on. Failure has one path."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import clock, faults
from jobs.adapters.usage import measured
from jobs.leases import Lease, LeaseKeeper
from jobs.logs import bound
from jobs.pipeline.checkpoint import CheckpointFailed, FencedOff, Outcome, checkpoint_durably
from jobs.pipeline.claims import Connection, NotClaimed, claim_document, load_document
from jobs.pipeline.company import Company
from jobs.pipeline.details import stage_detail
from jobs.pipeline.failure import describe_failure, failure_event, fenced_params, outcome_of
from jobs.pipeline.work import StageEvent, Work
from jobs.redaction import describe
from jobs.retry import StageRetry
from jobs.stages import Tools, check, chunk, embed, extract, finalize, parse, validate
from models.documents import Document
from models.errors import PermanentError
from models.errors import TimeoutError as StageTimeout
from models.settings import Settings
from models.stages import Stage, State, due_stage
from sql import query

StageFunction = Callable[[Document, Tools], Awaitable[Document]]

STAGE_FUNCTIONS: dict[str, StageFunction] = {
    "validate": validate.run,
    "parse": parse.run,
    "check": check.run,
    "chunk": chunk.run,
    "embed": embed.run,
    "extract": extract.run,
    "finalize": finalize.run,
}


@dataclass(frozen=True, slots=True)
class Job:
    """What the runner needs to know of the procrastinate job that it runs for."""

    id: int
    stage: str
    queues: frozenset[str] | None
    """The queues that this worker listens to; None for all."""


class Runner:
    """Runs the documents of one worker process."""

    def __init__(
        self,
        *,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        tools: Tools,
        leases: LeaseKeeper,
        retry: StageRetry,
        worker: str,
        stopping: Callable[[], bool],
        finished_jobs: set[int],
        stages: dict[str, StageFunction] | None = None,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._tools = tools
        self._leases = leases
        self._retry = retry
        self._worker = worker
        self._stopping = stopping
        self._finished_jobs = finished_jobs
        self._stages = stages or STAGE_FUNCTIONS
        self._company = Company()

    async def run(self, job: Job, doc_id: str) -> None:
        """Work on a document for a job until it ends, waits or must be handed on. Returns well however the document fares."""
        async with self._company.shared():
            claimed_at = clock.seconds()
            work = await self._claim(job, doc_id)
            if work is None:
                return
            lease = self._hold(work, claimed_at)
            if not work.suspect:
                await self._work(job, work, lease)
                return
        await self._work(job, work, lease)

    async def _claim(self, job: Job, doc_id: str) -> Work | None:
        settings = self._settings
        async with self._pool.connection() as conn:
            if self._stopping():
                await self._put_off(conn, job, doc_id, 0.0)
                return None
            work = await claim_document(
                conn,
                doc_id,
                job_id=job.id,
                worker=self._worker,
                lease_seconds=settings.lease_seconds,
                reconcile_seconds=settings.reconcile_seconds,
            )
            if not isinstance(work, NotClaimed):
                await faults.at("claimed", doc_id)
                return work
            if work.state is None:
                raise PermanentError(f'There is no document with doc_id "{doc_id}".')
            if work.wait_seconds is not None:
                await self._put_off(conn, job, doc_id, work.wait_seconds)
                logger.bind(doc_id=doc_id).info("The document cannot be had now; looking again in {:.0f} s", work.wait_seconds)
            return None

    async def _put_off(self, conn: Connection, job: Job, doc_id: str, delay: float) -> None:
        await conn.execute(query("put_off_stage"), {"doc_id": doc_id, "stage": job.stage, "delay": delay})

    async def _work(self, job: Job, work: Work, lease: Lease) -> None:
        document = work.document
        with bound(doc_id=document.doc_id, batch_id=document.batch_id, correlation_id=document.correlation_id, worker=self._worker):
            try:
                await self._carry(job, work, lease)
            finally:
                self._leases.release(lease)
        if document.batch_id is not None and not work.fenced:
            async with self._pool.connection() as conn:
                await conn.execute(query("settle_batch"), {"batch_id": document.batch_id})

    def _hold(self, work: Work, claimed_at: float) -> Lease:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def lost(superseded: bool) -> None:
            work.fenced = superseded
            if task is not None:
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
                    loop.call_soon_threadsafe(task.cancel)

        return self._leases.hold(work.document.doc_id, work.claim, claimed_at=claimed_at, on_lost=lost)

    async def _carry(self, job: Job, work: Work, lease: Lease) -> None:
        """Run stage after stage until the document ends or leaves this worker; whatever stops it takes the one failure path."""
        stage = due_stage(work.document.milestone)
        try:
            if stage is not None and not self._listens(job.queues, stage):
                await self._leave(work, lease, stage)
                return
            async with self._place(work):
                await self._load(work)
                while stage is not None:
                    with bound(stage=stage.name, attempt=work.attempt_at(stage.due_at)):
                        elapsed = await self._run_stage(stage, work, lease)
                        stage = await self._after(job, stage, work, lease, elapsed)
        except FencedOff:
            await self._tell_fenced(work, stage)
        except asyncio.CancelledError:
            await self._on_cancel(work, lease, stage)
        except CheckpointFailed as error:
            # The results may be what could not be written, so they are dropped; what the database has stays.
            work.document = work.saved
            work.events.clear()
            await self._fail(work, lease, due_stage(work.saved.milestone), error.cause)
        except Exception as error:
            await self._fail(work, lease, stage, error)

    async def _load(self, work: Work) -> None:
        """Take in what earlier checkpoints stored: under the lease and, for a suspect, alone, because a large one can cost the process."""
        async with self._pool.connection() as conn:
            work.document = work.saved = await load_document(conn, work.document)
        work.buffered = work.document.chunks is not None

    @asynccontextmanager
    async def _place(self, work: Work) -> AsyncIterator[None]:
        """From its first crash on a document has its worker to itself, so that the next crash can be no other's fault."""
        if not work.suspect:
            yield
            return
        async with self._company.alone():
            async with self._pool.connection() as conn:
                await conn.execute(query("claim_alone"), {"doc_id": work.document.doc_id, "claim": work.claim})
            yield

    async def _run_stage(self, stage: Stage, work: Work, lease: Lease) -> float:
        """Run one stage, note its event, and return how long it took in seconds."""
        started = clock.seconds()
        limit = self._settings.stage_timeout_seconds
        lease.deadline = started + limit
        attempt = work.attempt_at(stage.due_at)
        with measured() as usage:
            try:
                async with asyncio.timeout(limit) as deadline:
                    await faults.at(f"stage_started:{stage.name}", work.document.doc_id)
                    document = await self._stages[stage.name](work.document, self._tools)
                    await faults.at(f"stage_done:{stage.name}", work.document.doc_id)
            except TimeoutError as error:
                if not deadline.expired():
                    raise
                raise StageTimeout(f"{work.document.file_name}: {stage.name} took longer than STAGE_TIMEOUT_SECONDS={limit:g}.") from error
        elapsed = clock.seconds() - started
        work.document = replace(document, milestone=stage.reaches)
        work.events.append(
            StageEvent(
                "completed" if stage.name == "finalize" else "stage_completed",
                stage.name,
                attempt,
                round(elapsed * 1000, 3),
                round(usage.cpu_ms, 3),
                round(usage.peak_memory_mb, 1) or None,
                stage_detail(stage.name, work.document),
            )
        )
        return elapsed

    async def _after(self, job: Job, stage: Stage, work: Work, lease: Lease, elapsed: float) -> Stage | None:
        """Checkpoint if it pays and return the next stage to run here, or None when the document is done or has left."""
        following = due_stage(work.document.milestone)
        if following is None:
            await self._checkpoint(work, Outcome(State.COMPLETE), lease)
            logger.success("{} is complete: {} passages", work.document.file_name, len(work.document.chunks or ()))
            return None
        if self._settings.handoff == "queue" or self._stopping() or not self._listens(job.queues, following):
            await self._leave(work, lease, following)
            return None
        if work.suspect or elapsed >= self._settings.checkpoint_seconds or work.carried_bytes() > self._settings.carry_limit_mb * 1_000_000:
            await self._checkpoint(work, Outcome(State.WORKING), None)
        return following

    async def _leave(self, work: Work, lease: Lease, following: Stage) -> None:
        retry_count = work.attempt_at(work.document.milestone)
        await self._checkpoint(work, Outcome(State.QUEUED, next_stage=following.name, retry_count=retry_count), lease)

    async def _checkpoint(self, work: Work, outcome: Outcome, lease: Lease | None, *, patient: bool = False) -> None:
        """Make the work durable. `lease` is given when the work ends here; it is renewed until then, and its end is no loss."""
        if lease is not None:
            lease.on_lost = _nobody_minds
        await faults.at(f"before_checkpoint:{work.document.milestone}", work.document.doc_id)
        writing = asyncio.ensure_future(
            checkpoint_durably(self._pool, work, outcome, worker=self._worker, give_up=self._stopping, patient=patient)
        )
        cancelled = False
        while not writing.done():
            try:
                # A cancellation waits: a transaction cut off at its commit would leave open what became of it.
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                if writing.cancelled():
                    raise
                cancelled = True
            except Exception:
                break
        writing.result()
        if outcome.state is not State.WORKING:
            work.ended = True
            self._finished_jobs.add(work.job_id)
        if cancelled:
            raise asyncio.CancelledError
        await faults.at(f"after_checkpoint:{work.document.milestone}", work.document.doc_id)

    async def _fail(self, work: Work, lease: Lease, stage: Stage | None, error: Exception) -> None:
        """The one failure path: keep what was done before, record the error, and defer the stage again or write the dead letter."""
        if stage is None:
            raise error
        attempt = work.attempt_at(stage.due_at)
        plan = self._retry.plan(error, attempt)
        failure = describe_failure(work.document, stage.name, error, attempt=attempt, worker=self._worker)
        work.events.append(failure_event(failure, plan, attempt))
        try:
            await self._checkpoint(work, outcome_of(plan, failure, attempt), lease, patient=True)
        except FencedOff:
            await self._tell_fenced(work, stage)
            return
        with bound(stage=stage.name, attempt=attempt):
            if plan is None:
                logger.error("{} failed: {}", failure.error_type, failure.message)
            else:
                logger.warning("{}, trying again in {:.1f} s: {}", failure.error_type, plan.delay, failure.message)

    async def _on_cancel(self, work: Work, lease: Lease, stage: Stage | None) -> None:
        """A claim that has gone drops the work; a shutdown, or a lease that could not be renewed, hands it on at once without counting."""
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        if work.fenced:
            await self._tell_fenced(work, stage)
            return
        if work.ended:
            return
        following = due_stage(work.document.milestone)
        if following is None:
            # Finished but not written, and there is no more time: what the database has is where it goes on.
            work.document = work.saved
            work.events.clear()
            following = due_stage(work.document.milestone)
        if following is None:
            return
        attempt = work.attempt_at(following.due_at)
        work.events.append(StageEvent("handed_on", following.name, attempt, detail={"reason": self._why_cancelled()}))
        try:
            await self._leave(work, lease, following)
        except FencedOff:
            await self._tell_fenced(work, following)

    def _why_cancelled(self) -> str:
        return "the worker stops" if self._stopping() else "the lease could not be renewed in time"

    async def _tell_fenced(self, work: Work, stage: Stage | None) -> None:
        work.fenced = True
        name = stage.name if stage else None
        logger.warning("The claim has moved on; the work on {} is dropped", name)
        try:
            async with self._pool.connection() as conn:
                await conn.execute(query("tell_event"), fenced_params(work, name, self._worker))
        except psycopg.Error as error:
            logger.warning("The audit trail could not be told of it: {}", describe(error))

    @staticmethod
    def _listens(queues: Iterable[str] | None, stage: Stage) -> bool:
        return queues is None or stage.queue in queues


def _nobody_minds(superseded: bool) -> None:
    """For a lease whose work is being written for the last time: fencing decides, not the lease."""
