"""The circuit breaker of an outside service as a pure state machine. Its state lives in Postgres; jobs.services.state applies it there.

Times are seconds since 1970 by the database's clock. A breaker opens after so many failures in a row, however slowly they came, or within a
window, if they are a tenth of its calls: a busy service may fail now and then. After a while one call probes; with its success the breaker
is closed, and for RAMP_SECONDS calls are let in at a growing rate, at the end of which they pass unasked. A failed probe, or failures
during the ramp, open it again for twice as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

RAMP_SECONDS = 10.0
RAMP_FAILURES = 2
"""Failures that open it again during the ramp, where fewer than usual say enough."""
SMALLEST_PART = 0.1
"""Of the calls of the window that must have failed."""
PLACES_PER_SECOND = 20.0
"""How many of those who wait are given a time in one second; reconcilers bring them forward once calls pass unasked."""
PROBE_LOOK_SECONDS = 10.0
"""When those who meet a probe under way come back, at the latest."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings say. `probe_seconds` is how long a probe may take before it counts as lost with its worker."""

    failures: int = 5
    window_seconds: float = 60.0
    open_seconds: float = 60.0
    max_open_seconds: float = 900.0
    probe_seconds: float = 130.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """State of one breaker; the fields are the columns of circuit_breakers."""

    state: Literal["closed", "open", "half_open"] = "closed"
    reason: str | None = None
    refused: bool = False
    try_at: float | None = None
    open_seconds: float = 0.0
    probe_by: UUID | None = None
    closed_at: float | None = None
    passes_from: float | None = None
    opened_count: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A call wants to pass and would probe."""

    call: UUID


@dataclass(frozen=True, slots=True)
class Succeeded:
    """A call was answered, be it with a refusal of what it asked for."""

    call: UUID


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed by the service's fault; with it, so many of the calls since the window began, or since it was closed, did."""

    call: UUID
    reason: str
    failures: int
    calls: int
    in_a_row: int
    """Failures since a call was last answered, also before the window."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The service refused the key, or the quota is used up."""

    call: UUID
    reason: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """A probe was not sent after all; the next may be in so many seconds."""

    call: UUID
    seconds: float


Event = Asked | Succeeded | Failed | Refused | GaveUp


def decide(breaker: Breaker, event: Event, now: float, rules: Rules) -> Breaker:
    """Return the breaker after an event; the same one where nothing changes."""
    probing = breaker.state == "half_open" and breaker.probe_by == event.call
    match event:
        case Asked(call) if breaker.try_at is not None and now >= breaker.try_at:
            return replace(breaker, state="half_open", probe_by=call, try_at=now + rules.probe_seconds)
        case Succeeded() if probing:
            return replace(
                breaker, state="closed", refused=False, probe_by=None, try_at=None, closed_at=now, passes_from=now + RAMP_SECONDS
            )
        case GaveUp(_, seconds) if probing:
            return replace(breaker, state="open", probe_by=None, try_at=now + seconds)
        # Others that were under way when it opened for the same reason tell nothing new.
        case Refused(_, reason) if breaker.state == "closed" or probing or not breaker.refused:
            return _opened(breaker, reason, now, rules, refused=True, longer=probing)
        case Failed(_, reason) if probing or _is_enough(breaker, event, now, rules):
            return _opened(breaker, reason, now, rules, refused=False, longer=probing or _ramps(breaker, now))
    return breaker


def _ramps(breaker: Breaker, now: float) -> bool:
    return breaker.passes_from is not None and now < breaker.passes_from


def _is_enough(breaker: Breaker, failed: Failed, now: float, rules: Rules) -> bool:
    """Say whether failures open a closed breaker."""
    enough = min(RAMP_FAILURES, rules.failures) if _ramps(breaker, now) else rules.failures
    often = failed.failures >= enough and failed.failures >= SMALLEST_PART * failed.calls
    return breaker.state == "closed" and (often or failed.in_a_row >= enough)


def _opened(breaker: Breaker, reason: str, now: float, rules: Rules, *, refused: bool, longer: bool) -> Breaker:
    seconds = rules.open_seconds
    if longer:
        seconds = min(max(breaker.open_seconds * 2, seconds), max(rules.max_open_seconds, seconds))
    return replace(
        breaker,
        state="open",
        reason=reason,
        refused=refused,
        probe_by=None,
        try_at=now + seconds,
        open_seconds=seconds,
        passes_from=None,
        opened_count=breaker.opened_count + (breaker.state == "closed"),
    )


def passes(breaker: Breaker, now: float) -> bool:
    """Say whether calls pass unasked."""
    return breaker.state == "closed" and not _ramps(breaker, now)


def is_news(before: Breaker, after: Breaker) -> bool:
    """Say whether somebody should be alerted: the service refuses us, and did not before."""
    return after.refused and not before.refused


def wait_of(breaker: Breaker, place: int, now: float) -> float:
    """Return the seconds until a call that does not pass may come, `place` calls having been told to wait before it.

    While it ramps, call n may start log2(n + 1) seconds after the closing: 1, 3, 7, ... in all after 1, 2, 3 seconds. While it is open,
    those who wait are given times one after the other, so that the first to come back probes and the others follow at a rate that ends no
    outage with a stampede.
    """
    if breaker.state == "closed":
        behind = math.log2(place + 1)
        full = 2**RAMP_SECONDS
        if place >= full:
            behind = RAMP_SECONDS + (place - full) / PLACES_PER_SECOND
        return max(0.0, (breaker.closed_at or now) + behind - now)
    left = max(0.0, (breaker.try_at or now) - now)
    if breaker.state == "half_open":
        left = min(left, PROBE_LOOK_SECONDS)
    return left + place / PLACES_PER_SECOND
