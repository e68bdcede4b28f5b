"""`/metrics`: text that Prometheus' own parser reads, figures that SQL confirms, counters that count each event once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.adapters.storage import LocalStorage
from jobs.serve.examining import Doctor
from jobs.serve.metrics import Meter
from jobs.serve.reading import Database, DatabaseAway, Look, TooSlow
from models.settings import Settings
from tests.running import served
from tests.sites import client, failed_document

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """Return all samples by name and labels; no series may come twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
async def database_of(settings: Settings, database: str) -> AsyncIterator[Database]:
    made = Database(settings)
    yield made
    await made.close()


@pytest.fixture
def meter(settings: Settings, database_of: Database) -> Meter:
    return Meter(database_of, Doctor(settings))


def tell(conn: psycopg.Connection, event: str, stage: str | None = None, seconds: float | None = None, doc_id: str = "a") -> None:
    conn.execute(
        """INSERT INTO document_events (doc_id, user_id, correlation_id, event, stage, duration_ms, cpu_ms, detail)
        VALUES (%s, 'u', 'c', %s, %s, %s, %s, '{}')""",
        [doc_id, event, stage, None if seconds is None else seconds * 1000, None if seconds is None else seconds * 500],
    )


def test_the_text_is_prometheus_and_its_figures_are_those_of_the_tables(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path
) -> None:
    LocalStorage.prepared(settings)
    conn.execute("SELECT submit_document('uploads/x', doc_id => 'waits')")
    failed_document(conn, "fails")
    conn.execute(
        """INSERT INTO worker_registry (worker, host, pid, concurrency, active_jobs, memory_mb, cpu_seconds, connections, version)
        VALUES ('h:1', 'h', 1, 4, '{1,2}', 80, 12.5, 6, '1'), ('h:2', 'h', 2, 4, '{}', 70, 1, 5, '1')"""
    )
    conn.execute("UPDATE worker_registry SET heartbeat_at = now() - interval '1 hour' WHERE worker = 'h:2'")
    conn.execute(
        "INSERT INTO circuit_breakers (service, state, reason, try_at) VALUES ('embedding x', 'open', 'down', now() + interval '1 min'), "
        "('embedding old', 'open', 'down', now() - interval '2 hours')"
    )
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        answer = visitor.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = read(answer.text)
    assert [part for (name, labels), failed in found.items() if name == "docmill_scrape_failed" and failed for part in labels] == []
    assert value(found, "docmill_documents", state="queued") == 1
    assert value(found, "docmill_documents", state="failed") == 1
    assert value(found, "docmill_documents", state="working") == 0
    assert value(found, "docmill_documents_unfinished", stage="validate", state="queued") == 1
    assert value(found, "docmill_dead_letters_open", stage="validate", error_type="PERMANENT") == 1
    assert value(found, "docmill_queue_jobs", queue="cpu", status="waiting") == 1
    assert value(found, "docmill_queue_listeners", queue="cpu") == 1
    assert value(found, "docmill_workers", state="live") == 1
    assert value(found, "docmill_workers", state="dead") == 1
    assert value(found, "docmill_worker_memory_bytes", worker="h:1") == 80e6
    assert value(found, "docmill_worker_cpu_seconds_total", worker="h:1") == 12.5
    assert value(found, "docmill_worker_connections", worker="h:1") == 6
    assert value(found, "docmill_worker_jobs", worker="h:1") == 2
    assert ("docmill_worker_memory_bytes", frozenset({("worker", "h:2")})) not in found, "a dead worker uses no memory"
    assert value(found, "docmill_worker_heartbeat_age_seconds", worker="h:2") >= 3600
    assert value(found, "docmill_provider_breaker", service="embedding x", state="open") == 1
    states = {
        state: value(found, "docmill_provider_breaker", service="embedding old", state=state) for state in ("open", "half_open", "idle")
    }
    assert states == {"open": 0, "half_open": 0, "idle": 1}, "a rule that asks for the first two has nothing to tell"
    assert value(found, "docmill_component_up", component="services") == 0
    assert value(found, "docmill_ready") == 0
    assert value(found, "docmill_database_connections", state="idle") >= 1
    assert 1 / 6 <= value(found, "docmill_processing_rate_documents_per_minute") <= 1 / 5  # over five to six minutes
    assert found["docmill_storage_free_bytes", frozenset()] > 0


async def test_each_event_is_counted_once_however_late_its_transaction_commits(
    meter: Meter, conn: psycopg.Connection, database: str
) -> None:
    tell(conn, "submitted")
    await meter.catch_up()
    with psycopg.connect(database) as late, psycopg.connect(database) as rolled_back:
        tell(late, "retry_scheduled", "parse")
        with late.transaction():  # a subtransaction has a transaction id of its own
            tell(late, "rescued", "parse")
        tell(rolled_back, "failed", "parse")
        for _ in range(3):
            tell(conn, "stage_completed", "embed", 0.3)
            await meter.catch_up()
        rolled_back.rollback()
        late.commit()
        tell(conn, "stage_completed", "embed", 3)
        for _ in range(3):
            await meter.catch_up()
    assert dict(meter.tally.events) == {("retry_scheduled", "parse"): 1, ("rescued", "parse"): 1, ("stage_completed", "embed"): 4}
    assert meter.tally.stages["embed"].seconds == pytest.approx(3.9)
    assert sum(meter.tally.stages["embed"].counts) == 4
    assert meter.tally.stage_cpu["embed"] == pytest.approx(1.95)
    assert meter.tally.missed == 0


class Held(Database):
    """Holds the first look back once it has its snapshot."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.begun, self.may_go_on = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def look(self, **given: Any) -> AsyncIterator[Look]:
        async with super().look(**given) as look:
            if not self.begun.is_set():
                self.begun.set()
                await self.may_go_on.wait()
            yield look


async def test_two_who_count_at_once_count_no_event_twice_and_see_no_database_set_back(
    settings: Settings, conn: psycopg.Connection, database: str
) -> None:
    held = Held(settings)
    meter = Meter(held, Doctor(settings))
    held.begun.set()
    await meter.catch_up()
    held.begun.clear()
    tell(conn, "submitted")
    first = asyncio.create_task(meter.catch_up())
    await held.begun.wait()
    tell(conn, "completed", "finalize", 0.1)
    second = asyncio.create_task(meter.catch_up())
    await asyncio.wait([second], timeout=1)
    held.may_go_on.set()
    await asyncio.gather(first, second)
    assert dict(meter.tally.events) == {("submitted", ""): 1, ("completed", "finalize"): 1}
    assert meter.tally.missed == 0
    await held.close()


async def test_what_was_written_but_not_committed_when_it_began_is_counted(meter: Meter, conn: psycopg.Connection, database: str) -> None:
    with psycopg.connect(database) as late:
        tell(late, "failed", "parse")
        tell(conn, "submitted")
        await meter.catch_up()
        late.commit()
    await meter.catch_up()
    assert dict(meter.tally.events) == {("failed", "parse"): 1}


async def test_pruned_events_and_a_database_that_was_set_back_make_no_counter_fall(meter: Meter, conn: psycopg.Connection) -> None:
    await meter.catch_up()
    for _ in range(5):
        tell(conn, "completed", "finalize", 0.1)
    await meter.catch_up()
    conn.execute("SET docmill.prune = 'on'")
    conn.execute("DELETE FROM document_events WHERE id < (SELECT max(id) FROM document_events)")
    await meter.catch_up()
    conn.execute("TRUNCATE document_events RESTART IDENTITY")
    await meter.catch_up()
    tell(conn, "completed", "finalize", 0.1)
    await meter.catch_up()
    assert meter.tally.events["completed", "finalize"] == 6
    assert meter.tally.missed == 1


async def test_a_value_on_a_bound_counts_below_it_as_prometheus_has_it(meter: Meter, conn: psycopg.Connection) -> None:
    await meter.catch_up()
    for seconds in (0.005, 0.0051, 300, 301):
        tell(conn, "stage_completed", "parse", seconds)
    found = read((await meter.text()).decode())
    buckets = {b: value(found, "docmill_stage_duration_seconds_bucket", stage="parse", le=b) for b in ("0.005", "0.025", "300.0", "+Inf")}
    assert buckets == {"0.005": 1, "0.025": 2, "300.0": 3, "+Inf": 4}
    assert value(found, "docmill_stage_duration_seconds_count", stage="parse") == 4


async def test_the_servers_own_questions_cannot_write(database_of: Database, conn: psycopg.Connection) -> None:
    conn.execute("INSERT INTO circuit_breakers (service) VALUES ('embedding x')")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        async with database_of.look() as look:
            await look.rows("reset_breaker", service="embedding x")
    assert await database_of.act("reset_breaker", service="embedding x") == [{"known": True}]


async def test_a_question_behind_a_lock_is_given_up_and_the_connection_is_good_again(
    settings: Settings, conn: psycopg.Connection, database: str
) -> None:
    impatient = Database(settings.model_copy(update={"serve_query_seconds": 0.2, "serve_connections": 1}))
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE processing_jobs IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TooSlow):
            async with impatient.look() as look:
                await look.rows("metric_batches")
    async with impatient.look() as look:
        assert await look.rows("metric_batches") == []
    await impatient.close()


async def test_a_failure_is_shared_by_all_who_waited_for_it_and_by_nobody_who_comes_later(
    settings: Settings, conn: psycopg.Connection, database: str
) -> None:
    asked: list[Look] = []

    class Counted(Database):
        @asynccontextmanager
        async def look(self, **given: Any) -> AsyncIterator[Look]:
            async with super().look(**given) as look:
                asked.append(look)
                yield look

    counted = Counted(settings.model_copy(update={"serve_query_seconds": 0.5}))
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE processing_jobs IN ACCESS EXCLUSIVE MODE")
        found = await asyncio.gather(*[counted.shared("metric_batches") for _ in range(6)], return_exceptions=True)
        assert [type(error) for error in found] == [TooSlow] * 6
        assert len(asked) == 1
        with pytest.raises(TooSlow):
            await counted.shared("metric_batches")
        assert len(asked) == 2
    assert await counted.shared("metric_batches") == []
    await counted.close()


def test_a_scraper_is_answered_while_it_waits_with_all_that_can_be_read(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path
) -> None:
    failed_document(conn, "fails")
    with served(tmp_path / "serve.log") as address, psycopg.connect(str(settings.database_conninfo)) as other:
        other.execute("LOCK TABLE file_extractions, provider_usage, document_chunks IN ACCESS EXCLUSIVE MODE")
        scraped = httpx2.get(f"{address}/metrics", headers={"X-Prometheus-Scrape-Timeout-Seconds": "10"}, timeout=10, trust_env=False)
    found = read(scraped.text)
    parts = {dict(labels)["part"]: failed for (name, labels), failed in found.items() if name == "docmill_scrape_failed"}
    assert {part for part, failed in parts.items() if failed} >= {"documents", "providers", "database_facts"}
    assert (parts["batches"], parts["dead_letters"], parts["alerts"]) == (0, 0, 0)
    assert value(found, "docmill_dead_letters_open", stage="validate", error_type="PERMANENT") == 1


async def test_more_visitors_than_connections_wait_for_their_turn_or_are_told(settings: Settings, database: str) -> None:
    small = Database(settings.model_copy(update={"serve_connections": 1, "database_timeout": 0.1}))
    async with small.look():
        with pytest.raises(DatabaseAway):
            async with small.look():
                pass
    async with small.look() as look:
        assert await look.row("tally_horizon") is not None
    await small.close()
