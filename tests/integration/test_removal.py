"""Cancel and delete: they win over work in flight, leave an event, and what was deleted never comes back."""

from __future__ import annotations

import asyncio
import threading

import psycopg
import pytest
from psycopg.rows import dict_row

import jobs
from jobs.reconcile import Reconciler
from models.documents import Document
from models.errors import NotFound, SubmitConflict
from models.settings import load_settings
from models.stages import State
from sql import migrate as migrations
from tests.integration.batches import refuse
from tests.integration.conftest import STAGE_NAMES, Bench

TABLES = ("file_extractions", "document_markdown", "document_chunks", "chunk_buffer", "vector_buffer", "extraction_buffer")


pytestmark = pytest.mark.usefixtures("front_door")


def counts(bench: Bench) -> dict[str, int]:
    return {table: found for table in TABLES if (found := bench.one(f"SELECT count(*) FROM {table}")[0])}


def live_jobs(bench: Bench) -> int:
    return int(bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')")[0])


def batch(bench: Bench, *doc_ids: str, batch_id: str = "b", seal: bool = True) -> str:
    run = bench.one("SELECT begin_batch(%s, 'default', NULL, 'c')", batch_id)[0]
    for doc_id in doc_ids:
        accept(bench, doc_id, batch_id, run)
    if seal:
        bench.conn.execute("SELECT seal_batch(%s, %s, %s)", [batch_id, run, len(doc_ids)])
    return str(run)


def accept(bench: Bench, doc_id: str, batch_id: str, run: str) -> str:
    statement = """SELECT outcome FROM accept_document(%s, 'default', 'f', 'uploads/' || %s, NULL, 1,
        encode(sha256(convert_to(%s, 'UTF8')), 'hex'), '{}', 0, 'c', %s, %s, 50)"""
    return str(bench.one(statement, doc_id, doc_id, doc_id, batch_id, run)[0])


def end_job(bench: Bench, job_id: int) -> None:
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s AND status = 'doing'", [job_id])


def test_claims_go_on_above_those_that_were_given_before_the_migration(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        monkeypatch.setattr(migrations, "_own", lambda: [path for path in every if path.name < "0007"])
        migrations.migrate(conn)
        conn.execute("SELECT submit_document('uploads/a', doc_id => 'a', content_sha256 => repeat('1', 64))")
        conn.execute("UPDATE file_extractions SET state = 'working', claim = 41, lease_until = now()")
        monkeypatch.undo()
        migrations.migrate(conn)
        conn.execute("UPDATE file_extractions SET claim = claim + 1")
        conn.execute("SELECT submit_document('uploads/b', doc_id => 'b', content_sha256 => repeat('1', 64))")
        conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() WHERE doc_id = 'b'")
        assert conn.execute("SELECT claim FROM file_extractions ORDER BY id").fetchall() == [(42,), (43,)]


# Cancel


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_a_document_cancelled_in_mid_stage_writes_nothing_more(bench: Bench, stage: str, handoff: str) -> None:
    async def cancel(document: Document) -> None:
        if document.version == 2:
            assert bench.one("SELECT cancel_document('a')") == ("cancelled",)

    bench.submit("a", "1")
    await bench.drain()
    bench.submit("a", "2")
    bench.also[stage] = cancel
    await bench.drain(handoff=handoff)
    assert bench.one("SELECT state, status, version, served_version, lease_until FROM file_extractions") == (
        "cancelled",
        "failed",
        2,
        1,
        None,
    )
    assert bench.one("SELECT raw_extraction->>'title' FROM file_extractions") == ("text of a version 1",)
    assert bench.all("SELECT DISTINCT version FROM document_chunks") == [(1,)]
    told = bench.all("SELECT event, stage FROM document_events WHERE event IN ('cancelled', 'fenced_off') ORDER BY id")
    assert [event for event, _ in told] == ["cancelled", "fenced_off"]
    assert live_jobs(bench) == 0
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}
    bench.also.clear()
    bench.submit("a", "2")
    await bench.drain()
    assert bench.one("SELECT state, version, served_version FROM file_extractions") == ("complete", 2, 2)


async def test_a_waiting_document_is_cancelled_with_its_job_and_an_ended_one_stays_as_it_is(bench: Bench) -> None:
    bench.submit("a")
    assert jobs.cancel_document("a") is State.CANCELLED
    assert live_jobs(bench) == 0
    assert jobs.cancel_document("a") is State.CANCELLED
    bench.submit("b")
    await bench.drain()
    assert await jobs.cancel_document_async("b") is State.COMPLETE
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'cancelled'") == (1,)
    with pytest.raises(NotFound, match='"c"'):
        jobs.cancel_document("c")


async def test_cancel_and_delete_join_the_callers_transaction(bench: Bench, database: str) -> None:
    bench.submit("a")
    bench.submit("b")
    with psycopg.connect(database) as mine:
        jobs.cancel_document("a", connection=mine)
        jobs.delete_document("b", connection=mine)
        mine.rollback()
    assert bench.all("SELECT doc_id, state FROM file_extractions ORDER BY id") == [("a", "queued"), ("b", "queued")]
    async with await psycopg.AsyncConnection.connect(database) as theirs:
        assert await jobs.cancel_document_async("a", connection=theirs) is State.CANCELLED
        assert await jobs.delete_document_async("b", connection=theirs)
    assert bench.all("SELECT doc_id, state FROM file_extractions") == [("a", "cancelled")]
    assert live_jobs(bench) == 0


async def test_a_callers_connection_may_give_its_rows_any_shape(bench: Bench, database: str) -> None:
    for each in "abcd":
        batch(bench, each, batch_id=f"batch {each}")
    with psycopg.connect(database, row_factory=dict_row) as mine:
        assert jobs.cancel_document("a", connection=mine) is State.CANCELLED
        assert jobs.delete_document("a", connection=mine)
        assert jobs.cancel_batch("batch b", connection=mine) == 1
        assert jobs.delete_batch("batch b", connection=mine) == 1
    async with await psycopg.AsyncConnection.connect(database, row_factory=dict_row) as theirs:
        assert await jobs.cancel_document_async("c", connection=theirs) is State.CANCELLED
        assert await jobs.delete_document_async("c", connection=theirs)
        assert await jobs.cancel_batch_async("batch d", connection=theirs) == 1
        assert await jobs.delete_batch_async("batch d", connection=theirs) == 1


async def test_a_callers_connection_may_have_cursors_of_any_kind(bench: Bench, database: str) -> None:
    batch(bench, "a", "b", batch_id="c")
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as mine:
        assert jobs.cancel_document("a", connection=mine) is State.CANCELLED
        assert jobs.delete_document("a", connection=mine)
    async with await psycopg.AsyncConnection.connect(database, cursor_factory=psycopg.AsyncRawCursor) as theirs:
        assert await jobs.cancel_batch_async("c", connection=theirs) == 1
        assert await jobs.delete_batch_async("c", connection=theirs) == 1


@pytest.mark.parametrize("name", ["cancel_document", "delete_document", "cancel_batch", "delete_batch"])
async def test_a_connection_of_the_other_kind_is_refused_by_its_name(bench: Bench, database: str, name: str) -> None:
    async with await psycopg.AsyncConnection.connect(database) as theirs:
        with pytest.raises(TypeError, match=r"AsyncConnection.*_async"):
            getattr(jobs, name)("a", connection=theirs)
    with psycopg.connect(database) as mine, pytest.raises(TypeError, match=r"not Connection.*without _async"):
        await getattr(jobs, f"{name}_async")("a", connection=mine)


async def test_a_document_that_a_transaction_holds_is_a_conflict_and_not_a_hang(
    bench: Bench, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "0.05")
    load_settings.cache_clear()
    batch(bench, "a")
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions FOR UPDATE")
        for attempt in (lambda: jobs.cancel_document("a"), lambda: jobs.delete_document("a"), lambda: jobs.delete_batch("b")):
            with pytest.raises(SubmitConflict, match="holds"):
                attempt()
        assert bench.one("SELECT current_setting('lock_timeout')") == ("0",)


async def test_a_cancelled_batch_takes_in_nothing_more_and_is_not_settled(bench: Bench) -> None:
    run = batch(bench, "a", "b", "c", seal=False)
    await bench.runner(small_documents_together=1).run(*bench.fetch())  # type: ignore[misc]  # there is one
    bench.conn.execute(
        "INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)"
        " VALUES ('b', %s, 'default', '', '', 'z')",
        [run],
    )
    assert jobs.cancel_batch("b") == 2
    assert bench.all("SELECT doc_id, state FROM file_extractions ORDER BY id") == [
        ("a", "complete"),
        ("b", "cancelled"),
        ("c", "cancelled"),
    ]
    assert bench.one("SELECT status, completed_at IS NULL FROM processing_jobs") == ("cancelled", False)
    assert bench.one("SELECT state, ended_at IS NULL FROM batch_archives") == ("cancelled", False)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="cancelled"):
        accept(bench, "late", "b", run)
    bench.conn.execute("SELECT seal_batch('b', %s, 3)", [run])
    bench.conn.execute("SELECT settle_batch('b')")
    assert bench.one("SELECT status FROM processing_jobs") == ("cancelled",)
    assert jobs.cancel_batch("b") == 0
    with pytest.raises(NotFound, match='"x"'):
        jobs.cancel_batch("x")


async def test_submitting_a_cancelled_batch_again_begins_a_run_that_goes_on_where_it_was_left(bench: Bench) -> None:
    batch(bench, "a", "b")
    assert bench.one("SELECT cancel_batch('b')") == (2,)
    run = bench.one("SELECT begin_batch('b', 'default', NULL, 'c')")[0]
    assert [accept(bench, doc_id, "b", run) for doc_id in "ab"] == ["resumed", "resumed"]
    bench.conn.execute("SELECT seal_batch('b', %s, 2)", [run])
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}
    await bench.drain()
    assert bench.one("SELECT status FROM processing_jobs") == ("completed",)


async def test_an_ended_batch_is_not_cancelled(bench: Bench) -> None:
    batch(bench, "a")
    await bench.drain()
    assert jobs.cancel_batch("b") == 0
    assert bench.one("SELECT status FROM processing_jobs") == ("completed",)


async def test_a_document_that_was_held_or_submitted_while_its_batch_was_cancelled_is_cancelled_by_the_reconciler(
    bench: Bench, database: str
) -> None:
    run = batch(bench, "held", "free", seal=False)
    with psycopg.connect(database) as holder, psycopg.connect(database) as submitter:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'held' FOR UPDATE")
        submitter.execute("SELECT accept_document('late','default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,50)", [run])
        assert bench.one("SELECT cancel_batch('b')") == (1,)
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {"cancelled": 2}
    assert bench.all("SELECT DISTINCT state FROM file_extractions") == [("cancelled",)]
    assert live_jobs(bench) == 0


async def test_a_document_of_a_cancelled_batch_that_is_taken_up_by_itself_is_left_in_peace(bench: Bench) -> None:
    batch(bench, "again", "failed")
    bench.conn.execute(
        "UPDATE file_extractions SET state = 'failed', error_type = 'PERMANENT', error_message = 'm' WHERE doc_id = 'failed'"
    )
    bench.conn.execute(
        """INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message)
        VALUES ('failed', 1, 'default', 'c', 'validate', 'PERMANENT', 'm')"""
    )
    assert bench.one("SELECT cancel_batch('b')") == (1,)
    bench.submit("again")
    bench.conn.execute("SELECT requeue_document('failed')")
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}
    await bench.drain()
    assert bench.all("SELECT state FROM file_extractions") == [("complete",), ("complete",)]


# Delete


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_a_document_deleted_in_mid_stage_is_gone_and_stays_gone(bench: Bench, stage: str, handoff: str) -> None:
    async def delete(document: Document) -> None:
        if document.version == 2:
            assert bench.one("SELECT delete_document('a')") == (True,)

    bench.submit("a", "1")
    await bench.drain()
    bench.submit("a", "2")
    bench.also[stage] = delete
    await bench.drain(handoff=handoff)
    assert counts(bench) == {}
    told = [event for (event,) in bench.all("SELECT event FROM document_events ORDER BY id DESC LIMIT 2")]
    assert told == ["fenced_off", "deleted"]
    assert live_jobs(bench) == 0
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'failed'") == (0,)
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}
    assert counts(bench) == {}


@pytest.mark.parametrize("stage", STAGE_NAMES)
async def test_a_late_worker_of_a_deleted_document_writes_nothing_to_the_one_that_has_its_name_now(bench: Bench, stage: str) -> None:
    """Its claim number would come again if each row counted for itself."""
    held, going_on = asyncio.Event(), asyncio.Event()

    async def hold(document: Document) -> None:
        if not held.is_set():
            held.set()
            await going_on.wait()

    bench.submit("a", "1")
    bench.also[stage] = hold
    found = bench.fetch()
    assert found is not None
    late = asyncio.create_task(bench.runner("late:1").run(*found))
    await held.wait()
    claim = bench.one("SELECT claim FROM file_extractions")[0]
    assert bench.one("SELECT delete_document('a')") == (True,)
    bench.submit("a", "2")
    found = bench.fetch()
    assert found is not None

    async def wake(document: Document) -> None:
        going_on.set()
        await late

    bench.also["finalize"] = wake
    await bench.runner("second:1").run(*found)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE claim = %s", claim) == (0,)
    assert bench.one("SELECT state, version, content_sha256 FROM file_extractions") == ("complete", 1, "2" * 64)
    assert bench.one("SELECT count(*) FROM document_chunks") == (5,)
    fenced = bench.all("SELECT worker FROM document_events WHERE event = 'fenced_off'")
    assert fenced == [("late:1",)]


async def test_a_job_of_a_deleted_document_ends_well(bench: Bench) -> None:
    bench.submit("a")
    found = bench.fetch()
    assert found is not None
    assert jobs.delete_document("a")
    await bench.runner().run(*found)
    assert not jobs.delete_document("a")
    assert bench.calls == []


async def test_delete_resolves_the_dead_letter_and_keeps_the_audit_trail(bench: Bench) -> None:
    bench.submit("a")
    bench.conn.execute("UPDATE file_extractions SET state = 'failed', error_type = 'PERMANENT', error_message = 'm'")
    bench.conn.execute(
        """INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message)
        VALUES ('a', 1, 'default', 'c', 'validate', 'PERMANENT', 'm')"""
    )
    assert await jobs.delete_document_async("a")
    assert bench.one("SELECT resolution FROM dead_letters") == ("deleted",)
    assert bench.all("SELECT event, detail->>'role' FROM document_events ORDER BY id") == [("submitted", None), ("deleted", "postgres")]
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="deleted"):
        bench.conn.execute("SELECT requeue_dead_letter(id) FROM dead_letters")


async def test_a_submission_that_waits_for_a_delete_is_a_new_document(bench: Bench, database: str) -> None:
    bench.submit("a", "1")
    with psycopg.connect(database) as deleter:
        deleter.execute("SELECT delete_document('a')")
        thread = threading.Thread(target=lambda: submit_elsewhere(database))
        thread.start()
        waits = "wait_event_type = 'Lock' AND query LIKE '%%submit_document%%' AND datname = current_database()"
        while bench.one(f"SELECT count(*) FROM pg_stat_activity WHERE {waits}") == (0,):  # noqa: ASYNC110 - another process's wait
            await asyncio.sleep(0.01)
    thread.join()
    assert bench.one("SELECT version, state, content_sha256 FROM file_extractions") == (1, "queued", "1" * 64)
    await bench.drain()
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


def submit_elsewhere(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("SELECT submit_document('uploads/a', doc_id => 'a', content_sha256 => repeat('1', 64))")


async def test_delete_batch_takes_documents_of_all_runs_archives_and_summaries(bench: Bench) -> None:
    batch(bench, "old", "kept")
    run = batch(bench, "kept", "new", seal=False)
    bench.submit("other")
    bench.conn.execute(
        "INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)"
        " VALUES ('b', %s, 'default', '', '', 'z')",
        [run],
    )
    bench.conn.execute(
        """INSERT INTO run_summaries (run_id, batch_id, user_id, ui_json, nested_summary, file_count, success_count, error_count)
        VALUES (%s, 'b', 'default', '{}', '{}', 0, 0, 0)""",
        [run],
    )
    assert jobs.delete_batch("b") == 3
    assert bench.all("SELECT doc_id FROM file_extractions") == [("other",)]
    for table in ("processing_jobs", "batch_archives", "run_summaries"):
        assert bench.one(f"SELECT count(*) FROM {table}") == (0,)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="deleted"):
        accept(bench, "late", "b", run)
    assert jobs.delete_batch("b") is None
    assert await Reconciler(bench.settings, bench.pool).pass_once() == {}


async def test_delete_batch_in_sql_is_one_transaction(bench: Bench) -> None:
    batch(bench, "a", "b")
    assert bench.one("SELECT delete_batch('b')") == (2,)
    assert bench.one("SELECT delete_batch('b')") == (None,)
    assert counts(bench) == {}


async def test_the_batch_of_the_last_document_ends_when_that_is_cancelled_or_deleted(bench: Bench) -> None:
    ends = ((jobs.cancel_document, "completed_with_errors"), (jobs.delete_document, "completed"))
    for number, (end, status) in enumerate(ends):
        batch(bench, f"done {number}", f"open {number}", batch_id=f"b{number}")
        await bench.runner(small_documents_together=1).run(*bench.fetch())  # type: ignore[misc]  # there is one
        end(f"open {number}")
        assert bench.one("SELECT status FROM processing_jobs WHERE batch_id = %s", f"b{number}") == (status,)


SUMMARY = "SELECT xmin::text, jsonb_path_query_array(ui_json, '$.files[*].outcome') FROM run_summaries"


async def test_the_summary_of_a_batch_that_has_ended_is_made_again_once_for_all_that_were_deleted_and_never_for_nothing(
    bench: Bench,
) -> None:
    batch(bench, "a", "c", "x", "y")
    bench.also["parse"] = refuse("x")
    await bench.drain()
    before = bench.one(SUMMARY)
    assert jobs.cancel_document("a") is State.COMPLETE
    for doc_id in ("a", "c", "x"):
        assert jobs.delete_document(doc_id)
    assert bench.one(SUMMARY) == before
    reconciler = Reconciler(bench.settings, bench.pool)
    assert await reconciler.pass_once() == {"renewed": 1}
    after = bench.one(SUMMARY)
    assert after[1] == ["succeeded"]
    assert bench.one("SELECT status, total_files FROM processing_jobs") == ("completed", 1)
    assert await reconciler.pass_once() == {}
    assert bench.one(SUMMARY) == after


async def test_a_summary_tells_at_once_of_a_document_that_was_cancelled_before_its_batch_was_reopened(bench: Bench) -> None:
    batch(bench, "a", "x")
    bench.also["parse"] = refuse("x")
    await bench.drain()
    bench.conn.execute("SELECT requeue_document('x')")
    assert bench.one("SELECT settled_at IS NULL FROM processing_jobs") == (False,)
    assert jobs.cancel_document("x") is State.CANCELLED
    told = bench.one(SUMMARY)
    assert sorted(told[1]) == ["cancelled", "succeeded"]
    assert jobs.cancel_document("x") is State.CANCELLED
    assert bench.one(SUMMARY) == told


async def test_a_batch_whose_canceller_was_cut_off_ends_when_that_is_done_again(bench: Bench) -> None:
    batch(bench, "a")
    bench.conn.execute("SELECT cancel_document('a')")
    assert bench.one("SELECT count(*) FROM run_summaries") == (0,)
    assert jobs.cancel_document("a") is State.CANCELLED
    assert bench.one(SUMMARY)[1] == ["cancelled"]
