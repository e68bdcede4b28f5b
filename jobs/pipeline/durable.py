"""A checkpoint that is written whatever the database goes through meanwhile, or said not to be."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Protocol, TypeVar

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from jobs import clock, faults
from jobs.pipeline.checkpoint import FencedOff, Outcome, StaleVectors, advance_free, checkpoint
from jobs.pipeline.claims import Connection, one
from jobs.pipeline.completing import complete_free
from jobs.pipeline.rows import has_new_text
from jobs.pipeline.together import NotTogether
from jobs.pipeline.work import SMALL_BYTES, Work
from jobs.redaction import describe
from jobs.retry import calculate_backoff, classify_error, is_away
from models.errors import ErrorType
from models.stages import State

T = TypeVar("T")
Locked = psycopg.errors.LockNotAvailable
"""Another transaction holds the document."""


class CheckpointFailed(Exception):
    """The checkpoint could not be written, and trying again at once does not help."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause

    @property
    def refuses_results(self) -> bool:
        """Whether it may be what was to be stored that cannot be: then less can."""
        return not is_away(self.cause) and not isinstance(self.cause, Locked)


class _WriteFree(Protocol):
    async def __call__(self, works: Sequence[Work], conn: Connection, *, worker: str) -> set[str]: ...


_TRIES = 4  # of a checkpoint that the database answers with a deadlock, a full disk and the like
_LONGEST_PAUSE = 5.0  # seconds
_SHORTEST_PAUSE = 0.05
LAST_WAIT = 3.0  # seconds that a worker may wait beyond the moment at which it must stop


@asynccontextmanager
async def connection(pool: AsyncConnectionPool[Connection], stopping: Callable[[], bool]) -> AsyncIterator[Connection]:
    """Yield a connection, or raise PoolTimeout: after the pool's time, or once `stopping` says so after LAST_WAIT at the latest.

    A worker that must stop has no time to wait for a database that is away, also where it is asked to while it waits.
    """
    end = clock.seconds() + pool.timeout
    async with AsyncExitStack() as stack:
        while True:
            try:
                conn = await stack.enter_async_context(pool.connection(timeout=min(LAST_WAIT, pool.timeout)))
                break
            except PoolTimeout:
                if stopping() or clock.seconds() >= end:
                    raise
        yield conn


async def when_free(work: Work, write: Callable[[], Awaitable[T]], give_up: Callable[[], bool]) -> T:
    """Return what `write` returns, run again while it raises Locked: no connection is held meanwhile, and the document's place is lent.

    Who holds it may be an application that is in no hurry, so nobody waits for this document meanwhile. After a few tries Locked is raised
    once `give_up` says so.
    """
    attempt = 0
    while True:
        try:
            return await write()
        except Locked:
            attempt += 1
            if attempt >= _TRIES and give_up():
                raise
            work.part()
            if attempt == _TRIES:
                logger.warning("Another transaction holds the document (sql/inspect/22_blocked.sql says whose); what was made of it waits")
            pause = calculate_backoff(attempt - 1, _SHORTEST_PAUSE, LAST_WAIT)
            work.advanced = True
            # To come back takes as long as another document is alone in this worker, and what is waited for is not the stage's time.
            began, deadline, work.lease.deadline = clock.seconds(), work.lease.deadline, math.inf
            try:
                # A large one keeps its place, so that no more of them come to lie in memory.
                with nullcontext() if work.carried_bytes() > SMALL_BYTES else work.place.waiting(0.0):
                    async with work.entry.away():
                        await asyncio.sleep(pause)
            finally:
                work.lease.deadline = deadline + clock.seconds() - began


async def checkpoint_durably(
    pool: AsyncConnectionPool[Connection],
    work: Work,
    outcome: Outcome,
    *,
    worker: str,
    give_up: Callable[[], bool],
    patient: bool = False,
) -> None:
    """Write a checkpoint or raise FencedOff, StaleVectors or CheckpointFailed.

    A database that is away is waited for, however long (until `give_up` says that the worker must stop): what was done would be lost
    otherwise. So is the end of a transaction that holds the document. An error that the database answers with is tried again a few times
    if that can help; with `patient`, until it is written or `give_up`: a failure that is not recorded would pass for a crash.
    """
    attempt = 0
    sends_much = has_new_text(work) and len(work.document.markdown or "") > SMALL_BYTES
    if work.together is not None and (write := _for_several(outcome)) is not None:
        try:
            await work.together.ask((outcome, work.document.milestone), work, partial(_write_all, write, pool, worker, give_up))
        except NotTogether as alone:
            attempt = int(alone.tried)
        else:
            _mark_saved(work, outcome)
            return

    async def write_alone() -> None:
        async with connection(pool, give_up) as conn:
            if sends_much:
                _expire(conn)
            # A connection that broke at the commit does not say whether it was written.
            if attempt == 0 or not await _was_written(conn, work, outcome):
                await checkpoint(conn, work, outcome, worker=worker)
                await faults.at(f"committed:{work.document.milestone}", work.document.doc_id)
            _mark_saved(work, outcome)

    while True:
        try:
            await when_free(work, write_alone, lambda: give_up() and work.hurried)
            return
        except Locked as error:
            raise CheckpointFailed(error) from error
        except psycopg.Error as error:
            answered = not is_away(error)
            enough = give_up() if not answered else attempt + 1 >= _TRIES and (not patient or give_up())
            if enough or classify_error(error) is not ErrorType.RETRYABLE:
                raise CheckpointFailed(error) from error
            pause = calculate_backoff(attempt, 0.1, _LONGEST_PAUSE)
            logger.warning("The checkpoint was not written, trying again in {:.1f} s: {}", pause, describe(error))
            await asyncio.sleep(pause)
            attempt += 1
        except (FencedOff, StaleVectors):
            raise
        except Exception as error:
            # What cannot even be sent: text that is no UTF-8, an array of the wrong length, no memory.
            raise CheckpointFailed(error) from error


def _for_several(outcome: Outcome) -> _WriteFree | None:
    """Return how a checkpoint is written for several documents at once that it leaves alike, or None: each has its own."""
    if outcome.state is State.COMPLETE:
        return complete_free
    return partial(advance_free, outcome=outcome) if outcome.state in (State.WORKING, State.QUEUED) else None


def _expire(conn: Connection) -> None:
    """Have the pool replace a connection when it comes back, as one that is too old: it keeps a buffer as large as the largest statement
    that it has sent. The pool offers no other way that closes this one alone, and warns of one that comes back closed."""
    conn._expire_at = 0.0


async def _write_all(
    write: _WriteFree, pool: AsyncConnectionPool[Connection], worker: str, give_up: Callable[[], bool], works: Sequence[Work]
) -> Sequence[NotTogether | None]:
    """Who is fenced off, or locked by somebody's transaction, asks alone: it finds out, or waits with nobody else in hand."""
    async with connection(pool, give_up) as conn:
        done = await write(works, conn, worker=worker)
        for work in works:
            if work.document.doc_id in done:
                await faults.at(f"committed:{work.document.milestone}", work.document.doc_id)
    return [None if work.document.doc_id in done else NotTogether() for work in works]


async def _was_written(conn: Connection, work: Work, outcome: Outcome) -> bool:
    """Say whether the database already holds what this checkpoint is to write, also where the document has gone on since."""
    row = await one(conn, "look_at_document", {"doc_id": work.document.doc_id})
    if row is None:
        return False
    if row["claim"] != work.claim:
        # Its events were written with it, under our claim.
        last = work.events[-1] if work.events else None
        told = {"doc_id": work.document.doc_id, "claim": work.claim, "stage": last and last.stage, "event": last and last.event}
        return last is not None and await one(conn, "find_told_event", told) is not None
    target = (work.document.milestone, outcome.state)
    return (row["milestone"], row["state"]) == target and target != (work.saved.milestone, State.WORKING)


def _mark_saved(work: Work, outcome: Outcome) -> None:
    if work.saved.milestone != work.document.milestone:
        work.waiting_since = None
    work.saved = work.document
    work.retry_count = outcome.retry_count
    work.paid = False
    work.events.clear()
