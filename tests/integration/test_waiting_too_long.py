"""MAX_WAIT_HOURS: waits that count as no attempt end in a dead letter that says since when, for what and why."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobs.adapters.sandbox import ProcessSandbox
from jobs.pipeline.runner import Runner
from jobs.retry import StageRetry
from jobs.stages import embed, extract
from models.documents import Document
from models.errors import RateLimitError, RetryableError, ServiceUnavailable
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.servers import OpenAIServer, faults

HOURS = 2.0


def runner(bench: Bench, **settings: Any) -> Runner:
    made = bench.runner(**settings)
    made._runs._retry = made._endings._retry = StageRetry(max_attempts=3, base=0.01, max_delay=0.02, max_wait_hours=HOURS)
    return made


async def step(bench: Bench, made: Runner) -> None:
    """Run the next waiting job."""
    found = bench.fetch()
    assert found is not None
    await made.run(*found)
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0].id])


def hours_pass(bench: Bench, hours: float) -> None:
    bench.conn.execute("UPDATE file_extractions SET waiting_since = waiting_since - make_interval(secs => %s)", [hours * 3600])


def waiting(bench: Bench) -> tuple[Any, ...]:
    """State, counted failures, and for how many whole hours it has waited."""
    return bench.one("SELECT state::text, retry_count, floor(extract(epoch FROM now() - waiting_since) / 3600)::int FROM file_extractions")


def raising(bench: Bench, stage: str, *errors: Exception | None) -> None:
    """Have a stage raise these one after the other, the last for ever; None lets it pass."""
    left = list(errors)

    async def fail(_: Document) -> None:
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error

    bench.also[stage] = fail


LIMITED = RateLimitError("embedding https://e.test answered HTTP 429.", 1)
DOWN = ServiceUnavailable("embedding https://e.test is not called for now: HTTP 503", 1)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_a_wait_that_lasts_too_long_ends_in_a_dead_letter_that_says_since_when_and_why(bench: Bench, handoff: str) -> None:
    raising(bench, "embed", LIMITED, DOWN)
    bench.submit()
    made = runner(bench, handoff=handoff)
    while waiting(bench)[0] != "retrying":
        await step(bench, made)
    assert waiting(bench) == ("retrying", 0, 0)
    hours_pass(bench, 1.5)
    await step(bench, made)
    assert waiting(bench) == ("retrying", 0, 1)
    began = datetime.now(UTC) - timedelta(hours=2.5)
    hours_pass(bench, 1)
    await step(bench, made)
    ((stage, kind, message),) = bench.all("SELECT stage, error_type, error_message FROM dead_letters")
    assert (stage, kind) == ("embed", "TIMEOUT")
    assert f"Waited since {began:%Y-%m-%d %H}:" in message or f"Waited since {began - timedelta(minutes=1):%Y-%m-%d %H}:" in message
    assert "longer than MAX_WAIT_HOURS=2. Last: embedding https://e.test is not called for now: HTTP 503" in message
    assert waiting(bench) == ("failed", 0, None)


async def test_a_requeued_document_may_wait_anew(bench: Bench) -> None:
    raising(bench, "embed", DOWN)
    bench.submit()
    made = runner(bench)
    await step(bench, made)
    hours_pass(bench, 3)
    await step(bench, made)
    assert waiting(bench)[0] == "failed"
    bench.conn.execute("SELECT requeue_document('a')")
    await step(bench, made)
    assert waiting(bench) == ("retrying", 0, 0)


@pytest.mark.parametrize("between", [None, RetryableError("broken"), ValueError("unforeseen")], ids=["got on", "counted", "unforeseen"])
async def test_what_is_no_wait_ends_it(bench: Bench, between: Exception | None) -> None:
    raising(bench, "embed", DOWN, between, DOWN)
    raising(bench, "extract", DOWN)
    bench.submit()
    made = runner(bench)
    await step(bench, made)
    hours_pass(bench, 1.9)
    for _ in range(1 if between is None else 2):
        await step(bench, made)
    assert waiting(bench) == ("retrying", 0 if between is None else 1, 0)


async def test_a_new_version_may_wait_anew(bench: Bench) -> None:
    raising(bench, "embed", DOWN)
    bench.submit()
    made = runner(bench)
    await step(bench, made)
    hours_pass(bench, 3)
    bench.submit(content="f")
    assert waiting(bench) == ("queued", 0, None)
    await step(bench, made)
    assert waiting(bench) == ("retrying", 0, 0)


async def test_a_handover_does_not_end_a_wait(bench: Bench) -> None:
    raising(bench, "embed", DOWN)
    bench.submit()
    made = runner(bench)
    await step(bench, made)
    hours_pass(bench, 1)

    async def stop(_: Document) -> None:
        bench.stopping = True
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    bench.also["embed"] = stop
    await step(bench, made)
    assert waiting(bench) == ("queued", 0, 1)


async def test_no_wait_is_longer_than_what_is_left_of_it(bench: Bench) -> None:
    raising(bench, "embed", ServiceUnavailable("away", 90_000))
    bench.submit()
    await step(bench, runner(bench))
    (seconds,) = bench.one("SELECT extract(epoch FROM not_before - now())::float8 FROM file_extractions")
    assert 0.9 * HOURS * 3600 < seconds <= HOURS * 3600


async def test_without_a_limit_a_document_waits_as_long_as_it_takes(bench: Bench) -> None:
    raising(bench, "embed", DOWN)
    bench.submit()
    made = runner(bench)
    made._runs._retry.max_wait_hours = 0
    for _ in range(3):
        await step(bench, made)
        hours_pass(bench, 10_000)
    assert waiting(bench)[:2] == ("retrying", 0)


async def test_a_wait_after_a_request_that_was_kept_is_a_new_one(outside: Outside, endpoint: OpenAIServer) -> None:
    bench = outside.bench
    endpoint.script(faults.sequence(faults.rate_limited("30"), None, faults.rate_limited("30"), None))
    bench.submit()
    made = outside.runner({"embed": embed.run}, embedder=outside.embedder(endpoint.url))
    made._runs._retry = made._endings._retry = StageRetry(max_attempts=3, base=0.01, max_delay=0.02, max_wait_hours=HOURS)
    for hours in (3.0, 0.0):
        await step(bench, made)
        assert waiting(bench) == ("retrying", 0, 0)
        hours_pass(bench, hours)
        bench.conn.execute("UPDATE provider_budgets SET paused_until = 'epoch'")
    await step(bench, made)
    assert outside.state() == ("complete", "complete", 0)


async def test_a_document_that_has_waited_too_long_for_its_extraction_stays_searchable(
    outside: Outside, endpoint: OpenAIServer, sandbox: ProcessSandbox
) -> None:
    bench, outside.passages = outside.bench, 2
    endpoint.script(faults.sequence(faults.rate_limited("30")))
    bench.submit()
    made = outside.runner({"extract": extract.run}, sandbox=sandbox, extractor=outside.extractor(endpoint.url))
    made._runs._retry = made._endings._retry = StageRetry(max_attempts=3, base=0.01, max_delay=0.02, max_wait_hours=HOURS)
    await step(bench, made)
    assert waiting(bench) == ("retrying", 0, 0)
    hours_pass(bench, 3)
    await step(bench, made)
    assert outside.state() == ("complete", "complete", 0)
    failure = bench.one("SELECT raw_extraction->'failure' FROM file_extractions")[0]
    assert failure["error_type"] == "TIMEOUT" and "MAX_WAIT_HOURS=2" in failure["error_message"]
