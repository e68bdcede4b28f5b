"""Small documents that are handed on, because workers listen to one queue each or every stage waits in its queue (`HANDOFF=queue`): they go
together from one to the next, and otherwise as if each were alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jobs.pipeline.runner import Runner
from models.documents import Document
from models.errors import PermanentError
from models.stages import STAGE_BY_NAME, STAGES
from tests.integration.conftest import Bench
from tests.integration.test_runner import RESULTS
from tests.integration.test_small_documents import COMPLETE, TOGETHER, submit

STANDS = "SELECT milestone::text, state::text, count(*), count(DISTINCT xmin::text) FROM file_extractions GROUP BY 1, 2 ORDER BY 3 DESC"
HANDED_ON = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo' AND task_name <> 'validate'"
JOBS = "SELECT task_name, count(*) FROM procrastinate_jobs WHERE status = 'todo' GROUP BY 1 ORDER BY 2 DESC"


async def run_first(bench: Bench, runner: Runner | None = None) -> None:
    """Run the first job that waits, in a worker that listens to its queue alone."""
    found = bench.fetch()
    assert found is not None
    job, doc_id = found
    await (runner or bench.runner()).run(replace(job, queues=frozenset({STAGE_BY_NAME[job.stage].queue})), doc_id)


async def test_they_are_handed_on_in_one_transaction_a_queue(bench: Bench) -> None:
    submit(bench, 16)
    for milestone, stage in (("chunks_stored", "embed"), ("embeddings_stored", "extract"), ("extracted", "finalize")):
        await run_first(bench)
        assert bench.all(STANDS) == [(milestone, "queued", 16, 1)]
        assert bench.all(JOBS) == [(stage, 16)]
        assert bench.leases.held() == []
    await run_first(bench)
    assert bench.all(TOGETHER) == [(16,)]
    assert bench.one(COMPLETE) == (16,)
    assert bench.all("SELECT status, count(*) FROM procrastinate_jobs GROUP BY 1") == [("succeeded", 64)]
    assert bench.one("SELECT max(retry_count), max(crash_count) FROM file_extractions") == (0, 0)
    assert bench.one("SELECT (SELECT count(*) FROM chunk_buffer) + (SELECT count(*) FROM vector_buffer)") == (0,)


async def test_where_every_stage_waits_in_its_queue_they_go_through_each_together(bench: Bench) -> None:
    submit(bench, 16)
    runner = bench.runner(handoff="queue")
    for stage, following in pairwise(STAGES):
        await run_first(bench, runner)
        assert bench.all(STANDS) == [(stage.reaches, "queued", 16, 1)]
        assert bench.all(JOBS) == [(following.name, 16)]
    await run_first(bench, runner)
    assert bench.all(TOGETHER) == [(16,)]
    assert bench.all("SELECT status, count(*) FROM procrastinate_jobs GROUP BY 1") == [("succeeded", 16 * len(STAGES))]


async def drain_queues(bench: Bench, **changes: Any) -> None:
    runner = bench.runner(**changes)
    while bench.all(JOBS):
        await run_first(bench, runner)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_together_they_leave_the_same_rows_and_events_as_alone(bench: Bench, handoff: str) -> None:
    events = """SELECT DISTINCT string_agg(concat_ws(' ', stage, event, attempt), ', ' ORDER BY id) FROM document_events
        WHERE event <> 'deleted' AND id > %s GROUP BY doc_id"""
    submit(bench, 20)
    await drain_queues(bench, small_documents_together=1, handoff=handoff)
    alone, told = bench.all(RESULTS), bench.all(events, 0)
    assert len(bench.all(TOGETHER)) == 20
    bench.conn.execute("DELETE FROM file_extractions")
    (last,) = bench.one("SELECT max(id) FROM document_events")
    submit(bench, 20)
    await drain_queues(bench, handoff=handoff)
    assert max(bench.all(TOGETHER)) > (8,)
    assert bench.all(RESULTS) == alone
    assert bench.all(events, last) == told


@pytest.mark.parametrize("stage", ["chunk", "embed", "extract"])
async def test_who_fails_keeps_no_other_from_being_handed_on(bench: Bench, stage: str) -> None:
    async def refuse(document: Document) -> None:
        if document.doc_id == "d03":
            raise PermanentError("d03 is not to be read")

    submit(bench, 16)
    bench.also[stage] = refuse
    await drain_queues(bench)
    assert bench.all(TOGETHER) == [(15,)]
    assert bench.all("SELECT doc_id, stage FROM dead_letters") == [("d03", stage)]


@pytest.mark.parametrize("stage", ["chunk", "embed", "extract"])
async def test_who_is_fenced_off_writes_nothing_and_the_others_are_handed_on(bench: Bench, stage: str) -> None:
    async def cancel(document: Document) -> None:
        if document.doc_id == "d03":
            bench.conn.execute("SELECT cancel_document('d05')")

    submit(bench, 16)
    bench.also[stage] = cancel
    await drain_queues(bench)
    assert bench.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1 ORDER BY 2") == [("cancelled", 1), ("complete", 15)]
    assert bench.all(TOGETHER) == [(15,)]
    assert bench.all("SELECT doc_id, stage FROM document_events WHERE event = 'fenced_off'") == [("d05", stage)]


async def test_one_that_somebodys_transaction_holds_keeps_no_other_from_being_handed_on(bench: Bench) -> None:
    submit(bench, 16)
    async with bench.held_from("chunk", run_first):
        await bench.until(HANDED_ON, 15)
        assert bench.all("SELECT count(*) FROM file_extractions WHERE state = 'queued' GROUP BY xmin::text") == [(15,)]
    assert bench.all(JOBS) == [("embed", 16)]
    assert bench.all("SELECT DISTINCT milestone::text, state::text FROM file_extractions") == [("chunks_stored", "queued")]


async def test_a_connection_that_is_cut_under_it_hands_each_of_them_on_once(bench: Bench) -> None:
    async def cut(document: Document) -> None:
        if document.doc_id == "d15":
            bench.cut_connections()

    submit(bench, 16)
    bench.also["chunk"] = cut
    await drain_queues(bench)
    assert bench.one(COMPLETE) == (16,)
    assert bench.all("SELECT task_name, status, count(*) FROM procrastinate_jobs GROUP BY 1, 2 ORDER BY 1") == [
        ("embed", "succeeded", 16),
        ("extract", "succeeded", 16),
        ("finalize", "succeeded", 16),
        ("validate", "succeeded", 16),
    ]


async def test_a_shutdown_hands_on_all_but_the_one_that_takes_long(bench: Bench) -> None:
    release = asyncio.Event()

    async def stop(document: Document) -> None:
        bench.stopping = bench.stopping or document.doc_id == "d08"
        if document.doc_id == "d00":
            await release.wait()

    submit(bench, 16)
    bench.also["chunk"] = stop
    running = asyncio.create_task(run_first(bench))
    try:
        await bench.until(HANDED_ON, 15)
    finally:
        release.set()
        await running
    stand = "SELECT state::text, count(*), max(retry_count), count(lease_until) FROM file_extractions GROUP BY 1"
    assert bench.all(stand) == [("queued", 16, 0, 0)]
    assert bench.one("SELECT count(*) > 4 FROM file_extractions WHERE milestone = 'chunks_stored'") == (True,)


@pytest.mark.parametrize(("queues", "part"), [(None, 16 // 2), (["cpu"], 16 // 2), (["embed"], 15), (["cpu", "embed"], 16 // 2)])
async def test_only_workers_that_listen_to_the_queue_have_their_part_of_it(bench: Bench, queues: list[str] | None, part: int) -> None:
    statement = "INSERT INTO worker_registry (worker, host, pid, concurrency, version, queues) VALUES (%s, 'h', 1, 4, '1', %s)"
    bench.conn.execute(statement, ["a:1", ["cpu"]])
    bench.conn.execute(statement, ["b:1", queues])
    submit(bench, 17)
    await run_first(bench)
    assert bench.one("SELECT count(*) FROM file_extractions WHERE milestone = 'chunks_stored'") == (part + 1,)


OF_FIRST, OF_LAST = (
    f"doc_id = (SELECT args->>'doc_id' FROM procrastinate_jobs WHERE status = 'todo' ORDER BY id {order} LIMIT 1)" for order in ("", "DESC")
)
ALONE = {
    "of many passages": f"UPDATE file_extractions SET chunk_count = 101 WHERE {OF_LAST}",
    "tried before": f"UPDATE file_extractions SET retry_count = 1 WHERE {OF_LAST}",
    "a suspect": f"UPDATE file_extractions SET crash_count = 1 WHERE {OF_LAST}",
    "not the owner of its content": f"UPDATE file_extractions SET owns_content = FALSE WHERE {OF_LAST}",
    "served already": f"UPDATE file_extractions SET served_version = 1 WHERE {OF_LAST}",
}


async def come_to(bench: Bench, stage: str) -> Runner:
    """Have 16 documents wait for a stage."""
    submit(bench, 16)
    runner = bench.runner(handoff="queue")
    while bench.all(JOBS) != [(stage, 16)]:
        await run_first(bench, runner)
    return runner


@pytest.mark.parametrize("stage", ["parse", "chunk", "extract", "finalize"])
@pytest.mark.parametrize("why", ALONE)
async def test_what_is_not_small_untried_and_alone_with_its_content_is_not_taken_along(bench: Bench, why: str, stage: str) -> None:
    runner = await come_to(bench, stage)
    bench.conn.execute(ALONE[why])
    await run_first(bench, runner)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo' AND task_name = %s", stage) == (1,)


@pytest.mark.parametrize("stage", ["extract", "finalize"])
async def test_one_of_many_passages_takes_no_others_along(bench: Bench, stage: str) -> None:
    runner = await come_to(bench, stage)
    bench.conn.execute(f"UPDATE file_extractions SET chunk_count = 101 WHERE {OF_FIRST}")
    await run_first(bench, runner)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo' AND task_name = %s", stage) == (15,)


async def test_who_turns_out_to_be_large_is_handed_on_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.integration.conftest as made

    plain = made.made_by

    def large(stage: str, document: Document) -> Document:
        document = plain(stage, document)
        return replace(document, markdown="x" * 2_000_000) if stage == "parse" and document.doc_id == "d04" else document

    runner = await come_to(bench, "parse")
    monkeypatch.setattr(made, "made_by", large)
    await run_first(bench, runner)
    assert bench.all("SELECT count(*) FROM file_extractions WHERE milestone = 'parse_complete' GROUP BY xmin::text ORDER BY 1") == [
        (1,),
        (15,),
    ]
