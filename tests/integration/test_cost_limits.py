"""MAX_COST_PER_DOCUMENT and MAX_COST_PER_BATCH: no call is made that would cost more, whoever makes it, and the totals are the ledger's."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from jobs.adapters.exchange.verdict import judge
from jobs.breaker import Rules
from jobs.database import make_pool
from jobs.services import Prices, Service, Terms, service_name, terms_of
from jobs.services.ledger import new_entry
from models.calls import CallPurpose, CallShare, Reply
from models.errors import ConfigurationError, CostLimitReached, RetryableError, ServiceUnavailable
from models.settings import Settings
from tests.running import REPOSITORY

NAME = "embedding https://service.test/v1 key:0123456789ab"
QUICK = Rules(failures=5, window_seconds=60, open_seconds=0.3, max_open_seconds=1, probe_seconds=1)
TERMS = Terms(NAME, "embedding", prices=Prices(input_per_million=2.0), rules=QUICK, total_seconds=5, patience_seconds=0.1)
ESTIMATE = Decimal("0.002")  # of a call of 1000 tokens
TOTALS = "SELECT scope, name, sum(spent) FROM cost_totals GROUP BY scope, name HAVING sum(spent) <> 0 ORDER BY scope, name"
ADDED_UP = """
    SELECT c.scope, c.name, sum(c.cost) FROM (
        SELECT 'document' AS scope, d.name, coalesce(u.cost, u.estimated_cost) * d.share::numeric AS cost
        FROM provider_usage AS u, unnest(u.doc_ids, u.shares) AS d (name, share)
        UNION ALL
        SELECT 'batch', d.name, coalesce(u.cost, u.estimated_cost) * d.share::numeric
        FROM provider_usage AS u, unnest(u.batch_ids, u.shares) AS d (name, share) WHERE d.name IS NOT NULL
    ) AS c GROUP BY c.scope, c.name HAVING sum(c.cost) <> 0 ORDER BY c.scope, c.name
"""
Make = Callable[..., Awaitable[Service]]


def answered(status: int) -> Exception:
    return judge("The service", "service.test", status=status, headers={}, body=b"", secret="")


async def paid(tokens: int = 1000, seconds: float = 0.0) -> Reply[str]:
    await asyncio.sleep(seconds)
    return Reply("fine", tokens_in=tokens)


def of(doc_id: str, batch_id: str | None = "b", tokens: int = 1000) -> CallPurpose:
    return CallPurpose("embed", (CallShare(doc_id, "ann", batch_id),), "m", tokens=tokens)


def shared(*parts: tuple[str, str | None], tokens: int = 1000) -> CallPurpose:
    each = 1 / len(parts)
    return CallPurpose("embed", tuple(CallShare(doc, "ann", batch, share=each) for doc, batch in parts), "m", tokens=tokens)


@pytest.fixture
async def make(settings: Settings, database: str) -> AsyncIterator[Make]:
    """Makes a service as one more worker sees it, over connections of its own."""
    async with AsyncExitStack() as stack:

        async def made(connections: int = 4, **changes: Any) -> Service:
            pool = make_pool(settings, database, max_size=connections)
            await pool.open()
            stack.push_async_callback(pool.close)
            service = Service(pool, replace(TERMS, **changes), worker="test:1")
            stack.push_async_callback(service.aclose)
            return service

        yield made


def rows(conn: psycopg.Connection, statement: str, *args: object) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in conn.execute(statement, args).fetchall()]


async def refused(service: Service, purpose: CallPurpose) -> CostLimitReached:
    async def never() -> Reply[str]:
        raise AssertionError("the call was made")

    with pytest.raises(CostLimitReached) as caught:
        await service.call(never, purpose)
    return caught.value


async def test_a_call_that_would_pass_a_documents_limit_is_not_made_and_says_why(make: Any, conn: psycopg.Connection) -> None:
    service = await make(max_cost_per_document=Decimal("0.005"), tokens_per_minute=100_000)
    for _ in range(2):
        await service.call(paid, of("a"))
    error = await refused(service, of("a"))
    assert error.over == {"a": str(error)}
    assert str(error) == (
        'The document "a" has cost 0.004, and a call to embedding https://service.test/v1 would cost about 0.002 more: '
        "that is over MAX_COST_PER_DOCUMENT=0.005. The call was not made."
    )
    assert rows(conn, "SELECT count(*), sum(cost) FROM provider_usage") == [(2, Decimal("0.004"))]
    assert rows(conn, "SELECT tokens_last_minute, requests_last_minute FROM provider_budget_use") == [(2000, 2)]
    # To the limit itself it may go, and others are not concerned.
    await service.call(lambda: paid(500), of("a", tokens=500))
    await service.call(paid, of("x"))
    assert rows(conn, "SELECT cost_of_document('a'), cost_of_document('x'), cost_of_batch('b')") == [
        (Decimal("0.005"), Decimal("0.002"), Decimal("0.007"))
    ]


async def test_workers_together_do_not_pass_a_batchs_limit(make: Any, conn: psycopg.Connection) -> None:
    services = [await make(5, max_cost_per_batch=Decimal("0.015")) for _ in range(3)]
    sent = 0

    async def send() -> Reply[str]:
        nonlocal sent
        sent += 1
        return await paid(seconds=0.2)

    calls = [services[number % 3].call(send, of(f"d{number}")) for number in range(30)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sent == sum(isinstance(result, Reply) for result in results) == 7
    assert all(isinstance(result, Reply | CostLimitReached) for result in results)
    assert rows(conn, "SELECT cost_of_batch('b')") == [(Decimal("0.014"),)]


async def test_money_that_an_answer_did_not_take_may_be_spent_again(make: Any) -> None:
    service = await make(max_cost_per_batch=Decimal("0.002"))
    await service.call(lambda: paid(100), of("a"))
    assert 'The batch "b" has cost 0.0002' in str(await refused(service, of("c")))
    await service.call(lambda: paid(900), of("c", tokens=900))
    with pytest.raises(CostLimitReached):
        await service.call(paid, of("d", tokens=1))


async def test_calls_that_failed_or_were_never_sent_leave_no_cost(make: Any, conn: psycopg.Connection) -> None:
    service = await make(max_cost_per_document=Decimal("0.002"))

    async def down() -> Reply[str]:
        raise answered(503)

    for _ in range(3):
        with pytest.raises(RetryableError):
            await service.call(down, of("a"))
    await service.call(paid, of("a"))
    assert rows(conn, TOTALS) == rows(conn, ADDED_UP) == [("batch", "b", ESTIMATE), ("document", "a", ESTIMATE)]


async def test_of_a_shared_call_those_are_named_that_do_not_fit_and_the_others_fit(make: Any, conn: psycopg.Connection) -> None:
    service = await make(max_cost_per_document=Decimal("0.004"), max_cost_per_batch=Decimal("0.01"))
    await service.call(paid, of("dear", None, tokens=1900))
    await service.call(lambda: paid(2000), of("first", tokens=2000))
    parts = [("dear", "b"), ("one", "b"), ("two", "b"), ("three", "b"), ("free", None)]
    error = await refused(service, shared(*parts, tokens=10_000))
    assert set(error.over) == {"dear", "two", "three"}
    assert "MAX_COST_PER_DOCUMENT" in error.over["dear"]
    assert 'The batch "b"' in error.over["two"] and 'the document "two"' in error.over["two"]
    left = [part for part in parts if part[0] not in error.over]
    await service.call(paid, shared(*left, tokens=4000))
    assert rows(conn, TOTALS) == rows(conn, ADDED_UP)


async def test_a_call_whose_worker_was_killed_counts_with_its_estimate(make: Any, database: str) -> None:
    assert run_killed(database) == -signal.SIGKILL
    service = await make(max_cost_per_document=Decimal("0.003"))
    assert "has cost 0.002" in str(await refused(service, of("a")))


def run_killed(database: str) -> int:
    """Make one good call in a process of its own, which is killed when the answer is there."""
    command = [sys.executable, "-c", "from tests.integration.test_cost_limits import call_once; call_once()"]
    fault = {"DATABASE_URL": database, "DOCMILL_FAULTS": "kill@call_answered"}
    return subprocess.run(command, env={**os.environ, **fault}, cwd=REPOSITORY, timeout=60, check=False).returncode


def call_once() -> None:
    async def whole() -> None:
        settings = Settings()
        async with make_pool(settings, os.environ["DATABASE_URL"]) as pool:
            await Service(pool, TERMS, worker="other:1").call(paid, of("a"))

    asyncio.run(whole())


async def test_an_intent_that_is_sent_twice_is_no_second_cost(make: Any, conn: psycopg.Connection) -> None:
    service = await make(max_cost_per_document=ESTIMATE)
    entry = new_entry(of("a"))
    asked = [await service._ledger.begin(entry) for _ in range(2)]
    assert [answer.hindrance for answer in asked] == [None, None]
    assert rows(conn, TOTALS) == [("batch", "b", ESTIMATE), ("document", "a", ESTIMATE)]


async def test_a_probe_that_nobody_may_pay_for_lets_another_go_at_once(make: Any, conn: psycopg.Connection) -> None:
    service = await make(max_cost_per_document=Decimal("0.003"), rules=replace(QUICK, probe_seconds=1000))

    async def refuse() -> Reply[str]:
        raise answered(401)

    with pytest.raises(ServiceUnavailable):
        await service.call(refuse, of("a"))
    await asyncio.sleep(0.35)
    asking = service._ask_breaker

    async def meanwhile(*asked: Any) -> Any:
        let_in = await asking(*asked)
        conn.execute("INSERT INTO cost_totals VALUES ('document', 'a', 0, 1) ON CONFLICT (scope, name, stripe) DO UPDATE SET spent = 1")
        return let_in

    service._ask_breaker = meanwhile
    await refused(service, of("a"))
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("open",)]
    service._ask_breaker = asking
    assert (await service.call(paid, of("x"))).value == "fine"


async def test_totals_are_the_ledgers_after_many_shared_calls_at_once(make: Any, conn: psycopg.Connection) -> None:
    limits = {"max_cost_per_document": Decimal(100), "max_cost_per_batch": Decimal(100)}
    services = [await make(6, tokens_per_minute=10_000_000, **changes) for changes in (limits, limits, {})]
    chance = random.Random(1)

    async def call(service: Service) -> None:
        parts = chance.sample([(f"d{number}", f"b{number % 3}" if number % 4 else None) for number in range(12)], chance.randint(1, 6))
        await service.call(lambda: paid(chance.randint(1, 3000)), shared(*parts))

    await asyncio.gather(*(call(services[number % 3]) for number in range(150)))
    assert rows(conn, "SELECT count(*) FROM provider_usage WHERE outcome = 'ok'") == [(150,)]
    assert rows(conn, TOTALS) == rows(conn, ADDED_UP)


async def test_calls_without_a_price_take_no_totals(make: Any, conn: psycopg.Connection) -> None:
    service = await make(prices=Prices())
    await service.call(paid, of("a"))
    assert rows(conn, "SELECT count(*) FROM cost_totals") == [(0,)]


def test_a_limit_without_a_price_is_refused_where_the_service_is_called(settings: Settings) -> None:
    limited = settings.model_copy(update={"max_cost_per_batch": 1.0})
    with pytest.raises(ConfigurationError, match="MAX_COST_PER_BATCH needs EMBEDDING_PRICE_PER_MILLION_TOKENS"):
        terms_of(limited, "embedding", service_name(limited, "embedding"))
    free = limited.model_copy(update={"embedding_price_per_million_tokens": 0.0})
    assert terms_of(free, "embedding", service_name(free, "embedding")).max_cost_per_batch == 1
