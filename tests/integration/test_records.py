"""The operations that application code calls: what they answer, what they change, and what they refuse."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

import jobs
from jobs.front import close_async, close_sync
from models.errors import ConfigurationError, ErrorType, OperationRefused, RetryableError, SubmitConflict, SubmitError
from models.settings import load_settings
from models.stages import Milestone, State
from tests.integration.batches import BATCH, accept, batch_of, begin, reconciler, refuse, summary
from tests.integration.conftest import Bench
from tests.summaries import check


@pytest.fixture(autouse=True)
def front(settings: Any) -> Iterator[None]:
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


@pytest.fixture
async def front_async(front: None) -> AsyncIterator[None]:
    yield
    await close_async()


async def test_documents_and_batches_are_told_as_they_stand(bench: Bench) -> None:
    run = batch_of(bench, "a", "c", "x")
    bench.also["parse"] = refuse("x")
    await bench.drain()
    document = jobs.get_document("a")
    assert document is not None
    assert (document.state, document.milestone, document.stage_due, document.run_id) == (State.COMPLETE, Milestone.COMPLETE, None, run)
    assert document.raw_extraction is not None
    failed = jobs.get_document("x")
    assert failed is not None
    assert (failed.error_type, failed.error_message, failed.stage_due) == (ErrorType.PERMANENT, "x.txt: no", "parse")
    batch = jobs.get_batch("b")
    assert batch is not None
    assert (batch.status, batch.total_files, batch.run_id) == ("completed_with_errors", 3, run)
    assert [d.doc_id for d in jobs.list_batch_documents("b", limit=2)] == ["a", "c"]
    assert [d.doc_id for d in jobs.list_batch_documents("b", after="c")] == ["x"]
    assert [d.doc_id for d in jobs.list_batch_documents("b", state=State.FAILED)] == ["x"]
    figures = jobs.batch_statistics("b")
    assert figures is not None
    assert (figures.files, figures.complete, figures.failed, figures.passages) == (3, 2, 1, 10)
    assert figures.by_error_type == {"PERMANENT": 1}
    assert figures.mean_duration_ms is not None
    for nothing in (jobs.get_document("?"), jobs.get_batch("?"), jobs.batch_statistics("?"), jobs.run_summary("?")):
        assert nothing is None
    with pytest.raises(OperationRefused, match="1 to 1000"):
        jobs.list_batch_documents("b", limit=0)


async def test_a_summary_is_found_by_batch_and_by_run_and_told_before_the_end_on_request(bench: Bench) -> None:
    run = batch_of(bench, "a")
    assert jobs.run_summary("b") is None
    present = jobs.run_summary("b", present=True)
    assert present is not None
    check(present.ui_json, present.nested_summary)
    assert (present.ui_json["batch"]["status"], present.ui_json["totals"]["unfinished"]) == ("processing", 1)
    assert bench.one("SELECT count(*) FROM run_summaries") == (0,)
    await bench.drain()
    found = jobs.run_summary("b")
    assert found is not None
    assert found == jobs.run_summary(str(run))
    assert (found.file_count, found.success_count, found.error_count) == (1, 1, 0)
    begin(bench.conn)
    assert jobs.run_summary("b") is None, "the new run has not ended"
    assert jobs.run_summary(str(run)) == found


async def test_a_changed_priority_reaches_the_waiting_job_and_the_next_one(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    jobs.update_document("c", priority=7)
    assert bench.all("SELECT args ->> 'doc_id', priority FROM procrastinate_jobs ORDER BY 1") == [("a", 0), ("c", 7)]
    found = bench.fetch()
    assert found is not None
    jobs.update_document("a", priority=9)  # its job has been fetched
    await bench.runner(handoff="queue").run(*found)
    assert bench.one("SELECT priority FROM procrastinate_jobs WHERE status = 'todo' AND args ->> 'doc_id' = 'a'") == (9,)
    with pytest.raises(SubmitError, match="32 bits"):
        jobs.update_document("a", priority=2**40)


async def test_metadata_is_changed_key_by_key(bench: Bench) -> None:
    batch_of(bench, "a")
    jobs.update_document("a", metadata={"year": 2026, "old": {"deep": None}})
    jobs.update_document("a", metadata={"old": None, "new": [1]})
    document = jobs.get_document("a")
    assert document is not None
    assert document.metadata == {"year": 2026, "new": [1]}
    jobs.update_batch("b", metadata={"k": 1})
    jobs.update_batch("b", metadata={"l": 2})
    batch = jobs.get_batch("b")
    assert batch is not None
    assert batch.metadata == {"k": 1, "l": 2}
    told = bench.all("SELECT detail -> 'metadata_keys' FROM document_events WHERE event = 'updated_by_operator' ORDER BY id")
    assert [sorted(keys) for (keys,) in told] == [["old", "year"], ["new", "old"]]
    with pytest.raises(SubmitError, match="JSON"):
        jobs.update_document("a", metadata={"x": object()})
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        bench.conn.execute("SELECT update_document('a', '[]')")


async def test_a_document_failed_by_hand_is_fenced_off_its_worker_and_ends_its_batch(bench: Bench) -> None:
    batch_of(bench, "a", "c")

    async def by_hand(document: Any) -> None:
        if document.doc_id == "a":
            await jobs.fail_document_async("a", "wrong customer")

    bench.also["embed"] = by_hand
    try:
        await bench.drain()
    finally:
        await close_async()
    assert bench.one("SELECT state, error_type, error_message, served_version FROM file_extractions WHERE doc_id = 'a'") == (
        "failed", "PERMANENT", "wrong customer", None,
    )  # fmt: skip
    assert bench.one("SELECT error_message, resolved_at FROM dead_letters") == ("wrong customer", None)
    assert bench.one("SELECT count(*) FROM document_events WHERE doc_id = 'a' AND event = 'fenced_off'") == (1,)
    assert bench.one(BATCH)[0] == "completed_with_errors"
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')") == (0,)
    for doc_id in ("a", "c"):
        with pytest.raises(OperationRefused, match="cannot be failed"):
            jobs.fail_document(doc_id, "again")


def test_a_waiting_document_failed_by_hand_leaves_no_job_and_settles_its_batch(settings: Any, conn: psycopg.Connection) -> None:
    run = begin(conn)
    conn.execute("SELECT accept_document('a', 'ann', 'a', 'uploads/a', NULL, 1, repeat('1', 64), '{}', 0, 'c', 'b', %s, 100)", [run])
    conn.execute("SELECT seal_batch('b', %s, 1)", [run])
    with pytest.raises(OperationRefused, match="a reason is needed"):
        jobs.fail_document("a", " ")
    jobs.fail_document("a", "no longer wanted")
    assert conn.execute(BATCH).fetchone() == ("failed", True, "every document of the batch failed", 1)
    assert conn.execute("SELECT status FROM procrastinate_jobs").fetchall() == [("cancelled",)]


async def test_a_batch_failed_by_hand_stays_failed_whatever_becomes_of_its_documents(bench: Bench) -> None:
    batch_of(bench, "a", "x")
    jobs.fail_batch("b", "the wrong folder")
    assert bench.one(BATCH) == ("failed", True, "the wrong folder", 2)
    assert summary(bench)[0]["totals"]["unfinished"] == 2
    bench.also["parse"] = refuse("x")
    await bench.drain()
    assert bench.one(BATCH) == ("failed", True, "the wrong folder", 2)
    assert summary(bench)[0]["totals"] | {"succeeded": 1, "failed": 1} == summary(bench)[0]["totals"]
    jobs.retry_document("x")
    assert await reconciler(bench).pass_once() == {}
    assert bench.one(BATCH)[0] == "failed"
    run = batch_of(bench, "a")
    assert bench.one("SELECT given_up, run_id FROM processing_jobs") == (False, run)
    bench.conn.execute("UPDATE processing_jobs SET status = 'cancelled', completed_at = now()")
    with pytest.raises(OperationRefused, match="is cancelled"):
        jobs.fail_batch("b", "again")


async def test_a_retry_goes_on_at_the_failed_stage_reopens_the_batch_and_is_counted(bench: Bench) -> None:
    batch_of(bench, "a")
    bench.also["embed"] = refuse("a")
    for count in (1, 2, 3):
        await bench.drain()
        assert bench.one(BATCH)[0] == "failed"
        retry = jobs.retry_document("a")
        assert (retry.stage, retry.count) == ("embed", count)
        assert bench.one(BATCH)[:2] == ("processing", False)
    bench.also.clear()
    await bench.drain()
    assert bench.one(BATCH)[0] == "completed"
    with pytest.raises(OperationRefused, match="no open dead letter"):
        jobs.retry_document("a")


async def test_a_retry_can_carry_a_priority(bench: Bench) -> None:
    batch_of(bench, "a")
    bench.also["embed"] = refuse("a")
    await bench.drain()
    with pytest.raises(SubmitError, match="priority"):
        jobs.retry_document("a", priority=2**31)
    jobs.retry_document("a", priority=9)
    assert bench.one("SELECT priority FROM procrastinate_jobs WHERE status = 'todo'") == (9,)


async def test_operations_join_the_callers_transaction_and_go_with_it(bench: Bench, database: str, front_async: None) -> None:
    batch_of(bench, "a", "c")
    with psycopg.connect(database) as caller:
        jobs.update_document("a", metadata={"k": 1}, priority=3, connection=caller)
        jobs.fail_document("c", "no", connection=caller)
        jobs.fail_batch("b", "no", connection=caller)
        inside = jobs.get_document("c", connection=caller)
        assert inside is not None
        assert inside.state is State.FAILED
        caller.rollback()
    assert bench.all("SELECT state, priority, metadata FROM file_extractions") == [("queued", 0, {})] * 2
    assert bench.one(BATCH)[0] == "processing"
    async with await psycopg.AsyncConnection.connect(database) as other:
        await jobs.update_document_async("a", priority=4, connection=other)
        await other.commit()
    document = await jobs.get_document_async("a")
    assert document is not None
    assert document.priority == 4


def test_a_document_that_somebody_holds_is_a_conflict_and_not_waited_for_for_ever(
    settings: Any, conn: psycopg.Connection, database: str
) -> None:
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a')")
    conn.execute("ALTER FUNCTION hold_document SET lock_timeout = '50ms'")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions FOR UPDATE")
        with pytest.raises(SubmitConflict):
            jobs.update_document("a", priority=1)
    for what in (jobs.fail_document, jobs.fail_batch):
        with pytest.raises(OperationRefused, match="there is no"):
            what("unknown", "because")


async def reprocess(bench: Bench) -> tuple[bool, str]:
    advice = jobs.should_reprocess("a")
    assert bool(advice) is advice.answer
    return advice.answer, advice.reason


async def test_what_is_done_cancelled_or_waits_is_not_reprocessed(bench: Bench) -> None:
    bench.submit()
    assert await reprocess(bench) == (False, "it waits to be worked on")
    await bench.drain()
    assert await reprocess(bench) == (False, "it is done: complete")
    bench.submit(content="2")
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled'")
    assert (await reprocess(bench))[0] is False
    with pytest.raises(OperationRefused, match="there is no document"):
        jobs.should_reprocess("unknown")


async def test_a_permanent_error_is_not_reprocessed_and_one_that_can_pass_is_while_retries_are_left(bench: Bench) -> None:
    async def fail(document: Any) -> None:
        raise RetryableError("busy")

    bench.submit()
    bench.also["parse"] = fail
    runner, found = bench.runner(), bench.fetch()
    assert found is not None
    await runner.run(*found)
    assert (await reprocess(bench))[0] is True, "it is being retried"
    await bench.drain()
    assert await reprocess(bench) == (False, "its retries are used up: busy")
    bench.conn.execute("UPDATE file_extractions SET retry_count = 2")
    assert await reprocess(bench) == (True, "its error may pass (retries left: 1): busy")
    bench.conn.execute("SELECT discard_dead_letter(id) FROM dead_letters")
    assert await reprocess(bench) == (False, "it failed and was put away")
    bench.submit(content="2")
    bench.also["parse"] = refuse("a")
    await bench.drain()
    assert (await reprocess(bench))[0] is False


async def test_a_document_past_its_deadline_or_of_a_dead_worker_is_reprocessed(bench: Bench) -> None:
    bench.submit()
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 hour'")
    assert await reprocess(bench) == (False, "it is being worked on")
    bench.conn.execute("UPDATE file_extractions SET updated_at = now() - interval '29 min'")
    assert (await reprocess(bench))[0] is False
    bench.conn.execute("UPDATE file_extractions SET updated_at = now() - interval '31 min'")
    assert await reprocess(bench) == (True, "it is past its deadline of 1800 seconds")
    bench.conn.execute("UPDATE file_extractions SET lease_until = now() - interval '1 s', updated_at = now()")
    assert await reprocess(bench) == (True, "its worker is dead; it is taken up again by itself")


async def test_a_document_that_killed_its_worker_is_not_reprocessed(bench: Bench) -> None:
    bench.submit()
    bench.conn.execute(
        """UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() - interval '1 s', alone = TRUE,
            lone_crash_count = 2"""
    )
    bench.conn.execute("SELECT rescue_document('a', 3)")
    answer, reason = await reprocess(bench)
    assert answer is False
    assert "its worker died of it" in reason


async def test_a_failed_batch_that_is_cancelled_stays_cancelled_and_takes_in_nothing(bench: Bench) -> None:
    run = begin(bench.conn)
    accept(bench.conn, run, "a")
    jobs.fail_batch("b", "the wrong folder")
    assert jobs.cancel_batch("b") == 1
    bench.conn.execute("SELECT settle_batch('b')")
    assert bench.one(BATCH)[:3] == ("cancelled", True, "the wrong folder")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        accept(bench.conn, run, "late")


@pytest.mark.parametrize("ask", [jobs.get_document, jobs.get_batch, jobs.cancel_document, jobs.delete_batch, jobs.retry_document])
async def test_an_id_that_is_no_string_is_refused_and_the_callers_transaction_goes_on(bench: Bench, database: str, ask: Any) -> None:
    with psycopg.connect(database) as caller:
        with pytest.raises(OperationRefused, match="must be a string, not UUID"):
            ask(uuid.uuid4(), connection=caller)
        assert caller.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("word", ["a\0", "a\udcff"])
async def test_an_id_that_no_document_can_have_names_none(bench: Bench, word: str) -> None:
    for doc_id in ("a", "a\ufffd"):
        bench.submit(doc_id)
    assert jobs.get_document(word) is None
    assert not jobs.delete_document(word)
    with pytest.raises(OperationRefused):
        jobs.cancel_document(word)
    jobs.fail_document("a", f"because of {word}")
    document = jobs.get_document("a")
    assert document is not None
    assert document.state is State.FAILED


async def test_a_connection_of_the_other_kind_is_refused_by_its_name(bench: Bench, database: str, front_async: None) -> None:
    async with await psycopg.AsyncConnection.connect(database) as other:
        with pytest.raises(TypeError, match=r"AsyncConnection.*_async"):
            jobs.get_document("a", connection=other)  # type: ignore[arg-type]
    with psycopg.connect(database) as other, pytest.raises(TypeError, match=r"not Connection.*without _async"):
        await jobs.get_document_async("a", connection=other)  # type: ignore[arg-type]


async def test_a_callers_connection_may_have_cursors_of_any_kind(bench: Bench, database: str, front_async: None) -> None:
    bench.submit("a")
    with psycopg.connect(database, cursor_factory=psycopg.RawCursor) as caller:
        assert jobs.get_document("a", connection=caller) is not None
    async with await psycopg.AsyncConnection.connect(database, cursor_factory=psycopg.AsyncRawCursor) as other:
        assert await jobs.get_document_async("a", connection=other) is not None


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_callers_connection_that_does_not_speak_utf8_is_refused(
    bench: Bench, database: str, front_async: None, encoding: str
) -> None:
    bench.submit("a")
    jobs.update_document("a", metadata={"k": "\u00e4"})
    with psycopg.connect(database, client_encoding=encoding) as caller, pytest.raises(ConfigurationError, match=f"{encoding}.*UTF8"):
        jobs.get_document("a", connection=caller)
    async with await psycopg.AsyncConnection.connect(database, client_encoding=encoding) as other:
        with pytest.raises(ConfigurationError, match=f"{encoding}.*UTF8"):
            await jobs.get_document_async("a", connection=other)
