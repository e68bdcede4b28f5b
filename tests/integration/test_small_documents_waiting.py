"""Small documents whose passages are stored, and which waited for a service or were handed on: embedded together as new ones are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobs.breaker import Rules
from jobs.pipeline.runner import Runner
from jobs.retry import StageRetry
from jobs.stages import embed
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.integration.test_waiting import due
from tests.servers import OpenAIServer, faults

COMPLETED = "SELECT count(*) FROM file_extractions WHERE state = 'complete' GROUP BY xmin::text ORDER BY 1"
WAITING = "SELECT count(*) FROM file_extractions WHERE state = 'retrying' AND milestone = 'chunks_stored' AND retry_count = 0"
TIME_HAS_COME = (
    "UPDATE file_extractions SET not_before = now() WHERE state = 'retrying'",
    "UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo'",
    "UPDATE circuit_breakers SET try_at = now() WHERE state <> 'closed'",
)


def embedding(outside: Outside, endpoint: OpenAIServer, **settings: Any) -> Runner:
    """A worker that waits as long as it is told."""
    outside.terms["rules"] = Rules()
    changed = {"embedding_gather_ms": 10_000, **settings}
    made = outside.runner({"embed": embed.run}, settings=changed, embedder=outside.embedder(endpoint.url, max_texts=256))
    made._runs._retry = made._endings._retry = StageRetry(max_attempts=3, base=0.1, max_delay=1, max_wait_hours=72)
    return made


async def run_first(bench: Bench, worker: Runner) -> None:
    found = due(bench)
    assert found is not None
    async with asyncio.timeout(60):
        await worker.run(*found)


def come(bench: Bench) -> None:
    for statement in TIME_HAS_COME:
        bench.conn.execute(statement)


async def outage(outside: Outside, endpoint: OpenAIServer, count: int = 16) -> None:
    """Leave so many documents waiting for a service that is down."""
    for number in range(count):
        outside.bench.submit(f"d{number:02}", user_id="ann")
    outside.bench.conn.execute("UPDATE file_extractions SET file_size = 100")
    endpoint.script(faults.always(faults.NAMED["502_html"]))
    worker = embedding(outside, endpoint)
    while outside.bench.one(WAITING) != (count,):
        come(outside.bench)
        await run_first(outside.bench, worker)


async def test_after_an_outage_they_are_embedded_with_one_request_and_completed_in_one_transaction(
    outside: Outside, endpoint: OpenAIServer
) -> None:
    await outage(outside, endpoint)
    endpoint.script(faults.never)
    before = endpoint.tally.requests
    come(outside.bench)
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(16,)]
    assert endpoint.tally.requests == before + 1
    assert outside.bench.one("SELECT count(*), count(DISTINCT embedding) FROM document_chunks") == (160, 144)
    assert outside.bench.one("SELECT (SELECT count(*) FROM chunk_buffer) + (SELECT count(*) FROM vector_buffer)") == (0,)
    assert outside.bench.all("SELECT DISTINCT waiting_for, waiting_since FROM file_extractions") == [(None, None)]
    assert outside.bench.all("SELECT status, count(*) FROM procrastinate_jobs WHERE task_name = 'embed' GROUP BY 1") == [("succeeded", 16)]
    assert outside.bench.leases.held() == []


async def test_where_it_is_down_still_all_wait_on_and_are_known_to_have_waited_since(outside: Outside, endpoint: OpenAIServer) -> None:
    await outage(outside, endpoint)
    since = "SELECT doc_id, waiting_since FROM file_extractions ORDER BY 1"
    outside.bench.conn.execute("UPDATE file_extractions SET waiting_since = waiting_since - interval '1 hour'")
    before = outside.bench.all(since)
    come(outside.bench)
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.one(WAITING) == (16,)
    assert outside.bench.all(since) == before
    assert outside.bench.one("SELECT max(crash_count), max(requeue_count) FROM file_extractions") == (0, 0)
    assert outside.bench.one("SELECT count(DISTINCT not_before) > 8, min(not_before) > now() FROM file_extractions") == (True, True)


async def test_who_has_waited_too_long_fails_alone(outside: Outside, endpoint: OpenAIServer) -> None:
    await outage(outside, endpoint)
    outside.bench.conn.execute("UPDATE file_extractions SET waiting_since = now() - interval '100 days' WHERE doc_id = 'd05'")
    come(outside.bench)
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all("SELECT doc_id FROM dead_letters") == [("d05",)]
    assert outside.bench.one(WAITING) == (15,)


async def test_what_was_paid_for_before_is_not_paid_for_again(outside: Outside, endpoint: OpenAIServer) -> None:
    await outage(outside, endpoint)
    endpoint.script(faults.never)
    outside.bench.conn.execute(
        """INSERT INTO vector_buffer (doc_id, version, chunk_index, embedding_model, embedding)
        SELECT b.doc_id, b.version, b.chunk_index, 'm@32', array_fill(0.5, ARRAY[32])::vector
        FROM chunk_buffer AS b WHERE b.doc_id IN ('d03', 'd07') AND b.chunk_index < 5"""
    )
    come(outside.bench)
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(16,)]
    for doc_id in ("d03", "d07"):
        assert f"passage 4 of {doc_id}" not in endpoint.tally.seen
        assert endpoint.tally.seen[f"passage 5 of {doc_id}"] == 1


async def test_documents_that_are_queued_with_their_passages_stored_are_embedded_together(outside: Outside, endpoint: OpenAIServer) -> None:
    for number in range(16):
        outside.bench.submit(f"d{number:02}", user_id="ann")
    outside.bench.conn.execute("UPDATE file_extractions SET file_size = 100")
    endpoint.script(faults.always(faults.NAMED["503"]))
    await run_first(outside.bench, embedding(outside, endpoint))
    endpoint.script(faults.never)
    outside.bench.conn.execute("UPDATE file_extractions SET state = 'queued', not_before = NULL, waiting_for = NULL, waiting_place = NULL")
    come(outside.bench)
    outside.bench.conn.execute("DELETE FROM circuit_breakers")
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(16,)]


UNLIKE = {
    "its time has not come": "UPDATE file_extractions SET not_before = now() + interval '1 day' WHERE doc_id = 'd05'",
    "its job is scheduled": "UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 day' WHERE args->>'doc_id' = 'd05'",
    "tried before": "UPDATE file_extractions SET retry_count = 1 WHERE doc_id = 'd05'",
    "a suspect": "UPDATE file_extractions SET crash_count = 1 WHERE doc_id = 'd05'",
    "of many passages": "UPDATE file_extractions SET chunk_count = 101 WHERE doc_id = 'd05'",
    "large": "UPDATE file_extractions SET file_size = 64001 WHERE doc_id = 'd05'",
    "served already": "UPDATE file_extractions SET served_version = 1 WHERE doc_id = 'd05'",
    "not the owner of its content": "UPDATE file_extractions SET owns_content = FALSE WHERE doc_id = 'd05'",
    "another user's": "UPDATE procrastinate_jobs SET docmill_user = 'bob' WHERE args->>'doc_id' = 'd05' AND status = 'todo'",
    "further on": "SET session_replication_role = replica; "
    "UPDATE file_extractions SET milestone = 'embeddings_stored' WHERE doc_id = 'd05'; RESET session_replication_role",
}


@pytest.mark.parametrize("why", UNLIKE)
async def test_what_is_not_small_untried_and_due_is_not_taken_along(outside: Outside, endpoint: OpenAIServer, why: str) -> None:
    await outage(outside, endpoint)
    endpoint.script(faults.never)
    come(outside.bench)
    # Not the one whose job is first: it would be the one that takes others along.
    (last,) = outside.bench.one("SELECT args->>'doc_id' FROM procrastinate_jobs WHERE status = 'todo' ORDER BY id DESC LIMIT 1")
    outside.bench.conn.execute(UNLIKE[why].replace("d05", last))
    stands = "SELECT state::text, claim FROM file_extractions WHERE doc_id = %s"
    before = outside.bench.one(stands, last)
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(15,)]
    assert outside.bench.one(stands, last) == before == ("retrying", before[1])


async def test_one_of_many_passages_takes_no_others_along(outside: Outside, endpoint: OpenAIServer) -> None:
    await outage(outside, endpoint)
    endpoint.script(faults.never)
    come(outside.bench)
    (first,) = outside.bench.one("SELECT args->>'doc_id' FROM procrastinate_jobs WHERE status = 'todo' ORDER BY id LIMIT 1")
    outside.bench.conn.execute("UPDATE file_extractions SET chunk_count = 101 WHERE doc_id = %s", [first])
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(1,)]


async def test_new_documents_are_not_taken_along_with_them(outside: Outside, endpoint: OpenAIServer) -> None:
    await outage(outside, endpoint, 4)
    endpoint.script(faults.never)
    come(outside.bench)
    for number in range(8):
        outside.bench.submit(f"new{number}", user_id="ann")
    outside.bench.conn.execute("UPDATE file_extractions SET file_size = 100")
    outside.bench.conn.execute("UPDATE procrastinate_jobs SET queue_name = 'embed', docmill_begun = TRUE WHERE task_name = 'validate'")
    await run_first(outside.bench, embedding(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(4,)]
    assert outside.bench.one("SELECT count(*) FROM file_extractions WHERE state = 'queued' AND milestone = 'uploaded'") == (8,)
