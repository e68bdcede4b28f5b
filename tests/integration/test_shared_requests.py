"""Documents of one worker that share requests for embeddings, run by the real runner: what is sent, who pays, whose failure it is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest

from jobs.leases import Lease
from jobs.pipeline.runner import Runner
from jobs.places import Places
from jobs.stages import embed
from tests.integration.outside import Outside
from tests.servers import OpenAIServer, Request, Response, faults

DOCUMENTS = [f"d{number:02}" for number in range(40)]
GATHER_MS = 10_000  # longer than any test: a request that waits in vain shows in its number, or in time


class Fragile(OpenAIServer):
    """Fails with 500 over one text."""

    bomb = b"nothing"

    async def handle(self, request: Request, mangle: str) -> Response:
        return Response(500) if self.bomb in request.body else await super().handle(request, mangle)


@pytest.fixture
def endpoint() -> Iterator[Fragile]:
    with Fragile(dimensions=32) as running:
        yield running


def runner(outside: Outside, endpoint: OpenAIServer, lent_place: Any = None, **settings: Any) -> Runner:
    changed = {"embedding_gather_ms": GATHER_MS, **settings}
    embedder = outside.embedder(endpoint.url, max_texts=256)
    return outside.runner({"embed": embed.run}, settings=changed, embedder=embedder, lent_place=lent_place)


async def at_once(outside: Outside, worker: Runner) -> None:
    """Run all jobs that wait, together, again and again until there are none."""

    async def one(job: Any, doc_id: str) -> None:
        await worker.run(job, doc_id)
        outside.bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [job.id])

    async with asyncio.timeout(120):
        while found := list(iter(outside.bench.fetch, None)):
            await asyncio.gather(*(one(*each) for each in found))


def states(outside: Outside) -> dict[str, tuple[str, int]]:
    return {row[0]: row[1:] for row in outside.bench.all("SELECT doc_id, state::text, retry_count FROM file_extractions")}


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_forty_small_documents_send_a_few_requests_and_each_pays_its_share(outside: Outside, endpoint: Fragile, handoff: str) -> None:
    for doc_id in DOCUMENTS:
        outside.bench.submit(doc_id)
    await at_once(outside, runner(outside, endpoint, handoff=handoff))
    assert set(states(outside).values()) == {("complete", 0)}
    # 40 documents of nine different texts need two requests of 256.
    assert endpoint.tally.requests <= 6
    assert (endpoint.tally.texts, endpoint.tally.paid_twice()) == (360, 0)
    calls = outside.bench.all("SELECT outcome, cardinality(doc_ids), (SELECT sum(s) FROM unnest(shares) AS s) FROM provider_usage")
    assert {outcome for outcome, _, _ in calls} == {"ok"}
    assert [total for *_, total in calls] == pytest.approx([1] * len(calls))
    assert sum(count for _, count, _ in calls) <= 40 + len(calls)
    paid = outside.bench.all("SELECT doc_id, cost, tokens_in FROM cost_by_document")
    assert sorted(doc_id for doc_id, *_ in paid) == DOCUMENTS
    (whole,) = outside.bench.one("SELECT sum(cost) FROM provider_usage")
    assert float(sum(cost for _, cost, _ in paid)) == pytest.approx(float(whole), abs=1e-8)
    # Their texts are equally long, so they pay alike.
    assert max(cost for _, cost, _ in paid) <= 2 * min(cost for _, cost, _ in paid)
    assert outside.bench.one("SELECT count(*), count(DISTINCT doc_id) FROM document_chunks WHERE embedding IS NOT NULL") == (400, 40)


async def test_documents_that_wait_for_a_request_lend_their_places_to_others(outside: Outside, endpoint: Fragile) -> None:
    for doc_id in DOCUMENTS[:6]:
        outside.bench.submit(doc_id)
    places = Places(2, most_documents=2, most_requests=4)
    worker = runner(outside, endpoint, lent_place=places.lent)
    endpoint.latency = 1.0
    in_hand: set[str] = set()
    most = 0

    async def one(job: Any, doc_id: str) -> None:
        nonlocal most
        in_hand.add(doc_id)
        most = max(most, len(in_hand))
        await worker.run(job, doc_id)
        in_hand.remove(doc_id)
        places.release()

    running = []
    async with asyncio.timeout(120):
        for found in list(iter(outside.bench.fetch, None)):
            await places.acquire()
            running.append(asyncio.create_task(one(*found)))
        await asyncio.gather(*running)
    assert set(states(outside).values()) == {("complete", 0)}
    assert most == 4
    assert (endpoint.tally.texts, endpoint.tally.paid_twice()) == (54, 0)


async def test_a_place_is_lent_by_all_passages_of_a_document_however_few_are_asked_for(outside: Outside, endpoint: Fragile) -> None:
    lent: list[tuple[int, float]] = []

    @contextmanager
    def lend(documents: int, requests: float) -> Iterator[None]:
        lent.append((documents, requests))
        yield

    worker = runner(outside, endpoint, lent_place=lend)
    for content, outside.passages in (("1", 64), ("2", 128)):
        outside.bench.submit("a", content=content)
        await at_once(outside, worker)
    assert lent == [(1, 0.25), (1, 0.5)]
    assert endpoint.tally.texts == 127


async def test_a_poisoned_passage_in_a_shared_request_fails_its_document_alone(outside: Outside, endpoint: Fragile) -> None:
    endpoint.poison = "passage 5 of d17"
    for doc_id in DOCUMENTS[:24]:
        outside.bench.submit(doc_id)
    await at_once(outside, runner(outside, endpoint))
    found = states(outside)
    assert found.pop("d17")[0] == "failed"
    assert set(found.values()) == {("complete", 0)}
    (message,) = outside.bench.one("SELECT error_message FROM dead_letters")
    assert "passage 5 cannot be embedded" in message
    assert endpoint.tally.paid_twice() == 0


async def test_a_document_that_may_cost_no_more_leaves_a_shared_request_to_the_others(outside: Outside, endpoint: Fragile) -> None:
    outside.terms = {"max_cost_per_document": Decimal("0.01")}
    for doc_id in DOCUMENTS[:4]:
        outside.bench.submit(doc_id)
    outside.bench.conn.execute("""
        INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, estimated_cost, give_up_at)
        VALUES (gen_random_uuid(), 's', 'embedding', '{d01}', '{NULL}', '{ann}', '{1}', 1, now())""")
    await at_once(outside, runner(outside, endpoint))
    assert {doc_id: state for doc_id, (state, _) in states(outside).items()} == {
        "d00": "complete", "d01": "failed", "d02": "complete", "d03": "complete",
    }  # fmt: skip
    (message,) = outside.bench.one("SELECT error_message FROM dead_letters")
    assert "MAX_COST_PER_DOCUMENT=0.01" in message
    assert not any(b"of d01" in seen.encode() for seen in endpoint.tally.seen)


async def test_a_passage_that_breaks_the_service_costs_its_neighbours_no_attempt(outside: Outside, endpoint: Fragile) -> None:
    endpoint.bomb = b"passage 5 of d02"
    for doc_id in DOCUMENTS[:4]:
        outside.bench.submit(doc_id)
    worker = runner(outside, endpoint)
    worker._runs._retry.max_attempts = 0
    await at_once(outside, worker)
    assert {doc_id: state for doc_id, (state, _) in states(outside).items()} == {
        "d00": "complete", "d01": "complete", "d02": "failed", "d03": "complete",
    }  # fmt: skip
    assert outside.bench.all("SELECT DISTINCT doc_id FROM document_events WHERE event IN ('failed', 'retry_scheduled')") == [("d02",)]
    assert endpoint.tally.paid_twice() == 0


async def test_a_document_that_is_superseded_in_a_shared_request_keeps_nothing_and_the_others_go_on(
    outside: Outside, endpoint: Fragile
) -> None:
    def superseded(number: int, seconds: float) -> faults.Fault | None:
        if number == 1:
            outside.bench.conn.execute("SELECT submit_document('uploads/b', doc_id => 'd01', content_sha256 => %s)", ["b" * 64])
        return None

    endpoint.script(superseded)
    for doc_id in DOCUMENTS[:3]:
        outside.bench.submit(doc_id)
    await at_once(outside, runner(outside, endpoint))
    assert set(states(outside).values()) == {("complete", 0)}
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)
    assert outside.bench.all("SELECT DISTINCT version FROM document_chunks WHERE doc_id = 'd01'") == [(2,)]
    assert outside.bench.one("SELECT count(*) FROM vector_buffer") == (0,)
    # The first request held all three; the new version went by itself.
    assert sorted(row[0] for row in outside.bench.all("SELECT cardinality(doc_ids) FROM provider_usage")) == [1, 3]


async def test_a_document_whose_lease_is_lost_before_sending_is_not_in_the_request_and_no_call_is_left_open(
    outside: Outside, endpoint: Fragile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for doc_id in DOCUMENTS[:3]:
        outside.bench.submit(doc_id)
    worker = runner(outside, endpoint)
    front = outside.fronts[0]
    begin = front._ledger.begin
    held: list[Lease] = []

    async def lost_meanwhile(entry: Any) -> Any:
        asked = await begin(entry)
        if not held:
            held.extend(lease for lease in outside.bench.leases._leases.values() if lease.doc_id == "d01")
            held[0].good_until = 0.0
            asyncio.get_running_loop().call_later(0.3, lambda: setattr(held[0], "good_until", math.inf))
        return asked

    monkeypatch.setattr(front._ledger, "begin", lost_meanwhile)
    monkeypatch.setattr(outside.bench.leases, "start", lambda: None)  # nobody renews
    await at_once(outside, worker)
    assert set(states(outside).values()) == {("complete", 0)}
    calls = outside.bench.all("SELECT outcome, doc_ids, cost FROM provider_usage ORDER BY started_at")
    assert [(outcome, len(doc_ids)) for outcome, doc_ids, _ in calls] == [("not_sent", 3), ("ok", 2), ("ok", 1)]
    assert (calls[0][2], calls[2][1], endpoint.tally.requests) == (0, ["d01"], 2)
