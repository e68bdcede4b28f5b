"""Calls to outside services: what all workers share about them, and what is written about each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from jobs.adapters.exchange.verdict import judge
from jobs.breaker import Rules
from jobs.database import make_pool
from jobs.services import Prices, Service, Terms, front, state
from jobs.services.ledger import Ledger
from jobs.services.state import SharedBreaker
from models.calls import CallPurpose, CallShare, Reply
from models.errors import (
    BadAnswer,
    DocmillError,
    NotSent,
    PermanentError,
    RateLimitError,
    RequestRefused,
    RetryableError,
    ServiceUnavailable,
    UnknownError,
)
from models.errors import TimeoutError as CallTimeout
from models.settings import Settings
from sql import query
from tests.running import REPOSITORY

NAME = "embedding https://service.test/v1 key:0123456789ab"
QUICK = Rules(failures=5, window_seconds=60, open_seconds=0.3, max_open_seconds=1, probe_seconds=1)
TERMS = Terms(NAME, "embedding", prices=Prices(input_per_million=2.0), rules=QUICK, total_seconds=5, patience_seconds=0.1)
PURPOSE = CallPurpose("embed", (CallShare("a", "ann", "b1", "c1"),), "m", tokens=1000)
Send = Callable[[], Awaitable[Reply[str]]]
Make = Callable[..., Service]


def answers(*told: Exception | Reply[str]) -> Send:
    """A service that answers as told, the last answer for ever."""
    left = list(told)

    async def send() -> Reply[str]:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return send


GOOD = Reply("fine", tokens_in=900, request_id="r1")


def refusal(status: int, headers: Mapping[str, str] | None = None, code: str = "", words: str = "") -> DocmillError:
    """What an adapter makes of an answer that is no 2xx."""
    body = json.dumps({"error": {"code": code, "message": words}}).encode()
    return judge("The service", "service.test", status=status, headers=headers or {}, body=body, secret="")


ok = answers(GOOD)
down = answers(refusal(500))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for some seconds, as one with much to do does, is no part of what is tested here."""
    monkeypatch.setattr(front, "LATEST_SECONDS", 60.0)
    monkeypatch.setattr(front, "_SETTLE_SECONDS", 60.0)


@pytest.fixture
async def make(settings: Settings, database: str) -> AsyncIterator[Make]:
    """Makes a service as one more worker sees it, over connections of its own."""
    async with AsyncExitStack() as stack:

        async def close(service: Service, pool: Any) -> None:
            await service.aclose()
            await pool.close()

        def made(terms: Terms = TERMS, *, connections: int = 4, **changes: Any) -> Service:
            pool = make_pool(settings, database, max_size=connections)
            pools.append(pool)
            service = Service(pool, replace(terms, **changes), worker=f"test:{len(pools)}")
            stack.push_async_callback(close, service, pool)
            return service

        pools: list[Any] = []
        yield made


async def opened(service: Service) -> Service:
    await service._pool.open()
    return service


def rows(conn: psycopg.Connection, statement: str, *args: object) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in conn.execute(statement, args).fetchall()]


async def fails(service: Service, send: Send = down, purpose: CallPurpose = PURPOSE) -> DocmillError:
    with pytest.raises(DocmillError) as caught:
        await service.call(send, purpose)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited 30 s in vain")


async def test_a_good_call_is_entered_with_what_it_was_for_and_what_it_cost(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(tokens_per_minute=100_000))
    assert (await service.call(ok, PURPOSE)).value == "fine"
    assert rows(
        conn,
        """SELECT service, kind, model, stage, doc_id, batch_id, user_id, correlation_id, worker, outcome, http_status, request_id,
            estimated_tokens, tokens_in, estimated_cost, cost, latency_ms < 5000 FROM provider_usage""",
    ) == [
        (
            NAME, "embedding", "m", "embed", "a", "b1", "ann", "c1", "test:1", "ok", 200, "r1", 1000, 900,
            Decimal("0.002"), Decimal("0.0018"), True,
        )
    ]  # fmt: skip
    assert rows(conn, "SELECT tokens_last_minute, requests_last_minute FROM provider_budget_use") == [(900, 1)]


async def test_a_call_that_is_not_sent_after_all_costs_nothing_and_gives_request_tokens_and_probe_back(
    make: Make, conn: psycopg.Connection
) -> None:
    service = await opened(make(tokens_per_minute=100_000, requests_per_minute=1000))
    withdrawn = answers(NotSent("Nobody may pay for it."))
    assert type(await fails(service, withdrawn)) is NotSent
    assert rows(conn, "SELECT outcome, cost, error_message, error_type FROM provider_usage") == [
        ("not_sent", 0, "Nobody may pay for it.", None)
    ]
    assert rows(conn, "SELECT tokens_last_minute, requests_last_minute FROM provider_budget_use") == [(0, 0)]
    for _ in range(5):
        await fails(service)
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("open",)]
    for _ in range(100):
        await asyncio.sleep(0.1)
        if type(await fails(service, withdrawn)) is NotSent:
            break
    assert rows(conn, "SELECT state, probe_by FROM circuit_breakers") == [("open", None)]
    # Somebody else may probe at once.
    await asyncio.sleep(0.05)
    assert (await service.call(ok, PURPOSE)).value == "fine"


async def test_a_call_that_is_ready_too_late_for_its_time_is_given_another_one(
    make: Make, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "LATEST_SECONDS", 2.0)
    service = await opened(make(requests_per_minute=100))
    begin, times = service._ledger.begin, 0

    async def slowly(entry: Any) -> Any:
        nonlocal times
        asked, times = await begin(entry), times + 1
        if times == 1:
            await asyncio.sleep(2.05)  # as where the machine has too much to do
        return asked

    service._ledger.begin = slowly  # type: ignore[method-assign]
    assert (await service.call(ok, PURPOSE)).value == "fine"
    assert times >= 2
    assert rows(conn, "SELECT outcome FROM provider_usage ORDER BY started_at") == [*[("not_sent",)] * (times - 1), ("ok",)]


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_call_that_is_let_through_in_vain_three_times_goes_back_to_the_queue_and_uses_nothing_up(
    make: Make, conn: psycopg.Connection, recorded: bool
) -> None:
    service = await opened(make(requests_per_minute=6000, tokens_per_minute=10_000_000, patience_seconds=60))

    async def pause() -> None:
        while True:
            conn.execute("SELECT pause_budget(%s, 2)", [NAME])
            await asyncio.sleep(0.05)

    pausing = asyncio.create_task(pause())
    error = await fails(service, ok, replace(PURPOSE, recorded=recorded, tokens=1000 if recorded else 0))
    pausing.cancel()
    assert isinstance(error, RateLimitError) and "was given 3 times" in str(error)
    assert error.turn is not None and (error.turn.service, error.turn.place) == (NAME, None)
    assert rows(conn, "SELECT outcome FROM provider_usage") == [("not_sent",)] * (3 if recorded else 0)
    assert rows(conn, "SELECT requests_last_minute, tokens_last_minute FROM provider_budget_use") == [(0, 0)]


async def test_a_call_cut_off_while_it_waits_for_its_time_was_not_sent_and_costs_nothing(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(requests_per_minute=6, patience_seconds=60))
    await service.call(ok, PURPOSE)
    waiting = asyncio.create_task(service.call(ok, PURPOSE))
    await until(lambda: len(rows(conn, "SELECT id FROM provider_usage")) == 2)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await service.aclose()
    assert rows(conn, "SELECT outcome, cost > 0 FROM provider_usage ORDER BY started_at") == [("ok", True), ("not_sent", False)]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("step", ["begin", "passes"])
async def test_a_call_cut_off_while_it_is_asked_for_was_not_sent_and_uses_nothing_up(
    make: Make, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, step: str, recorded: bool
) -> None:
    service = await opened(make(requests_per_minute=100, tokens_per_minute=100_000, patience_seconds=60))
    asked, there = getattr(Ledger, step), asyncio.Event()

    async def is_not_answered(self: Any, entry: Any) -> Any:
        answer = await asked(self, entry)
        there.set()
        await asyncio.sleep(60)
        return answer

    conn.execute("SELECT pause_budget(%s, 1)", [NAME])  # so that it is asked once more whether the call may be sent
    monkeypatch.setattr(Ledger, step, is_not_answered)
    waiting = asyncio.create_task(service.call(ok, replace(PURPOSE, recorded=recorded, tokens=1000 if recorded else 0)))
    await there.wait()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await service.aclose()
    assert rows(conn, "SELECT outcome, cost FROM provider_usage") == [("not_sent", 0)] * recorded
    taken = 0 if recorded or step == "passes" else 1  # without a row nobody knows which second the request was counted in
    assert rows(conn, "SELECT requests_last_minute, tokens_last_minute FROM provider_budget_use") == [(taken, 0)]


@pytest.mark.parametrize("passed", ["ask", "begin"])
async def test_a_probe_that_is_cut_off_before_it_is_sent_leaves_its_place_to_the_next(
    make: Make, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, passed: str
) -> None:
    service = await opened(make(rules=replace(QUICK, probe_seconds=600)))
    await fails(service, answers(refusal(401)))
    await asyncio.sleep(0.35)
    there = asyncio.Event()
    owner = {"ask": SharedBreaker, "begin": Ledger}[passed]
    told = getattr(owner, passed)

    async def stands_still(self: Any, *args: Any) -> Any:
        answer = await told(self, *args)
        if rows(conn, "SELECT FROM circuit_breakers WHERE state = 'half_open'"):
            there.set()
            await asyncio.sleep(60)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(owner, passed, stands_still)
        probe = asyncio.create_task(service.call(ok, PURPOSE))
        await there.wait()
        probe.cancel()
        with suppress(asyncio.CancelledError):
            await probe
    await until(lambda: rows(conn, "SELECT state, probe_by FROM circuit_breakers") == [("open", None)])
    assert (await service.call(ok, PURPOSE)).value == "fine"


async def test_a_probe_that_the_budget_sends_back_leaves_its_place_also_where_it_is_cut_off_meanwhile(
    make: Make, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await opened(make(requests_per_minute=1, rules=replace(QUICK, probe_seconds=600)))
    await fails(service, answers(refusal(401)))
    await asyncio.sleep(0.35)
    there, give_up = asyncio.Event(), SharedBreaker.give_up

    async def slowly(self: Any, *args: Any) -> None:
        there.set()
        await asyncio.sleep(0.2)
        await give_up(self, *args)

    monkeypatch.setattr(SharedBreaker, "give_up", slowly)
    probe = asyncio.create_task(service.call(ok, PURPOSE))
    await there.wait()
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("half_open",)]
    probe.cancel()
    with suppress(asyncio.CancelledError):
        await probe
    await service.aclose()
    assert rows(conn, "SELECT state, probe_by FROM circuit_breakers") == [("open", None)]


async def test_a_call_that_is_entered_by_a_connection_that_breaks_while_the_worker_stops_was_not_sent(
    make: Make, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await opened(make(requests_per_minute=100, tokens_per_minute=100_000))
    service._stopping = service._ledger._stopping = lambda: True
    whole = state.one

    async def breaks(pool: Any, name: str, params: dict[str, Any]) -> Any:
        answer = await whole(pool, name, params)
        if name == "begin_call":
            raise psycopg.OperationalError("the connection is lost")
        return answer

    monkeypatch.setattr("jobs.services.ledger.one", breaks)
    assert type(await fails(service, ok)) is RetryableError
    await service.aclose()
    assert rows(conn, "SELECT outcome, cost FROM provider_usage") == [("not_sent", 0)]
    assert rows(conn, "SELECT requests_last_minute, tokens_last_minute FROM provider_budget_use") == [(0, 0)]


@pytest.mark.parametrize(
    ("told", "tokens"), [(Reply("", tokens_in=300), 500), (Reply("", tokens_out=50), 850), (Reply("", 300, 50), 350), (Reply(""), 1000)]
)
async def test_what_a_service_did_not_count_stays_taken_from_the_budget_as_it_was_expected(
    make: Make, conn: psycopg.Connection, told: Reply[str], tokens: int
) -> None:
    service = await opened(make(tokens_per_minute=100_000))
    await service.call(answers(told), replace(PURPOSE, tokens_out=200))
    assert rows(conn, "SELECT tokens_last_minute FROM provider_budget_use") == [(tokens,)]


async def test_calls_that_are_not_recorded_are_for_a_while_after_one_has_failed(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(prices=Prices(per_page=2.0), rules=replace(QUICK, window_seconds=0.5)))
    poll = replace(PURPOSE, tokens=0, recorded=False)
    for _ in range(8):
        for _ in range(20):
            await service.call(answers(replace(GOOD, pages=7)), poll)
        assert type(await fails(service, down, poll)) is RetryableError
    assert rows(conn, "SELECT state, opened_count FROM circuit_breakers") == [("closed", 0)]
    assert rows(conn, "SELECT count(*) FILTER (WHERE outcome = 'failed'), sum(cost), sum(pages) FROM provider_usage") == [(8, 0, None)]
    await service.call(ok, poll)
    await asyncio.sleep(0.6)
    entered = rows(conn, "SELECT count(*) FROM provider_usage")
    await service.call(ok, poll)
    assert rows(conn, "SELECT count(*) FROM provider_usage") == entered


async def test_a_call_shared_by_documents_costs_each_its_share(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    shares = (CallShare("a", "ann", "b1", share=0.25), CallShare("b", "bob", None, share=0.75))
    await service.call(ok, CallPurpose("embed", shares, "m", tokens=1000))
    await service.call(ok, PURPOSE)
    cost = "SELECT doc_id, batch_id, user_id, calls, calls_ok, cost FROM cost_by_document ORDER BY doc_id"
    assert rows(conn, cost) == [("a", "b1", "ann", 2, 2, Decimal("0.00225")), ("b", None, "bob", 1, 1, Decimal("0.00135"))]
    assert rows(conn, "SELECT cost_of_document('a'), cost_of_document('b'), cost_of_document('x'), cost_of_batch('b1')") == [
        (Decimal("0.00225"), Decimal("0.00135"), 0, Decimal("0.00225"))
    ]


@pytest.mark.parametrize(
    ("error", "raised", "word", "status", "paid"),
    [
        (refusal(500, {}), RetryableError, "failed", 500, False),
        (refusal(302, {}), ServiceUnavailable, "refused", 302, False),
        (refusal(504, {}), CallTimeout, "timeout", 504, True),
        (refusal(503, {}), ServiceUnavailable, "failed", 503, False),
        (refusal(400, {}, "bad", "no"), RequestRefused, "rejected", 400, False),
        (refusal(401, {}), ServiceUnavailable, "refused", 401, False),
        (refusal(429, {}, "insufficient_quota"), ServiceUnavailable, "refused", 429, False),
        (refusal(429, {"retry-after": "7"}), RateLimitError, "rate_limited", 429, False),
        (ConnectionResetError("reset"), RetryableError, "failed", None, False),
        (TimeoutError(), CallTimeout, "timeout", None, True),
        (BadAnswer("no JSON", tokens_in=500), BadAnswer, "bad_answer", None, True),
        (KeyError("data"), UnknownError, "rejected", None, False),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else None,
)
async def test_each_failure_is_entered_and_raised_as_what_it_is(
    make: Make, conn: psycopg.Connection, error: Exception, raised: type[Exception], word: str, status: int | None, paid: bool
) -> None:
    service = await opened(make())
    assert type(await fails(service, answers(error))) is raised
    assert rows(conn, "SELECT outcome, http_status, cost > 0, error_message <> '' FROM provider_usage") == [(word, status, paid, True)]


async def test_five_failures_over_two_workers_open_it_for_both_and_success_closes_it(make: Make, conn: psycopg.Connection) -> None:
    one, two = await opened(make()), await opened(make())
    kinds = [type(await fails(one if number % 2 else two)) for number in range(4)]
    assert kinds == [RetryableError] + [ServiceUnavailable] * 3
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]
    await fails(one)
    entered = rows(conn, "SELECT count(*) FROM provider_usage")
    for service in (one, two):
        error = await fails(service, ok)
        assert isinstance(error, ServiceUnavailable) and error.retry_after is not None and error.retry_after > 0
    assert rows(conn, "SELECT count(*) FROM provider_usage") == entered
    await asyncio.sleep(0.5)
    assert (await one.call(ok, PURPOSE)).value == "fine"
    assert rows(conn, "SELECT state, opened_count, waiting FROM circuit_breakers") == [("closed", 1, 0)]
    assert rows(conn, "SELECT count(*) FROM alerts") == [(0,)]


AGO = "UPDATE provider_usage SET finished_at = finished_at - %s::interval, started_at = started_at - %s::interval"


async def test_failures_in_a_row_open_it_however_slowly_they_come(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    for _ in range(4):
        await fails(service)
        conn.execute(AGO, ["61 s", "61 s"])
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]
    await fails(service)
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("open",)]


async def test_a_failure_counts_against_a_document_only_where_others_were_answered(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    assert type(await fails(service)) is RetryableError
    waits = await fails(service)
    assert isinstance(waits, ServiceUnavailable) and waits.retry_after == QUICK.open_seconds / 12
    await service.call(ok, PURPOSE)
    assert type(await fails(service)) is RetryableError
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]


async def test_failures_outside_the_window_and_before_the_closing_do_not_count(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    for _ in range(4):
        await fails(service)
    await service.call(ok, PURPOSE)
    conn.execute(AGO, ["61 s", "61 s"])
    assert type(await fails(service)) is RetryableError
    for _ in range(3):
        await fails(service)
    conn.execute("SELECT reset_breaker(%s)", [NAME])
    assert type(await fails(service)) is RetryableError
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]


async def test_calls_that_were_not_sent_say_nothing_of_a_service_and_are_none_in_any_figure(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    withdrawn = answers(NotSent("Nobody may pay for it."))
    for number in range(4):
        await fails(service)
        if number == 1:
            await service.call(ok, PURPOSE)
    for _ in range(60):
        await fails(service, withdrawn)
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]
    await fails(service)
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("open",)]
    assert rows(conn, "SELECT calls, calls_ok FROM cost_by_document") == [(6, 1)]
    assert rows(conn, "SELECT calls, calls_ok FROM cost_by_batch") == [(6, 1)]
    assert rows(conn, "SELECT calls_last_hour, failed_last_hour FROM provider_health") == [(6, 5)]
    with conn.cursor(row_factory=dict_row) as cursor:
        for name in ("page_cost_of_document", "page_cost_by_day", "page_dearest_documents"):
            counted = cursor.execute(query(name), {"doc_id": "a", "limit": 10}).fetchall()
            assert sum(row["calls"] for row in counted) == 6, name


async def test_failures_in_a_row_are_seen_behind_any_number_of_calls_that_were_not_sent(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    for _ in range(4):
        await fails(service)
        conn.execute(AGO, ["61 s", "61 s"])
    conn.execute(
        """INSERT INTO provider_usage (id, service, kind, outcome, give_up_at, finished_at)
        SELECT gen_random_uuid(), %s, 'embedding', 'not_sent', now(), now() FROM generate_series(1, 300)""",
        [NAME],
    )
    await fails(service)
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("open",)]


async def test_a_refused_key_opens_it_at_once_with_one_alert_and_a_reset_closes_it(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(rules=Rules()))
    refused = answers(refusal(401, {}, "invalid_api_key", "never shown"))
    errors = await asyncio.gather(*(fails(service, refused) for _ in range(4)))
    assert all(isinstance(error, ServiceUnavailable) for error in errors)
    assert rows(conn, "SELECT state, refused, reason FROM circuit_breakers") == [
        ("open", True, "The service at service.test answered HTTP 401 (invalid_api_key) [the key is refused]")
    ]
    assert rows(conn, "SELECT kind, detail FROM alerts") == [("service_refused", {"service": NAME})]
    assert rows(conn, "SELECT reset_breaker(%s), reset_breaker('unknown')", NAME) == [(True, False)]
    assert (await service.call(ok, PURPOSE)).value == "fine"


async def test_of_fifty_that_ask_at_once_one_probes(make: Make, conn: psycopg.Connection) -> None:
    services = [await opened(make(rules=replace(QUICK, probe_seconds=600), connections=5)) for _ in range(5)]
    await fails(services[0], answers(refusal(401, {})))
    await asyncio.sleep(0.35)
    breakers = [SharedBreaker(service._pool, service.terms) for service in services]
    told = await asyncio.gather(*(breakers[number % 5].ask(uuid4(), []) for number in range(50)))
    assert sum(answer.probes for answer in told) == 1
    assert rows(conn, "SELECT state, waiting FROM circuit_breakers") == [("half_open", 49)]
    assert len({answer.wait_seconds for answer in told if not answer.probes}) == 49


async def test_a_probe_whose_worker_was_killed_gives_way_to_another(make: Make, conn: psycopg.Connection, database: str) -> None:
    service = await opened(make())
    await fails(service, answers(refusal(401, {})))
    await asyncio.sleep(0.35)
    assert run_caller(database, "kill@probing") == -signal.SIGKILL
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("half_open",)]
    assert isinstance(await fails(service, ok), ServiceUnavailable)
    await asyncio.sleep(1.1)
    assert (await service.call(ok, PURPOSE)).value == "fine"
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]


@pytest.mark.parametrize("point", ["call_entered", "call_answered"])
async def test_a_call_whose_worker_was_killed_stays_unknown_and_counts_with_its_estimate(
    conn: psycopg.Connection, database: str, point: str
) -> None:
    assert run_caller(database, f"kill@{point}") == -signal.SIGKILL
    assert rows(conn, "SELECT outcome, finished_at, cost, estimated_cost FROM provider_usage") == [
        ("unknown", None, None, Decimal("0.002"))
    ]
    conn.execute("UPDATE provider_usage SET give_up_at = now() - interval '1 s'")
    assert rows(conn, "SELECT doc_id, calls, calls_unknown, cost FROM cost_by_document") == [("a", 1, 1, Decimal("0.002"))]


def run_caller(database: str, fault: str) -> int:
    """Make one good call in a process of its own, with a fault."""
    command = [sys.executable, "-c", "from tests.integration.test_services import call_once; call_once()"]
    return subprocess.run(
        command, env={**os.environ, "DATABASE_URL": database, "DOCMILL_FAULTS": fault}, cwd=REPOSITORY,
        timeout=60, check=False,
    ).returncode  # fmt: skip


def call_once() -> None:
    async def whole() -> None:
        settings = Settings()
        async with make_pool(settings, os.environ["DATABASE_URL"]) as pool:
            await Service(pool, TERMS, worker="other:1").call(ok, PURPOSE)

    asyncio.run(whole())


async def test_a_cancelled_call_stays_unknown_and_a_cancelled_probe_lets_another_go_at_once(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(rules=replace(QUICK, probe_seconds=1000)))
    await fails(service, answers(refusal(401, {})))
    await asyncio.sleep(0.35)
    started = asyncio.Event()

    async def hang() -> Reply[str]:
        started.set()
        await asyncio.sleep(60)
        return GOOD

    calling = asyncio.create_task(service.call(hang, PURPOSE))
    await started.wait()
    calling.cancel()
    with suppress(asyncio.CancelledError):
        await calling
    await until(lambda: rows(conn, "SELECT state FROM circuit_breakers") == [("open",)])
    assert rows(conn, "SELECT outcome FROM provider_usage ORDER BY started_at DESC LIMIT 1") == [("unknown",)]
    assert (await service.call(ok, PURPOSE)).value == "fine"


async def test_a_call_that_is_cancelled_once_it_is_answered_returns_its_answer_first(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    kept: list[str] = []

    async def send() -> Reply[str]:
        conn.execute("BEGIN")
        conn.execute("LOCK TABLE provider_usage IN EXCLUSIVE MODE")
        return GOOD

    async def call() -> None:
        kept.append((await service.call(send, PURPOSE)).value)
        await asyncio.sleep(60)
        kept.append("and went on")

    calling = asyncio.create_task(call())
    await until(lambda: bool(service._settling))
    calling.cancel()
    with suppress(asyncio.CancelledError):
        await calling
    assert kept == ["fine"]
    conn.execute("COMMIT")
    await until(lambda: rows(conn, "SELECT outcome FROM provider_usage") == [("ok",)])


async def test_a_429_is_waited_for_in_place_if_short_and_else_in_the_queue(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(patience_seconds=1, requests_per_minute=1000))
    assert (await service.call(answers(refusal(429, {"retry-after-ms": "50"}), GOOD), PURPOSE)).value == "fine"
    assert rows(conn, "SELECT outcome FROM provider_usage ORDER BY started_at") == [("rate_limited",), ("ok",)]
    assert rows(conn, "SELECT share < 0.71 FROM provider_budget_use") == [(True,)]
    error = await fails(service, answers(refusal(429, {"retry-after": "20"})))
    assert isinstance(error, RateLimitError) and error.retry_after == 20
    waiting = await fails(service, ok)
    assert isinstance(waiting, RateLimitError) and waiting.retry_after is not None and 18 < waiting.retry_after <= 20
    assert rows(conn, "SELECT state FROM circuit_breakers") == [("closed",)]


async def test_headers_of_a_good_answer_that_say_stop_stop_all_workers(make: Make, conn: psycopg.Connection) -> None:
    one, two = await opened(make()), await opened(make())
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m0s"}
    await one.call(answers(replace(GOOD, headers=headers)), PURPOSE)
    error = await fails(two, ok)
    assert isinstance(error, RateLimitError) and error.retry_after is not None and 55 < error.retry_after <= 60


async def test_a_503_that_says_when_to_come_back_is_believed_by_all(make: Make, conn: psycopg.Connection) -> None:
    one, two = await opened(make(rules=Rules())), await opened(make(rules=Rules()))
    assert type(await fails(one, answers(refusal(503, {"retry-after": "40"})))) is ServiceUnavailable
    error = await fails(two, ok)
    assert isinstance(error, RateLimitError) and error.retry_after is not None and 35 < error.retry_after <= 40


async def test_what_a_service_says_wrongly_keeps_no_call_from_being_entered(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(tokens_per_minute=100_000))
    odd: Any = "many"
    for reply in (replace(GOOD, tokens_in=-5), replace(GOOD, tokens_in=10**30, pages=2**40), replace(GOOD, tokens_out=odd)):
        await service.call(answers(reply), PURPOSE)
    await fails(service, answers(BadAnswer("lone \ud800 and \x00")))
    assert rows(conn, "SELECT outcome, tokens_in, tokens_out, pages FROM provider_usage ORDER BY started_at") == [
        ("ok", None, None, None), ("ok", None, None, None), ("ok", 900, None, None), ("bad_answer", None, None, None)
    ]  # fmt: skip


async def test_a_request_larger_than_a_minutes_budget_is_refused_for_good(make: Make) -> None:
    service = await opened(make(tokens_per_minute=999))
    error = await fails(service, ok)
    assert isinstance(error, PermanentError) and "EMBEDDING_TOKENS_PER_MINUTE is 999" in str(error)


async def test_calls_that_cost_nothing_are_entered_only_where_they_fail(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    free = replace(PURPOSE, tokens=0, recorded=False)
    await service.call(ok, free)
    assert rows(conn, "SELECT count(*) FROM provider_usage") == [(0,)]
    await fails(service, down, free)
    assert rows(conn, "SELECT outcome FROM provider_usage") == [("failed",)]


async def test_no_call_is_made_before_its_intent_is_written_and_a_paid_answer_survives_an_outage(
    make: Make, conn: psycopg.Connection, database: str
) -> None:
    service = await opened(make())
    name = conn.info.dbname
    sent = 0

    async def send() -> Reply[str]:
        nonlocal sent
        sent += 1
        if sent == 1:
            away(True)
        return GOOD

    with psycopg.connect(database.replace(name, "postgres"), autocommit=True) as admin:

        def away(gone: bool) -> None:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {not gone}")
            if gone:
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])

        first = asyncio.create_task(service.call(send, PURPOSE))
        await until(lambda: sent > 0)
        second = asyncio.create_task(service.call(send, PURPOSE))
        await asyncio.sleep(0.5)
        assert sent == 1 and not second.done()
        away(False)
        assert [(await task).value for task in (first, second)] == ["fine", "fine"]
    with psycopg.connect(database, autocommit=True) as again:
        await until(lambda: rows(again, "SELECT outcome FROM provider_usage") == [("ok",), ("ok",)])


async def test_a_document_that_failed_the_probe_goes_behind_those_who_wait(make: Make) -> None:
    service = await opened(make(rules=replace(QUICK, open_seconds=20)))
    culprit = await fails(service, answers(refusal(401, {})))
    others = [await fails(service, ok) for _ in range(20)]
    assert isinstance(culprit, ServiceUnavailable)
    waits = [error.retry_after or 0 for error in others if isinstance(error, ServiceUnavailable)]
    assert len(waits) == 20 and max(waits) < (culprit.retry_after or 0)


async def test_after_the_probe_calls_are_let_in_at_a_growing_rate(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make(patience_seconds=1.5))
    await fails(service, answers(refusal(401, {})))
    await asyncio.sleep(0.35)
    await service.call(ok, PURPOSE)
    results = await asyncio.gather(*(service.call(ok, PURPOSE) for _ in range(30)), return_exceptions=True)
    let_in = sum(isinstance(result, Reply) for result in results)
    assert 1 <= let_in <= 3
    waits = [result.retry_after for result in results if isinstance(result, ServiceUnavailable)]
    assert len(waits) == 30 - let_in and all(wait is not None and wait < 6 for wait in waits)


async def test_success_writes_nothing_to_the_breaker(make: Make, conn: psycopg.Connection) -> None:
    service = await opened(make())
    await service.call(ok, PURPOSE)
    before = rows(conn, "SELECT xmin::text, ctid::text FROM circuit_breakers")
    for _ in range(5):
        await service.call(ok, PURPOSE)
    assert rows(conn, "SELECT xmin::text, ctid::text FROM circuit_breakers") == before


def docmill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "breaker", *arguments], capture_output=True, text=True, timeout=90, check=False
    )


@pytest.mark.usefixtures("settings")
def test_the_command_lists_and_resets(conn: psycopg.Connection) -> None:
    conn.execute("SELECT take_budget(%s, 100, 0, 5, 5)", [NAME])
    conn.execute("UPDATE circuit_breakers SET state = 'open', reason = 'HTTP 401', refused = TRUE, try_at = now() + interval '1 h'")
    (row,) = json.loads(docmill("list", "--json").stdout)
    assert (row["service"], row["state"], row["reason"], row["requests_last_minute"]) == (NAME, "open", "HTTP 401", 1)
    shown = docmill("list").stdout
    assert f"{NAME}\n" in shown and "HTTP 401" in shown and "1 of 100 requests" in shown
    done = docmill("reset", NAME, "nobody")
    assert (done.returncode, done.stdout) == (1, f"Closed: {NAME}\n") and 'no service "nobody"' in done.stderr
    assert rows(conn, "SELECT state, try_at FROM circuit_breakers") == [("closed", None)]
