"""Documents that wait for a service's breaker: each has one place, nobody waits for a service that is up, and nobody comes in a crowd."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from jobs.breaker import Rules
from jobs.pipeline.claiming import Job
from jobs.pipeline.runner import Runner
from jobs.reconcile import Reconciler
from jobs.retry import StageRetry
from jobs.stages import embed
from sql import query
from tests.integration.conftest import Bench
from tests.integration.outside import RULES, Outside
from tests.servers import OpenAIServer, faults

NAME = "embedding http://local key:none"
PERIOD = 0.5


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    made = Outside(bench, passages=1)
    yield made
    await made.aclose()


def runner(outside: Outside, endpoint: OpenAIServer, rules: Rules, worker: str = "test:1") -> Runner:
    """A worker that waits as long as it is told."""
    made = outside.runner({"embed": embed.run}, worker, embedder=outside.embedder(endpoint.url))
    front = outside.fronts[-1]
    front.terms = front._breaker._terms = front._ledger._terms = replace(front.terms, rules=rules)
    made._runs._retry = made._endings._retry = StageRetry(max_attempts=3, base=0.1, max_delay=1)
    return made


def due(bench: Bench) -> tuple[Job, str] | None:
    """Fetch a job as a worker does, if one is due."""
    params = {"queues": None, "worker_id": None, "after_user": "", "others_first": False, "max_documents": 0}
    row = bench.conn.execute(query("fetch_job"), params).fetchone()
    assert row is not None
    return None if row[0] is None else (Job(row[0], row[2], None), row[6]["doc_id"])


async def work(bench: Bench, made: Runner) -> int:
    """Run what is due and return how many jobs that were."""
    count = 0
    while found := due(bench):
        await made.run(*found)
        count += 1
    return count


def reconciler(bench: Bench) -> Reconciler:
    return Reconciler(bench.settings.model_copy(update={"reconcile_seconds": PERIOD}), bench.pool)


def waiting(bench: Bench) -> list[tuple[Any, ...]]:
    return bench.all(
        """SELECT d.doc_id, d.state::text, d.waiting_place, round(extract(epoch FROM d.not_before - now())) > 50,
            j.scheduled_at - d.not_before
        FROM file_extractions AS d JOIN procrastinate_jobs AS j ON j.status = 'todo' AND j.args ->> 'doc_id' = d.doc_id
        WHERE d.waiting_for = %s ORDER BY d.doc_id""",
        NAME,
    )


async def test_a_reset_has_the_documents_that_wait_for_the_breaker_start_within_seconds(outside: Outside, endpoint: OpenAIServer) -> None:
    bench, made = outside.bench, runner(outside, endpoint, Rules())
    endpoint.script(faults.always(faults.NAMED["401"]))
    for doc_id in "abc":
        bench.submit(doc_id)
    assert await work(bench, made) == 3
    before = waiting(bench)
    assert [row[:4] for row in before] == [("a", "retrying", 0, True), ("b", "retrying", 1, True), ("c", "retrying", 2, True)]
    assert {row[4].total_seconds() for row in before} == {0}
    assert "bring_forward" not in await reconciler(bench).pass_once()
    endpoint.script(faults.never)
    bench.one("SELECT reset_breaker(%s)", NAME)
    done = await reconciler(bench).pass_once()
    assert done["bring_forward"] == 1
    after = waiting(bench)
    assert [row[3] for row in after] == [False] * 3 and {row[4].total_seconds() for row in after} == {0}
    assert "bring_forward" not in await reconciler(bench).pass_once()
    await asyncio.sleep(PERIOD)
    await work(bench, made)
    assert [outside.state(doc_id) for doc_id in "abc"] == [("complete", "complete", 0)] * 3
    assert endpoint.tally.requests == 1 + 1  # together
    assert bench.all("SELECT DISTINCT waiting_for, waiting_revision, waiting_place FROM file_extractions") == [(None, None, None)]


async def test_who_waits_for_the_budget_waits_on_unless_an_operator_resets(outside: Outside, endpoint: OpenAIServer) -> None:
    bench, made = outside.bench, runner(outside, endpoint, Rules())
    endpoint.script(faults.always(faults.rate_limited("600")))
    bench.submit("a")
    await work(bench, made)
    assert [row[:4] for row in waiting(bench)] == [("a", "retrying", None, True)]
    assert "bring_forward" not in await reconciler(bench).pass_once()
    endpoint.script(faults.never)
    bench.one("SELECT reset_breaker(%s)", NAME)
    assert (await reconciler(bench).pass_once())["bring_forward"] == 1
    await work(bench, made)
    assert outside.state() == ("complete", "complete", 0)


async def test_what_those_who_are_gone_leave_of_a_budget_is_for_those_behind_them(outside: Outside, endpoint: OpenAIServer) -> None:
    outside.terms["requests_per_minute"] = 6
    bench, made = outside.bench, runner(outside, endpoint, Rules())
    for number in range(12):
        bench.submit(f"d{number:02}")
    await work(bench, made)
    assert [row[:4] for row in waiting(bench)][-2:] == [("d10", "retrying", None, True), ("d11", "retrying", None, True)]
    bench.conn.execute("UPDATE provider_budgets SET next_request_at = now() + interval '1 hour'")  # used up, whatever the machine has to do
    assert "use_idle_budget" not in await reconciler(bench).pass_once()
    for number in range(10):
        bench.one("SELECT cancel_document(%s)", f"d{number:02}")
    bench.conn.execute("UPDATE provider_budgets SET next_request_at = now()")  # as some seconds later
    for count in (1, 2):
        assert (await reconciler(bench).pass_once())["use_idle_budget"] == 1
        assert "use_idle_budget" not in await reconciler(bench).pass_once()
        await asyncio.sleep(PERIOD)
        await work(bench, made)
        assert bench.one("SELECT count(*) FROM file_extractions WHERE doc_id >= 'd10' AND state = 'complete'") == (count,)
        bench.conn.execute("UPDATE provider_budgets SET next_request_at = now(), last_send_at = least(last_send_at, now())")
    bench.submit("new")
    assert "use_idle_budget" not in await reconciler(bench).pass_once()
    told = "SELECT wait_seconds FROM take_budget(%s, 6, 0, 0, -1)"  # who cannot wait at all
    assert bench.one(told, NAME)[0] < 12


async def test_an_idle_budget_is_used_by_as_many_documents_as_its_requests_hold_and_by_one_worker_at_a_time(
    bench: Bench, database: str
) -> None:
    for number in range(100):
        bench.submit(f"d{number:02}")
    bench.conn.execute("SET session_replication_role = replica")
    bench.conn.execute(
        """UPDATE file_extractions
        SET state = 'retrying', not_before = now() + interval '1 hour', waiting_for = %s, milestone = 'chunks_stored'""",
        [NAME],
    )
    bench.conn.execute("RESET session_replication_role")
    bench.conn.execute("SELECT take_budget(%s, 60, 0, 0, 60)", [NAME])
    bench.conn.execute("UPDATE provider_budgets SET next_request_at = now(), last_send_at = now()")
    bench.conn.execute(
        """INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, estimated_cost, give_up_at)
        SELECT gen_random_uuid(), %s, 'embedding', array_fill('d'::text, ARRAY[20]), array_fill(NULL::text, ARRAY[20]),
            array_fill('ann'::text, ARRAY[20]), array_fill(0.05::float8, ARRAY[20]), 0, now() FROM generate_series(1, 20)""",
        [NAME],
    )
    ask = "SELECT use_idle_budget(%s, 1000, 2.2)"  # in which the limit lets two requests through
    with psycopg.connect(database) as other:
        assert other.execute(ask, [NAME]).fetchone() == (40,)
        assert bench.one(ask, NAME) == (0,)
    assert bench.one(ask, NAME) == (0,)
    soon = "SELECT count(*) FROM file_extractions WHERE not_before <= now() + interval '3 seconds'"
    assert bench.one(soon) == (40,)


async def test_a_document_that_asks_again_keeps_its_place(outside: Outside, endpoint: OpenAIServer) -> None:
    bench, made = outside.bench, runner(outside, endpoint, Rules())
    endpoint.script(faults.always(faults.NAMED["401"]))
    for doc_id in "abc":
        bench.submit(doc_id)
    await work(bench, made)
    for _ in range(3):
        bench.conn.execute("UPDATE file_extractions SET not_before = NULL WHERE doc_id = 'b'")
        bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() WHERE status = 'todo' AND args ->> 'doc_id' = 'b'")
        assert await work(bench, made) == 1
    assert [row[:3] for row in waiting(bench)] == [("a", "retrying", 0), ("b", "retrying", 1), ("c", "retrying", 2)]
    assert bench.one("SELECT waiting FROM circuit_breakers") == (3,)


async def test_documents_are_brought_forward_at_a_rate_and_nobody_is_waited_for(
    bench: Bench, database: str, outside: Outside, endpoint: OpenAIServer
) -> None:
    made = runner(outside, endpoint, Rules())
    endpoint.script(faults.always(faults.NAMED["401"]))
    for number in range(8):
        bench.submit(f"d{number}")
    await work(bench, made)
    bench.one("SELECT reset_breaker(%s)", NAME)
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'd0' FOR UPDATE")
        bench.conn.execute("SET lock_timeout = '5s'")
        assert bench.one("SELECT bring_forward(%s, 4, 2)", NAME)[0] in (3, 4)
    spans = bench.all(
        """SELECT extract(epoch FROM scheduled_at - min(scheduled_at) OVER ())::float8 FROM procrastinate_jobs
        WHERE status = 'todo' AND scheduled_at < now() + interval '10 s' ORDER BY 1"""
    )
    assert [round(span[0], 3) for span in spans][:3] == [0.0, 0.5, 1.0]
    while bench.one("SELECT bring_forward(%s, 4, 2)", NAME) != (0,):
        pass
    assert {row[3] for row in waiting(bench)} == {False}


DOCUMENTS, WORKERS, AT_ONCE = 200, 4, 4
OUTAGE = 4.0
"""Seconds, four times as long as the breaker opens for at most, as an hour is four times 15 minutes."""


async def test_200_documents_wait_out_an_outage_without_a_stampede_and_without_spending_attempts(
    bench: Bench, outside: Outside, endpoint: OpenAIServer
) -> None:
    rules = replace(RULES, open_seconds=0.25, max_open_seconds=1.0)
    workers = [runner(outside, endpoint, rules, f"test:{number}") for number in range(WORKERS)]
    for number in range(DOCUMENTS):
        bench.submit(f"d{number}")
    began: list[float] = []

    def outage(number: int, seconds: float) -> faults.Fault | None:
        """From the first request on."""
        began.append(seconds)
        return faults.NAMED["503"] if seconds < began[0] + OUTAGE else None

    endpoint.script(outage)
    end = time.monotonic() + 90
    ended = asyncio.Event()

    async def unfinished() -> int:
        (count,) = bench.one("SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'failed')")
        return int(count)

    async def slot(made: Runner) -> None:
        while not ended.is_set() and time.monotonic() < end:
            found = due(bench)
            if found is None:
                await asyncio.sleep(0.05)
            else:
                await made.run(*found)

    async def repair() -> None:
        own = reconciler(bench)
        while await unfinished() and time.monotonic() < end:
            await own.pass_once()
            await asyncio.sleep(PERIOD)
        ended.set()

    await asyncio.gather(*(slot(made) for made in workers for _ in range(AT_ONCE)), *(repair() for _ in range(WORKERS)))
    came = [at - began[0] for at in began]
    during, after = [at for at in came if at < OUTAGE], [at for at in came if at >= OUTAGE]
    first_second = sum(at < after[0] + 1 for at in after)
    asks = [row[0] for row in bench.all("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled' GROUP BY doc_id")]
    print(
        f"\n{DOCUMENTS} documents, outage of {OUTAGE:g} s: calls {len(came)}, of which in the outage {len(during)}; in the first second "
        f"after it {first_second}; the last came {after[-1] - OUTAGE:.1f} s after it; asks per document at most {max(asks)}"
    )
    assert bench.all("SELECT state::text, max(retry_count), count(*) FROM file_extractions GROUP BY 1") == [("complete", 0, DOCUMENTS)]
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled' AND (detail ->> 'counts')::boolean") == (0,)
    assert bench.one("SELECT count(*) FROM dead_letters") == (0,)
    assert len(during) <= rules.failures + WORKERS * AT_ONCE + 12
    assert first_second <= 6
    assert max(asks) <= 12
