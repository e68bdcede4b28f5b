"""One open alert for each rule and subject, told once, told again after hours, and told when it is over."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import psycopg
import pytest

from jobs.reconcile import Reconciler
from tests.integration.conftest import Bench

ALWAYS = 0.0


def evaluate(conn: psycopg.Connection) -> list[tuple[str, str, str]]:
    """Look at all rules at once and return what changed."""
    conn.execute("UPDATE alert_rules SET evaluated_at = 'epoch'")
    return [
        (row[0], row[1], row[2]) for row in conn.execute("SELECT change, rule, subject FROM evaluate_alerts(0) ORDER BY 2, 3").fetchall()
    ]


def findings(conn: psycopg.Connection) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in conn.execute("SELECT rule, subject FROM alert_findings ORDER BY 1, 2").fetchall()]


def told(conn: psycopg.Connection) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in conn.execute("SELECT kind, detail->>'status' FROM alerts ORDER BY id").fetchall()]


def set_rule(conn: psycopg.Connection, rule: str, **values: Any) -> None:
    changes = ", ".join(f"{name} = %({name})s" for name in values)
    conn.execute(f"UPDATE alert_rules SET {changes} WHERE rule = %(rule)s", {**values, "rule": rule})


def break_service(conn: psycopg.Connection, service: str = "embedding http://x") -> None:
    conn.execute(
        """INSERT INTO circuit_breakers (service, state, reason, try_at) VALUES (%s, 'open', 'HTTP 503', now())
        ON CONFLICT (service) DO UPDATE SET state = 'open', reason = 'HTTP 503', try_at = now()""",
        [service],
    )


def mend_service(conn: psycopg.Connection) -> None:
    conn.execute("UPDATE circuit_breakers SET state = 'closed', try_at = NULL")


def pass_hours(conn: psycopg.Connection, hours: float) -> None:
    """Let everything that was noted have been noted earlier."""
    conn.execute(
        """UPDATE alert_conditions SET first_seen_at = first_seen_at - i.by, opened_at = opened_at - i.by, notified_at = notified_at - i.by,
            last_seen_at = last_seen_at - i.by FROM (SELECT make_interval(secs => 3600 * %(by)s) AS by) AS i""",
        {"by": hours},
    )


def worker_row(conn: psycopg.Connection, worker: str, silent: float = 0, queues: list[str] | None = None, started: float = 3600) -> None:
    conn.execute(
        """INSERT INTO worker_registry (worker, host, pid, queues, concurrency, started_at, heartbeat_at, version)
        VALUES (%s, split_part(%s, ':', 1), 1, %s, 1, now() - make_interval(secs => %s), now() - make_interval(secs => %s), '1')""",
        [worker, worker, queues, started, silent],
    )


def test_an_alert_is_told_once_while_it_lasts_again_after_hours_and_when_it_is_over(conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=0, clear_seconds=0, repeat_hours=4)
    break_service(conn)
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]
    assert evaluate(conn) == []
    pass_hours(conn, 3.9)
    assert evaluate(conn) == []
    pass_hours(conn, 0.2)
    assert evaluate(conn) == [("repeated", "breaker_open", "embedding http://x")]
    assert evaluate(conn) == []
    assert conn.execute("SELECT rule, severity FROM open_alerts").fetchall() == [("breaker_open", "critical")]
    mend_service(conn)
    assert evaluate(conn) == [("resolved", "breaker_open", "embedding http://x")]
    assert evaluate(conn) == []
    assert conn.execute("SELECT count(*) FROM open_alerts").fetchone() == (0,)
    break_service(conn)
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]
    assert told(conn) == [("breaker_open", status) for status in ("open", "repeated", "resolved", "open")]
    assert conn.execute("SELECT count(*), count(resolved_at) FROM alert_conditions").fetchone() == (1, 0)


def test_a_service_that_nobody_calls_any_more_is_no_alert_unless_a_document_waits_for_it(conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=0, clear_seconds=0)
    break_service(conn)
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a')")
    for changes in ("state = 'working', claim = 1, lease_until = now()", "state = 'retrying', lease_until = NULL"):
        conn.execute(f"UPDATE file_extractions SET {changes}")
    conn.execute("UPDATE circuit_breakers SET try_at = now() - interval '61 minutes'")
    for place in (7, None):  # among those that wait for the breaker; for the budget, before that opened
        conn.execute("UPDATE file_extractions SET waiting_for = 'embedding http://x', waiting_place = %s", [place])
        assert findings(conn) == [("breaker_open", "embedding http://x")]
        ((health, what_to_do),) = conn.execute("SELECT health, what_to_do FROM provider_health").fetchall()
        assert health == "down" and "reset_breaker" in what_to_do
    conn.execute("UPDATE file_extractions SET waiting_for = 'embedding http://new'")
    assert conn.execute("SELECT health, what_to_do FROM provider_health").fetchall() == [("idle", None)]
    assert evaluate(conn) == [("resolved", "breaker_open", "embedding http://x")]
    conn.execute("UPDATE circuit_breakers SET try_at = now() + interval '1 minute'")  # somebody did call
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]


def test_what_passes_before_its_time_is_never_told(conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=120)
    break_service(conn)
    assert evaluate(conn) == []
    pass_hours(conn, 100 / 3600)
    assert evaluate(conn) == []
    mend_service(conn)
    assert evaluate(conn) == []
    assert conn.execute("SELECT count(*) FROM alert_conditions").fetchone() == (0,)
    break_service(conn)
    evaluate(conn)
    pass_hours(conn, 130 / 3600)
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]
    assert told(conn) == [("breaker_open", "open")]


def test_what_comes_and_goes_is_one_alert(conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=0, clear_seconds=300)
    for _ in range(5):
        break_service(conn)
        evaluate(conn)
        mend_service(conn)
        evaluate(conn)
    assert told(conn) == [("breaker_open", "open")]
    pass_hours(conn, 301 / 3600)
    assert evaluate(conn) == [("resolved", "breaker_open", "embedding http://x")]


def test_of_many_who_evaluate_at_once_one_tells(database: str, conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=0)
    break_service(conn)
    start, changes = threading.Barrier(8), []

    def look() -> None:
        with psycopg.connect(database, autocommit=True) as own:
            start.wait()
            for _ in range(5):
                changes.extend(own.execute("SELECT change FROM evaluate_alerts(30)").fetchall())

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert changes == [("open",)]
    assert told(conn) == [("breaker_open", "open")]


def test_somebody_who_is_changing_a_rule_holds_up_neither_the_others_nor_the_worker(database: str, conn: psycopg.Connection) -> None:
    for rule in ("breaker_open", "worker_dead"):
        set_rule(conn, rule, for_seconds=0)
    break_service(conn)
    worker_row(conn, "far:1", silent=3600)
    with psycopg.connect(database) as operator:
        operator.execute("UPDATE alert_rules SET threshold = 10 WHERE rule = 'worker_dead'")
        conn.execute("SET statement_timeout = '20s'")
        assert conn.execute("SELECT change, rule FROM evaluate_alerts(0)").fetchall() == [("open", "breaker_open")]
        operator.commit()
    assert conn.execute("SELECT change, rule FROM evaluate_alerts(0)").fetchall() == [("open", "worker_dead")]


def test_a_rule_that_is_switched_off_or_relaxed_ends_its_alert(conn: psycopg.Connection) -> None:
    worker_row(conn, "far:1", silent=3600)
    set_rule(conn, "worker_dead", clear_seconds=0)
    assert evaluate(conn) == [("open", "worker_dead", "far:1")]
    set_rule(conn, "worker_dead", threshold=7200)
    assert evaluate(conn) == [("resolved", "worker_dead", "far:1")]
    set_rule(conn, "worker_dead", threshold=60)
    assert evaluate(conn) == [("open", "worker_dead", "far:1")]
    set_rule(conn, "worker_dead", enabled=False)
    assert evaluate(conn) == [("resolved", "worker_dead", "far:1")]


def test_an_evaluation_that_is_rolled_back_has_told_nothing(conn: psycopg.Connection) -> None:
    set_rule(conn, "breaker_open", for_seconds=0)
    break_service(conn)
    with conn.transaction(force_rollback=True):
        assert len(conn.execute("SELECT FROM evaluate_alerts(0)").fetchall()) == 1
    assert told(conn) == []
    assert evaluate(conn) == [("open", "breaker_open", "embedding http://x")]


def test_an_empty_installation_finds_nothing(conn: psycopg.Connection) -> None:
    assert findings(conn) == []
    assert evaluate(conn) == []


async def test_documents_that_wait_too_long_are_found_by_queue_and_whether_anybody_listens(bench: Bench) -> None:
    bench.submit("a")
    bench.submit("b")
    worker_row(bench.conn, "h:1", queues=["embed"])
    assert findings(bench.conn) == []
    bench.conn.execute("UPDATE file_extractions SET updated_at = now() - interval '2 hours' WHERE doc_id = 'a'")
    assert findings(bench.conn) == [("no_worker", "cpu"), ("oldest_waiting", "cpu")]
    assert bench.one("SELECT detail->>'doc_id' FROM alert_findings WHERE rule = 'oldest_waiting'") == ("a",)
    worker_row(bench.conn, "h:2", queues=["cpu"])
    assert findings(bench.conn) == [("oldest_waiting", "cpu")]
    # Told to wait is not due.
    bench.conn.execute("UPDATE file_extractions SET not_before = now() + interval '1 hour' WHERE doc_id = 'a'")
    assert findings(bench.conn) == []


async def test_a_document_that_waits_for_an_equal_one_is_not_due(bench: Bench) -> None:
    for doc_id in ("first", "second"):
        bench.submit(doc_id, content="1")
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now()")
    bench.conn.execute(
        """UPDATE file_extractions SET milestone = 'upload_validated', state = 'queued', lease_until = NULL,
        updated_at = now() - interval '2 hours'"""
    )
    bench.conn.execute("UPDATE file_extractions SET owns_content = TRUE, not_before = now() + interval '1 hour' WHERE doc_id = 'first'")
    worker_row(bench.conn, "h:1", queues=["cpu"])
    assert findings(bench.conn) == []
    bench.conn.execute("UPDATE file_extractions SET owns_content = FALSE WHERE doc_id = 'first'")
    assert findings(bench.conn) == [("oldest_waiting", "cpu")]


def ended(conn: psycopg.Connection, event: str, count: int, age: str = "1 minute") -> None:
    conn.execute(
        """INSERT INTO document_events (at, doc_id, user_id, correlation_id, event)
        SELECT now() - %s::interval, 'd' || n, 'u', 'c', %s FROM generate_series(1, %s) AS n""",
        [age, event, count],
    )


def test_a_rate_of_failures_is_judged_over_enough_documents_of_the_last_hour(conn: psycopg.Connection) -> None:
    ended(conn, "failed", 100, age="2 hours")
    ended(conn, "failed", 5)
    assert findings(conn) == []
    ended(conn, "completed", 60)
    ended(conn, "stage_completed", 1000)
    assert findings(conn) == [("dead_letter_rate", "all")]
    assert conn.execute("SELECT value FROM alert_findings").fetchone() == (5 / 65,)
    ended(conn, "completed", 60)
    assert findings(conn) == []


def test_a_worker_is_dead_until_another_takes_its_place_or_a_day_has_passed(conn: psycopg.Connection) -> None:
    worker_row(conn, "h:1", silent=60)
    worker_row(conn, "other:1")
    assert findings(conn) == []
    conn.execute("UPDATE worker_registry SET heartbeat_at = now() - interval '5 minutes' WHERE worker = 'h:1'")
    assert findings(conn) == [("worker_dead", "h:1")]
    worker_row(conn, "h:2", started=60)
    assert findings(conn) == []
    conn.execute("DELETE FROM worker_registry WHERE worker = 'h:2'")
    conn.execute("UPDATE worker_registry SET heartbeat_at = now() - interval '25 hours' WHERE worker = 'h:1'")
    assert findings(conn) == []


def test_a_budget_that_is_used_up_far_ahead_is_found(conn: psycopg.Connection) -> None:
    conn.execute("SELECT take_budget('s', 60, 0, 0, 5)")
    assert findings(conn) == []
    conn.execute("SELECT pause_budget('s', 601)")
    assert findings(conn) == [("budget_exhausted", "s")]


def test_an_index_whose_build_was_cut_off_is_found(conn: psycopg.Connection) -> None:
    conn.execute("CREATE INDEX half_built ON file_extractions (file_name)")
    assert findings(conn) == []
    conn.execute("UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'half_built'::regclass")
    assert findings(conn) == [("index_invalid", "half_built")]


@pytest.mark.parametrize("subject", ["'; DROP TABLE alerts; --", "😀 <script>", "%s {} \\"])
def test_names_from_outside_are_only_data(conn: psycopg.Connection, subject: str) -> None:
    set_rule(conn, "breaker_open", for_seconds=0)
    break_service(conn, subject)
    assert evaluate(conn) == [("open", "breaker_open", subject)]
    assert conn.execute("SELECT detail->>'subject' FROM alerts").fetchone() == (subject,)


async def test_the_reconciler_of_any_worker_raises_alerts_and_notifies(bench: Bench) -> None:
    set_rule(bench.conn, "breaker_open", for_seconds=0)
    break_service(bench.conn)
    bench.conn.execute("LISTEN docmill_alerts")
    reconcilers = [Reconciler(bench.settings, bench.pool) for _ in range(3)]
    await asyncio.gather(*(reconciler.pass_once() for reconciler in reconcilers))
    (notice,) = bench.conn.notifies(timeout=10, stop_after=1)
    assert '"breaker_open"' in notice.payload
    assert told(bench.conn) == [("breaker_open", "open")]


async def test_a_rule_that_fails_keeps_no_repair_from_being_made(bench: Bench) -> None:
    bench.conn.execute("ALTER TABLE alert_rules RENAME TO alert_rules_gone")
    bench.submit("a")
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {"requeued": 1}
