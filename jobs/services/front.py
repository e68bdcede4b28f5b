"""One outside service as adapters call it: breaker, budget and intent before the call, outcome and cost after it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

from loguru import logger

from jobs import budget, clock, faults
from jobs.outages import outlive
from jobs.services.ledger import Entry, Ledger, new_entry
from jobs.services.outcomes import BLAMES_SERVICE, Outcome, outcome_of
from jobs.services.state import Pool, SharedBreaker, one
from jobs.services.terms import Terms
from models.calls import CallPurpose, Reply
from models.errors import NotSent, PermanentError, RateLimitError, ServiceUnavailable

T = TypeVar("T")
_RESENDS = 2  # of a call that was answered 429 with a pause that is short enough to wait for
_LOOK_AGAIN = 0.5  # seconds of waiting after which it is asked whether the service may still be called
_SETTLE_SECONDS = 5.0  # that a call waits for its entry before it hands its answer on; the entry is written all the same
_CLOSE_SECONDS = 3.0


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
        """Make a call: see models.calls.Caller. Cancelled in mid-call, it stays unknown in the ledger."""
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
                    self._spawn(self._breaker.give_up(entry.id, 0.0))
                raise
            except NotSent as error:
                await self._settle(self._withdraw(entry, error))
                raise
            except Exception as error:
                outcome = outcome_of(error, self.terms)
                wait = await self._settle(self._record_failure(entry, outcome))
                if outcome.word == "rate_limited" and wait is not None and wait <= self.terms.patience_seconds and resends < _RESENDS:
                    resends += 1
                    continue
                self._raise(outcome, wait, error)
            await self._settle(self._record_success(entry, reply))
            return reply

    async def _enter(self, purpose: CallPurpose) -> Entry:
        """Return a call that may be sent now and whose intent is written."""
        entry = new_entry(purpose)
        while True:
            asked = await self._ledger.begin(entry)
            if asked.hindrance is None:
                await asyncio.sleep(asked.wait_seconds)
                if asked.wait_seconds < _LOOK_AGAIN or entry.probes or await self._ledger.passes(entry):
                    return entry
                dropped = Outcome("not_sent", ServiceUnavailable("The service may no longer be called."))
                await self._settle(self._ledger.finish(entry, None, dropped))
                entry = new_entry(purpose)
            elif asked.hindrance == "budget":
                if entry.probes:
                    await self._breaker.give_up(entry.id, asked.wait_seconds)
                told = f"The budget of {self.terms.service} is used up; there is room in {asked.wait_seconds:.0f} s."
                raise RateLimitError(told, asked.wait_seconds)
            else:
                entry = await self._ask_breaker(entry)

    async def _ask_breaker(self, entry: Entry) -> Entry:
        """Return the call as let through, after a short wait perhaps, or raise ServiceUnavailable."""
        told = await outlive("Asking the breaker", lambda: self._breaker.ask(entry.id), until=self._stopping)
        if told is None or told.wait_seconds > self.terms.patience_seconds:
            wait = None if told is None else told.wait_seconds
            raise ServiceUnavailable(f"{self.terms.service} is not called for now: {told and told.reason}", wait)
        await asyncio.sleep(told.wait_seconds)
        if told.wait_seconds > 0 and not told.ramps:
            return entry  # a probe was under way or due soon: ask again
        await faults.at("probing" if told.probes else "let_in", _doc(entry.purpose))
        return replace(entry, admitted=told.revision, probes=told.probes)

    async def _withdraw(self, entry: Entry, error: NotSent) -> None:
        """Enter that a call which was let through is not made, and give back what it was granted."""
        await self._ledger.finish(entry, None, Outcome("not_sent", error))
        if entry.probes:
            await self._breaker.give_up(entry.id, 0.0)

    async def _record_success(self, entry: Entry, reply: Reply[Any]) -> None:
        await self._ledger.finish(entry, reply, None)
        if entry.probes:
            await outlive("Closing the breaker", lambda: self._breaker.tell(entry.id, None), until=self._stopping)
        if pause := budget.pause_told(reply.headers, entry.purpose.tokens):
            await self._pause(pause)

    async def _record_failure(self, entry: Entry, outcome: Outcome) -> float | None:
        """Return the seconds that the document should wait because of it; None where the failure alone decides."""
        await self._ledger.finish(entry, None, outcome)
        wait: float | None = None
        if entry.probes or outcome.word in BLAMES_SERVICE or outcome.word == "refused":
            wait = await outlive("Telling the breaker", lambda: self._breaker.tell(entry.id, outcome), until=self._stopping)
        if outcome.word == "failed" and (told := budget.retry_after(outcome.headers or {})):
            await self._pause(min(told, self.terms.rules.max_open_seconds))
        if outcome.word != "rate_limited":
            return wait
        params = {"service": self.terms.service, "seconds": outcome.told_seconds}
        row = await outlive("Slowing down", lambda: one(self._pool, "limit_budget", params), until=self._stopping)
        return None if row is None else float(row["seconds"])

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

    def _raise(self, outcome: Outcome, wait: float | None, cause: Exception) -> NoReturn:
        if outcome.word == "rate_limited":
            raise RateLimitError(str(outcome.error), wait) from cause
        if outcome.word == "refused" or wait is not None:
            raise ServiceUnavailable(str(outcome.error), wait) from cause
        if outcome.error is cause:
            raise cause
        raise outcome.error from cause

    async def aclose(self) -> None:
        """Give the results that are still being entered a last moment."""
        if self._settling:
            await asyncio.wait(set(self._settling), timeout=_CLOSE_SECONDS)
        for task in set(self._settling):
            task.cancel()


def _doc(purpose: CallPurpose) -> str:
    return purpose.shares[0].doc_id if purpose.shares else ""
