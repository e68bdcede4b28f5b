"""The reconciler's repairs, one broken invariant at a time, and that it leaves alone what is whole."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from jobs import faults
from jobs.database import make_pool
from jobs.reconcile import Reconciler
from models.documents import Document
from tests.integration.batches import accept, add_archive, begin, seal
from tests.integration.conftest import STAGE_NAMES, Bench


def reconciler(bench: Bench, **changes: Any) -> Reconciler:
    """One that judges leases at once: as if it had run for longer than a lease, on a Postgres that has."""
    settings = bench.settings.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 60.0, **changes})
    return Reconciler(settings, bench.pool)


def long_awake(bench: Bench, lease: float = 2.0) -> Reconciler:
    """One with such leases, in seconds, that has been awake for longer, on a Postgres that has."""
    begun = "pg_postmaster_start_time() + make_interval(secs => %s) - now()"
    bench.conn.execute(f"SELECT pg_sleep(extract(epoch FROM {begun}))".encode(), [lease + 0.1])
    awake = reconciler(bench, lease_seconds=lease, reconcile_seconds=0.0)
    awake._awake_since -= 100.0
    return awake


def crash(bench: Bench, *, alone: bool = False) -> None:
    """Leave the document as a worker leaves it that died with it in hand."""
    found = bench.fetch()
    assert found is not None
    bench.conn.execute(
        """UPDATE file_extractions SET state = 'working', claim = claim + 1, claim_job_id = %s, alone = %s,
            lease_until = now() - interval '1 s' WHERE doc_id = %s""",
        [found[0].id, alone, found[1]],
    )


async def test_a_whole_database_is_left_alone(bench: Bench) -> None:
    bench.submit("a")
    bench.submit("b")
    await bench.drain()
    bench.submit("c")
    assert await reconciler(bench).pass_once() == {}


async def test_an_expired_lease_is_rescued_with_a_new_job_and_the_old_one_ended(bench: Bench) -> None:
    bench.submit()
    crash(bench)
    bench.conn.execute("UPDATE procrastinate_jobs SET worker_id = (SELECT worker_id FROM procrastinate_register_worker_v1())")
    assert await reconciler(bench).pass_once() == {"rescued": 1}
    assert bench.one("SELECT state, crash_count, lone_crash_count, lease_until FROM file_extractions") == ("queued", 1, 0, None)
    assert bench.all("SELECT status, worker_id FROM procrastinate_jobs ORDER BY id") == [("aborted", None), ("todo", None)]
    await bench.drain()
    assert bench.one("SELECT state, crash_count FROM file_extractions") == ("complete", 0)


async def test_a_live_lease_is_left_alone_and_none_is_judged_before_the_reconciler_has_been_awake_for_a_lease(bench: Bench) -> None:
    bench.submit()
    crash(bench)
    fresh = Reconciler(bench.settings, bench.pool)
    assert await fresh.pass_once() == {}
    bench.conn.execute("UPDATE file_extractions SET lease_until = now() + interval '1 min'")
    assert await reconciler(bench).pass_once() == {}


@pytest.mark.parametrize("what", ["lives", "does not name it", "was not heard of"])
async def test_what_a_worker_that_lives_says_it_holds_is_not_taken_from_it_although_its_lease_could_not_be_renewed(
    bench: Bench, what: str
) -> None:
    bench.submit()
    crash(bench)
    bench.conn.execute("UPDATE file_extractions SET claimed_by = 'test:1'")
    bench.conn.execute(
        "INSERT INTO worker_registry (worker, host, pid, concurrency, documents, version, heartbeat_at) "
        "VALUES ('test:1', 'test', 1, 1, %s, 'x', now() + make_interval(secs => %s))",
        [["a" if what != "does not name it" else "b"], -1.1 if what == "was not heard of" else 60],
    )
    done = await long_awake(bench).pass_once()
    assert bench.one("SELECT state FROM file_extractions") == ("working" if what == "lives" else "queued",), done


async def test_expired_leases_that_a_transaction_holds_hide_no_other(bench: Bench, database: str) -> None:
    bench.submit("free")
    crash(bench)
    bench.conn.execute(
        """SET session_replication_role = replica;
        INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, content_sha256, correlation_id, state, lease_until)
        SELECT 'held' || n, 'u', 'held' || n, 'x', encode(sha256(n::text::bytea), 'hex'), 'c', 'working', now() - interval '1 h'
        FROM generate_series(1, 120) AS n;
        RESET session_replication_role"""
    )
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id LIKE 'held%' FOR UPDATE")
        assert (await reconciler(bench).pass_once())["rescued"] == 1
    assert bench.one("SELECT state FROM file_extractions WHERE doc_id = 'free'") == ("queued",)


async def test_only_crashes_alone_make_a_dead_letter(bench: Bench) -> None:
    bench.submit()
    for _ in range(5):
        crash(bench)
        await reconciler(bench).pass_once()
        bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL")
    assert bench.one("SELECT state, crash_count, lone_crash_count FROM file_extractions") == ("queued", 5, 0)
    for _ in range(3):
        crash(bench, alone=True)
        await reconciler(bench, max_crashes=3).pass_once()
        bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL")
    state, kind, message = bench.one("SELECT state, error_type, error_message FROM file_extractions")
    assert (state, kind) == ("failed", "UNKNOWN")
    assert "MAX_CRASHES" in message
    assert bench.one("SELECT stage FROM dead_letters") == ("validate",)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')") == (0,)


async def test_progress_sets_the_crash_count_back(bench: Bench) -> None:
    bench.submit()
    crash(bench, alone=True)
    await reconciler(bench).pass_once()
    found = bench.fetch()
    assert found is not None
    await bench.runner(handoff="queue").run(*found)
    assert bench.one("SELECT milestone, crash_count, lone_crash_count FROM file_extractions") == ("upload_validated", 0, 0)


async def test_a_suspect_runs_alone_with_a_checkpoint_a_stage_and_its_neighbours_wait(bench: Bench) -> None:
    bench.submit("suspect")
    crash(bench)
    await reconciler(bench).pass_once()
    bench.submit("neighbour")
    seen: list[tuple[str, str, bool]] = []
    inside: set[str] = set()

    async def look(document: Document) -> None:
        inside.add(document.doc_id)
        await asyncio.sleep(0.02)
        alone = bench.one("SELECT alone FROM file_extractions WHERE doc_id = %s", document.doc_id)[0]
        seen.append((document.doc_id, str(document.milestone), alone))
        assert "suspect" not in inside or len(inside) == 1
        inside.discard(document.doc_id)

    bench.also.update(dict.fromkeys(STAGE_NAMES, look))
    runner = bench.runner()
    jobs = [bench.fetch(), bench.fetch()]
    await asyncio.gather(*(runner.run(*job) for job in jobs if job is not None))
    assert bench.all("SELECT DISTINCT state FROM file_extractions") == [("complete",)]
    assert [alone for doc_id, _, alone in seen if doc_id == "suspect"] == [True] * 7
    assert [alone for doc_id, _, alone in seen if doc_id == "neighbour"] == [False] * 7


async def test_a_job_that_was_fetched_but_never_claimed_is_ended_and_its_document_queued_again(bench: Bench) -> None:
    bench.submit()
    assert bench.fetch() is not None
    done = await reconciler(bench).pass_once()
    assert done == {"ended": 1, "requeued": 1}
    assert bench.one("SELECT requeue_count FROM file_extractions") == (1,)
    await bench.drain()
    assert bench.one("SELECT state, requeue_count FROM file_extractions") == ("complete", 0)


async def test_a_fetched_job_that_a_live_worker_has_in_hand_is_left_alone(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    bench.conn.execute(
        "INSERT INTO worker_registry (worker, host, pid, concurrency, active_jobs, version) VALUES ('h:1', 'h', 1, 4, %s, 'x')",
        [[found[0].id]],
    )
    assert await reconciler(bench).pass_once() == {"ended": 1, "requeued": 1}  # the heartbeat is older than a lease of 0 s
    bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL")
    found = bench.fetch()
    assert found is not None
    bench.conn.execute("UPDATE worker_registry SET active_jobs = %s, heartbeat_at = now() + interval '1 min'", [[found[0].id]])
    assert await reconciler(bench).pass_once() == {}


async def test_a_job_whose_outcome_was_never_saved_is_ended(bench: Bench) -> None:
    bench.submit()
    await bench.drain()
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    assert await reconciler(bench).pass_once() == {"ended": 1}
    assert bench.one("SELECT status FROM procrastinate_jobs") == ("aborted",)
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


@pytest.mark.parametrize("loss", ["DELETE FROM procrastinate_jobs", "UPDATE procrastinate_jobs SET status = 'failed'"])
async def test_a_document_whose_job_vanished_or_failed_is_queued_again_with_backoff_and_parked_in_the_end(bench: Bench, loss: str) -> None:
    bench.submit()
    delays = []
    for count in range(1, 5):
        bench.conn.execute(loss)
        assert await reconciler(bench, max_requeues=4).pass_once() == {"requeued": 1}
        assert bench.one("SELECT requeue_count FROM file_extractions") == (count,)
        delay = "extract(epoch FROM j.scheduled_at - d.updated_at)::int"
        delays.append(bench.one(f"SELECT {delay} FROM procrastinate_jobs j, file_extractions d ORDER BY j.id DESC")[0])
    assert delays == [None, 4, 8, 16]
    bench.conn.execute(loss)
    assert await reconciler(bench, max_requeues=4).pass_once() == {"failed": 1}
    assert bench.one("SELECT state, error_type FROM file_extractions") == ("failed", "UNKNOWN")
    assert bench.one("SELECT stage, resolved_at FROM dead_letters") == ("validate", None)


async def test_any_number_of_reconcilers_repair_each_thing_once(bench: Bench) -> None:
    for i in range(20):
        bench.submit(f"doc {i}")
    for _ in range(10):
        crash(bench)
    for _ in range(5):
        bench.fetch()
    results = await asyncio.gather(*(reconciler(bench).pass_once() for _ in range(6)))
    total: dict[str, int] = {}
    for result in results:
        for key, value in result.items():
            total[key] = total.get(key, 0) + value
    assert (total["rescued"], total["ended"]) == (10, 5)
    assert bench.one("SELECT max(crash_count) FROM file_extractions") == (1,)
    await reconciler(bench).pass_once()
    assert bench.one("SELECT count(*), count(DISTINCT args->>'doc_id') FROM procrastinate_jobs WHERE status = 'todo'") == (20, 20)
    await bench.drain()
    assert bench.all("SELECT state, count(*) FROM file_extractions GROUP BY 1") == [("complete", 20)]


async def test_a_worker_that_comes_back_after_its_rescue_changes_nothing(bench: Bench) -> None:
    async def rescued_meanwhile(document: Document) -> None:
        if document.doc_id == "a" and bench.calls.count("embed") == 1:
            bench.conn.execute("UPDATE file_extractions SET lease_until = now() - interval '1 s'")
            assert await reconciler(bench).pass_once() == {"rescued": 1}

    bench.also["embed"] = rescued_meanwhile
    bench.submit()
    await bench.drain()
    assert bench.one("SELECT state, crash_count FROM file_extractions") == ("complete", 0)
    assert bench.calls == 2 * STAGE_NAMES
    assert bench.one("SELECT count(*) FROM document_chunks") == (5,)
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'completed'") == (1,)


async def test_a_side_job_of_a_dead_worker_is_deferred_again(bench: Bench) -> None:
    bench.conn.execute(
        """SELECT procrastinate_defer_jobs_v1(ARRAY[ROW('maintenance', 'look_after_vector_index', 0, NULL, 'look_after', '{"a": 1}', NULL)
        ::procrastinate_job_to_defer_v1])"""
    )
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    await reconciler(bench).pass_once()
    assert bench.all("SELECT status, args FROM procrastinate_jobs ORDER BY id") == [("aborted", {"a": 1}), ("todo", {"a": 1})]


async def test_an_applications_own_jobs_are_left_alone(bench: Bench) -> None:
    bench.conn.execute("INSERT INTO procrastinate_jobs (queue_name, task_name, status) VALUES ('theirs', 'their_task', 'doing')")
    assert await reconciler(bench).pass_once() == {}
    assert bench.all("SELECT status FROM procrastinate_jobs") == [("doing",)]


async def test_a_step_that_always_meets_a_timeout_keeps_no_other_from_being_done(bench: Bench, database: str) -> None:
    bench.submit()
    crash(bench)
    bench.conn.execute("INSERT INTO summaries_to_renew (batch_id) VALUES ('gone')")
    pool = make_pool(bench.settings, make_conninfo(database, options="-c statement_timeout=200"))
    await pool.open()
    try:
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE processing_jobs, alert_conditions IN ACCESS EXCLUSIVE MODE")
            settings = bench.settings.model_copy(update={"lease_seconds": 0.0})
            assert await Reconciler(settings, pool).pass_once() == {"rescued": 1}
            other.execute("ROLLBACK")
            other.execute("LOCK TABLE batch_archives IN ACCESS EXCLUSIVE MODE")
            await Reconciler(settings, pool).pass_once()
            assert bench.one("SELECT count(*) FROM summaries_to_renew") == (0,)
    finally:
        await pool.close()


async def test_an_applications_own_job_that_names_a_document_hides_no_loss(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    bench.conn.execute("UPDATE procrastinate_jobs SET task_name = 'notify_user', queue_name = 'application'")
    assert await reconciler(bench).pass_once() == {"requeued": 1}


async def test_an_extraction_that_is_tried_again_in_a_cancelled_batch_is_not_cancelled_with_it(bench: Bench) -> None:
    run = begin(bench.conn)
    accept(bench.conn, run, "a", "c")
    seal(bench.conn, run, 2)
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    bench.conn.execute("SELECT cancel_batch('b')")
    assert bench.all("SELECT doc_id, state FROM file_extractions ORDER BY 1") == [("a", "complete"), ("c", "cancelled")]
    bench.conn.execute("""UPDATE file_extractions SET raw_extraction = '{"failure": {"error_type": "PERMANENT"}}' WHERE doc_id = 'a'""")
    bench.conn.execute("SELECT requeue_extraction('a')")
    assert "cancelled" not in await reconciler(bench).pass_once()
    await bench.drain()
    assert bench.one("SELECT state, version, served_version FROM file_extractions WHERE doc_id = 'a'") == ("complete", 2, 2)


async def test_a_database_that_was_away_gives_everybody_a_lease_to_come_back(bench: Bench) -> None:
    bench.submit()
    crash(bench)
    waking = reconciler(bench, lease_seconds=5.0)
    waking._awake_since -= 100.0
    waking._noted_at -= 100.0
    assert await waking.pass_once() == {}


async def test_passes_that_take_long_do_not_pass_for_pauses_and_leases_are_judged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_FAULTS", faults.parse("sleep:1.1@before_repair:requeue_lost_document"))
    for n in range(3):
        bench.submit(f"doc {n}")
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    busy = long_awake(bench, lease=6.0)
    assert await busy.pass_once() == {"requeued": 3}
    crash(bench)
    assert await busy.pass_once() == {"rescued": 1}


async def test_a_pause_in_the_middle_of_a_pass_gives_everybody_a_lease_to_come_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_FAULTS", faults.parse("block:1.2@before_repair:rescue_document;doc=a"))
    bench.submit("a")
    crash(bench)
    bench.submit("b")
    crash(bench)
    assert await long_awake(bench).pass_once() == {}
    assert bench.all("SELECT state FROM file_extractions") == [("working",), ("working",)]


async def test_a_statement_that_is_slow_in_every_pass_keeps_no_lease_from_being_judged(bench: Bench, database: str) -> None:
    pool = make_pool(bench.settings, make_conninfo(database, options="-c statement_timeout=1500"))
    await pool.open()
    try:
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE alert_conditions IN ACCESS EXCLUSIVE MODE")
            slow = long_awake(bench)
            slow._pool = pool
            await slow.pass_once()
            slow._awake_since -= 100.0
            await slow.pass_once()
            bench.submit()
            crash(bench)
            assert await slow.pass_once() == {"rescued": 1}
    finally:
        await pool.close()


async def test_a_sealed_batch_whose_last_document_ended_without_saying_so_is_settled(bench: Bench) -> None:
    run = bench.one("SELECT begin_batch('b', 'default', NULL, 'c')")[0]
    bench.conn.execute("SELECT accept_document('a','default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,50)", [run])
    bench.conn.execute("SELECT seal_batch('b', %s, 1)", [run])
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = 1, lease_until = now()")
    bench.conn.execute("UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = 1")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded'")
    assert await reconciler(bench).pass_once() == {"completed": 1}
    assert bench.one("SELECT status FROM processing_jobs") == ("completed",)


async def test_a_sweep_of_what_waits_goes_on_where_the_last_pass_stopped_and_takes_several_windows_where_there_is_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.reconcile.WINDOW", 2)
    for n in range(7):
        bench.submit(f"doc {n}")
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    hurried = reconciler(bench, reconcile_seconds=0.0)
    assert [await hurried.pass_once() for _ in range(4)] == [{"requeued": 2}, {"requeued": 2}, {"requeued": 2}, {"requeued": 1}]
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    assert await reconciler(bench, reconcile_seconds=3600.0).pass_once() == {"requeued": 7}


async def test_a_pass_looks_at_a_window_of_the_archives_that_wait_and_the_next_one_goes_on_behind_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.reconcile.WINDOW", 2)
    run = begin(bench.conn)
    for n in range(5):
        add_archive(bench.conn, run, f"{n}.zip/", "waiting")
    sweeps = reconciler(bench)
    assert [await sweeps.pass_once() for _ in range(3)] == [{}] * 3
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    assert [await sweeps.pass_once() for _ in range(4)] == [{"requeued": 2}, {"requeued": 2}, {"requeued": 1}, {}]
