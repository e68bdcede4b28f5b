"""What is measured: each part asks one or two questions and gives Prometheus' metrics. Base units: seconds and bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from jobs.serve.reading import Look, Row
from jobs.serve.tally import DOCUMENT_BOUNDS, STAGE_BOUNDS, Tally
from models.stages import State

_ENDS = {"completed": "complete", "duplicate": "duplicate", "failed": "failed", "cancelled": "cancelled"}
"""The events that end a document, and how it ended."""
_SUBMISSIONS = ("submitted", "resubmitted")
_BREAKER_STATES = ("closed", "open", "half_open", "idle")


def counters(tally: Tally) -> Iterator[Metric]:
    """Return what has been counted since this process began to look."""
    events = CounterMetricFamily("docmill_document_events", "Entries of the audit trail.", labels=["event", "stage"])
    ended = CounterMetricFamily("docmill_documents_ended", "Documents that came to an end.", labels=["outcome"])
    for (event, stage), times in sorted(tally.events.items()):
        events.add_metric([event, stage], times)
    for event, outcome in _ENDS.items():
        ended.add_metric([outcome], sum(times for (name, _), times in tally.events.items() if name == event))
    submitted = sum(times for (name, _), times in tally.events.items() if name in _SUBMISSIONS)
    yield events
    yield ended
    yield CounterMetricFamily("docmill_documents_submitted", "Documents submitted, new versions included.", value=submitted)
    yield CounterMetricFamily("docmill_tally_restarts", "Times that events were left out of the counters.", value=tally.missed)
    cpu = CounterMetricFamily("docmill_stage_cpu_seconds", "CPU time of stages, child processes included.", labels=["stage"])
    stages = HistogramMetricFamily("docmill_stage_duration_seconds", "How long stages took, waiting not included.", labels=["stage"])
    for stage, durations in sorted(tally.stages.items()):
        cpu.add_metric([stage], tally.stage_cpu[stage])
        stages.add_metric([stage], durations.cumulative(STAGE_BOUNDS), durations.seconds)
    whole = HistogramMetricFamily("docmill_document_duration_seconds", "From first claim to complete, waiting included.")
    whole.add_metric([], tally.documents.cumulative(DOCUMENT_BOUNDS), tally.documents.seconds)
    yield from (cpu, stages, whole)


async def documents(look: Look) -> list[Metric]:
    """Documents by state, and those in work by stage."""
    states = dict.fromkeys((state.value for state in State), 0)
    states |= {row["state"]: row["documents"] for row in await look.rows("metric_documents")}
    unfinished = await look.rows("metric_unfinished")
    rate = await look.row("metric_rate")
    return [
        _gauge("docmill_documents", "Documents by state.", ["state"], states.items()),
        _gauges(
            "docmill_documents_unfinished", "Unfinished documents by the stage that is due.", ["stage", "state"], unfinished, "documents"
        ),
        _single("docmill_processing_rate_documents_per_minute", "Documents that ended, over the last 5 minutes.", rate, "per_minute"),
    ]


async def stuck(look: Look) -> list[Metric]:
    """Documents that do not get on."""
    rows = await look.rows("metric_stuck")
    return [_gauge("docmill_documents_stuck", "Unfinished documents that do not get on.", ["reason"], _pairs(rows, "cause", "documents"))]


async def queues(look: Look) -> list[Metric]:
    """Jobs by queue."""
    rows = await look.rows("metric_queues")
    jobs = GaugeMetricFamily("docmill_queue_jobs", "Jobs by queue: due, put off, and fetched by a worker.", labels=["queue", "status"])
    for row in rows:
        for status in ("waiting", "scheduled", "running"):
            jobs.add_metric([row["queue"], status], row[status])
    oldest = _pairs(rows, "queue", "oldest_seconds")
    listeners = _pairs(rows, "queue", "listeners")
    return [
        jobs,
        _gauge("docmill_queue_oldest_waiting_seconds", "For how long the oldest due job has waited; 0 for none.", ["queue"], oldest),
        _gauge("docmill_queue_listeners", "Live workers that listen to the queue.", ["queue"], listeners),
    ]


async def batches(look: Look) -> list[Metric]:
    """Batches by status, and their archives that are not unpacked."""
    rows = await look.rows("metric_batches")
    archives = dict.fromkeys(("waiting", "unpacking", "failed", "cancelled"), 0)
    archives |= {row["state"]: row["archives"] for row in await look.rows("metric_archives")}
    return [
        _gauge("docmill_batches", "Batches by status.", ["status"], _pairs(rows, "status", "batches")),
        _gauge("docmill_archives", "Archives of the batches' current runs that are not unpacked.", ["state"], archives.items()),
    ]


async def dead_letters(look: Look) -> list[Metric]:
    """Open dead letters."""
    rows = await look.rows("metric_dead_letters")
    oldest = max((row["oldest_seconds"] for row in rows), default=0)
    return [
        _gauges(
            "docmill_dead_letters_open", "Documents that failed for good and wait for somebody.", ["stage", "error_type"], rows, "letters"
        ),
        GaugeMetricFamily("docmill_dead_letters_oldest_seconds", "For how long the oldest has waited; 0 for none.", value=oldest),
    ]


async def workers(look: Look) -> list[Metric]:
    """Workers, from their rows in the registry."""
    rows = await look.rows("metric_workers")
    healths = dict.fromkeys(("live", "stopping", "silent", "dead"), 0)
    for row in rows:
        healths["live" if row["health"] == "alive" else row["health"]] += 1
    told = rows
    rows = [row for row in rows if row["health"] != "dead"]
    started = _gauge("docmill_worker_start_time_seconds", "When it started, since 1970.", ["worker"], _pairs(rows, "worker", "started"))
    memory = [(row["worker"], row["memory_mb"] * 1e6) for row in rows if row["memory_mb"] is not None]
    cpu = CounterMetricFamily("docmill_worker_cpu_seconds", "CPU time of the process, children not included.", labels=["worker"])
    for worker, seconds in _pairs(rows, "worker", "cpu_seconds"):
        cpu.add_metric([worker], seconds)
    one = ["worker"]
    return [
        _gauge("docmill_workers", "Workers; dead ones stand here for 7 days or until they sign off.", ["state"], healths.items()),
        _gauge("docmill_worker_heartbeat_age_seconds", "Since it was heard of.", one, _pairs(told, "worker", "silent_seconds")),
        _gauge("docmill_worker_memory_bytes", "Resident memory, children not included.", one, memory),
        _gauge("docmill_worker_connections", "Database connections that it holds.", one, _pairs(rows, "worker", "connections")),
        _gauge("docmill_worker_jobs", "Jobs in hand.", one, _pairs(rows, "worker", "jobs")),
        _gauge("docmill_worker_concurrency", "Jobs that it runs at a time at most.", one, _pairs(rows, "worker", "concurrency")),
        started,
        cpu,
    ]


async def providers(look: Look) -> list[Metric]:
    """Outside services."""
    rows = await look.rows("metric_providers")
    breaker = GaugeMetricFamily(
        "docmill_provider_breaker",
        "1 for the state that the breaker is in; idle: was open, and nobody calls any more.",
        labels=["service", "state"],
    )
    requests = GaugeMetricFamily(
        "docmill_provider_requests_per_minute", "Requests of the last minute, and the limit.", labels=["service", "kind"]
    )
    for row in rows:
        for state in _BREAKER_STATES:
            breaker.add_metric([row["service"], state], float(row["state"] == state))
        requests.add_metric([row["service"], "used"], row["requests_last_minute"] or 0)
        requests.add_metric([row["service"], "limit"], row["requests_per_minute"] or 0)
    waiting, share = _pairs(rows, "service", "waiting"), _pairs(rows, "service", "share")
    calls, cost = await look.rows("metric_provider_calls"), await look.rows("metric_provider_cost")
    return [
        breaker,
        requests,
        _gauge("docmill_provider_waiting_calls", "Calls told to wait since the breaker last changed.", ["service"], waiting),
        _gauge("docmill_provider_budget_share", "Part of its limits that is used; lower after 429.", ["service"], share),
        _gauges("docmill_provider_calls_recent", "Calls of the last 5 minutes.", ["service", "kind", "outcome"], calls, "calls"),
        _gauges("docmill_provider_cost_last_day", "Price of the last 24 hours.", ["service", "kind"], cost, "cost"),
    ]


async def alerts(look: Look) -> list[Metric]:
    """Alerts that are open, and those that no webhook has accepted yet."""
    unforwarded, known = await look.row("metric_alerts"), await look.row("page_knows_alerts")
    rows = await look.rows("metric_open_alerts") if known and known["known"] else []
    return [
        _gauges("docmill_alerts_open", "Open alerts.", ["rule", "severity"], rows, "alerts"),
        _single("docmill_alerts_unforwarded", "Alerts that no webhook has accepted yet.", unforwarded, "unforwarded"),
    ]


async def database(look: Look) -> list[Metric]:
    """The database itself."""
    facts, invalid = await look.row("metric_database"), await look.row("metric_indexes")
    connections = _pairs(await look.rows("metric_connections"), "state", "connections")
    return [
        _gauge("docmill_database_connections", "Connections to the database, everybody's.", ["state"], connections),
        _single("docmill_database_max_connections", "Most that the server takes.", facts, "max_connections"),
        _single("docmill_database_size_bytes", "Size of the database.", facts, "size_bytes"),
        _single("docmill_chunks", "Passages; estimated from 100,000 on.", facts, "chunks"),
        _single("docmill_index_invalid", "Indexes that searches cannot use.", invalid, "invalid"),
    ]


PARTS: dict[str, Callable[[Look], Awaitable[list[Metric]]]] = {
    "documents": documents, "stuck": stuck, "queues": queues, "batches": batches, "dead_letters": dead_letters, "workers": workers,
    "providers": providers, "alerts": alerts, "database_facts": database,
}  # fmt: skip


def _pairs(rows: list[Row], name: str, value: str) -> list[tuple[str, float]]:
    """Return label and value of each row that has a value."""
    return [(row[name], row[value]) for row in rows if row[value] is not None]


def _gauge(name: str, text: str, labels: list[str], values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for label, value in values:
        family.add_metric([label], value)
    return family


def _gauges(name: str, text: str, labels: list[str], rows: list[Row], value: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for row in rows:
        family.add_metric([str(row[label]) for label in labels], row[value])
    return family


def _single(name: str, text: str, row: dict[str, Any] | None, column: str) -> Metric:
    return GaugeMetricFamily(name, text, value=float((row or {}).get(column) or 0))
