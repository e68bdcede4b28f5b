"""Small documents that wait are taken up together: sooner done, and otherwise as if each were alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from jobs.pipeline.claiming import Job
from jobs.pipeline.runner import Runner
from jobs.pipeline.stage_runs import StageRuns
from models.documents import Document
from models.errors import PermanentError, RetryableError
from tests.integration.conftest import STAGE_NAMES, Bench, sha
from tests.integration.test_runner import RESULTS

COMPLETE = "SELECT count(*) FROM file_extractions WHERE state = 'complete' AND served_version = 1 AND lease_until IS NULL"
TOGETHER = "SELECT count(*) FROM file_extractions WHERE state = 'complete' GROUP BY xmin::text ORDER BY 1"


def submit(bench: Bench, count: int) -> None:
    for number in range(count):
        bench.submit(f"d{number:02}", user_id="ann")
    bench.conn.execute("UPDATE file_extractions SET file_size = 100")


async def run_first(bench: Bench, runner: Runner | None = None) -> None:
    found = bench.fetch()
    assert found is not None
    await (runner or bench.runner()).run(*found)


async def test_small_documents_that_wait_are_completed_in_one_transaction(bench: Bench) -> None:
    submit(bench, 40)
    await run_first(bench)
    assert bench.all(TOGETHER) == [(16,)]
    assert bench.all("SELECT status, count(*) FROM procrastinate_jobs GROUP BY 1 ORDER BY 2") == [("succeeded", 16), ("todo", 24)]
    assert bench.one("SELECT count(DISTINCT claim), max(crash_count) FROM file_extractions WHERE state = 'complete'") == (16, 0)
    each = bench.all("SELECT DISTINCT string_agg(stage, ' ' ORDER BY id) FROM document_events WHERE stage IS NOT NULL GROUP BY doc_id")
    assert each == [(" ".join(STAGE_NAMES),)]
    assert bench.leases.held() == []


async def test_together_they_leave_the_same_rows_as_alone(bench: Bench) -> None:
    submit(bench, 20)
    await bench.drain(small_documents_together=1)
    alone = bench.all(RESULTS)
    assert len(bench.all(TOGETHER)) == 20
    bench.conn.execute("DELETE FROM file_extractions")
    submit(bench, 20)
    await bench.drain()
    assert max(bench.all(TOGETHER)) > (8,)
    assert bench.all(RESULTS) == alone


@pytest.mark.parametrize(("together", "kept"), [(16, False), (4, True)])
async def test_a_stage_that_was_long_for_all_is_kept_where_it_was_long_for_each(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, together: int, kept: bool
) -> None:
    run, seen = StageRuns.run, set[tuple[Any, ...]]()

    async def ten_seconds(runs: StageRuns, *given: Any) -> float:
        await run(runs, *given)
        return 10.0

    async def look(document: Document) -> None:
        seen.add(bench.one("SELECT milestone FROM file_extractions WHERE doc_id = %s", document.doc_id))

    monkeypatch.setattr(StageRuns, "run", ten_seconds)
    bench.also["finalize"] = look
    submit(bench, 16)
    await run_first(bench, bench.runner(small_documents_together=together, checkpoint_seconds=1.0))
    assert seen == {("extracted" if kept else "uploaded",)}
    assert bench.all(TOGETHER) == [(together,)]


async def test_who_fails_fails_alone(bench: Bench) -> None:
    async def refuse(document: Document) -> None:
        if document.doc_id == "d03":
            raise PermanentError("d03 is not to be read")
        if document.doc_id == "d05":
            raise RetryableError("not now")

    submit(bench, 16)
    bench.also["parse"] = refuse
    await run_first(bench)
    assert bench.one(COMPLETE) == (14,)
    assert bench.all("SELECT doc_id, state::text, retry_count FROM file_extractions WHERE state <> 'complete' ORDER BY 1") == [
        ("d03", "failed", 0),
        ("d05", "retrying", 1),
    ]
    assert bench.one("SELECT doc_id, error_message FROM dead_letters") == ("d03", "d03 is not to be read")
    assert bench.all("SELECT status, count(*) FROM procrastinate_jobs GROUP BY 1 ORDER BY 2") == [("todo", 1), ("succeeded", 16)]


async def test_what_the_database_refuses_of_one_is_stored_of_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.integration.conftest as made

    plain = made.made_by

    def with_a_nul(stage: str, document: Document) -> Document:
        document = plain(stage, document)
        return replace(document, markdown="no\x00text") if stage == "parse" and document.doc_id == "d04" else document

    monkeypatch.setattr(made, "made_by", with_a_nul)
    submit(bench, 16)
    await run_first(bench, bench.runner(max_retry_attempts=0))
    assert bench.one(COMPLETE) == (15,)
    assert bench.one("SELECT doc_id FROM dead_letters") == ("d04",)


async def test_who_turns_out_to_be_large_goes_on_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.integration.conftest as made

    plain = made.made_by

    def large(stage: str, document: Document) -> Document:
        document = plain(stage, document)
        return replace(document, markdown="large " * 200_000) if stage == "parse" and document.doc_id == "d04" else document

    monkeypatch.setattr(made, "made_by", large)
    submit(bench, 16)
    await run_first(bench)
    assert bench.all(TOGETHER) == [(1,), (15,)]


async def test_who_is_fenced_off_writes_nothing_and_the_others_are_complete(bench: Bench) -> None:
    async def newer_claim(document: Document) -> None:
        if document.doc_id == "d07":
            bench.conn.execute("UPDATE file_extractions SET claim = claim + 1 WHERE doc_id = 'd07'")

    submit(bench, 16)
    bench.also["finalize"] = newer_claim
    await run_first(bench)
    assert bench.one(COMPLETE) == (15,)
    assert bench.one("SELECT count(*) FROM document_chunks WHERE doc_id = 'd07'") == (0,)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'") == (0,)
    assert bench.all("SELECT doc_id FROM document_events WHERE event = 'fenced_off'") == [("d07",)]


async def test_the_job_of_who_is_fenced_off_does_not_wait_for_the_others(bench: Bench) -> None:
    over = asyncio.Event()

    async def cancel_one_and_keep_another(document: Document) -> None:
        if document.doc_id == "d07":
            bench.conn.execute("SELECT cancel_document('d07')")
        if document.doc_id == "d03":
            await over.wait()

    submit(bench, 16)
    bench.also["finalize"] = cancel_one_and_keep_another
    running = asyncio.create_task(run_first(bench))
    job = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded' AND args->>'doc_id' = 'd07'"
    try:
        await bench.until(job, 1)
    finally:
        over.set()
        await running
    assert bench.one(COMPLETE) == (15,)


async def test_a_connection_that_is_cut_under_the_common_checkpoint_loses_and_doubles_nothing(bench: Bench) -> None:
    async def cut(document: Document) -> None:
        if document.doc_id == "d00":
            bench.cut_connections()

    submit(bench, 16)
    bench.also["finalize"] = cut
    await run_first(bench)
    assert bench.one(COMPLETE) == (16,)
    assert bench.one("SELECT count(*), count(DISTINCT (doc_id, chunk_index)) FROM document_chunks") == (80, 80)


async def test_a_shutdown_hands_each_of_them_on_without_counting(bench: Bench) -> None:
    inside = asyncio.Event()

    async def hang(document: Document) -> None:
        if document.doc_id != "d00":
            return
        inside.set()
        await asyncio.sleep(60)

    submit(bench, 16)
    bench.also["check"] = hang
    running = asyncio.create_task(run_first(bench))
    await inside.wait()
    bench.stopping = True
    running.cancel()
    await running
    states = bench.all("SELECT state::text, milestone::text, max(retry_count), max(crash_count) FROM file_extractions GROUP BY 1, 2")
    assert all(state in {"queued", "complete"} and retries == crashes == 0 for state, _, retries, crashes in states)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE lease_until IS NOT NULL") == (0,)
    live = "SELECT count(*) FROM procrastinate_jobs AS j JOIN file_extractions AS d ON d.doc_id = j.args->>'doc_id' "
    assert bench.one(live + "WHERE d.state = 'queued' AND j.status = 'todo'") == bench.one(
        "SELECT count(*) FROM file_extractions WHERE state = 'queued'"
    )
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'") == (0,)
    bench.stopping = False
    bench.also.clear()
    await bench.drain()
    assert bench.one(COMPLETE) == (16,)


async def test_a_document_that_somebodys_transaction_holds_keeps_no_other_from_being_completed(bench: Bench) -> None:
    submit(bench, 16)
    async with bench.held_from("finalize", run_first) as other:
        await bench.until(COMPLETE, 15)
        # Whoever holds one can have any other: no worker waits for it with others in hand.
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'd03' FOR UPDATE NOWAIT")
    assert bench.one(COMPLETE) == (16,)
    assert max(bench.all(TOGETHER)) == (15,)


UNLIKE = {
    "another user's document under a job of this one's": "SET session_replication_role = replica; "
    "UPDATE file_extractions SET user_id = 'bob' WHERE doc_id = 'd05'; RESET session_replication_role",
    "another user's": "UPDATE procrastinate_jobs SET docmill_user = 'bob' WHERE args->>'doc_id' = 'd05'",
    "of another priority": "UPDATE procrastinate_jobs SET priority = 5 WHERE args->>'doc_id' = 'd05'",
    "begun": "UPDATE procrastinate_jobs SET docmill_begun = TRUE WHERE args->>'doc_id' = 'd05'",
    "scheduled for later": "UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 day' WHERE args->>'doc_id' = 'd05'",
    "large": "UPDATE file_extractions SET file_size = 64001 WHERE doc_id = 'd05'",
    "of unknown size": "UPDATE file_extractions SET file_size = NULL WHERE doc_id = 'd05'",
    "served already": "UPDATE file_extractions SET served_version = 1 WHERE doc_id = 'd05'",
    "a suspect": "UPDATE file_extractions SET crash_count = 1 WHERE doc_id = 'd05'",
    "tried before": "UPDATE file_extractions SET retry_count = 1 WHERE doc_id = 'd05'",
    "equal to another": f"UPDATE file_extractions SET content_sha256 = '{sha('d06')}' WHERE doc_id = 'd05'",
    "cancelled": "SELECT cancel_document('d05')",
}


@pytest.mark.parametrize("why", UNLIKE)
async def test_what_is_not_small_new_and_like_no_other_is_not_taken_along(bench: Bench, why: str) -> None:
    submit(bench, 40)
    bench.conn.execute(UNLIKE[why])
    await run_first(bench)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == (16,)
    assert bench.one("SELECT state = 'complete' FROM file_extractions WHERE doc_id = 'd05'") == (False,)


async def test_what_somebodys_transaction_holds_is_not_waited_for(bench: Bench, database: str) -> None:
    submit(bench, 40)
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'd05' FOR UPDATE")
        other.execute("SELECT FROM procrastinate_jobs WHERE args->>'doc_id' = 'd06' FOR UPDATE")
        async with asyncio.timeout(30):
            await run_first(bench)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == (16,)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE doc_id IN ('d05', 'd06') AND state = 'queued'") == (2,)


async def test_the_limit_of_a_user_holds(bench: Bench) -> None:
    submit(bench, 40)
    await run_first(bench, bench.runner(max_documents_per_user=5))
    assert bench.all(TOGETHER) == [(5,)]


async def test_who_takes_a_document_of_a_user_with_a_limit_is_not_waited_for(bench: Bench, database: str) -> None:
    submit(bench, 40)
    with psycopg.connect(database) as other:
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('docmill documents of ann', 0))")
        async with asyncio.timeout(30):
            await run_first(bench, bench.runner(max_documents_per_user=5))
    assert bench.all(TOGETHER) == [(1,)]


async def test_a_worker_takes_no_more_than_its_part_of_what_waits_however_many_places_it_has(bench: Bench) -> None:
    for worker in ("a:1", "b:1"):
        bench.conn.execute("INSERT INTO worker_registry (worker, host, pid, concurrency, version) VALUES (%s, 'h', 1, 4, '1')", [worker])
    submit(bench, 11)
    await run_first(bench)
    assert bench.all(TOGETHER) == [(1 + 10 // 2,)]


async def test_nothing_is_taken_along_where_it_is_not_wanted(bench: Bench) -> None:
    submit(bench, 20)
    await run_first(bench, bench.runner(small_documents_together=1))
    assert bench.one("SELECT count(*) FROM file_extractions WHERE claim > 0") == (1,)


async def test_nothing_new_goes_before_what_was_begun(bench: Bench) -> None:
    submit(bench, 20)
    bench.conn.execute("UPDATE procrastinate_jobs SET docmill_begun = TRUE WHERE args->>'doc_id' IN ('d00', 'd01')")
    await run_first(bench)
    assert bench.all(TOGETHER) == [(1,)]


async def test_a_job_of_another_stage_takes_nothing_along(bench: Bench) -> None:
    submit(bench, 20)
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(Job(found[0].id, "parse", None), found[1])
    assert bench.one("SELECT count(*) FROM file_extractions WHERE claim > 0") == (1,)


async def test_a_stray_job_for_a_document_that_is_taken_along_goes_on_waiting(bench: Bench) -> None:
    submit(bench, 10)
    bench.conn.execute("INSERT INTO procrastinate_jobs (queue_name, task_name, args) VALUES ('cpu', 'validate', '{\"doc_id\": \"d03\"}')")
    await run_first(bench)
    assert bench.one(COMPLETE) == (10,)
    assert bench.all("SELECT status, args->>'doc_id' FROM procrastinate_jobs WHERE status <> 'succeeded'") == [("todo", "d03")]
