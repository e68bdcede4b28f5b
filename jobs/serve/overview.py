"""The first page: is it well, what is stuck, how quickly does it go; and the queues and stages over time."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.serve.charts import lines, stacked_bars
from jobs.serve.examining import all_work
from jobs.serve.reading import Database, Row, TooSlow
from jobs.serve.rendering import rendering_of
from models.stages import STAGES, State

SPANS = {
    "10m": ("10 minutes", "10 seconds", "%H:%M:%S"),
    "1h": ("1 hour", "1 minute", "%H:%M"),
    "24h": ("24 hours", "30 minutes", "%H:%M"),
    "7d": ("7 days", "3 hours", "%m-%d %H h"),
}
"""What a person can look at: the span, its slices, and how a slice is written."""
_ENDS = ("complete", "duplicate", "failed", "cancelled")
_OPEN = ("queued", "working", "retrying")


async def overview(request: Request) -> Response:
    """Show how everything stands; what could not be read in time is said to be so."""
    parts = request.app.state.parts
    database: Database = parts.database
    health = await parts.doctor.examine()
    if not all_work(health, ("database", "migrations")):
        return rendering_of(request).page(request, "overview.html", 503, health=health, figures=None)
    ask = _asker(database, time.monotonic() + 2 * parts.settings.serve_query_seconds)
    states, slices = await ask("metric_documents", seconds=10), await ask("page_throughput", span="1 hour", bucket="1 minute", seconds=5)
    counts = None if states is None else {row["state"]: row["documents"] for row in states}
    unfinished = None if slices is None or counts is None else _unfinished(slices, counts)
    rate, letter_count = await ask("metric_rate", seconds=5), await ask("page_letter_count")
    figures = {
        "states": dict.fromkeys(State) if counts is None else counts,
        "unfinished": None if counts is None else sum(counts.get(state, 0) for state in _OPEN),
        "slices": slices,
        "ended_hour": None if slices is None else sum(row[end] for row in slices for end in _ENDS),
        "per_minute": rate and rate[0]["per_minute"],
        "stages": await ask("page_stages"),
        "stuck": await ask("page_stuck", limit=8, seconds=10),
        "letters": await ask("page_newest_letters", limit=5),
        "letter_count": letter_count and letter_count[0]["letters"],
        "batches": await ask("page_newest_batches", limit=5, seconds=5),
        "workers": await ask("page_worker_healths"),
        "alerts": await _alerts(ask),
    }
    return rendering_of(request).page(
        request,
        "overview.html",
        health=health,
        figures=figures,
        chart=None if slices is None else _ends(slices, "%H:%M"),
        backlog=None if slices is None or unfinished is None else _backlog(slices, unfinished, "%H:%M"),
        unfinished_over_time=unfinished,
    )


_Ask = Callable[..., Awaitable[list[Row] | None]]


def _asker(database: Database, until: float) -> _Ask:
    """Return what asks one question after the other, until a moment of the monotonic clock; None for what was not answered in time."""

    async def ask(name: str, **params: Any) -> list[Row] | None:
        try:
            # Half of the time that is left: one question that hangs leaves some for the others.
            return await database.shared(name, within=(until - time.monotonic()) / 2, **params)
        except TooSlow:
            return None

    return ask


async def queues(request: Request) -> Response:
    """Show the queues now, and stages and documents over a span."""
    database: Database = request.app.state.parts.database
    chosen = request.query_params.get("span", "1h")
    span, bucket, form = SPANS.get(chosen, SPANS["1h"])
    states = {row["state"]: row["documents"] for row in await database.shared("metric_documents", seconds=10)}
    slices = await database.shared("page_throughput", span=span, bucket=bucket, seconds=5)
    latency = await database.shared("page_latency", span=span, bucket=span, seconds=10)
    unfinished = _unfinished(slices, states)
    over_time = await database.shared("page_latency", span=span, bucket=bucket, seconds=10)
    return rendering_of(request).page(
        request,
        "queues.html",
        queues=await database.shared("page_queues"),
        slices=slices,
        latency=latency,
        span=chosen,
        spans=tuple(SPANS),
        span_words=span.removeprefix("1 "),
        chart=_ends(slices, form),
        backlog=_backlog(slices, unfinished, form),
        unfinished=unfinished,
        stage_chart=_stage_runs(slices, over_time, form),
        runs=_by_stage(slices, over_time),
        stages=[stage.name for stage in STAGES],
    )


async def _alerts(ask: _Ask) -> list[Row] | None:
    known = await ask("page_knows_alerts", seconds=60)
    if known is None:
        return None
    return await ask("page_alerts", limit=10) if known[0]["known"] else []


def _labels(slices: Sequence[Row], form: str) -> list[str]:
    return [row["bucket_at"].astimezone(UTC).strftime(form) for row in slices]


def _ends(slices: Sequence[Row], form: str) -> Any:
    series = {end: [row[end] for row in slices] for end in _ENDS if end in ("complete", "failed") or any(row[end] for row in slices)}
    return stacked_bars(_labels(slices, form), series, title="Documents that ended, over time")


def _unfinished(slices: Sequence[Row], states: Mapping[str, int]) -> list[int]:
    """Return how many documents were unfinished: from how many are now, back over what came in and went out."""
    left = sum(states.get(state, 0) for state in _OPEN)
    values = []
    for row in reversed(slices):
        values.append(max(0, left))
        left -= row["submitted"] + row["requeued"] - row["dropped"] - sum(row[end] for end in _ENDS)
    return values[::-1]


def _backlog(slices: Sequence[Row], unfinished: Sequence[int], form: str) -> Any:
    return lines(_labels(slices, form), {"unfinished": unfinished}, title="Unfinished documents, over time")


def _by_stage(slices: Sequence[Row], latency: Sequence[Row]) -> dict[str, list[int]]:
    """Return how often each stage ran in each slice."""
    found: dict[datetime, dict[str, int]] = {row["bucket_at"]: {} for row in slices}
    for row in latency:
        found.setdefault(row["bucket_at"], {})[row["stage"]] = row["runs"]
    return {stage.name: [found[row["bucket_at"]].get(stage.name, 0) for row in slices] for stage in STAGES}


def _stage_runs(slices: Sequence[Row], latency: Sequence[Row], form: str) -> Any:
    return lines(_labels(slices, form), _by_stage(slices, latency), title="Runs of each stage, over time")


ROUTES = [Route("/", overview), Route("/queues", queues)]
