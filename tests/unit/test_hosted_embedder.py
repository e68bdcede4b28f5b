"""Embedding over HTTP: requests used, answers checked, long and poisoned texts."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from jobs.adapters.embedders import HashedWords, HostedEmbedder, bisect, plan_requests
from jobs.adapters.embedders.answers import read_usage, read_vectors
from jobs.adapters.embedders.hosted import Limits, make_hosted
from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.tokens import FRAME, estimate_tokens, split_by_tokens
from models.calls import CallPurpose, CallShare, Reply
from models.errors import (
    BadAnswer,
    ConfigurationError,
    CostLimitReached,
    CredentialRefused,
    DocmillError,
    NotSent,
    RateLimitError,
    RequestRefused,
    ServiceUnavailable,
)
from models.settings import Settings
from tests.servers import OpenAIServer, faults
from tests.servers.openai import count_tokens

T = TypeVar("T")
ODD: tuple[Any, ...] = ([[1.0]], ["1"], [None], "AAAA", [1e300], [True], [10**400], {}, 5)
TEXTS = [f"passage number {number} about {word}" for number, word in enumerate(["rent", "steel", "law", "wheat", "sound"] * 20)]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=64) as running:
        yield running


def embedder(server: OpenAIServer, dimensions: int | None = 64, key: str | None = None, **limits: Any) -> HostedEmbedder:
    service = Service("The embedding service", server.url, SecretStr(key) if key else None, Timeouts(5, 10, 30))
    return HostedEmbedder(service, "test-model", dimensions, Limits(**limits))


async def test_as_few_requests_are_used_as_the_limits_allow(server: OpenAIServer) -> None:
    rows = await embedder(server, max_texts=32).embed(TEXTS)
    assert rows.shape == (100, 64)
    assert server.tally.requests == math.ceil(100 / 32)
    assert server.tally.paid_twice() == 0
    tokens = estimate_tokens(TEXTS[0])
    server.reset()
    await embedder(server, max_tokens=10 * (tokens + 2)).embed(TEXTS)
    assert server.tally.requests <= 13
    assert [len(request.json()["input"]) <= 13 for request in server.log] == [True] * len(server.log)


async def test_what_is_sent_is_the_protocol_s(server: OpenAIServer) -> None:
    await embedder(server, key="sk-test").embed(["a", "b"])
    (request,) = server.log
    assert request.path == "/v1/embeddings"
    assert request.headers["authorization"] == "Bearer sk-test"
    assert request.json() == {"model": "test-model", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 64}


async def test_dimensions_are_only_asked_for_where_they_are_set(server: OpenAIServer) -> None:
    service = Service("The embedding service", server.url, None)
    server.dimensions = 1536
    known = HostedEmbedder(service, "text-embedding-3-small", None)
    assert (known.model, known.dimensions) == ("text-embedding-3-small@1536", 1536)
    await known.embed(["a"])
    assert "dimensions" not in server.log[0].json()
    with pytest.raises(ConfigurationError, match="EMBEDDING_DIMENSIONS must say"):
        HostedEmbedder(service, "my-own-model", None)


@pytest.mark.parametrize("order", ["permuted", ""])
async def test_vectors_go_to_the_texts_that_index_names(server: OpenAIServer, order: str) -> None:
    server.shuffled = not order
    if order:
        server.script(faults.always(faults.NAMED[order]))
    rows = await embedder(server).embed(TEXTS)
    expected = await HashedWords(64).embed(TEXTS)
    assert np.allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mangle", "words"),
    [
        ("wrong_count", "sent 4 embeddings for 5 texts"),
        ("bad_index", "indexes are not those"),
        ("same_index", "indexes are not those"),
        ("wrong_dimension", "63 dimensions where EMBEDDING_DIMENSIONS says 64"),
        ("nan", "NaN or infinity"),
        ("infinity", "NaN or infinity"),
        ("zeros", "vector of zeros"),
        ("not_base64", "neither base64"),
        ("truncated", "cut off or no JSON"),
    ],
)
@pytest.mark.parametrize("encoding", ["yes", "ignored"])
async def test_an_answer_that_cannot_be_used_is_refused(server: OpenAIServer, mangle: str, words: str, encoding: Any) -> None:
    server.base64 = encoding
    server.script(faults.first(1, faults.NAMED[mangle]))
    called = embedder(server)
    with pytest.raises(BadAnswer, match=words) as caught:
        await called.embed(TEXTS[:5])
    assert "The embedding service at 127.0.0.1:" in str(caught.value)
    assert caught.value.call is not None and caught.value.call.status == 200
    assert np.allclose(await called.embed(TEXTS[:5]), await HashedWords(64).embed(TEXTS[:5]), atol=1e-6)


@pytest.mark.parametrize(
    ("base64", "dimensions", "requests"),
    [("refused", "yes", 2), ("refused", "refused", 3), ("ignored", "ignored", 1), ("yes", "refused", 3)],
)
async def test_a_server_of_another_dialect_is_understood_and_remembered(
    server: OpenAIServer, base64: Any, dimensions: Any, requests: int
) -> None:
    server.base64, server.chooses_dimensions = base64, dimensions
    called = embedder(server)
    first = await called.embed(TEXTS[:4])
    assert server.tally.requests == requests
    again = await called.embed(TEXTS[:4])
    assert server.tally.requests == requests + 1
    assert first.tobytes() == again.tobytes()
    assert np.allclose(first, await HashedWords(64).embed(TEXTS[:4]), atol=1e-6)


async def test_a_model_that_cannot_choose_its_size_is_told_by_the_check(server: OpenAIServer) -> None:
    server.dimensions, server.chooses_dimensions = 128, "refused"
    with pytest.raises(BadAnswer, match="128 dimensions where EMBEDDING_DIMENSIONS says 64"):
        await embedder(server).embed(["a"])


async def test_a_long_text_is_the_weighted_mean_of_pieces_that_lose_nothing(server: OpenAIServer) -> None:
    server.max_text_tokens = 100
    text = "The tenant pays the rent.\n\n" * 40 + "The volcano erupts at dawn. " * 40
    called = embedder(server, max_text_tokens=100)
    (row,) = await called.embed([text])
    sent = server.log[0].json()["input"]
    assert "".join(sent) == text and len(sent) > 3
    assert max(count_tokens(piece) for piece in sent) <= 100
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)
    pieces = await HashedWords(64).embed(sent)
    mean = (pieces * np.array([[estimate_tokens(piece)] for piece in sent])).sum(axis=0)
    assert row @ (mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-5)


async def test_a_long_text_is_refused_where_the_rule_says_so_before_anything_is_paid(server: OpenAIServer) -> None:
    with pytest.raises(RequestRefused, match=r"EMBEDDING_MAX_TEXT_TOKENS=100, and EMBEDDING_LONG_TEXTS=refuse"):
        await embedder(server, max_text_tokens=100, long_texts="refuse").embed(["short", "long words " * 100])
    assert server.tally.requests == 0


async def test_a_text_longer_than_a_request_takes_several(server: OpenAIServer) -> None:
    text = " ".join(f"word{number}" for number in range(2000))
    called = embedder(server, max_texts=4, max_tokens=400, max_text_tokens=100)
    assert called.plan(called.size(["a", text, "b"])) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    reply = await called.embed_sized(called.size([text]))
    assert reply.value.shape == (1, 64)
    assert server.tally.requests > 10
    assert max(len(request.json()["input"]) for request in server.log) <= 4
    assert reply.tokens_in == server.tally.tokens


async def test_a_text_without_anything_to_see_costs_nothing(server: OpenAIServer) -> None:
    rows = await embedder(server).embed(["", " \n\t ", "\u2003"])
    assert server.tally.requests == 0
    assert rows[:, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("guilty", [[], [0], [99], [17, 18], [3, 50, 98], list(range(100))])
async def test_bisection_finds_the_poison_and_pays_for_each_other_text_once(server: OpenAIServer, guilty: list[int]) -> None:
    texts = [text + " POISON" if index in guilty else text for index, text in enumerate(TEXTS)]
    called = embedder(server)
    await called.embed(["proves the dialect"])
    server.reset()
    server.poison = "POISON"
    found, rows = await embed_all(called, texts)
    assert found == guilty
    assert sorted(rows) == [index for index in range(100) if index not in guilty]
    assert server.tally.paid_twice() == 0
    assert server.tally.texts == 100 - len(guilty)
    assert server.tally.requests <= 1 + 2 * max(1, len(guilty)) * 7


async def embed_all(called: HostedEmbedder, texts: Sequence[str]) -> tuple[list[int], dict[int, Any]]:
    """What a caller does with `plan`, `embed_sized` and `bisect`."""
    rows: dict[int, Any] = {}
    found: list[int] = []

    async def refused(part: slice) -> bool:
        try:
            reply = await called.embed_sized(called.size(texts[part]))
        except RequestRefused:
            return True
        rows.update(zip(range(part.start, part.stop), reply.value, strict=True))
        return False

    for part in called.plan(called.size(texts)):
        if not await refused(part):
            continue
        search = bisect(part)
        try:
            half = next(search)
            while True:
                half = search.send(await refused(half))
        except StopIteration as stop:
            found += stop.value
    return found, rows


async def test_a_poisoned_first_request_does_not_change_the_dialect(server: OpenAIServer) -> None:
    server.poison = "POISON"
    called = embedder(server)
    with pytest.raises(RequestRefused, match=r"HTTP 400 .*invalid sequence") as caught:
        await called.embed(["POISON"])
    assert caught.value.call is not None and caught.value.call.status == 400
    await called.embed(["fine"])
    assert server.log[-1].json()["encoding_format"] == "base64"


class Limited:
    """A caller that makes some calls in all, and raises for those beyond."""

    def __init__(self, error: DocmillError | None = None) -> None:
        self.allowed, self.made = 1, 0
        self.error = error or RateLimitError("There is room later.", 1.0)

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        if self.made >= self.allowed:
            raise self.error
        self.made += 1
        return await send()


async def limited_twice(called: HostedEmbedder, caller: Limited, *texts: Sequence[str]) -> None:
    """Have texts wait before the second dialect and others before the third, then let one more call be made."""
    called.caller = caller
    for some in texts:
        with pytest.raises(type(caller.error)):
            await called.embed(some)
        caller.allowed += 1


@pytest.mark.parametrize(
    "error", [RateLimitError("later"), ServiceUnavailable("away"), NotSent("left"), CostLimitReached({"a": "too much"})], ids=type
)
async def test_after_a_wait_between_two_dialects_texts_go_on_with_the_next_however_they_are_batched(
    server: OpenAIServer, error: DocmillError
) -> None:
    server.base64 = server.chooses_dimensions = "refused"
    called = embedder(server)
    await limited_twice(called, Limited(error), TEXTS[:2], TEXTS[1:4])
    assert (await called.embed(TEXTS[:1])).shape == (1, 64)
    assert server.tally.requests == 3


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["POISON"] * 3, "HTTP 422 .*encoding_format"), (["POISON a", "POISON b", "POISON b"], "HTTP 400 .*matryoshka")],
    ids=["the same", "others"],
)
async def test_a_wait_changes_nothing_in_whose_refusal_is_raised(server: OpenAIServer, texts: list[str], words: str) -> None:
    server.base64 = server.chooses_dimensions = "refused"
    server.poison = "POISON"
    called = embedder(server)
    await limited_twice(called, Limited(), texts[:1], texts[1:2])
    with pytest.raises(RequestRefused, match=words):
        await called.embed(texts[2:])
    assert server.tally.requests == 3


@pytest.mark.parametrize("next_text", ["POISON", "fine"])
async def test_a_text_that_is_refused_before_and_after_a_wait_does_not_change_the_dialect(server: OpenAIServer, next_text: str) -> None:
    server.dimensions, server.poison = 128, "POISON"
    called = embedder(server)
    await limited_twice(called, caller := Limited(), ["POISON"], ["POISON"])
    with pytest.raises(RequestRefused if next_text == "POISON" else BadAnswer):
        await called.embed([next_text])
    caller.allowed += 1
    await called.embed(["fine"])
    assert (server.log[-1].json()["encoding_format"], server.log[-1].json()["dimensions"]) == ("base64", 64)


@pytest.mark.parametrize("must_wait", [True, False])
async def test_what_others_were_answered_in_meanwhile_stays_the_dialect(server: OpenAIServer, must_wait: bool) -> None:
    server.poison = "POISON"
    called, limited = embedder(server), Limited()

    class OthersFirst:
        async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
            if limited.made == 1:
                await called.embed(["fine"])
                server.poison, limited.allowed = None, 1 if must_wait else 2
            return await limited.call(send, purpose)

    with pytest.raises(RateLimitError) if must_wait else nullcontext():
        await called.embed_sized(called.size(["POISON"]), caller=OthersFirst())
    await called.embed(["fine"])
    assert server.tally.requests == limited.made + 2
    assert server.log[-1].json()["encoding_format"] == "base64"


async def test_every_exchange_goes_through_what_is_put_around_it(server: OpenAIServer) -> None:
    seen: list[int] = []

    class Counted:
        async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
            assert (purpose.stage, purpose.model, purpose.shares) == ("embed", "test-model", shares)
            seen.append(purpose.tokens)
            return await send()

    shares = (CallShare("a"),)
    called = embedder(server, max_texts=10)
    for part in called.plan(called.size(TEXTS)):
        reply = await called.embed_sized(called.size(TEXTS[part]), shares=shares, caller=Counted())
        assert reply.tokens_in is not None and 0 < reply.tokens_in <= seen[-1]
    assert len(seen) == server.tally.requests == 10


async def test_rate_limit_headers_of_an_answer_are_passed_on(server: OpenAIServer) -> None:
    server.requests_per_minute, server.tokens_per_minute = 10, 1000
    called = embedder(server)
    reply = await called.embed_sized(called.size(["four letters"]))
    assert (reply.headers["x-ratelimit-limit-requests"], reply.headers["x-ratelimit-remaining-requests"]) == ("10", "9")
    assert reply.tokens_in is not None
    assert reply.headers["x-ratelimit-remaining-tokens"] == str(1000 - reply.tokens_in)


async def test_a_wrong_key_is_the_service_s_refusal_and_is_not_shown(server: OpenAIServer) -> None:
    server.key = "right"
    with pytest.raises(CredentialRefused) as caught:
        await embedder(server, key="sk-very-wrong-key-1234").embed(["a"])
    assert "very-wrong" not in str(caught.value)
    assert "invalid_api_key" in str(caught.value)


async def test_a_service_that_answers_only_every_fifth_request_is_got_through(server: OpenAIServer) -> None:
    server.script(faults.only_every(5, faults.NAMED["503"]))
    called, tries = embedder(server, max_texts=50), 0
    for part in called.plan(called.size(TEXTS)):
        while True:
            tries += 1
            try:
                await called.embed_sized(called.size(TEXTS[part]))
                break
            except DocmillError:
                continue
    assert (tries, server.tally.answered, server.tally.paid_twice()) == (10, 2, 0)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 8), st.integers(10, 100))
def test_a_plan_holds_every_text_once_in_order_within_the_limits(tokens: list[int], max_texts: int, max_tokens: int) -> None:
    parts = plan_requests(tokens, max_texts=max_texts, max_tokens=max_tokens)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(len(tokens)))
    for part in parts:
        count = part.stop - part.start
        assert count == 1 or (count <= max_texts and sum(tokens[part]) <= max_tokens)
    for one, other in pairwise(parts):
        assert one.stop - one.start + 1 > max_texts or sum(tokens[one]) + tokens[other.start] > max_tokens


@given(st.integers(1, 200), st.data())
def test_bisection_names_exactly_the_guilty(size: int, data: st.DataObject) -> None:
    guilty = set(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    taken: list[int] = []
    search = bisect(slice(0, size))
    try:
        part = next(search)
        while True:
            bad = bool(guilty & set(range(part.start, part.stop)))
            taken += [] if bad else range(part.start, part.stop)
            part = search.send(bad)
    except StopIteration as stop:
        assert stop.value == sorted(guilty)
    assert sorted(taken) == [index for index in range(size) if index not in guilty]


@settings(max_examples=50)
@given(st.text(max_size=400), st.integers(16, 60))
def test_pieces_lose_nothing_and_keep_to_the_limit(text: str, limit: int) -> None:
    pieces = split_by_tokens(text, limit)
    assert "".join(pieces) == text
    assert all(estimate_tokens(piece) <= limit for piece in pieces)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("a", 1), ("ab", 1), ("abc", 2), ("abcd", 2), ("abcde fgh", 5), ("a b", 2), ("1,2", 3), ("a1b", 3), ("ß", 2), ("語", 3),
     ("\ud800", 1), ("\n", 1), ("\n\n", 2), (" ", 0), ("  ", 1), ("\t\r", 1), (" " * 8, 1), (" " * 9, 2),
     ("  \n  ", 3), (" \n ", 1), ("\0", 1)],
)  # fmt: skip
def test_the_estimate_counts_pairs_of_letters_each_mark_and_line_and_eight_blanks(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens + FRAME


@given(st.text(max_size=300))
def test_the_estimate_is_never_under_a_token_for_four_letters(text: str) -> None:
    assert count_tokens(text) <= estimate_tokens(text)


@pytest.mark.parametrize(
    "data",
    [
        *(None, [], {}, {"data": None}, {"data": [1]}, {"data": [{}]}, {"data": [{"index": True, "embedding": [1.0]}]}),
        *({"data": [{"embedding": told}]} for told in ODD),
    ],
)
def test_any_answer_at_all_is_either_read_or_refused(data: Any) -> None:
    with pytest.raises(BadAnswer):
        read_vectors(data, 1, 1, BadAnswer)


@pytest.mark.parametrize(
    "usage",
    [None, [], {"prompt_tokens": 0}, {"prompt_tokens": -1}, {"prompt_tokens": "5"}, {"prompt_tokens": True}, {"prompt_tokens": 1 << 70}],
)
def test_a_count_of_tokens_that_makes_no_sense_is_none(usage: Any) -> None:
    assert read_usage({"usage": usage}) == (None, None)


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="EMBEDDING_API_KEY"):
        make_hosted(Settings(embedding_provider="openai"))
    made = make_hosted(Settings(embedding_provider="openai", embedding_base_url="http://localhost:8080/v1", embedding_dimensions=8))
    assert made.model == "text-embedding-3-small@8"
