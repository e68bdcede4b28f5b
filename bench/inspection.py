"""How long each inspection view and each file of sql/inspect takes with a million documents, ten million events and ten million passages.

Usage: python -m bench.inspection [--documents 1000000] [--passages 10000000] [--rounds 3] [--database URL]

The rows are made with SQL: three quarters of the documents ended in the last seven days, the rest wait, in 250 batches and one of a fifth
of all. Passages are skinny (3 dimensions) and without the indexes that only searches use. A database given with --database is filled if it
holds no documents, and kept; otherwise a server of its own is made and taken away. On a machine that others use the CPU time is what
counts. Exit code 1: something took more than 2 s of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files

import psycopg

from bench.cpu import cpu_seconds
from bench.running import bench_server, fresh_settings, url_of
from sql import query
from sql.migrate import migrate

LIMIT = 2.0  # seconds

BARE = """
SET session_replication_role = replica; SET synchronous_commit = off; SET maintenance_work_mem = '512MB'; SET work_mem = '256MB';
DROP INDEX document_events_document, document_chunks_fulltext, document_chunks_known, document_chunks_language, provider_usage_documents,
    provider_usage_batches;
ALTER TABLE document_chunks DROP CONSTRAINT document_chunks_doc_id_version_chunk_index_key;
ALTER TABLE document_chunks ALTER COLUMN fulltext DROP EXPRESSION"""

BATCHES = """
INSERT INTO processing_jobs (
    batch_id, source_path, total_files, status, correlation_id, created_at, run_started_at, sealed_at, completed_at
)
SELECT 'batch-' || b, '/in/' || b, 1, CASE WHEN b < 190 THEN 'completed' ELSE 'processing' END, 'c' || b, t, t, t,
    CASE WHEN b < 190 THEN t + interval '1 hour' END
FROM generate_series(0, 250) AS b, LATERAL (SELECT now() - (251 - b) * interval '40 minutes' AS t) AS t"""

DOCUMENTS = """
INSERT INTO file_extractions (
    doc_id, batch_id, run_id, file_name, file_path, source_path, file_type, mime_type, file_size, content_sha256, milestone, state,
    served_version, page_count, chunk_count, duplicate_of, retry_count, not_before, error_type, error_message, correlation_id, claimed_by,
    lease_until, created_at, updated_at, processing_started_at, processing_completed_at, raw_extraction
)
SELECT 'document-' || n, b.batch_id, b.run_id, 'file ' || n || '.pdf', 'uploads/' || n, '/in/' || n, 'pdf', 'application/pdf', 100000,
    encode(sha256(convert_to((CASE WHEN n %% 50 = 3 THEN n - 1 ELSE n END)::text, 'UTF8')), 'hex'),
    CASE WHEN s.state = 'complete' THEN 'complete' WHEN s.state IN ('failed', 'duplicate') THEN 'parse_validated'
        ELSE (ARRAY['uploaded', 'uploaded', 'uploaded', 'uploaded', 'upload_validated', 'chunks_stored', 'embeddings_stored'])[n %% 7 + 1]
    END::document_milestone,
    s.state, CASE WHEN s.state = 'complete' THEN 1 END, 3, 10, CASE WHEN s.state = 'duplicate' THEN 'document-' || n - 1 END,
    CASE WHEN s.state = 'retrying' THEN 1 ELSE 0 END, CASE WHEN s.state = 'retrying' THEN now() + n %% 600 * interval '1 second' END,
    CASE WHEN s.state = 'failed' THEN 'PARSE_ERROR' WHEN s.state = 'retrying' THEN 'RETRYABLE' END::document_error_type,
    CASE WHEN s.state IN ('failed', 'retrying') THEN 'something went wrong' END, 'c' || n, 'host:' || n %% 50,
    CASE WHEN s.state = 'working' THEN now() + n %% 4 * interval '20 minutes' - interval '2 minutes' END,
    s.at - interval '1 hour', s.at, s.at - interval '10 seconds',
    CASE WHEN s.state IN ('complete', 'failed', 'duplicate') THEN s.at END,
    CASE WHEN s.state = 'complete' THEN jsonb_build_object('title', 'file ' || n, 'summary', repeat('word ', 60)) END
FROM generate_series(1, %(documents)s) AS n
CROSS JOIN LATERAL (
    SELECT CASE WHEN n <= 0.75 * %(documents)s
            THEN CASE n %% 50 WHEN 1 THEN 'failed' WHEN 3 THEN 'duplicate' ELSE 'complete' END
            ELSE CASE WHEN n %% 2500 = 0 THEN 'working' WHEN n %% 100 = 1 THEN 'retrying' ELSE 'queued' END
        END::document_state AS state,
        CASE WHEN n <= 0.75 * %(documents)s THEN now() - interval '7 days' * (1 - n / (0.75 * %(documents)s))
            ELSE now() - interval '6 hours' * (1 - (n / %(documents)s::float8 - 0.75) * 4) END AS at
) AS s
LEFT JOIN processing_jobs AS b ON b.batch_id = CASE
    WHEN n %% 10 = 9 THEN NULL
    WHEN n > 0.65 * %(documents)s AND n <= 0.85 * %(documents)s THEN 'batch-250'
    ELSE 'batch-' || n * 250::bigint / (%(documents)s + 1)
END"""

EVENTS = """
INSERT INTO document_events (
    at, doc_id, version, batch_id, user_id, correlation_id, stage, event, attempt, duration_ms, cpu_ms, peak_memory_mb, worker, claim,
    detail
)
SELECT d.updated_at - (12 - k) * interval '80 milliseconds', d.doc_id, 1, d.batch_id, 'default', d.correlation_id,
    CASE WHEN k > 1 THEN
        (ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'embed', 'embed', 'embed', 'embed', 'extract', 'finalize'])[k - 1]
    END,
    CASE WHEN k = 1 THEN 'submitted' WHEN k = 12 THEN 'completed'
        WHEN k BETWEEN 6 AND 9 OR k = 4 AND d.state = 'retrying' THEN 'retry_scheduled' ELSE 'stage_completed' END,
    0, CASE WHEN k > 1 AND k NOT BETWEEN 6 AND 9 THEN random() * 1000 END, random() * 100, 120,
    CASE WHEN k > 1 THEN 'host:' || d.id %% 50 END, 1, '{"file_type": "pdf", "counts": false}'
FROM file_extractions AS d, generate_series(1, CASE WHEN d.state IN ('complete', 'failed', 'duplicate') THEN 12 ELSE 4 END) AS k
ORDER BY 1"""

REST = """
INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock, args, status, scheduled_at, docmill_user)
SELECT stage_queue(due_stage(d.milestone)), due_stage(d.milestone), due_stage(d.milestone) || ':' || d.doc_id,
    jsonb_build_object('doc_id', d.doc_id), CASE d.state WHEN 'working' THEN 'doing' ELSE 'todo' END::procrastinate_job_status,
    d.not_before, 'default'
FROM file_extractions AS d WHERE d.state IN ('queued', 'working', 'retrying');
INSERT INTO procrastinate_jobs (queue_name, task_name, args, status)
SELECT 'cpu', 'validate', jsonb_build_object('doc_id', d.doc_id), 'succeeded' FROM file_extractions AS d WHERE d.state = 'complete';
INSERT INTO procrastinate_events (job_id, type, at)
SELECT j.id, t, now() - interval '1 hour'
FROM procrastinate_jobs AS j
CROSS JOIN LATERAL unnest(
    CASE j.status WHEN 'todo' THEN '{deferred}' ELSE '{deferred,started,succeeded}' END::procrastinate_job_event_type[]
) AS t;
INSERT INTO dead_letters (doc_id, version, batch_id, user_id, correlation_id, stage, error_type, error_message, traceback, created_at)
SELECT d.doc_id, 1, d.batch_id, 'default', d.correlation_id, 'parse', 'PARSE_ERROR', 'something went wrong', repeat('line', 200),
    d.updated_at
FROM file_extractions AS d WHERE d.state = 'failed';
INSERT INTO worker_registry (worker, host, pid, concurrency, heartbeat_at, version, active_jobs)
SELECT 'host:' || n, 'host', n, 4, now() + CASE WHEN n < 47 THEN interval '1 hour' ELSE interval '-1 hour' END, '1.0', ARRAY(
    SELECT j.id FROM procrastinate_jobs AS j WHERE j.status = 'doing' AND j.id %% 50 = n
) FROM generate_series(0, 49) AS n;
INSERT INTO circuit_breakers (service) SELECT 'embedding https://service/' || n FROM generate_series(1, 4) AS n;
INSERT INTO provider_budgets (service, requests_per_minute) SELECT c.service, 600 FROM circuit_breakers AS c;
INSERT INTO provider_usage (id, service, kind, model, stage, doc_ids, batch_ids, user_ids, shares, outcome, cost, started_at, give_up_at,
    finished_at, latency_ms, tokens_in)
SELECT gen_random_uuid(), 'embedding https://service/' || d.id %% 4 + 1, 'embedding', 'm', 'embed', ARRAY[d.doc_id], ARRAY[d.batch_id],
    '{default}', '{1}', CASE WHEN d.id %% 300 = 0 THEN 'failed' ELSE 'ok' END, 0.0001, d.updated_at, d.updated_at, d.updated_at,
    random() * 900, 500
FROM file_extractions AS d WHERE d.state = 'complete';
INSERT INTO serving_embeddings (embedding_model, dimensions) VALUES ('m', 3);
INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent)
SELECT 'm', d.doc_id, 10, TRUE FROM file_extractions AS d WHERE d.state = 'complete' LIMIT 5000"""

PASSAGES = """
INSERT INTO document_chunks (
    id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, language, embedding, embedding_model
)
SELECT overlay('00000000-0000-0000-0000-000000000000' PLACING lpad(n::text, 12, '0') FROM 25 FOR 12)::uuid, 'document-' || n / 10,
    'default', 1, n %% 10, 'passage', repeat('0', 64), 0, 7, 'en', '[1,0,0]', 'm'
FROM generate_series(1, %(passages)s) AS n"""

INDEXES = """
CREATE INDEX document_events_document ON document_events (doc_id, id);
CREATE INDEX provider_usage_documents ON provider_usage USING gin (doc_ids);
SELECT setval('document_claims', 10000000);
VACUUM ANALYZE"""

QUESTIONS = {
    "document_status, one document": "SELECT * FROM document_status WHERE doc_id = 'document-777'",
    "batch_progress, the 20 latest": """SELECT * FROM batch_progress
        WHERE batch_id IN (SELECT batch_id FROM processing_jobs ORDER BY id DESC OFFSET 1 LIMIT 20)""",
    "batch_progress, a batch of a fifth of all": "SELECT * FROM batch_progress WHERE batch_id = 'batch-250'",
    "batch_progress, all batches": "SELECT * FROM batch_progress",
    "queue_depth": "SELECT * FROM queue_depth",
    "stage_latency": "SELECT * FROM stage_latency",
    "throughput": "SELECT * FROM throughput",
    "throughput_over, an hour by the minute": "SELECT * FROM throughput_over('1 hour', '1 minute')",
    "stuck_documents": "SELECT * FROM stuck_documents",
    "dead_letter_queue, the 100 newest": "SELECT * FROM dead_letter_queue LIMIT 100",
    "dead_letter_queue, counted": "SELECT error_type, count(*) FROM dead_letter_queue GROUP BY 1",
    "worker_health": "SELECT * FROM worker_health",
    "provider_health": "SELECT * FROM provider_health",
    "cost_by_document, all": "SELECT sum(cost) FROM cost_by_document",
    "cost_of_document": "SELECT cost_of_document('document-777')",
    "embedding_coverage": "SELECT * FROM embedding_coverage",
    "index_health": "SELECT * FROM index_health",
    "duplicate_documents": "SELECT * FROM duplicate_documents",
    "explain_document, complete": "SELECT * FROM explain_document('document-777')",
    "explain_document, waiting": """SELECT * FROM explain_document(
        (SELECT doc_id FROM file_extractions WHERE state = 'queued' ORDER BY id DESC LIMIT 1))""",
}


COMMAND = ("count_documents_by_state", "count_unfinished_by_stage", "stuck_causes", "watch_queues", "watch_stages", "watch_rates")
"""Named queries of `docmill status` and `docmill watch` that ask more than a view."""


def fill(conn: psycopg.Connection, documents: int, passages: int) -> None:
    """Fill a migrated database; says what it makes and how long that takes."""
    params = {"documents": documents, "passages": passages}
    steps = {"nothing": BARE, "batches": BATCHES, "documents": DOCUMENTS, "events": EVENTS, "jobs and the rest": REST, "passages": PASSAGES,
             "indexes": INDEXES}  # fmt: skip
    for what, statements in steps.items():
        started = time.perf_counter()
        for statement in statements.split(";\n" if ";\n" in statements else ";"):
            conn.execute(statement, params if "%(" in statement or "%%" in statement else None)
        print(f"{what}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def database(given: str | None, documents: int, passages: int) -> Iterator[str]:
    """Yield the conninfo of a filled database."""
    if given is None:
        with bench_server() as (server, folder):
            url = url_of(fresh_settings(server, folder, "inspection"))
            with psycopg.connect(url, autocommit=True) as conn:
                fill(conn, documents, passages)
            yield url
        return
    with psycopg.connect(given, autocommit=True) as conn:
        migrate(conn)
        row = conn.execute("SELECT EXISTS (SELECT FROM file_extractions)").fetchone()
        if row is not None and not row[0]:
            fill(conn, documents, passages)
    yield given


@dataclass
class Timing:
    """How long a question took, round by round, in seconds: on the clock, and of the CPU, which others on the machine do not change."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rows: int = 0


def timed(conn: psycopg.Connection, statement: str, rounds: int) -> Timing:
    """Run a question and fetch all of it, several times."""
    timing = Timing()
    for _ in range(rounds):
        used, started = cpu_seconds(conn.info.backend_pid), time.perf_counter()
        with conn.transaction():
            # As a whole text: the files hold one statement each, and no parameters.
            timing.rows = len(conn.execute(statement.encode()).fetchall())
        timing.clock.append(time.perf_counter() - started)
        timing.cpu.append(cpu_seconds(conn.info.backend_pid) - used)
    return timing


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--passages", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", help="a migrated or empty database to fill and keep")
    given = parser.parse_args()
    folder = files("sql").joinpath("inspect")
    asked = QUESTIONS | {f"command, {name}": query(name) for name in COMMAND}
    if folder.is_dir():
        asked |= {f.name: f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".sql")}
    slow = 0
    with database(given.database, given.documents, given.passages) as url, psycopg.connect(url, autocommit=True) as conn:
        sizes = conn.execute(
            """SELECT c.relname, rows_about(c.oid, 0), pg_size_pretty(pg_total_relation_size(c.oid)) FROM pg_class AS c
            WHERE c.relname IN ('file_extractions', 'document_events', 'document_chunks', 'procrastinate_jobs', 'procrastinate_events',
                'provider_usage') ORDER BY 1"""
        ).fetchall()
        print("\n".join(f"{name}: {rows:,} rows, {size}" for name, rows, size in sizes))
        # One process for each question, or its CPU time would not be all of it.
        conn.execute("SET max_parallel_workers_per_gather = 0")
        print("| question | rows | first, s | best, s | of the CPU, s |\n|---|---|---|---|---|")
        for name, statement in asked.items():
            t = timed(conn, statement, given.rounds)
            slow += min(t.cpu) > LIMIT
            said = " over the limit" if min(t.cpu) > LIMIT else ""
            print(f"| {name} | {t.rows:,} | {t.clock[0]:.2f} | {min(t.clock):.2f} | {min(t.cpu):.2f} |{said}", flush=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
