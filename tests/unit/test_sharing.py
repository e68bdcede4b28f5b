"""Documents that share requests to an embedding service behind a socket: who goes with which request, and whose failure it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.adapters.embedders import HashedWords, HostedEmbedder, SizedText, fill_request
from jobs.adapters.embedders.hosted import Limits
from jobs.adapters.exchange import Service, Timeouts
from jobs.pipeline import sharing
from jobs.pipeline.sharing import Sharing
from jobs.stages import Embedded
from models.calls import CallPurpose, CallShare, Reply
from models.errors import BadAnswer, CredentialRefused, DocmillError, NotSent, RateLimitError, RetryableError, ServiceUnavailable
from tests.servers import OpenAIServer, Request, Response, faults

T = TypeVar("T")
LONG = 3600.0


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=16) as running:
        yield running


@dataclass
class Books:
    """A caller that notes each call, and holds it back while its gate is closed."""

    open: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[CallPurpose] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    not_sent: int = 0

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        self.calls.append(purpose)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if not self.open:
                await self.gate.wait()
            return await send()
        except NotSent:
            self.not_sent += 1
            raise
        finally:
            self.under_way -= 1

    def documents(self) -> list[list[str]]:
        return [[share.doc_id for share in call.shares] for call in self.calls]

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Desk:
    """A worker's requests, and documents that go through them as the stage does."""

    sharing: Sharing
    embedder: HostedEmbedder
    books: Books
    allowed: dict[str, bool] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    async def document(self, name: str, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """Return the vectors of all texts, asked for one request after the other."""
        rows: list[Any] = []
        sized = self.embedder.size(texts)
        while len(rows) < len(texts):
            told = await self.ask(name, sized[len(rows) :])
            assert told is not None
            if told.refused is not None:
                raise told.refused
            assert told.vectors is not None and len(told.vectors) == told.count
            rows.extend(told.vectors)
        return np.stack(rows)

    async def ask(self, name: str, sized: Sequence[SizedText]) -> Embedded | None:
        self.asked[name] = self.asked.get(name, 0) + 1
        return await self.sharing.embed(self.embedder, sized, share=CallShare(name), may_call=lambda: self.allowed.get(name, True))

    async def _one(self, job: int | None, name: str, texts: Sequence[str]) -> Any:
        try:
            return await self.document(name, texts)
        finally:
            if job is not None:
                self.sharing.expect(job, False)

    def start(self, name: str, texts: Sequence[str], job: int | None = None) -> asyncio.Task[Any]:
        return asyncio.create_task(self._one(job, name, texts))

    async def all(self, *, expect: int = 0, **documents: Sequence[str]) -> dict[str, Any]:
        """Run documents at once, `expect` of which this worker has in hand; return their vectors or errors."""
        for job in range(expect):
            self.sharing.expect(job, True)
        running = [self.start(name, texts, job) for job, (name, texts) in enumerate(documents.items())]
        return dict(zip(documents, await done(*running), strict=True))


async def done(*running: asyncio.Task[Any]) -> list[Any]:
    """Return what tasks return or raise; a request that waits for nothing must not hold the tests up."""
    async with asyncio.timeout(30):
        return await asyncio.gather(*running, return_exceptions=True)


def desk(server: OpenAIServer, *, gather: float = LONG, most: int = 4, gated: bool = False, **limits: Any) -> Desk:
    books = Books(open=not gated)
    embedder = HostedEmbedder(Service("The embedding service", server.url, None, Timeouts(5, 10, 30)), "m", 16, Limits(**limits), books)
    return Desk(Sharing(gather_seconds=gather, most_requests=most), embedder, books)


def texts_of(name: str, count: int) -> list[str]:
    return [f"text {number} of {name}" for number in range(count)]


def many(documents: int, texts: int, letter: str = "d") -> dict[str, list[str]]:
    return {f"{letter}{number}": texts_of(f"{letter}{number}", texts) for number in range(documents)}


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.003)
    raise AssertionError("waited 30 s in vain")


async def right(found: dict[str, Any], documents: dict[str, list[str]]) -> None:
    for name, texts in documents.items():
        assert np.allclose(found[name], await HashedWords(16).embed(texts), atol=1e-6), name


async def test_texts_of_several_documents_go_out_in_one_full_request_and_each_gets_its_own_vectors(server: OpenAIServer) -> None:
    made = desk(server)
    documents = many(8, 32)
    # A ninth may come, for an hour: a full request does not wait for it.
    await right(await made.all(expect=9, **documents), documents)
    assert server.tally.requests == 1
    assert made.books.documents() == [list(documents)]


async def test_a_request_does_not_wait_when_nobody_else_can_come(server: OpenAIServer) -> None:
    made = desk(server)
    await right(await made.all(expect=1, a=["alone"]), {"a": ["alone"]})
    documents = many(3, 2)
    await right(await made.all(expect=3, **documents), documents)
    assert [len(names) for names in made.books.documents()] == [1, 3]


async def test_nobody_waits_for_a_document_that_is_in_another_request(server: OpenAIServer) -> None:
    made = desk(server, gated=True)
    for job in range(2):
        made.sharing.expect(job, True)
    flying = made.start("a", texts_of("a", 300), 0)
    await until(lambda: made.books.under_way == 1)
    small = made.start("b", ["one"], 1)
    await until(lambda: made.books.under_way == 2)
    made.books.open = True
    made.books.gate.set()
    await done(flying, small)
    assert made.books.documents()[:2] == [["a"], ["b"]]


async def test_the_wait_for_company_that_does_not_come_is_bounded(server: OpenAIServer) -> None:
    made = desk(server, gather=0.05)
    documents = many(3, 2)
    await right(await made.all(expect=50, **documents), documents)
    assert server.tally.requests == 1


async def test_who_leaves_this_worker_is_not_waited_for(server: OpenAIServer) -> None:
    made = desk(server)
    for job in range(3):
        made.sharing.expect(job, True)
    running = [made.start("a", ["one"]), made.start("b", ["two"])]
    await asyncio.sleep(0.05)
    assert made.books.calls == []
    made.sharing.expect(2, False)
    await done(*running)
    assert made.books.documents() == [["a", "b"]]


async def test_without_a_wait_nothing_is_shared(server: OpenAIServer) -> None:
    made = desk(server, gather=0, most=2)
    documents = many(6, 3)
    await right(await made.all(expect=6, **documents), documents)
    assert [len(names) for names in made.books.documents()] == [1] * 6
    assert server.tally.most_in_flight <= 2


async def test_no_more_requests_are_under_way_than_allowed_and_a_document_has_one(server: OpenAIServer) -> None:
    made = desk(server, most=3, gated=True, max_texts=4)
    running = [made.start(name, texts) for name, texts in many(10, 12).items()]
    await until(lambda: made.books.under_way == 3)
    await asyncio.sleep(0.02)
    flying = [name for names in made.books.documents() for name in names]
    assert (made.books.under_way, len(flying)) == (3, len(set(flying)))
    made.books.open = True
    made.books.gate.set()
    await done(*running)
    assert made.books.most_under_way == 3
    assert server.tally.most_in_flight <= 3
    assert server.tally.paid_twice() == 0


async def test_a_document_of_one_passage_goes_with_the_next_request_however_long_the_others_are(server: OpenAIServer) -> None:
    made = desk(server, most=1, gated=True, max_texts=16)
    long = [made.start(name, texts) for name, texts in many(3, 160, "long").items()]
    await until(lambda: made.books.under_way == 1)
    small = made.start("small", ["one"])
    await asyncio.sleep(0)
    made.books.open = True
    made.books.gate.set()
    await done(*long, small)
    assert "small" in made.books.documents()[1]
    assert server.tally.requests == -(-(3 * 160 + 1) // 16)


async def test_long_documents_take_turns_and_use_all_requests_that_may_be_under_way(server: OpenAIServer) -> None:
    made = desk(server, most=4, gated=True, max_texts=16)
    running = [made.start(name, texts) for name, texts in many(4, 64).items()]
    await until(lambda: made.books.under_way == 4)
    assert made.books.documents() == [["d0"], ["d1"], ["d2"], ["d3"]]
    assert len(server.log) == 0
    made.books.open = True
    made.books.gate.set()
    await done(*running)
    assert server.tally.requests == 16


async def test_no_request_is_over_the_token_ceiling(server: OpenAIServer) -> None:
    made = desk(server, max_tokens=300, most=2)
    documents = {name: [f"{text} {'word ' * (number % 30)}" for number, text in enumerate(texts)] for name, texts in many(6, 20).items()}
    await right(await made.all(expect=6, **documents), documents)
    assert max(call.tokens for call in made.books.calls) <= 300
    assert server.tally.paid_twice() == 0


async def test_a_text_longer_than_a_request_goes_alone(server: OpenAIServer) -> None:
    made = desk(server, max_texts=4, max_tokens=400, max_text_tokens=100)
    documents = {"long": [" ".join(f"word{number}" for number in range(500)), "short"], **many(3, 1)}
    found = await made.all(expect=4, **documents)
    await right(found, {name: texts for name, texts in documents.items() if name != "long"})
    assert found["long"].shape == (2, 16)
    assert all(names == ["long"] for names in made.books.documents() if "long" in names and names != made.books.documents()[-1])


async def test_a_document_with_nothing_to_see_costs_nothing(server: OpenAIServer) -> None:
    made = desk(server)
    found = await made.all(expect=1, a=["", " \n"])
    assert (found["a"][:, 0].tolist(), server.tally.requests) == ([1, 1], 0)


async def test_each_document_pays_by_its_tokens(server: OpenAIServer) -> None:
    made = desk(server)
    documents = {"a": ["word " * 10], "b": ["word " * 30], "c": [" "]}
    await made.all(expect=3, **documents)
    (call,) = made.books.calls
    tokens = {name: made.embedder.size(texts)[0].tokens for name, texts in documents.items()}
    assert {share.doc_id: share.share for share in call.shares} == pytest.approx({name: own / call.tokens for name, own in tokens.items()})
    assert sum(share.share for share in call.shares) == pytest.approx(1)


async def test_different_models_never_share(server: OpenAIServer) -> None:
    made, other = desk(server), desk(server)
    other.sharing = made.sharing
    for job in range(4):
        made.sharing.expect(job, True)
    found = await asyncio.gather(*(one.document(name, [name]) for name, one in (("a", made), ("b", other), ("c", made), ("d", other))))
    assert len(found) == 4
    assert sorted(made.books.documents() + other.books.documents()) == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize("guilty", [0, 3, 7])
async def test_a_poisoned_text_fails_only_its_document_and_the_others_are_paid_for_once(server: OpenAIServer, guilty: int) -> None:
    made = desk(server)
    await made.embedder.embed(["proves the dialect"])
    server.reset()
    documents = many(8, 5)
    server.poison = f"text 2 of d{guilty}"
    found = await made.all(expect=8, **documents)
    refused = found.pop(f"d{guilty}")
    assert type(refused).__name__ == "RequestRefused"
    del documents[f"d{guilty}"]
    await right(found, documents)
    assert server.tally.paid_twice() == 0
    assert server.tally.requests == 1 + 2 * 3


class Fragile(OpenAIServer):
    """Fails with 500 over one text."""

    async def handle(self, request: Request, mangle: str) -> Response:
        return Response(500) if b"BOMB" in request.body else await super().handle(request, mangle)


async def test_a_text_that_makes_the_service_fail_costs_no_neighbour_a_failure() -> None:
    with Fragile(dimensions=16) as server:
        made = desk(server)
        documents = many(5, 2)
        found = await made.all(expect=6, bomb=["BOMB"], **documents)
        assert type(found.pop("bomb")) is RetryableError
        await right(found, documents)
        assert (len(made.books.calls), server.tally.paid_twice()) == (1 + 6, 0)


@pytest.mark.parametrize(("fault", "kind"), [("500", RetryableError), ("wrong_count", BadAnswer), ("reset", RetryableError)])
async def test_a_shared_failure_counts_for_nobody_and_one_that_meets_a_document_alone_does(
    server: OpenAIServer, fault: str, kind: type[DocmillError]
) -> None:
    server.script(faults.first(1, faults.NAMED[fault]))
    made = desk(server)
    documents = many(4, 2)
    await right(await made.all(expect=4, **documents), documents)
    assert sorted(len(names) for names in made.books.documents()) == [1, 1, 1, 1, 4]
    server.script(faults.always(faults.NAMED[fault]))
    made = desk(server)
    found = await made.all(expect=4, **documents)
    assert [type(error) for error in found.values()] == [kind] * 4
    assert len(set(map(id, found.values()))) == 4


@pytest.mark.parametrize(
    ("fault", "kind"), [("429_retry_after", RateLimitError), ("503_retry_after", ServiceUnavailable), ("401", CredentialRefused)]
)
async def test_what_makes_documents_wait_is_told_to_all_of_them_at_once(server: OpenAIServer, fault: str, kind: type[DocmillError]) -> None:
    server.script(faults.always(faults.NAMED[fault]))
    made = desk(server)
    found = await made.all(expect=4, **many(4, 2))
    assert [type(error) for error in found.values()] == [kind] * 4
    assert len({id(error) for error in found.values()}) == 4
    assert len({(str(error), error.retry_after, error.call.status) for error in found.values()}) == 1
    assert server.tally.requests == 1


async def test_a_document_that_is_cancelled_in_mid_request_leaves_the_others_in_it(server: OpenAIServer) -> None:
    made = desk(server, gated=True)
    documents = many(3, 4)
    for job in range(3):
        made.sharing.expect(job, True)
    running = {name: made.start(name, texts) for name, texts in documents.items()}
    await until(lambda: made.books.under_way == 1)
    server.latency = 0.1
    made.books.gate.set()
    await until(lambda: server.tally.requests == 1)
    running["d1"].cancel()
    found = dict(zip(running, await done(*running.values()), strict=True))
    assert isinstance(found.pop("d1"), asyncio.CancelledError)
    del documents["d1"]
    await right(found, documents)
    assert (server.tally.requests, made.books.not_sent) == (1, 0)


async def test_an_answer_that_comes_in_the_same_turn_as_a_cancellation_is_returned_first(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tell, told = desk(server), sharing._tell, list[Embedded | None]()

    def cancel_too(ask: Any, answer: Embedded) -> None:
        tell(ask, answer)
        running.cancel()

    async def ask() -> None:
        told.append(await made.ask("a", made.embedder.size(["a"])))
        await asyncio.sleep(0)

    monkeypatch.setattr(sharing, "_tell", cancel_too)
    running = asyncio.create_task(ask())
    await asyncio.wait([running])
    assert running.cancelled()
    assert [answer and answer.count for answer in told] == [1]


async def test_a_request_that_nobody_waits_for_ends_and_leaves_no_task(server: OpenAIServer) -> None:
    before = asyncio.all_tasks()
    made = desk(server, gated=True, most=1)
    running = [made.start(name, texts) for name, texts in many(3, 4).items()]
    await until(lambda: made.books.under_way == 1)
    waiting = made.start("later", ["one"])
    await asyncio.sleep(0)
    made.books.open = True
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    await done(waiting)
    assert asyncio.all_tasks() == before
    assert [request.json()["input"] for request in server.log] == [["one"]]


async def test_who_is_cancelled_while_waiting_is_not_sent(server: OpenAIServer) -> None:
    made = desk(server)
    for job in range(3):
        made.sharing.expect(job, True)
    running = [made.start(name, [name]) for name in ("a", "b")]
    await asyncio.sleep(0)
    running[0].cancel()
    await asyncio.wait(running[:1])
    running.append(made.start("c", ["c"]))
    await asyncio.sleep(0)
    made.sharing.expect(0, False)
    await done(*running[1:])
    assert made.books.documents() == [["b", "c"]]


async def test_a_document_that_may_not_pay_is_left_out_and_blocks_nobody(server: OpenAIServer) -> None:
    made = desk(server)
    for job in range(3):
        made.sharing.expect(job, True)
    made.allowed["b"] = False
    told = await asyncio.gather(*(made.ask(name, made.embedder.size([name])) for name in ("b", "a", "c", "d")))
    assert told[0] is None
    assert all(one is not None and one.count == 1 for one in told[1:])
    assert made.books.documents() == [["a", "c", "d"]]


async def test_a_document_that_may_no_longer_pay_when_the_request_is_due_is_left_out_of_it(server: OpenAIServer) -> None:
    made = desk(server, gated=True)
    for job in range(3):
        made.sharing.expect(job, True)
    asked = [asyncio.create_task(made.ask(name, made.embedder.size([name]))) for name in ("a", "b", "c")]
    await until(lambda: made.books.under_way == 1)
    made.allowed["b"] = False
    made.books.open = True
    made.books.gate.set()
    told = await done(*asked)
    assert told[1] is None
    assert [one and one.count for one in told] == [1, None, 1]
    assert made.books.documents() == [["a", "b", "c"], ["a", "c"]]
    assert made.books.not_sent == 1
    assert [request.json()["input"] for request in server.log] == [["a", "c"]]


async def test_what_goes_wrong_in_making_up_a_request_reaches_its_documents(server: OpenAIServer) -> None:
    made = desk(server)

    async def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    made.embedder.embed_sized = broken  # type: ignore[method-assign]  # a mistake of our own
    found = await made.all(expect=2, **many(2, 1))
    assert [type(error) for error in found.values()] == [ZeroDivisionError] * 2


@dataclass(frozen=True)
class Piece:
    tokens: int
    pieces: tuple[int, ...] = (0,)


WAITING = st.lists(st.lists(st.builds(Piece, st.integers(1, 60)), min_size=1, max_size=12), min_size=1, max_size=8)


@given(WAITING, st.integers(1, 12), st.integers(40, 120), st.booleans())
def test_a_request_holds_what_waits_longest_and_no_more_than_it_may(
    waiting: list[list[Piece]], max_texts: int, max_tokens: int, cut: bool
) -> None:
    taken = fill_request(waiting, max_texts=max_texts, max_tokens=max_tokens, cut=cut)
    sent = [piece for texts, count in zip(waiting, taken, strict=True) for piece in texts[:count]]
    assert all(count <= len(texts) for texts, count in zip(waiting, taken, strict=True))
    assert taken[0] >= 1
    tokens = sum(piece.tokens for piece in sent)
    assert len(sent) == 1 or (len(sent) <= max_texts and tokens <= max_tokens)
    for texts, count in zip(waiting[1:], taken[1:], strict=True):
        assert cut or count in (0, len(texts))
    if cut and tokens <= max_tokens:
        for texts, count in zip(waiting, taken, strict=True):
            assert count == len(texts) or len(sent) == max_texts or tokens + texts[count].tokens > max_tokens


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_everybody_who_fits_into_an_even_share_goes_whole(counts: list[int]) -> None:
    waiting = [[Piece(1)] * count for count in counts]
    taken = fill_request(waiting, max_texts=256, max_tokens=10_000, cut=False)
    assert all(took == count for took, count in zip(taken, counts, strict=True) if count <= 256 // len(counts))
