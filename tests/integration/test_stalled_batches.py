"""A batch that gets no further while something of it is worked on is failed, with a reason; one that only waits is not."""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.batches import BATCH, accept, add_archive, batch_of, begin, reconciler, seal, summary
from tests.integration.conftest import Bench

IN_HAND = "UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 hour'"
LONG_AGO = ("file_extractions", "processing_jobs", "batch_archives")


def let_time_pass(bench: Bench) -> None:
    """Set back when anything last changed by an hour; BATCH_PROCESSING_TIMEOUT is a second here."""
    for table in LONG_AGO:
        bench.conn.execute(f"UPDATE {table} SET updated_at = now() - interval '1 hour'")


async def repairs(bench: Bench, seconds: float = 1) -> list[str]:
    return list(await reconciler(bench, batch_processing_timeout=seconds).pass_once())


async def test_a_batch_without_progress_while_a_document_is_worked_on_is_failed_and_its_documents_go_on(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    bench.conn.execute(IN_HAND + " WHERE doc_id = 'a'")
    let_time_pass(bench)
    before = bench.all("SELECT doc_id, state, claim, milestone FROM file_extractions ORDER BY 1")
    reason = "nothing got on for 1 seconds (BATCH_PROCESSING_TIMEOUT) while 1 of its documents was being worked on"
    assert await repairs(bench) == [f"batch failed: {reason}"]
    assert bench.one(BATCH) == ("failed", True, reason, 2)
    assert bench.all("SELECT doc_id, state, claim, milestone FROM file_extractions ORDER BY 1") == before
    assert summary(bench)[0]["totals"]["unfinished"] == 2
    kind, message, batch_id = bench.one("SELECT kind, message, detail ->> 'batch_id' FROM alerts")
    assert (kind, message, batch_id) == ("batch_stalled", f"batch /data/in: {reason}", "b")
    assert await repairs(bench) == [], "once"


async def test_the_alert_of_a_stalled_list_names_its_batch(bench: Bench) -> None:
    begin(bench.conn, source_path="")
    let_time_pass(bench)
    await repairs(bench)
    assert bench.one("SELECT message FROM alerts")[0].startswith("batch b: the submitter stopped")


async def test_the_last_late_document_of_a_failed_batch_settles_it_again(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    bench.conn.execute(IN_HAND + " WHERE doc_id = 'a'")
    let_time_pass(bench)
    await repairs(bench)
    bench.conn.execute("UPDATE file_extractions SET state = 'queued', lease_until = NULL WHERE doc_id = 'a'")
    await bench.drain()
    assert bench.one(BATCH) == ("completed", True, None, 2)
    ui, _ = summary(bench)
    assert ui["batch"]["status"] == "completed"
    assert bench.one("SELECT completed_at >= (SELECT max(processing_completed_at) FROM file_extractions) FROM processing_jobs") == (True,)


async def test_a_late_document_whose_worker_died_before_it_could_say_so_settles_the_batch_through_the_reconciler(bench: Bench) -> None:
    batch_of(bench, "a")
    bench.conn.execute(IN_HAND)
    let_time_pass(bench)
    await repairs(bench)
    bench.conn.execute("UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = 1")
    assert await repairs(bench) == ["completed"]
    assert bench.one(BATCH)[0] == "completed"
    summary(bench)


@pytest.mark.parametrize("state", ["queued", "retrying"])
async def test_waiting_is_no_stall(bench: Bench, state: str) -> None:
    batch_of(bench, "a")
    bench.conn.execute(IN_HAND)
    bench.conn.execute("UPDATE file_extractions SET state = %s, lease_until = NULL", [state])
    let_time_pass(bench)
    assert await repairs(bench) == []
    assert bench.one(BATCH)[:2] == ("processing", False)


async def test_an_archive_that_waits_is_no_stall_and_one_that_is_unpacked_without_progress_is(bench: Bench) -> None:
    run = begin(bench.conn)
    add_archive(bench.conn, run, "", "waiting")
    seal(bench.conn, run, 0)
    let_time_pass(bench)
    assert await repairs(bench) == []
    bench.conn.execute("UPDATE batch_archives SET state = 'unpacking'")
    assert await repairs(bench) == [], "it was put off, or its job was lost: it waits for a worker again"
    assert bench.one("SELECT fail_stalled_batch('b', 1)") == (None,)
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    bench.conn.execute(
        """INSERT INTO worker_registry (worker, host, pid, concurrency, version, heartbeat_at, active_jobs)
            SELECT 'h:1', 'h', 1, 1, 'x', now() + interval '1 hour', array_agg(j.id) FROM procrastinate_jobs AS j"""
    )
    (said,) = await repairs(bench)
    assert said.endswith("while 1 of its archives was being worked on")
    summary(bench)


@pytest.mark.parametrize(
    "fresh", ["UPDATE file_extractions SET updated_at = now() WHERE doc_id = 'c'", "UPDATE processing_jobs SET updated_at = now()"]
)
async def test_any_progress_in_the_run_counts(bench: Bench, fresh: str) -> None:
    batch_of(bench, "a", "c")
    bench.conn.execute(IN_HAND + " WHERE doc_id = 'a'")
    let_time_pass(bench)
    bench.conn.execute(fresh.encode())
    assert await repairs(bench, seconds=1800) == []


async def test_time_in_which_the_database_was_away_is_no_stall(bench: Bench) -> None:
    batch_of(bench, "a")
    bench.conn.execute(IN_HAND)
    let_time_pass(bench)
    assert await repairs(bench, seconds=1800) == [], "this server has not been up for that long"
    assert bench.one("SELECT fail_stalled_batch('b', 1, 0.5)") == (None,), "who asks has watched for half a second"
    assert bench.one("SELECT fail_stalled_batch('b', 1)")[0].startswith("batch failed")


async def test_a_batch_that_its_submitter_left_is_failed_and_sealing_it_late_still_works(bench: Bench) -> None:
    run = begin(bench.conn)
    accept(bench.conn, run, "a")
    assert await repairs(bench, seconds=1800) == []
    let_time_pass(bench)
    reason = "the submitter stopped before everything was submitted; submit it again"
    assert await repairs(bench) == [f"batch failed: {reason}"]
    assert bench.one(BATCH)[:3] == ("failed", True, reason)
    await bench.drain()
    assert bench.one(BATCH)[:3] == ("failed", True, reason), "a batch that is not whole does not end"
    accept(bench.conn, run, "c")
    seal(bench.conn, run, 2)
    assert bench.one(BATCH) == ("processing", False, None, 2)
    await bench.drain()
    assert bench.one(BATCH) == ("completed", True, None, 2)
    summary(bench)


async def test_a_batch_that_was_left_can_be_submitted_again(bench: Bench) -> None:
    old = begin(bench.conn)
    let_time_pass(bench)
    await repairs(bench)
    run = begin(bench.conn)
    accept(bench.conn, run, "a")
    seal(bench.conn, run, 1)
    seal(bench.conn, old, 5)
    await bench.drain()
    assert bench.one(BATCH) == ("completed", True, None, 1)
    assert bench.one("SELECT count(*) FROM run_summaries WHERE run_id = %s", run) == (1,)


async def test_a_submission_whose_archive_waits_has_not_been_left(bench: Bench) -> None:
    run = begin(bench.conn)
    add_archive(bench.conn, run, "x.zip/", "waiting")
    let_time_pass(bench)
    assert await repairs(bench) == []


async def test_a_stalled_batch_in_somebodys_transaction_is_passed_over(bench: Bench, database: str) -> None:
    batch_of(bench, "a")
    bench.conn.execute(IN_HAND)
    let_time_pass(bench)
    with psycopg.connect(database) as caller:
        begin(caller)
        assert await repairs(bench) == []
    assert bench.one(BATCH)[:2] == ("pending", False)
