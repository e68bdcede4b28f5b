"""The stage embed with a service behind a socket, run by the real runner: what is paid for is kept, and nothing is paid for twice."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from jobs.adapters.embedders import HashedWords
from jobs.leases import Lease
from jobs.pipeline.runner import Runner
from jobs.services import front
from jobs.stages import embed
from models.documents import Document
from tests.integration.outside import MODEL, Outside
from tests.servers import OpenAIServer, faults


def runner(outside: Outside, endpoint: OpenAIServer, key: str | None = None, worker: str = "test:1", **settings: Any) -> Runner:
    return outside.runner({"embed": embed.run}, worker, settings, embedder=outside.embedder(endpoint.url, key))


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


async def whole(outside: Outside, endpoint: OpenAIServer) -> None:
    """The document is complete, with the vectors of its own passages, and no text of it was paid for twice."""
    assert outside.state() == ("complete", "complete", 0)
    found = outside.bench.all("SELECT content, embedding::text, embedding_model FROM document_chunks ORDER BY chunk_index")
    expected = await HashedWords(32).embed([row[0] for row in found])
    stored = np.array([[float(number) for number in row[1][1:-1].split(",")] for row in found])
    assert np.allclose(stored, expected, atol=1e-6)
    assert {row[2] for row in found} == {MODEL}
    assert (len(found), endpoint.tally.paid_twice()) == (outside.passages, 0)
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (0,)
    assert outside.bench.one("SELECT count(*) FROM chunk_buffer") == (0,)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_passages_are_embedded_in_requests_and_the_ledger_names_their_document(
    outside: Outside, endpoint: OpenAIServer, handoff: str
) -> None:
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, handoff=handoff))
    await whole(outside, endpoint)
    assert endpoint.tally.answered == 3  # nine different texts, four a request
    told = outside.bench.all("SELECT doc_ids, stage, kind, model, outcome, cost > 0 FROM provider_usage")
    assert told == [(["a"], "embed", "embedding", "m", "ok", True)] * 3
    assert outside.bench.one("SELECT detail->>'embedded' FROM document_events WHERE stage = 'embed'") == ("9",)


async def test_a_429_is_waited_out_without_counting(outside: Outside, endpoint: OpenAIServer) -> None:
    endpoint.script(faults.sequence(None, faults.rate_limited("0.3"), None))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint))
    await whole(outside, endpoint)
    assert outside.calls().count("rate_limited") == 1
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == (0,)


async def test_an_outage_is_waited_out_and_the_document_completes(outside: Outside, endpoint: OpenAIServer) -> None:
    endpoint.script(faults.outage(0, 1.0, faults.NAMED["502_html"]))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint))
    await whole(outside, endpoint)
    assert outside.bench.one("SELECT count(*) FROM dead_letters") == (0,)
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == (0,)


async def test_a_refused_key_keeps_documents_waiting_with_an_alert_until_it_is_right(outside: Outside, endpoint: OpenAIServer) -> None:
    endpoint.key = "new"
    outside.bench.submit()
    worker = runner(outside, endpoint, key="old")
    await outside.work(worker, until=lambda: len(outside.calls()) >= 2)
    assert outside.state()[1:] == ("retrying", 0)
    assert outside.bench.one("SELECT count(*) FROM alerts") == (1,)
    endpoint.key = "old"
    await outside.work(worker)
    await whole(outside, endpoint)


async def test_each_request_is_durable_before_the_next_and_another_worker_sends_only_the_rest(
    outside: Outside, endpoint: OpenAIServer
) -> None:
    endpoint.script(lambda number, seconds: faults.NAMED["hang_in_headers"] if number == 3 else None)
    outside.bench.submit()
    found = outside.bench.fetch()
    assert found is not None
    dying = asyncio.create_task(runner(outside, endpoint).run(*found))
    async with asyncio.timeout(20):
        await asyncio.to_thread(wait_for, lambda: endpoint.tally.requests >= 3)
    # Passage 3 is passage 2 once more, so two requests hold the texts of nine passages.
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (9,)
    assert outside.bench.one("SELECT milestone::text FROM file_extractions") == ("chunks_stored",)
    dying.cancel()
    await dying
    await outside.work(runner(outside, endpoint, worker="test:2"))
    await whole(outside, endpoint)
    assert outside.bench.calls.count("chunk") == 1
    assert outside.calls().count("ok") == 3


@pytest.mark.parametrize("why", ["shutdown", "timeout"])
async def test_what_is_paid_for_is_kept_where_the_worker_stops_or_the_time_ends_while_it_is_entered(
    outside: Outside, endpoint: OpenAIServer, database: str, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    outside.bench.submit()
    found = outside.bench.fetch()
    assert found is not None
    monkeypatch.setattr(front, "_SETTLE_SECONDS", 60.0)
    worker = runner(outside, endpoint, stage_timeout_seconds=60.0 if why == "shutdown" else 4.0)
    with psycopg.connect(database) as other:

        def lock(number: int, seconds: float) -> None:
            if number == 2:
                other.execute("LOCK TABLE provider_usage IN EXCLUSIVE MODE")

        endpoint.script(lock)
        dying = asyncio.create_task(worker.run(*found))
        async with asyncio.timeout(20):
            await asyncio.to_thread(wait_for, lambda: endpoint.tally.requests >= 2 and bool(outside.fronts[0]._settling))
        if why == "shutdown":
            dying.cancel()
        await dying
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (9,)
    assert outside.bench.one("SELECT event FROM document_events ORDER BY id DESC LIMIT 1") == (
        "handed_on" if why == "shutdown" else "retry_scheduled",
    )
    endpoint.script(faults.never)
    await outside.work(runner(outside, endpoint, worker="test:2"))
    assert outside.state()[1] == "complete"
    assert endpoint.tally.paid_twice() == 0


async def test_a_try_that_reaches_its_deadline_counts_unless_it_has_kept_something(outside: Outside, endpoint: OpenAIServer) -> None:
    """Each try but the last sends one request, and hangs in the next; then none is answered any more."""
    outside.passages = 27
    outside.bench.submit()
    worker = runner(outside, endpoint, stage_timeout_seconds=3.5)
    answered = 4  # tries that count would be over
    endpoint.script(lambda number, seconds: faults.NAMED["hang_in_headers"] if number % 2 == 0 or number > 2 * answered else None)
    await outside.work(worker, until=lambda: endpoint.tally.requests >= 2 * answered, seconds=60)
    assert outside.state() == ("chunks_stored", "retrying", 0)
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (4 * answered + 1,)
    await outside.work(worker, until=lambda: endpoint.tally.requests > 2 * answered, seconds=60)
    assert outside.state() == ("chunks_stored", "retrying", 1)


async def test_a_worker_that_was_fenced_off_in_mid_embed_keeps_nothing_and_asks_nothing_more(
    outside: Outside, endpoint: OpenAIServer
) -> None:
    outside.bench.submit()

    def superseded(number: int, seconds: float) -> faults.Fault | None:
        if number == 2:
            outside.bench.conn.execute("SELECT submit_document('uploads/b', doc_id => 'a', content_sha256 => %s)", ["b" * 64])
        return None

    endpoint.script(superseded)
    found = outside.bench.fetch()
    assert found is not None
    await runner(outside, endpoint).run(*found)
    assert endpoint.tally.requests == 2
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (0,)
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)
    endpoint.script(faults.never)
    await outside.work(runner(outside, endpoint))
    assert outside.state() == ("complete", "complete", 0)


async def test_no_request_is_sent_without_a_good_lease(outside: Outside, endpoint: OpenAIServer) -> None:
    outside.bench.submit()
    worker = runner(outside, endpoint)
    held: list[Lease] = []

    def expired(doc_id: str, claim: int, *, claimed_at: float, on_lost: Callable[[bool], None]) -> Lease:
        held.append(Lease(doc_id, claim, claimed_at - 1, math.inf, on_lost))
        return held[0]

    worker._leases.hold = expired  # type: ignore[method-assign]  # nobody renews it
    found = outside.bench.fetch()
    assert found is not None
    working = asyncio.create_task(worker.run(*found))
    async with asyncio.timeout(20):
        await asyncio.to_thread(wait_for, lambda: outside.state()[0] == "chunks_stored")
    await asyncio.sleep(0.3)
    assert endpoint.tally.requests == 0
    held[0].good_until = math.inf
    await working
    await whole(outside, endpoint)


@pytest.mark.parametrize("index", [0, 5, 8])
async def test_a_poisoned_passage_is_named_and_only_its_document_fails(outside: Outside, endpoint: OpenAIServer, index: int) -> None:
    endpoint.poison = f"passage {index} of a"
    worker = runner(outside, endpoint)
    for doc_id in ("a", "b"):
        outside.bench.submit(doc_id)
    await outside.work(worker)
    assert outside.state("a")[1] == "failed"
    assert outside.state("b")[1] == "complete"
    (message, kind) = outside.bench.one("SELECT error_message, error_type::text FROM dead_letters")
    assert f"passage {index} cannot be embedded" in message
    assert kind == "PERMANENT"
    assert endpoint.tally.paid_twice() == 0
    endpoint.poison = None
    outside.bench.conn.execute("SELECT requeue_document('a')")
    await outside.work(worker)
    assert outside.state("a")[1] == "complete"
    assert endpoint.tally.paid_twice() == 0


async def test_vectors_kept_of_another_model_are_made_anew(outside: Outside, endpoint: OpenAIServer) -> None:
    endpoint.script(lambda number, seconds: faults.NAMED["401"] if number == 3 else None)
    outside.bench.submit()
    worker = runner(outside, endpoint)
    await outside.work(worker, until=lambda: endpoint.tally.requests >= 3)
    assert outside.bench.one("SELECT count(*) FROM vector_buffer WHERE embedding_model = %s", MODEL) == (9,)
    outside.bench.conn.execute("UPDATE vector_buffer SET embedding_model = 'older@32', embedding = %s", [str([1.0] + [0.0] * 31)])
    await outside.work(worker)
    assert outside.state() == ("complete", "complete", 0)
    assert outside.bench.all("SELECT DISTINCT embedding_model FROM document_chunks") == [(MODEL,)]
    assert endpoint.tally.paid_twice() == 8


async def test_a_checkpoint_after_embed_adds_only_what_is_not_kept_yet(outside: Outside, endpoint: OpenAIServer) -> None:
    async def broken(document: Document) -> None:
        if outside.bench.calls.count("extract") == 1:
            assert outside.bench.one("SELECT count(*), milestone::text FROM vector_buffer, file_extractions GROUP BY 2") == (
                outside.passages,
                "embeddings_stored",
            )
            raise OSError(28, "No space left on device")

    outside.bench.also["extract"] = broken
    outside.bench.submit()
    await outside.work(runner(outside, endpoint))
    await whole(outside, endpoint)
    assert outside.bench.calls.count("embed") == 1
