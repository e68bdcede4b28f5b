"""Small documents that are taken up together and embedded by a service: one trip for all of them also where something is paid for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from jobs.pipeline import together
from jobs.pipeline.runner import Runner
from jobs.places import Places
from jobs.stages import embed
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.servers import OpenAIServer, Request, Response

STATES = "SELECT doc_id, state::text, retry_count FROM file_extractions WHERE state <> 'complete' ORDER BY 1"
COMPLETED = "SELECT count(*) FROM file_extractions WHERE state = 'complete' GROUP BY xmin::text ORDER BY 1"
BUFFERED = "SELECT count(DISTINCT doc_id), count(*) FROM chunk_buffer GROUP BY xmin::text"
KEPT = "SELECT count(DISTINCT doc_id), count(*) FROM vector_buffer GROUP BY xmin::text"


class Gated(OpenAIServer):
    """Does something when a request comes, before it is answered."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    async def handle(self, request: Request, mangle: str) -> Response:
        await asyncio.to_thread(self.meanwhile)
        return await super().handle(request, mangle)


@pytest.fixture
def endpoint() -> Iterator[Gated]:
    with Gated(dimensions=32) as running:
        yield running


def submit(bench: Bench, count: int = 16) -> None:
    for number in range(count):
        bench.submit(f"d{number:02}", user_id="ann")
    bench.conn.execute("UPDATE file_extractions SET file_size = 100")


def runner(outside: Outside, endpoint: OpenAIServer, **settings: Any) -> Runner:
    changed = {"embedding_gather_ms": 10_000, **settings}
    return outside.runner({"embed": embed.run}, settings=changed, embedder=outside.embedder(endpoint.url, max_texts=256))


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


async def run_first(outside: Outside, worker: Runner) -> None:
    found = outside.bench.fetch()
    assert found is not None
    async with asyncio.timeout(60):
        await worker.run(*found)


async def test_what_is_kept_before_and_after_a_request_is_kept_in_one_transaction_each(
    outside: Outside, endpoint: Gated, database: str
) -> None:
    before: list[Any] = []
    kept: list[Any] = []

    def look(statement: str, into: list[Any]) -> None:
        with psycopg.connect(database) as conn:
            into += conn.execute(statement).fetchall()

    async def after_embedding(document: Any) -> None:
        if document.doc_id == "d00":
            await asyncio.to_thread(look, KEPT, kept)

    endpoint.meanwhile = lambda: look(BUFFERED, before)
    outside.bench.also["extract"] = after_embedding
    submit(outside.bench)
    await run_first(outside, runner(outside, endpoint))
    assert outside.bench.all(COMPLETED) == [(16,)]
    assert endpoint.tally.requests == 1
    assert before == [(16, 160)]
    assert kept == [(16, 160)]
    assert outside.bench.all("SELECT outcome, cardinality(doc_ids) FROM provider_usage") == [("ok", 16)]
    assert outside.bench.one("SELECT count(*), count(DISTINCT embedding) FROM document_chunks") == (160, 144)
    assert outside.bench.one("SELECT (SELECT count(*) FROM chunk_buffer) + (SELECT count(*) FROM vector_buffer)") == (0,)


async def test_a_text_that_is_refused_is_its_documents_failure_alone(outside: Outside, endpoint: Gated) -> None:
    endpoint.poison = "passage 5 of d07"
    submit(outside.bench)
    await run_first(outside, runner(outside, endpoint))
    assert outside.bench.all(STATES) == [("d07", "failed", 0)]
    assert sum(count for (count,) in outside.bench.all(COMPLETED)) == 15
    (message,) = outside.bench.one("SELECT error_message FROM dead_letters")
    assert "passage 5 cannot be embedded" in message
    assert endpoint.tally.paid_twice() == 0


async def test_who_is_fenced_off_or_held_during_a_request_keeps_no_other_from_its_vectors(
    outside: Outside, endpoint: Gated, database: str
) -> None:
    other = psycopg.connect(database)

    def cancel_one_and_hold_another() -> None:
        other.execute("SELECT cancel_document('d07')")
        other.commit()
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'd03' FOR UPDATE")

    endpoint.meanwhile = cancel_one_and_hold_another
    submit(outside.bench)
    running = asyncio.create_task(run_first(outside, runner(outside, endpoint)))
    try:
        async with asyncio.timeout(30):
            while sum(count for (count,) in outside.bench.all(COMPLETED)) < 14:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.05)
        assert outside.bench.all("SELECT doc_id, state::text FROM file_extractions WHERE state <> 'complete' ORDER BY 1") == [
            ("d03", "working"),
            ("d07", "cancelled"),
        ]
    finally:
        other.close()
        await running
    assert outside.bench.one("SELECT count(*) FROM document_chunks WHERE doc_id = 'd07'") == (0,)
    assert outside.bench.one("SELECT count(*) FROM document_chunks WHERE doc_id = 'd03'") == (10,)
    assert endpoint.tally.paid_twice() == 0


async def test_those_of_another_request_are_not_waited_for(outside: Outside, endpoint: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_PATIENCE", 60)
    first, answered = True, asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_the_others() -> None:
        nonlocal first
        if first:
            first = False
            asyncio.run_coroutine_threadsafe(answered.wait(), loop).result(30)

    async def tell(document: Any) -> None:
        done.add(document.doc_id)
        if len(done) == 8:
            answered.set()

    done: set[str] = set()
    endpoint.meanwhile = wait_for_the_others
    outside.bench.also["finalize"] = tell
    submit(outside.bench)
    made = outside.runner(
        {"embed": embed.run}, settings={"embedding_gather_ms": 10_000}, embedder=outside.embedder(endpoint.url, max_texts=72)
    )
    await run_first(outside, made)
    # Those of the other request went through finalize, together, while the first one stood still.
    assert outside.bench.all(COMPLETED) == [(8,), (8,)]


@pytest.mark.parametrize("stop_at", ["request", "extract"])
async def test_a_shutdown_hands_on_what_has_been_paid_for(outside: Outside, endpoint: Gated, stop_at: str) -> None:
    inside, loop = asyncio.Event(), asyncio.get_running_loop()

    async def hang(document: Any) -> None:
        inside.set()
        await asyncio.sleep(60)

    if stop_at == "extract":
        outside.bench.also["extract"] = hang
    else:
        endpoint.latency = 1.0
        endpoint.meanwhile = partial(_tell, loop, inside)
    submit(outside.bench)
    worker = runner(outside, endpoint)
    running = asyncio.create_task(run_first(outside, worker))
    await inside.wait()
    outside.bench.stopping = True
    running.cancel()
    await running
    milestone = "embeddings_stored" if stop_at == "extract" else "chunks_stored"
    states = outside.bench.all("SELECT DISTINCT state::text, milestone::text, retry_count, crash_count, lease_until FROM file_extractions")
    assert states == [("queued", milestone, 0, 0, None)]
    outside.bench.stopping = False
    outside.bench.also.clear()
    endpoint.latency = 0
    await outside.work(worker)
    assert outside.bench.all(STATES) == []
    assert outside.bench.one("SELECT count(*) FROM document_chunks WHERE embedding IS NOT NULL") == (160,)
    most = 0 if stop_at == "extract" else 144  # a request that is cut off was sent, and may have been paid for
    assert endpoint.tally.paid_twice() <= most


async def test_groups_that_wait_for_a_request_lend_their_places_to_others(outside: Outside, endpoint: Gated) -> None:
    for number in range(12):
        outside.bench.submit(f"d{number:02}", user_id=f"user {number // 2}")
    outside.bench.conn.execute("UPDATE file_extractions SET file_size = 100")
    places = Places(2, most_documents=4, most_requests=4)
    embedder = outside.embedder(endpoint.url, max_texts=256)
    worker = outside.runner({"embed": embed.run}, settings={"embedding_gather_ms": 10_000}, embedder=embedder, lent_place=places.lent)
    endpoint.latency = 1.0
    in_hand, most = 0, 0

    async def one(job: Any, doc_id: str) -> None:
        nonlocal in_hand, most
        in_hand += 1
        most = max(most, in_hand)
        await worker.run(job, doc_id)
        in_hand -= 1
        places.release()

    running = []
    async with asyncio.timeout(60):
        for number in range(6):
            await places.acquire()
            found = outside.bench.fetch()
            assert found is not None
            running.append(asyncio.create_task(one(*found)))
            while outside.bench.one("SELECT count(*) FROM file_extractions WHERE claim > 0") != (2 * number + 2,):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # its companion is not its own yet
        await asyncio.gather(*running)
    assert (most, outside.bench.all(STATES)) == (4, [])


async def test_the_texts_of_all_are_sized_in_one_thread(outside: Outside, endpoint: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    sized: list[int] = []
    in_thread = asyncio.to_thread

    async def counted(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        before = len(sizes)
        result = await in_thread(function, *args, **kwargs)
        if len(sizes) > before:
            sized.append(len(sizes) - before)
        return result

    embedder = outside.embedder(endpoint.url, max_texts=256)
    size, sizes = embedder.size, list[int]()

    def noted(texts: Any) -> Any:
        sizes.append(len(texts))
        return size(texts)

    monkeypatch.setattr(embedder, "size", noted)
    monkeypatch.setattr(asyncio, "to_thread", counted)
    submit(outside.bench)
    await run_first(outside, outside.runner({"embed": embed.run}, embedder=embedder))
    assert sized == [16]


async def test_what_takes_long_for_each_is_taken_up_alone(outside: Outside, endpoint: Gated) -> None:
    embedder = outside.embedder(endpoint.url)
    assert outside.runner({}, embedder=embedder).takes_along
    assert not outside.runner({}, embedder=embedder, extractor=outside.extractor(endpoint.url)).takes_along
    assert not outside.runner({}, embedder=embedder, hosted_parser=outside.parser(endpoint.url)).takes_along


async def test_no_request_waits_for_a_job_that_somebodys_transaction_keeps_from_being_put_off(
    outside: Outside, endpoint: Gated, database: str
) -> None:
    outside.bench.submit("held")
    held = outside.bench.fetch()
    outside.bench.submit("other")
    other = outside.bench.fetch()
    assert held is not None
    assert other is not None
    worker = runner(outside, endpoint, embedding_gather_ms=3_600_000, small_documents_together=1)
    with psycopg.connect(database) as application:
        application.execute("SELECT FROM file_extractions WHERE doc_id = 'held' FOR UPDATE")
        application.execute("SELECT defer_stage('held', 'validate', 0)")
        waiting = asyncio.create_task(worker.run(*held))
        await asyncio.sleep(1)
        assert not waiting.done()
        async with asyncio.timeout(60):
            await worker.run(*other)
        assert outside.bench.one("SELECT state FROM file_extractions WHERE doc_id = 'other'") == ("complete",)
        application.rollback()
    await waiting
