"""How work on a document ends in this worker: kept, handed on, complete, failed, cut short or fenced off. Failure has one path."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.leases import nobody_minds
from jobs.logs import bound
from jobs.pipeline.checkpoint import FencedOff, Outcome
from jobs.pipeline.claims import Connection
from jobs.pipeline.copying import Copier
from jobs.pipeline.durable import CheckpointFailed, checkpoint_durably, connection
from jobs.pipeline.failure import describe_failure, failure_event, fenced_params, outcome_of
from jobs.pipeline.keeping import unbroken
from jobs.pipeline.work import StageEvent, Work
from jobs.redaction import describe
from jobs.retry import StageRetry
from models.stages import Stage, State, due_stage
from sql import query


class Endings:
    """Writes the checkpoints of one worker."""

    def __init__(
        self,
        pool: AsyncConnectionPool[Connection],
        *,
        retry: StageRetry,
        worker: str,
        stopping: Callable[[], bool],
        finished_jobs: set[int],
        copier: Copier | None = None,
    ) -> None:
        """`finished_jobs` is told the ids of jobs whose row a checkpoint has finished, `copier` of documents whose text has come to be
        served, or no longer is."""
        self._pool = pool
        self._retry = retry
        self._worker = worker
        self._stopping = stopping
        self._finished_jobs = finished_jobs
        self._copier = copier

    async def leave(self, work: Work, following: Stage) -> None:
        """Hand the document on to its next stage's queue, with those that it was taken up with where it has not parted from them."""
        retry_count = work.attempt_at(work.document.milestone)
        await self._checkpoint(work, Outcome(State.QUEUED, next_stage=following.name, retry_count=retry_count))
        logger.bind(duration_ms=work.taken_ms()).debug("{} is handed on to {}", work.document.file_name, following.name)

    async def keep(self, work: Work) -> None:
        """Make what has been done durable and go on."""
        await self._checkpoint(work, Outcome(State.WORKING))

    async def complete(self, work: Work) -> None:
        """Swap the finished version in."""
        await self._checkpoint(work, Outcome(State.COMPLETE))
        told = logger.bind(duration_ms=work.taken_ms(), passages=len(work.document.chunks or ()))
        told.success("{} is complete: {} passages", work.document.file_name, len(work.document.chunks or ()))

    async def skip(self, work: Work, original: str) -> None:
        """End a document as a duplicate, without rows of its own."""
        work.part()
        work.document = replace(work.document, duplicate_of=original)
        work.events.append(StageEvent("duplicate", detail={"duplicate_of": original}))
        await self._checkpoint(work, Outcome(State.DUPLICATE))
        logger.bind(duration_ms=work.taken_ms()).success("{} is a duplicate of {}", work.document.file_name, original)

    async def _checkpoint(self, work: Work, outcome: Outcome, *, patient: bool = False) -> None:
        """Make the work durable. Where it ends here, its lease is renewed until then, and the lease's end is no loss."""
        if outcome.state is not State.WORKING:
            work.lease.on_lost, work.lease.deadline = nobody_minds, math.inf
        await faults.at(f"before_checkpoint:{work.document.milestone}", work.document.doc_id)
        # A cancellation waits: a transaction cut off at its commit would leave open what became of it.
        _, cancelled = await unbroken(
            work,
            checkpoint_durably(self._pool, work, outcome, worker=self._worker, give_up=self._stopping, patient=patient),
            self._stopping,
        )
        if outcome.state is not State.WORKING:
            work.ended = True
            self._finished_jobs.add(work.job_id)
        if self._copier is not None and outcome.state in (State.COMPLETE, State.DUPLICATE):
            self._copier.add(work, served=outcome.state is State.COMPLETE)
        if cancelled:
            raise asyncio.CancelledError
        await faults.at(f"after_checkpoint:{work.document.milestone}", work.document.doc_id)

    async def fail(self, work: Work, stage: Stage | None, error: Exception) -> None:
        """The one failure path: keep what was done before, record the error, and defer the stage again or write the dead letter."""
        if stage is None:
            raise error
        work.part()
        attempt, waited = work.attempt_at(stage.due_at), work.waited_at(stage.due_at)
        error = self._retry.judge(error, waited)
        plan = self._retry.plan(error, attempt, waited)
        plan = plan and self._retry.within_wait(plan, waited)
        failure = describe_failure(work.document, stage.name, error, attempt=attempt, worker=self._worker)
        work.events.append(failure_event(failure, plan, attempt, work.used))
        try:
            await self._checkpoint(work, outcome_of(plan, failure, attempt), patient=True)
        except FencedOff:
            await self.tell_fenced(work, stage)
            return
        except CheckpointFailed as refused:
            if not refused.refuses_results or work.document is work.saved:
                raise
            await self.fail_without_results(work, refused)
            return
        with bound(stage=stage.name, attempt=attempt, error_type=failure.error_type, duration_ms=work.stage_taken_ms()):
            if plan is None:
                logger.error("{} failed: {}", failure.error_type, failure.message)
            else:
                # Waiting for a budget or a breaker is as it should be, and whole backlogs do it at once.
                level = "WARNING" if plan.counts else "INFO"
                logger.log(level, "{}, trying again in {:.1f} s: {}", failure.error_type, plan.delay, failure.message)

    async def fail_without_results(self, work: Work, refused: CheckpointFailed) -> None:
        """Fail with what kept a checkpoint from being written. It may be the results, so they are dropped; what the database has stays.
        Where they are not to blame this worker stops, and has waited as long as it may: that is raised."""
        if not refused.refuses_results:
            raise refused
        _drop_results(work)
        await self.fail(work, due_stage(work.saved.milestone), refused.cause)

    async def cancelled(self, work: Work, stage: Stage | None) -> None:
        """A claim that has gone drops the work; a shutdown, or a lease that could not be renewed, hands it on at once without counting."""
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        work.hurried = self._stopping()
        if work.fenced:
            await self.tell_fenced(work, stage)
            return
        if work.ended:
            return
        following = due_stage(work.document.milestone)
        if following is None:
            # Finished but not written, and there is no more time: what the database has is where it goes on.
            _drop_results(work)
            following = due_stage(work.document.milestone)
        if following is None:
            return
        try:
            try:
                await self._hand_on(work, following)
            except CheckpointFailed as refused:
                if not refused.refuses_results or work.document is work.saved:
                    raise
                _drop_results(work)
                following = due_stage(work.saved.milestone) or following
                await self._hand_on(work, following)
        except FencedOff:
            await self.tell_fenced(work, following)

    async def _hand_on(self, work: Work, following: Stage) -> None:
        work.part()
        attempt = work.attempt_at(following.due_at)
        work.events.append(StageEvent("handed_on", following.name, attempt, detail={"reason": self._why_cancelled()}))
        await self.leave(work, following)

    def _why_cancelled(self) -> str:
        return "the worker stops" if self._stopping() else "the lease could not be renewed in time"

    async def end_job(self, work: Work) -> None:
        """End the job of a document that was taken along, which procrastinate's worker does not know of, where no checkpoint has.

        One that cannot be ended is left to the reconciler.
        """
        if work.job_id in self._finished_jobs:
            self._finished_jobs.discard(work.job_id)
        elif work.fenced:
            with suppress(psycopg.Error):
                async with connection(self._pool, self._stopping) as conn:
                    await conn.execute(query("end_job"), {"job_id": work.job_id})

    async def tell_fenced(self, work: Work, stage: Stage | None) -> None:
        """Drop the work and say so in the audit trail."""
        work.fenced = True
        work.part()
        name = stage.name if stage else None
        logger.bind(stage=name, duration_ms=work.taken_ms()).warning("The claim has moved on; the work on {} is dropped", name)
        # The lease of what is not ours any more is lost too, which cancels this task: it has ended already.
        _, cancelled = await unbroken(work, self._tell(fenced_params(work, name, self._worker)), self._stopping)
        task = asyncio.current_task()
        if cancelled and task is not None:
            task.uncancel()

    async def _tell(self, event: dict[str, Any]) -> None:
        try:
            async with connection(self._pool, self._stopping) as conn:
                await conn.execute(query("tell_event"), event)
        except psycopg.Error as error:
            logger.warning("The audit trail could not be told of it: {}", describe(error))


def _drop_results(work: Work) -> None:
    """Go back to what the database has."""
    work.document = work.saved
    work.events.clear()
