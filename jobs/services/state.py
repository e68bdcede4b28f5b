"""Applies what jobs.breaker decides to the row that all workers share: read, decide, compare and swap."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import psycopg
from loguru import logger
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from jobs.breaker import Asked, Breaker, Event, Failed, GaveUp, Refused, Succeeded, decide, is_news, passes, wait_of
from jobs.services.outcomes import BLAMES_SERVICE, Outcome, message_of
from jobs.services.terms import Terms
from sql import query

Pool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]
_TRIES = 100  # of a compare and swap; each that fails means that somebody else's went through


@dataclass(frozen=True, slots=True)
class Seen:
    """A breaker as it was read, with the evidence: calls and failures since the window began or since it was closed, and failures in a
    row also before the window, as slow ones may all lie in different ones."""

    breaker: Breaker
    revision: int
    now: float
    failures: int
    calls: int
    in_a_row: int


@dataclass(frozen=True, slots=True)
class Pass:
    """What a call that asked was told: to come `wait_seconds` later, or to go at this revision, perhaps as the probe."""

    wait_seconds: float
    revision: int
    probes: bool = False
    ramps: bool = False
    """Whether the service is up and only lets calls in one by one."""
    reason: str | None = None
    place: int | None = None
    """Behind those who were told to wait before; kept by whoever asks again at the same revision."""


async def one(pool: Pool, name: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Run a named query in a transaction of its own and return its first row."""
    async with pool.connection() as conn, conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query(name), params)
        return await cursor.fetchone()


class SharedBreaker:
    """The breaker of one service."""

    def __init__(self, pool: Pool, terms: Terms) -> None:
        self._pool = pool
        self._terms = terms

    async def ask(self, call: UUID, doc_ids: Sequence[str], told: Pass | None = None) -> Pass:
        """Ask for a call that does not pass by itself: it probes, is given a place, or passes after all.

        `told`: what it was told before. A document that has been given a place keeps it until the breaker changes.
        """
        while True:
            _, seen = await self._apply(lambda _: Asked(call))
            breaker = seen.breaker
            if breaker.probe_by == call:
                return Pass(0.0, seen.revision, probes=True)
            if passes(breaker, seen.now):
                return Pass(0.0, seen.revision)
            place = told.place if told is not None and told.revision == seen.revision else None
            if place is None:
                place = await self._place(seen, doc_ids)
            if place is None:
                continue  # it has changed since
            wait = wait_of(breaker, place, seen.now)
            return Pass(wait, seen.revision, ramps=breaker.state == "closed", reason=breaker.reason, place=place)

    @property
    def brief_seconds(self) -> float:
        """How long a document waits for a service that fails without a break and is still called: 5 s by default."""
        return self._terms.rules.open_seconds / 12

    async def _place(self, seen: Seen, doc_ids: Sequence[str]) -> int | None:
        params = {"service": self._terms.service, "revision": seen.revision, "doc_ids": list(doc_ids)}
        row = await one(self._pool, "take_place", params)
        return None if row is None else int(row["place"])

    async def tell(self, call: UUID, outcome: Outcome | None, doc_ids: Sequence[str] = ()) -> Pass | None:
        """Say how a call went; None for well. Return how long to wait where it is the service that fails, whoever calls: longer than
        `brief_seconds`, and with a place, where its breaker is open because of it."""
        if outcome is None or outcome.word in ("rejected", "rate_limited"):
            # It was answered, so it is there.
            await self._apply(lambda _: Succeeded(call))
            return None
        reason = message_of(outcome.error)
        if outcome.word == "refused":
            before, seen = await self._apply(lambda _: Refused(call, reason))
        elif outcome.word in BLAMES_SERVICE:
            before, seen = await self._apply(lambda evidence: Failed(call, reason, evidence.failures, evidence.calls, evidence.in_a_row))
        else:
            return None
        if seen.breaker.state == "closed":
            # One failure may be the document's own doing. Another one, and nobody was answered in between: few documents alone with a
            # service that is down would all have spent their attempts before there are failures enough to open its breaker.
            return Pass(self.brief_seconds, seen.revision, reason=reason) if seen.in_a_row > 1 else None
        if before.state != "open" and seen.breaker.state == "open":
            logger.warning("{} is not called for {:.0f} s: {}", self._terms.service, seen.breaker.open_seconds, reason)
        place = await self._place(seen, doc_ids) or 0
        wait = wait_of(seen.breaker, place, seen.now)
        # Whoever failed goes behind those who wait: what makes the service fail may be this document, and others shall probe before it.
        return Pass(wait + max(self._terms.rules.open_seconds / 4, 0.1 * wait), seen.revision, reason=reason, place=place)

    async def give_up(self, call: UUID, seconds: float) -> None:
        """Say that a probe is not sent after all."""
        await self._apply(lambda _: GaveUp(call, seconds))

    async def look(self) -> Seen:
        """Read the breaker; one that has no row yet is closed."""
        terms = self._terms
        params = {
            "service": terms.service, "window_seconds": terms.rules.window_seconds, "total_seconds": terms.total_seconds,
            "failures": terms.rules.failures,
        }  # fmt: skip
        row = await one(self._pool, "look_at_breaker", params)
        if row is None:
            return Seen(Breaker(), -1, 0.0, 0, 0, 0)
        breaker = Breaker(
            row["state"], row["reason"], row["refused"], row["try_at"], row["open_seconds"], row["probe_by"], row["closed_at"],
            row["passes_from"], row["opened_count"],
        )  # fmt: skip
        return Seen(breaker, row["revision"], row["now"], row["failures"], row["calls"], row["in_a_row"])

    async def _apply(self, event: Any) -> tuple[Breaker, Seen]:
        """Decide and swap until nobody comes in between. Return the breaker before and after; `event` is made from what was seen."""
        for attempt in range(_TRIES):
            seen = await self.look()
            made: Event = event(seen)
            after = decide(seen.breaker, made, seen.now, self._terms.rules)
            if after == seen.breaker or seen.revision < 0:
                return seen.breaker, seen
            row = await one(self._pool, "change_breaker", self._change(seen, after))
            if row is not None:
                return seen.breaker, replace(seen, breaker=after, revision=row["revision"])
            await asyncio.sleep(random.uniform(0, 0.002 * min(attempt + 1, 25)))  # noqa: S311  # jitter, not a secret
        return seen.breaker, seen

    def _change(self, seen: Seen, after: Breaker) -> dict[str, Any]:
        return {
            "service": self._terms.service,
            "revision": seen.revision,
            "now": seen.now,
            "state": after.state,
            "reason": after.reason,
            "refused": after.refused,
            "try_at": after.try_at,
            "open_seconds": after.open_seconds,
            "probe_by": after.probe_by,
            "closed_at": after.closed_at,
            "passes_from": after.passes_from,
            "opened_count": after.opened_count,
            "tell": is_news(seen.breaker, after),
        }
