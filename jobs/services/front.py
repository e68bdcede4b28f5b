"""One outside service as adapters call it: breaker, budget and intent before the call, outcome and cost after it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from loguru import logger

from jobs import clock, faults
from jobs.adapters.exchange.told import pause_told, retry_after
from jobs.outages import cancel_later, outlive
from jobs.services.ledger import Entry, Ledger, new_entry
from jobs.services.limits import limit_reached
from jobs.services.outcomes import BLAMES_SERVICE, Outcome, outcome_of
from jobs.services.state import Pass, Pool, SharedBreaker, one
from jobs.services.terms import Terms
from models.calls import CallPurpose, Reply
from models.errors import DocmillError, NotSent, PermanentError, RateLimitError, RetryableError, ServiceUnavailable, Turn

T = TypeVar("T")
_RESENDS = 2  # of a call that was answered 429 with a pause that is short enough to wait for
_LOOK_AGAIN = 0.5  # seconds of waiting after which it is asked whether the service may still be called
_SETTLE_SECONDS = 5.0  # that a call waits for its entry before it hands its answer on; the entry is written all the same
_CLOSE_SECONDS = 3.0
LATEST_SECONDS = 2.0
"""How late a call may be sent: the budget's slots cover 66 s, so that it may arrive up to 5 s late, and the way takes time too."""
_MOST_PASSED = 3  # times that others are limited while a call waits for its time, before its document goes back to the queue
_MOST_LATE = 5  # times in a row that a call is ready too late, before its document goes back to the queue


class Service:
    """A service that is called by many coroutines of one worker, and by other workers, on the same terms."""

    def __init__(self, pool: Pool, terms: Terms, *, worker: str, stopping: Callable[[], bool] = lambda: False) -> None:
        self.terms = terms
        self._pool = pool
        self._breaker = SharedBreaker(pool, terms)
        self._ledger = Ledger(pool, terms, worker=worker, stopping=stopping)
        self._stopping = stopping
        self._settling: set[asyncio.Task[Any]] = set()

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Make a call: see models.calls.Caller. Cancelled in mid-call, it stays unknown in the ledger;
        once it is answered, it returns, and the caller is cancelled at its next await."""
        if 0 < self.terms.tokens_per_minute < purpose.tokens:
            raise PermanentError(
                f"A request of {purpose.tokens} tokens to {self.terms.service} can never be sent: "
                f"{self.terms.kind.upper()}_TOKENS_PER_MINUTE is {self.terms.tokens_per_minute}."
            )
        resends = 0
        while True:
            entry = await self._enter(purpose)
            await faults.at("call_entered", _doc(purpose))
            entry = replace(entry, sent_at=clock.seconds())
            try:
                async with asyncio.timeout(self.terms.total_seconds):
                    reply = await send()
                    await faults.at("call_answered", _doc(purpose))
            except asyncio.CancelledError:
                if entry.probes:
                    self._spawn(self._give_up(entry, 0.0))
                raise
            except NotSent as error:
                await self._settle(self._withdraw(entry, error))
                raise
            except Exception as error:
                outcome = outcome_of(error, self.terms)
                told = await self._settle(self._record_failure(entry, outcome))
                soon = told is not None and told.wait_seconds <= self.terms.patience_seconds
                if outcome.word == "rate_limited" and soon and resends < _RESENDS:
                    resends += 1
                    continue
                self._raise(outcome, told, error)
            try:
                await self._settle(self._record_success(entry, reply))
            except asyncio.CancelledError:
                cancel_later()  # it is paid for and entered all the same: whoever called can keep it first
            return reply

    async def _enter(self, purpose: CallPurpose) -> Entry:
        """Return a call that may be sent now and whose intent is written."""
        entry, told, late, passed = new_entry(purpose), None, 0, 0
        while True:
            asked_at = clock.seconds()
            asked = await self._or_withdrawn(entry, self._ledger.begin(entry))
            if asked.hindrance is None:
                entry = replace(entry, send_at=asked.send_at)
                await self._or_withdrawn(entry, asyncio.sleep(asked.wait_seconds))
                looks_again = asked.wait_seconds >= _LOOK_AGAIN and not entry.probes
                if looks_again and not await self._or_withdrawn(entry, self._ledger.passes(entry)):
                    why, passed = "The service may no longer be called.", passed + 1
                elif self._limited() and clock.seconds() - asked_at - asked.wait_seconds > LATEST_SECONDS:
                    # Sent now, it would be counted in another second than the one it falls into, and a minute could hold too many.
                    why, late = "The call was ready too late for the time that the budget gave it.", late + 1
                else:
                    return entry
                await self._settle(self._withdraw(entry, NotSent(why)))
                if passed == _MOST_PASSED:
                    # Of many that wait in hand it may be the same few who are let through each time.
                    words = f"A call to {self.terms.service} was given {passed} times to be sent at, and could not be sent at any of them."
                    raise self._waits(RateLimitError(words, asked.wait_seconds), None)
                if late == _MOST_LATE:
                    raise self._waits(RateLimitError(f"{why} This worker's machine has too much to do.", LATEST_SECONDS), None)
                entry = new_entry(purpose)
            elif asked.hindrance == "cost":
                if entry.probes:
                    await self._settle(self._give_up(entry, 0.0))
                raise limit_reached(asked.over, self.terms)
            elif asked.hindrance == "budget":
                if entry.probes:
                    await self._settle(self._give_up(entry, asked.wait_seconds))
                words = f"The budget of {self.terms.service} is used up; there is room in {asked.wait_seconds:.0f} s."
                raise self._waits(RateLimitError(words, asked.wait_seconds), None)
            else:
                entry, told = await self._let_in(entry, told)

    async def _or_withdrawn(self, entry: Entry, step: Awaitable[T]) -> T:
        """Take a step that comes before a call is sent. Cut off in it, or ended by a worker that stops while the database is away, the call
        was not sent, and must not count as one without an answer: its intent may be written even where the answer to that has not come."""
        try:
            return await step
        except (asyncio.CancelledError, RetryableError):
            self._spawn(self._withdraw(entry, NotSent("The call was not made: whoever it was for did not wait for its time.")))
            raise

    def _limited(self) -> bool:
        return bool(self.terms.requests_per_minute or self.terms.tokens_per_minute)

    async def _let_in(self, entry: Entry, before: Pass | None) -> tuple[Entry, Pass]:
        """Ask the breaker. Cut off meanwhile, the call may be the probe that everybody waits for."""
        try:
            return await self._ask_breaker(entry, before)
        except asyncio.CancelledError:
            self._spawn(self._give_up(entry, 0.0))
            raise

    async def _give_up(self, entry: Entry, seconds: float) -> None:
        """Say that a probe is not sent: the next may be in so many seconds."""
        await outlive("Giving up a probe", lambda: self._breaker.give_up(entry.id, seconds), until=self._stopping)

    async def _ask_breaker(self, entry: Entry, before: Pass | None) -> tuple[Entry, Pass]:
        """Return the call as let through, after a short wait perhaps, and what it was told, or raise ServiceUnavailable."""
        doc_ids = _docs(entry.purpose)
        told = await outlive("Asking the breaker", lambda: self._breaker.ask(entry.id, doc_ids, before), until=self._stopping)
        if told is None or told.wait_seconds > self.terms.patience_seconds:
            wait = None if told is None else told.wait_seconds
            raise self._waits(ServiceUnavailable(f"{self.terms.service} is not called for now: {told and told.reason}", wait), told)
        await asyncio.sleep(told.wait_seconds)
        if told.wait_seconds > 0 and not told.ramps:
            return entry, told  # a probe was under way or due soon: ask again
        await faults.at("probing" if told.probes else "let_in", _doc(entry.purpose))
        return replace(entry, admitted=told.revision, probes=told.probes), told

    def _waits(self, error: DocmillError, told: Pass | None) -> DocmillError:
        """Return the error with what its document waits for: its place at the breaker, or the budget."""
        error.turn = Turn(self.terms.service) if told is None else Turn(self.terms.service, told.revision, told.place)
        return error

    async def _withdraw(self, entry: Entry, error: NotSent) -> None:
        """Enter that a call which was let through is not made, and give back what it was granted."""
        await self._ledger.withdraw(entry, error)
        if entry.probes:
            await self._give_up(entry, 0.0)

    async def _record_success(self, entry: Entry, reply: Reply[Any]) -> None:
        await self._ledger.finish(entry, reply, None)
        if entry.probes:
            await outlive("Closing the breaker", lambda: self._breaker.tell(entry.id, None), until=self._stopping)
        if pause := pause_told(reply.headers, entry.purpose.tokens):
            await self._pause(pause)

    async def _record_failure(self, entry: Entry, outcome: Outcome) -> Pass | None:
        """Return how long the document should wait because of it; None where the failure alone decides."""
        await self._ledger.finish(entry, None, outcome)
        told: Pass | None = None
        doc_ids = _docs(entry.purpose)
        if entry.probes or outcome.word in BLAMES_SERVICE or outcome.word == "refused":
            told = await outlive("Telling the breaker", lambda: self._breaker.tell(entry.id, outcome, doc_ids), until=self._stopping)
        if outcome.word == "failed" and (asked := retry_after(outcome.headers or {})):
            await self._pause(min(asked, self.terms.rules.max_open_seconds))
        if outcome.word != "rate_limited":
            return told
        params = {"service": self.terms.service, "seconds": outcome.told_seconds}
        row = await outlive("Slowing down", lambda: one(self._pool, "limit_budget", params), until=self._stopping)
        return None if row is None else Pass(float(row["seconds"]), 0)

    async def _pause(self, seconds: float) -> None:
        params = {"service": self.terms.service, "seconds": seconds}
        await outlive("Pausing the budget", lambda: one(self._pool, "pause_budget", params), until=self._stopping)

    async def _settle(self, recording: Coroutine[Any, Any, Any]) -> Any:
        """Run what enters a result, to its end also where the caller is cancelled; return None where it takes too long to wait for."""
        task = self._spawn(recording)
        done, _ = await asyncio.wait([task], timeout=_SETTLE_SECONDS)
        return task.result() if done and not task.exception() else None

    def _spawn(self, recording: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(recording)
        self._settling.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[Any]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # The answer is worth more than its entry, which stays unknown.
            logger.error("The result of a call to {} could not be entered: {}: {}", self.terms.service, type(error).__name__, error)

    def _raise(self, outcome: Outcome, told: Pass | None, cause: Exception) -> NoReturn:
        wait = None if told is None else told.wait_seconds
        if outcome.word == "rate_limited":
            raise self._waits(RateLimitError(str(outcome.error), wait), None) from cause
        if outcome.word == "refused" or wait is not None:
            unavailable = ServiceUnavailable(str(outcome.error), wait)
            if wait is not None and wait <= self._breaker.brief_seconds:
                unavailable.call = outcome.error.call  # it was called and is called again: no reason yet to do without it
                raise unavailable from cause
            raise self._waits(unavailable, told) from cause
        if outcome.error is cause:
            raise cause
        raise outcome.error from cause

    async def aclose(self) -> None:
        """Give the results that are still being entered a last moment."""
        if self._settling:
            await asyncio.wait(set(self._settling), timeout=_CLOSE_SECONDS)
        for task in set(self._settling):
            task.cancel()


def _docs(purpose: CallPurpose) -> list[str]:
    return [share.doc_id for share in purpose.shares]


def _doc(purpose: CallPurpose) -> str:
    return purpose.shares[0].doc_id if purpose.shares else ""
