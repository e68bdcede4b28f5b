"""The ledger of calls: the intent before a call, and what became of it. Both wait out a database that is away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from jobs import clock
from jobs.outages import DATABASE_ERRORS, outlive
from jobs.services.outcomes import BLAMES_SERVICE, Outcome, message_of
from jobs.services.state import Pool, one
from jobs.services.terms import Terms
from models.calls import CallPurpose, Reply
from models.errors import BadAnswer, NotSent, RetryableError

_NO_REVISION = -1
_LARGEST_COUNT = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A call that may be made."""

    id: UUID
    purpose: CallPurpose
    admitted: int = _NO_REVISION
    """The breaker's revision at which it was let through by name."""
    probes: bool = False
    send_at: datetime | None = None
    """The time that the budget gave it, by the database's clock."""
    sent_at: float = 0.0
    """Of `jobs.clock`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking for a call; `hindrance` is cost, breaker or budget where it may not be made."""

    hindrance: str | None
    wait_seconds: float
    over: list[dict[str, Any]] = field(default_factory=list)
    """The documents that may not pay for it, as jobs.services.limits reads them."""
    send_at: datetime | None = None
    """When it may be made, by the database's clock."""


def _count(told: object) -> int | None:
    """Return a service's own count if it can be one: what it says comes from outside."""
    return told if isinstance(told, int) and not isinstance(told, bool) and 0 <= told <= _LARGEST_COUNT else None


def new_entry(purpose: CallPurpose) -> Entry:
    """Return a call that nobody has been asked for yet."""
    return Entry(uuid4(), purpose)


class Ledger:
    """Writes the calls to one service."""

    def __init__(self, pool: Pool, terms: Terms, *, worker: str, stopping: Callable[[], bool]) -> None:
        self._pool = pool
        self._terms = terms
        self._worker = worker
        self._stopping = stopping
        self._has_failed, self._noted_until = False, 0.0

    async def begin(self, entry: Entry) -> Asked:
        """Ask what may be spent, breaker and budget, and write the intent, without which no call is made: this waits for the database."""
        terms, purpose = self._terms, entry.purpose
        params = {
            **self._facts(entry),
            "admitted": entry.admitted,
            "requests_per_minute": terms.requests_per_minute,
            "tokens_per_minute": terms.tokens_per_minute,
            "patience": terms.patience_seconds,
            "estimated_cost": terms.prices.of_estimate(purpose),
            "max_cost_per_document": terms.max_cost_per_document,
            "max_cost_per_batch": terms.max_cost_per_batch,
            "total_seconds": terms.total_seconds,
            "recorded": purpose.recorded,
        }
        row = await outlive("Entering a call", lambda: one(self._pool, "begin_call", params), until=self._stopping)
        if row is None:
            raise RetryableError(f"{terms.service} was not called: this worker stops, and the database is away.")
        return Asked(None if row["granted"] else row["hindrance"], row["wait_seconds"] or 0.0, row["over"] or [], row["send_at"])

    async def finish(self, entry: Entry, reply: Reply[Any] | None, outcome: Outcome | None) -> None:
        """Write what became of a call, however long the database is away, unless this worker stops: then it stays unknown.

        Of calls that are not recorded the failed ones are written, and for a while every one.
        """
        if reply is not None and reply.settles is not None:
            await self._settle_pages(entry, reply.settles, _count(reply.pages) or 0)
        if not entry.purpose.recorded:
            if not self._is_noted(outcome):
                return
            reply = None  # what it brought was paid for by another call
        params = self._facts(entry) | self._result(entry, reply, outcome)
        await outlive("Entering an answer", lambda: one(self._pool, "finish_call", params), until=self._stopping)

    def _is_noted(self, outcome: Outcome | None) -> bool:
        """Say whether a call that is not recorded is written nevertheless: one that failed, the next that does not, and all for the
        breaker's window after that, because it would take failures with nothing in between for failures in a row."""
        if outcome is not None:
            self._has_failed = self._has_failed or outcome.word in BLAMES_SERVICE
            return True
        if self._has_failed:
            self._has_failed, self._noted_until = False, clock.seconds() + self._terms.rules.window_seconds
        return clock.seconds() < self._noted_until

    async def withdraw(self, entry: Entry, error: NotSent) -> None:
        """Write that a call is not sent and give back what it was granted; nothing where its intent was not written."""
        terms = self._terms
        if entry.purpose.recorded:
            params = {
                "id": entry.id,
                "service": terms.service,
                "message": message_of(error),
                "requests_per_minute": terms.requests_per_minute,
                "tokens_per_minute": terms.tokens_per_minute,
            }
            await outlive("Withdrawing a call", lambda: one(self._pool, "withdraw_call", params), until=self._stopping)
        elif terms.requests_per_minute and entry.send_at is not None:
            with suppress(*DATABASE_ERRORS):  # tried once: there is no row by which it could be done once
                await one(self._pool, "give_back_request", {"service": terms.service, "send_at": entry.send_at})

    async def _settle_pages(self, entry: Entry, request_id: str, pages: int) -> None:
        """Set the price of an earlier call right, which is found by its document."""
        params = {
            "doc_id": entry.purpose.shares[0].doc_id if entry.purpose.shares else None,
            "kind": self._terms.kind,
            "request_id": request_id,
            "pages": pages,
            "cost": self._terms.prices.of(0, 0, pages),
        }
        await outlive("Entering what was paid for", lambda: one(self._pool, "settle_pages", params), until=self._stopping)

    async def passes(self, entry: Entry) -> bool:
        """Say whether a call that has waited for its time may still be sent."""
        params = {"service": self._terms.service, "admitted": entry.admitted}
        row = await outlive("Looking at the breaker", lambda: one(self._pool, "still_passes", params), until=self._stopping)
        return row is not None and bool(row["passes"])

    def _facts(self, entry: Entry) -> dict[str, Any]:
        purpose = entry.purpose
        return {
            "id": entry.id,
            "service": self._terms.service,
            "kind": self._terms.kind,
            "model": purpose.model,
            "stage": purpose.stage,
            "doc_ids": [share.doc_id for share in purpose.shares],
            "batch_ids": [share.batch_id for share in purpose.shares],
            "user_ids": [share.user_id for share in purpose.shares],
            "shares": [share.share for share in purpose.shares],
            "correlation_id": purpose.shares[0].correlation_id if purpose.shares else None,
            "worker": self._worker,
            "tokens": purpose.tokens,
        }

    def _result(self, entry: Entry, reply: Reply[Any] | None, outcome: Outcome | None) -> dict[str, Any]:
        purpose = entry.purpose
        counted: Reply[Any] = reply or Reply(None)
        if outcome and isinstance(outcome.error, BadAnswer):
            counted = Reply(None, outcome.error.tokens_in, outcome.error.tokens_out)
        elif outcome and outcome.error.call:
            counted = Reply(None, outcome.error.call.tokens_in, outcome.error.call.tokens_out)
        counted = replace(counted, tokens_in=_count(counted.tokens_in), tokens_out=_count(counted.tokens_out), pages=_count(counted.pages))
        tokens_in, tokens_out = counted.tokens_in, counted.tokens_out
        # A refused or failed call is not paid for; one whose answer was cut off or could not be used probably is.
        answered = outcome is not None and outcome.status == 200  # an answer that was understood, and is of no use
        paid = outcome is None or answered or outcome.word in ("bad_answer", "timeout")
        if outcome is None or answered or outcome.word == "bad_answer":
            # What the service did not count was as much as was expected.
            more_in = 0 if tokens_in is None else tokens_in - (purpose.tokens - purpose.tokens_out)
            difference = more_in + (0 if tokens_out is None else tokens_out - purpose.tokens_out)
        else:
            difference = 0
        return {
            "outcome": outcome.word if outcome else "ok",
            "http_status": outcome.status if outcome else counted.status,
            "request_id": counted.request_id,
            "error_type": outcome.error.error_type if outcome else None,
            "error_message": message_of(outcome.error) if outcome else None,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "pages": counted.pages,
            "cost": self._terms.prices.of_reply(counted, purpose) if paid else 0,
            "seconds": max(0.0, clock.seconds() - entry.sent_at) if entry.sent_at else 0.0,
            "difference": difference if self._terms.tokens_per_minute else 0,
        }
