"""Adapters, the shared front and a server that fails as real ones do, together: what is raised, what is entered, what gets through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from pydantic import SecretStr

from jobs.adapters.embedders import HashedWords, HostedEmbedder, bisect
from jobs.adapters.embedders.hosted import Limits
from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.llamaparse import LlamaParse
from jobs.adapters.llm import ModelExtractor, load_shape
from jobs.adapters.stored_file import StoredFile
from jobs.breaker import Rules
from jobs.database import make_pool
from jobs.services import Prices, Terms
from jobs.services import Service as Front
from models.calls import CallShare
from models.errors import DocmillError, LLMError, ParseError, RateLimitError, RequestRefused, ServiceUnavailable
from models.settings import Settings
from tests.servers import LlamaParseServer, OpenAIServer, faults

SHARES = (CallShare("a", "ann", "b1", "c1"),)
TEXTS = [f"passage {number}" for number in range(8)]
QUICK = Rules(failures=5, window_seconds=60, open_seconds=0.2, max_open_seconds=0.5, probe_seconds=5)
PRICES = Prices(input_per_million=2.0, output_per_million=8.0, per_page=0.003)


@pytest.fixture
def local() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=32) as running:
        yield running


@pytest.fixture
async def front(settings: Settings, database: str) -> AsyncIterator[Any]:
    """Makes the front of one worker for a kind of service."""
    async with AsyncExitStack() as stack:

        async def made(kind: Any, rules: Rules = QUICK) -> Front:
            pool = make_pool(settings, database, max_size=4)
            await pool.open()
            terms = Terms(f"{kind} http://local key:none", kind, prices=PRICES, rules=rules, total_seconds=10, patience_seconds=0.1)
            service = Front(pool, terms, worker="test:1")
            stack.push_async_callback(pool.close)
            stack.push_async_callback(service.aclose)
            return service

        yield made


def embedder(local: OpenAIServer, front: Front, key: str | None = None, read: float = 5) -> HostedEmbedder:
    service = Service("The embedding service", local.url, SecretStr(key) if key else None, Timeouts(5, read, 10))
    return HostedEmbedder(service, "m", 32, Limits(max_texts=4), front)


async def persist(called: HostedEmbedder, texts: list[str]) -> tuple[Any, list[str]]:
    """Embed as documents do that come back when they are told to. Returns the rows and what was raised."""
    raised: list[str] = []
    for _ in range(100):
        try:
            return (await called.embed_sized(called.size(texts), shares=SHARES)).value, raised
        except DocmillError as error:
            raised.append(type(error).__name__)
            told = getattr(error, "retry_after", None)
            await asyncio.sleep(0.05 if told is None else min(told, 1.0) + 0.01)
    raise AssertionError(raised)


def entered(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT outcome, http_status FROM provider_usage ORDER BY started_at").fetchall()


@pytest.mark.parametrize(
    ("fault", "word", "status"),
    [
        ("429", "rate_limited", 429),
        ("500", "failed", 500),
        ("502_html", "failed", 502),
        ("401", "refused", 401),
        ("403", "refused", 403),
        ("quota", "refused", 429),
        ("404", "refused", 404),
        ("redirect", "refused", 307),
        ("hang_in_headers", "timeout", None),
        ("hang_in_body", "timeout", None),
        ("truncated", "bad_answer", 200),
        ("wrong_count", "bad_answer", 200),
        ("wrong_dimension", "bad_answer", 200),
        ("nan", "bad_answer", 200),
        ("reset", "failed", None),
        ("garbage", "failed", None),
    ],
)
async def test_every_failure_is_entered_as_what_it_is_and_outlived(
    local: OpenAIServer, front: Any, conn: psycopg.Connection, fault: str, word: str, status: int | None
) -> None:
    called = embedder(local, await front("embedding"), read=0.5 if fault.startswith("hang") else 5)
    await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    local.script(faults.first(2, faults.NAMED[fault]))
    rows, _ = await persist(called, TEXTS[:4])
    assert np.allclose(rows, await HashedWords(32).embed(TEXTS[:4]), atol=1e-6)
    rest = [entry for entry in entered(conn) if entry[0] != "not_sent"]
    assert (rest[0], rest[-1]) == (("ok", 200), ("ok", 200))
    assert set(rest[1:-1]) == {(word, status)}


async def test_a_refused_key_opens_the_breaker_at_once_and_all_completes_with_a_right_one(
    local: OpenAIServer, front: Any, conn: psycopg.Connection
) -> None:
    local.key = "new"
    shared = await front("embedding")
    with pytest.raises(ServiceUnavailable):
        called = embedder(local, shared, key="old")
        await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    assert conn.execute("SELECT state FROM circuit_breakers").fetchall() == [("open",)]
    local.key = "old"
    rows, raised = await persist(embedder(local, shared, key="old"), TEXTS[:4])
    assert rows.shape == (4, 32)
    assert set(raised) <= {"ServiceUnavailable"}
    assert conn.execute("SELECT state FROM circuit_breakers").fetchall() == [("closed",)]


@pytest.mark.parametrize("refuses_all", [False, True])
async def test_each_request_that_unlearns_an_optional_field_is_a_call_in_the_ledger(
    local: OpenAIServer, front: Any, conn: psycopg.Connection, refuses_all: bool
) -> None:
    local.base64 = local.chooses_dimensions = "refused"
    local.poison = TEXTS[0] if refuses_all else None
    called = embedder(local, await front("embedding"))
    with pytest.raises(RequestRefused) if refuses_all else nullcontext():
        await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    assert entered(conn) == [("rejected", 422), ("rejected", 400), ("rejected", 400) if refuses_all else ("ok", 200)]
    assert local.tally.requests == 3


async def test_a_poisoned_text_is_not_held_against_the_service(local: OpenAIServer, front: Any, conn: psycopg.Connection) -> None:
    called = embedder(local, await front("embedding"))
    await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    local.poison = "passage 2"
    with pytest.raises(RequestRefused):
        await called.embed_sized(called.size(TEXTS[:4]), shares=SHARES)
    search = bisect(slice(0, 4))
    try:
        half = next(search)
        while True:
            try:
                await called.embed_sized(called.size(TEXTS[half]), shares=SHARES)
                half = search.send(False)
            except RequestRefused:
                half = search.send(True)
    except StopIteration as stop:
        assert stop.value == [2]
    assert {word for word, _ in entered(conn)} == {"ok", "rejected"}
    assert conn.execute("SELECT count(*) FROM circuit_breakers WHERE state <> 'closed'").fetchone() == (0,)


async def test_an_answer_that_is_of_no_use_is_paid_for_and_entered_so(local: OpenAIServer, front: Any, conn: psycopg.Connection) -> None:
    service = Service("The extraction service", local.url, None, Timeouts(5, 5, 10))
    called = ModelExtractor(service, "m", load_shape(None), caller=await front("extraction"))
    local.script(faults.first(1, faults.NAMED["length"]))
    with pytest.raises(LLMError):
        await called.extract("A lease.", shares=SHARES)
    found = await called.extract("A lease.", shares=SHARES)
    costs = conn.execute("SELECT outcome, cost > 0, tokens_in > 0, tokens_out > 0 FROM provider_usage ORDER BY started_at").fetchall()
    assert costs == [("rejected", True, True, True), ("ok", True, True, True)]
    assert conn.execute("SELECT sum(tokens_in) FROM provider_usage WHERE outcome = 'ok'").fetchone() == (found.tokens_in,)


async def test_a_parse_is_entered_once_and_polls_only_where_they_fail(front: Any, conn: psycopg.Connection, tmp_path: Path) -> None:
    with LlamaParseServer() as server:
        (tmp_path / "a.pdf").write_text("one\ftwo", encoding="utf-8")
        service = Service("LlamaParse", server.url, None, Timeouts(5, 5, 10))
        called = LlamaParse(service, poll_seconds=0.01, deadline=20, caller=await front("parse"))
        job_id = await called.start(StoredFile(tmp_path / "a.pdf"), "application/pdf", page_estimate=2, shares=SHARES)
        assert len((await called.wait(job_id, shares=SHARES)).pages) == 2
        assert entered(conn) == [("ok", 200)]
        server.fails = "no"
        job_id = await called.start(StoredFile(tmp_path / "a.pdf"), "application/pdf", page_estimate=2, shares=SHARES)
        with pytest.raises(ParseError):
            await called.wait(job_id, shares=SHARES)
    assert entered(conn) == [("ok", 200), ("ok", 200), ("rejected", 200)]
    assert conn.execute("SELECT count(*) FROM circuit_breakers WHERE state <> 'closed'").fetchone() == (0,)


@pytest.mark.parametrize(
    "script",
    [
        faults.flapping(0.3, faults.NAMED["reset"]),
        faults.outage(0, 0.5, faults.NAMED["502_html"]),
        faults.outage(0, 0.5, faults.NAMED["429_retry_after"]),
    ],
    ids=["flapping", "outage", "throttled"],
)
async def test_what_comes_and_goes_is_outlived_and_no_text_paid_twice(local: OpenAIServer, front: Any, script: faults.Script) -> None:
    called = embedder(local, await front("embedding"))
    await called.embed_sized(called.size(["proves the dialect"]), shares=SHARES)
    local.script(script)
    made = await asyncio.gather(*(persist(called, [text]) for text in TEXTS))
    rows = np.concatenate([rows for rows, _ in made])
    assert np.allclose(rows, await HashedWords(32).embed(TEXTS), atol=1e-6)
    assert local.tally.paid_twice() == 0
    assert {name for _, raised in made for name in raised} <= {"ServiceUnavailable", "RateLimitError", "RetryableError"}


async def test_a_503_that_says_when_to_come_back_is_believed_by_all(local: OpenAIServer, front: Any) -> None:
    local.script(faults.always(faults.status(503, "", retry_after="40")))
    with pytest.raises(ServiceUnavailable) as first:
        called = embedder(local, await front("embedding", Rules()))
        await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    assert first.value.retry_after == 40
    with pytest.raises(RateLimitError) as second:
        called = embedder(local, await front("embedding", Rules()))
        await called.embed_sized(called.size(TEXTS[:1]), shares=SHARES)
    assert second.value.retry_after is not None and 30 < second.value.retry_after <= 40
    assert local.tally.requests == 1
