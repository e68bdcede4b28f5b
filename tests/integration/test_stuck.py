"""stuck_documents names what does not get on, why, since when and what to do, and leaves alone what only waits for its turn."""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.test_views import beat

STUCK = "SELECT cause, reason, extract(epoch FROM stuck_for)::int / 60, what_to_do FROM stuck_documents"


def submit(conn: psycopg.Connection, doc_id: str = "a", content: str = "1") -> None:
    conn.execute("SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => repeat(%s, 64))", [doc_id, content])


def age(conn: psycopg.Connection, minutes: int) -> None:
    conn.execute("UPDATE file_extractions SET updated_at = now() - make_interval(mins => %s)", [minutes])


def stuck(conn: psycopg.Connection) -> list[tuple[object, ...]]:
    return conn.execute(STUCK.encode()).fetchall()


def work(conn: psycopg.Connection, lease: str) -> None:
    conn.execute(
        f"UPDATE file_extractions SET state = 'working', claim = claim + 1, claimed_by = 'h:1', lease_until = now() + interval '{lease}'"
    )
    conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE status = 'todo'")


def event(
    conn: psycopg.Connection, name: str, minutes_ago: int, worker: str | None = None, stage: str = "validate", detail: str = "{}"
) -> None:
    conn.execute(
        """INSERT INTO document_events (at, doc_id, user_id, correlation_id, stage, event, worker, detail)
        VALUES (now() - make_interval(mins => %s), 'a', 'default', 'c', %s, %s, %s, %s)""",
        [minutes_ago, stage, name, worker, detail],
    )


def test_a_document_that_waits_for_its_turn_behind_others_is_not_stuck(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    event(conn, "stage_completed", 2, "h:1")
    age(conn, 600)
    assert stuck(conn) == []


def test_without_a_worker_for_the_queue_it_says_which_one_to_start(conn: psycopg.Connection) -> None:
    submit(conn)
    assert stuck(conn) == [], "a worker may be about to start"
    age(conn, 5)
    beat(conn, queues=["embed"])
    beat(conn, worker="h:2", ago=3600)
    ((cause, reason, minutes, advice),) = stuck(conn)
    assert (cause, reason, minutes) == ("no_worker", "no worker alive listens to the queue cpu", 5)
    assert "docmill worker --queues cpu" in str(advice)


def test_a_worker_that_fell_silent_with_a_document_is_named(conn: psycopg.Connection) -> None:
    submit(conn)
    work(conn, "-5 minutes")
    ((cause, reason, minutes, advice),) = stuck(conn)
    assert (cause, minutes) == ("worker_lost", 5)
    assert "h:1" in str(reason) and "start a worker" in str(advice)
    beat(conn, worker="h:9")
    ((_, _, _, advice),) = stuck(conn)
    assert "workers alive should take it over" in str(advice)


def test_a_document_that_a_transaction_holds_is_no_reason_to_restart_its_worker(conn: psycopg.Connection) -> None:
    submit(conn)
    work(conn, "-5 minutes")
    beat(conn)
    assert [row[0] for row in stuck(conn)] == ["worker_lost"], "a worker of that name lives, and knows nothing of the document"
    conn.execute("UPDATE worker_registry SET documents = '{a}'")
    ((cause, reason, minutes, advice),) = stuck(conn)
    assert (cause, minutes) == ("held", 5)
    assert "h:1" in str(reason) and "an open transaction holds it" in str(reason) and "22_blocked.sql" in str(advice)
    conn.execute("UPDATE worker_registry SET heartbeat_at = now() - interval '31 seconds'")
    assert [row[0] for row in stuck(conn)] == ["worker_lost"]


def test_a_long_stage_is_told_from_a_short_one(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    work(conn, "1 minute")
    assert stuck(conn) == []
    age(conn, 45)
    assert [row[0] for row in stuck(conn)] == ["slow"]


def test_a_document_without_a_job_is_named(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    conn.execute("DELETE FROM procrastinate_jobs")
    assert stuck(conn) == []
    age(conn, 2)
    assert [row[0] for row in stuck(conn)] == ["job_lost"]


def test_a_fetched_job_that_no_worker_has_in_hand_is_named(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    event(conn, "stage_completed", 2, "h:1")
    age(conn, 3)
    assert [row[0] for row in stuck(conn)] == ["job_lost"]
    conn.execute("UPDATE worker_registry SET active_jobs = ARRAY(SELECT id FROM procrastinate_jobs)")
    assert stuck(conn) == []


def test_a_document_whose_worker_died_is_named_while_it_waits(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    conn.execute("UPDATE file_extractions SET crash_count = 2")
    ((cause, reason, _, _),) = stuck(conn)
    assert (cause, reason) == ("crashing", "its worker died or hung 2 times during validate")


@pytest.mark.parametrize(
    ("counts", "waiting_for", "cause"),
    [("true", None, "failing"), ("false", "embedding http://x", "service"), ("false", "storage", "storage"), ("false", None, "failing")],
)
def test_a_document_that_is_tried_again_and_again_is_stuck_since_it_last_got_on(
    conn: psycopg.Connection, counts: str, waiting_for: str | None, cause: str
) -> None:
    submit(conn)
    beat(conn)
    work(conn, "1 minute")
    conn.execute(
        """UPDATE file_extractions SET state = 'retrying', lease_until = NULL, not_before = now() + interval '1 min', retry_count = 2,
        error_type = 'RETRYABLE', error_message = 'HTTP 503', waiting_for = %s""",
        [waiting_for],
    )
    conn.execute("UPDATE procrastinate_jobs SET status = 'todo', scheduled_at = now() + interval '1 min'")
    conn.execute("ALTER TABLE document_events DISABLE TRIGGER document_events_append_only")
    conn.execute("UPDATE document_events SET at = now() - interval '30 minutes'")
    event(conn, "retry_scheduled", 5, "h:1", detail=f'{{"counts": {counts}}}')
    event(conn, "retry_scheduled", 1, "h:1", detail=f'{{"counts": {counts}}}')
    ((found, reason, minutes, _),) = stuck(conn)
    assert (found, minutes) == (cause, 30)
    assert "HTTP 503" in str(reason)
    conn.execute("UPDATE document_events SET at = now() - interval '5 minutes' WHERE event = 'submitted'")
    assert stuck(conn) == [], "it may pass by itself"


def test_a_document_that_waits_for_an_equal_one_says_for_which(conn: psycopg.Connection) -> None:
    submit(conn, "first")
    submit(conn, "second")
    beat(conn)
    event(conn, "stage_completed", 2, "h:1")
    conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'")
    conn.execute("UPDATE file_extractions SET milestone = 'upload_validated'")
    conn.execute("UPDATE file_extractions SET owns_content = TRUE WHERE doc_id = 'first'")
    conn.execute("UPDATE file_extractions SET state = 'queued', lease_until = NULL WHERE doc_id = 'second'")
    conn.execute("UPDATE procrastinate_jobs SET task_name = 'parse', queueing_lock = replace(queueing_lock, 'validate', 'parse')")
    age(conn, 20)
    ((cause, reason, _, _),) = stuck(conn)
    assert (cause, reason) == ("equal", "it waits for first, which has the same content and is due for parse")


def test_a_queue_with_workers_where_nothing_comes_to_an_end_is_told_from_a_long_one(conn: psycopg.Connection) -> None:
    submit(conn)
    beat(conn)
    age(conn, 11)
    event(conn, "stage_completed", 15, "h:1")
    event(conn, "stage_completed", 1, "h:1", stage="embed")
    ((cause, reason, _, _),) = stuck(conn)
    assert cause == "queue_stands" and "queue cpu" in str(reason)
    event(conn, "stage_completed", 1, "h:1")
    assert stuck(conn) == []


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_what_has_ended_is_not_stuck(conn: psycopg.Connection, state: str) -> None:
    submit(conn)
    conn.execute(f"UPDATE file_extractions SET state = '{state}', error_type = 'PERMANENT', error_message = 'no'")
    age(conn, 6000)
    assert stuck(conn) == []


def test_a_retry_behind_a_long_backlog_is_seen_although_it_was_submitted_last(conn: psycopg.Connection) -> None:
    conn.execute(
        "SELECT submit_document('uploads/a', doc_id => 'd' || n, content_sha256 => repeat('1', 64)) FROM generate_series(1, 30) AS n"
    )
    definition = conn.execute("SELECT pg_get_viewdef('stuck_documents'::regclass)").fetchone()
    assert definition is not None
    conn.execute(f"CREATE VIEW few AS {definition[0].replace('10000', '5')}".encode())
    age(conn, 5)
    seen = {row[0] for row in conn.execute("SELECT doc_id FROM few").fetchall()}
    assert seen == {"d1", "d2", "d3", "d4", "d5"}
    conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 hour' WHERE args ->> 'doc_id' = 'd30'")
    assert "d30" in {row[0] for row in conn.execute("SELECT doc_id FROM few").fetchall()}
