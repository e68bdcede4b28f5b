"""What the runner promises: claims, fencing, carrying, checkpoints, one failure path."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from jobs.database import make_pool
from jobs.pipeline.claiming import Job
from models.documents import Document, PageMark
from models.errors import ParseError, PermanentError, RateLimitError, RetryableError, ServiceUnavailable
from models.stages import STAGE_BY_NAME, STAGES
from tests.integration import conftest
from tests.integration.conftest import STAGE_NAMES, Bench, sha

RESULTS = """SELECT d.doc_id, d.version, d.served_version, d.milestone, d.state, d.chunk_count, d.raw_extraction, c.id, c.chunk_index,
    c.content, c.language, c.embedding::text, c.embedding_model, m.markdown
    FROM file_extractions d JOIN document_chunks c USING (doc_id, version) JOIN document_markdown m USING (doc_id, version)
    ORDER BY d.doc_id, c.chunk_index"""


async def test_a_carried_document_is_claimed_once_and_ends_complete(bench: Bench) -> None:
    bench.submit()
    assert await bench.drain() == 1
    assert bench.calls == STAGE_NAMES
    assert bench.one("SELECT milestone, state, claim, served_version, chunk_count, lease_until FROM file_extractions") == (
        "complete", "complete", 1, 1, 5, None,
    )  # fmt: skip
    assert bench.one("SELECT count(*), count(DISTINCT chunk_index), min(language) FROM document_chunks") == (5, 5, "en")
    assert bench.all("SELECT stage FROM document_events WHERE stage IS NOT NULL ORDER BY id") == [(name,) for name in STAGE_NAMES]
    assert bench.one(
        "SELECT event, correlation_id = (SELECT correlation_id FROM file_extractions) FROM document_events ORDER BY id DESC"
    ) == (
        "completed",
        True,
    )


async def test_handing_on_through_the_queue_gives_the_same_rows_as_carrying(bench: Bench) -> None:
    bench.submit("a")
    bench.submit("b")
    assert await bench.drain() == 2
    carried = bench.all(RESULTS)
    bench.conn.execute("DELETE FROM file_extractions")
    bench.calls.clear()
    bench.submit("a")
    bench.submit("b")
    # A size is known from validate on, and small ones go together.
    assert await bench.drain(handoff="queue") == 2 + len(STAGES) - 1
    assert sorted(bench.calls) == sorted(2 * STAGE_NAMES)
    assert bench.all(RESULTS) == carried
    for buffer in ("chunk_buffer", "vector_buffer", "extraction_buffer"):
        assert bench.one(f"SELECT count(*) FROM {buffer}") == (0,)


async def test_a_worker_hands_on_what_belongs_to_a_queue_it_does_not_listen_to(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    job, doc_id = found
    await bench.runner().run(Job(job.id, job.stage, frozenset({"cpu"})), doc_id)
    assert bench.calls == STAGE_NAMES[:4]
    assert bench.one("SELECT milestone, state, lease_until FROM file_extractions") == ("chunks_stored", "queued", None)
    assert bench.one("SELECT queue_name, task_name FROM procrastinate_jobs WHERE status = 'todo'") == ("embed", "embed")
    await bench.runner().run(Job(99, "validate", frozenset({"extract"})), doc_id)  # a stray job on the wrong worker
    assert bench.one("SELECT milestone, state FROM file_extractions") == ("chunks_stored", "queued")
    await bench.drain()
    assert bench.calls == STAGE_NAMES


async def test_a_fenced_worker_writes_nothing_and_ends_well(bench: Bench) -> None:
    async def newer_claim(document: Document) -> None:
        bench.conn.execute("UPDATE file_extractions SET claim = claim + 1")

    bench.also["extract"] = newer_claim
    bench.submit()
    await bench.drain()
    assert bench.one("SELECT milestone, state, chunk_count FROM file_extractions") == ("uploaded", "working", None)
    assert bench.one("SELECT count(*) FROM document_chunks") == (0,)
    assert bench.one("SELECT count(*) FROM document_markdown") == (0,)
    assert bench.all("SELECT event FROM document_events WHERE stage IS NOT NULL") == [("fenced_off",)]


async def test_new_content_in_mid_run_drops_the_old_work_and_ends_with_the_new(bench: Bench) -> None:
    async def resubmit(document: Document) -> None:
        if document.version == 1:
            bench.submit(content="2")

    bench.also["embed"] = resubmit
    bench.submit()
    await bench.drain()
    assert bench.one("SELECT version, served_version, state FROM file_extractions") == (2, 2, "complete")
    assert bench.all("SELECT DISTINCT version FROM document_chunks") == [(2,)]
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)


async def test_the_old_version_answers_until_the_new_one_is_complete(bench: Bench) -> None:
    bench.submit()
    await bench.drain()
    seen: list[Any] = []

    async def look(document: Document) -> None:
        seen.append(bench.all("SELECT DISTINCT version FROM document_chunks"))

    bench.also["finalize"] = look
    bench.submit(content="2")
    await bench.drain(checkpoint_seconds=0)
    assert seen == [[(1,)]]
    assert bench.all("SELECT DISTINCT version FROM document_chunks") == [(2,)]
    assert bench.all("SELECT version FROM document_markdown") == [(2,)]


async def test_searches_by_file_type_find_what_is_served_while_a_new_version_waits_or_has_failed(bench: Bench) -> None:
    async def fail(_: Document) -> None:
        raise PermanentError("no")

    found = "SELECT version FROM search_by_text('text', file_type => 'text')"
    bench.submit(content="1")
    await bench.drain()
    assert bench.all(found) == [(1,)]
    bench.submit(content="2")
    assert bench.all(found) == [(1,)]
    bench.also["validate"] = fail
    await bench.drain()
    assert bench.one("SELECT state FROM file_extractions") == ("failed",)
    assert bench.all(found) == [(1,)]


async def test_a_new_version_that_fails_leaves_the_old_one_served(bench: Bench) -> None:
    bench.submit()
    await bench.drain()

    async def fail(document: Document) -> None:
        raise ParseError("broken.txt: no")

    bench.also["extract"] = fail
    bench.submit(content="2")
    await bench.drain()
    assert bench.one("SELECT version, served_version, state, raw_extraction->>'title' FROM file_extractions") == (
        2, 1, "failed", "text of a version 1",
    )  # fmt: skip
    assert bench.all("SELECT DISTINCT version FROM document_chunks") == [(1,)]


async def test_a_checkpointed_stage_is_never_run_again(bench: Bench) -> None:
    failures = [RetryableError("busy"), RetryableError("busy")]

    async def fail_twice(document: Document) -> None:
        if failures:
            raise failures.pop()

    bench.also["embed"] = fail_twice
    bench.submit()
    assert await bench.drain() == 3
    assert bench.calls == [*STAGE_NAMES[:4], "embed", "embed", *STAGE_NAMES[4:]]
    assert bench.one("SELECT state, retry_count, error_type, error_message FROM file_extractions") == ("complete", 0, None, None)
    assert bench.all("SELECT attempt FROM document_events WHERE event = 'retry_scheduled' ORDER BY id") == [(0,), (1,)]


async def test_a_failure_is_recorded_with_what_was_done_before_it_and_waits_its_backoff(bench: Bench) -> None:
    async def fail(document: Document) -> None:
        raise RetryableError("the disk is busy")

    bench.also["chunk"] = fail
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner(retry_base_delay_seconds=100.0).run(*found)
    assert bench.one("SELECT milestone, state, retry_count, error_type, error_message, lease_until FROM file_extractions") == (
        "parse_validated", "retrying", 1, "RETRYABLE", "the disk is busy", None,
    )  # fmt: skip
    assert bench.one(
        "SELECT task_name, scheduled_at BETWEEN now() + '90 s' AND now() + '151 s' FROM procrastinate_jobs WHERE status = 'todo'"
    ) == ("chunk", True)
    assert bench.one("SELECT count(*) FROM document_markdown") == (1,)
    assert bench.one("SELECT status FROM document_status") == ("retrying",)


async def test_retries_end_in_a_dead_letter_with_the_reason(bench: Bench) -> None:
    async def fail(document: Document) -> None:
        raise RuntimeError("nul \x00 and surrogate \ud800")

    bench.also["parse"] = fail
    bench.submit()
    assert await bench.drain() == 4
    assert bench.one("SELECT state, status, retry_count, error_type FROM file_extractions") == ("failed", "failed", 3, "UNKNOWN")
    stage, kind, message, trace, context, resolved = bench.one(
        "SELECT stage, error_type, error_message, traceback, context, resolved_at FROM dead_letters"
    )
    assert (stage, kind, message, resolved) == ("parse", "UNKNOWN", "nul  and surrogate ?", None)
    assert "RuntimeError" in trace
    assert context["milestone"] == "upload_validated"
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')") == (0,)


@pytest.mark.parametrize("error", [ParseError("broken"), PermanentError("never")])
async def test_what_cannot_be_helped_is_a_dead_letter_at_once(bench: Bench, error: Exception) -> None:
    async def fail(document: Document) -> None:
        raise error

    bench.also["parse"] = fail
    bench.submit()
    assert await bench.drain() == 1
    assert bench.one("SELECT state, retry_count FROM file_extractions") == ("failed", 0)


@pytest.mark.parametrize("error", [RateLimitError("slow down", retry_after=7), ServiceUnavailable("breaker open", retry_after=7)])
async def test_waiting_for_a_service_does_not_count(bench: Bench, error: Exception) -> None:
    waits = [error] * 5

    async def fail(document: Document) -> None:
        if waits:
            raise waits.pop()

    bench.also["embed"] = fail
    bench.submit()
    assert await bench.drain() == 6
    assert bench.one("SELECT state, retry_count FROM file_extractions") == ("complete", 0)
    assert bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'false'") == (5,)


async def test_a_database_that_goes_away_while_a_stage_asks_it_never_counts(bench: Bench) -> None:
    met = 0

    async def ask(_: Document) -> None:
        nonlocal met
        if met < 6:
            met += 1
            async with bench.pool.connection() as conn:
                await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    bench.also["embed"] = ask
    bench.submit()
    assert await bench.drain() == 7
    assert bench.one("SELECT state, retry_count FROM file_extractions") == ("complete", 0)
    told = bench.all("SELECT DISTINCT detail->>'error_type', detail->>'counts' FROM document_events WHERE event = 'retry_scheduled'")
    assert told == [("RETRYABLE", "false")]


async def test_a_stage_that_takes_too_long_is_a_timeout(bench: Bench) -> None:
    async def hang(document: Document) -> None:
        await asyncio.sleep(60)

    bench.also["parse"] = hang
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner(stage_timeout_seconds=0.05).run(*found)
    state, kind, message = bench.one("SELECT state, error_type, error_message FROM file_extractions")
    assert (state, kind) == ("retrying", "TIMEOUT")
    assert "STAGE_TIMEOUT_SECONDS" in message


async def test_shutdown_hands_on_at_once_without_counting(bench: Bench) -> None:
    started = asyncio.Event()

    async def hang(document: Document) -> None:
        started.set()
        await asyncio.sleep(60)

    bench.also["embed"] = hang
    bench.submit()
    found = bench.fetch()
    assert found is not None
    running = asyncio.create_task(bench.runner().run(*found))
    await started.wait()
    running.cancel()
    await running  # ends well: the job is no failure
    assert bench.one("SELECT milestone, state, retry_count, lease_until FROM file_extractions") == ("chunks_stored", "queued", 0, None)
    assert bench.one("SELECT task_name FROM procrastinate_jobs WHERE status = 'todo'") == ("embed",)
    bench.also.clear()
    await bench.drain()
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


async def test_a_shutdown_in_mid_claim_leaves_no_claim_that_nobody_knows_of(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    with psycopg.connect(bench.conn.info.dsn) as other:
        other.execute("SELECT FROM file_extractions FOR UPDATE")
        running = asyncio.create_task(bench.runner().run(*found))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        for _ in range(1000):
            if bench.one(waiting)[0]:
                break
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.sleep(0)
    await running
    assert bench.one("SELECT state, lease_until, crash_count FROM file_extractions") == ("queued", None, 0)
    assert bench.leases.held() == []
    await bench.drain()
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


async def test_a_lease_that_is_lost_while_the_trail_is_told_of_it_ends_the_job_well(bench: Bench) -> None:
    running: asyncio.Task[None] | None = None

    async def superseded(document: Document) -> None:
        bench.conn.execute("UPDATE file_extractions SET claim = claim + 1")

    bench.also["finalize"] = superseded
    bench.submit()
    found = bench.fetch()
    assert found is not None
    runner = bench.runner()
    tell = runner._endings._tell

    async def slowly(event: dict[str, Any]) -> None:
        assert running is not None
        running.cancel()
        await asyncio.sleep(0.05)
        await tell(event)

    runner._endings._tell = slowly  # type: ignore[method-assign]
    running = asyncio.create_task(runner.run(*found))
    await running
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)


async def test_a_stopping_worker_finishes_its_stage_and_hands_on(bench: Bench) -> None:
    async def stop(document: Document) -> None:
        bench.stopping = True

    bench.also["parse"] = stop
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    assert bench.calls == STAGE_NAMES[:2]
    assert bench.one("SELECT milestone, state FROM file_extractions") == ("parse_complete", "queued")


async def test_a_lease_is_waited_for_and_left_to_the_reconciler_once_expired(bench: Bench) -> None:
    for left in ("40 s", "-1 s"):
        bench.conn.execute("DELETE FROM file_extractions")
        bench.conn.execute("DELETE FROM procrastinate_jobs")
        bench.submit()
        bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + %s::interval", [left])
        found = bench.fetch()
        assert found is not None
        claim = bench.one("SELECT claim FROM file_extractions")[0]
        await bench.runner(reconcile_seconds=5.0).run(*found)
        assert bench.calls == []
        assert bench.one("SELECT state, claim, crash_count FROM file_extractions") == ("working", claim, 0)
        delay = "SELECT task_name, extract(epoch FROM scheduled_at - now())::int FROM procrastinate_jobs WHERE status = 'todo'"
        task, seconds = bench.one(delay)
        assert (task, 40 < seconds <= 46 if left == "40 s" else 3 < seconds <= 6) == ("validate", True)


async def test_a_row_that_an_open_transaction_holds_is_put_off_and_not_waited_for(bench: Bench, database: str) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions FOR UPDATE")
        await bench.runner().run(*found)
        assert bench.one("SELECT task_name, scheduled_at > now() FROM procrastinate_jobs WHERE status = 'todo'") == ("validate", True)
    bench.conn.execute("UPDATE file_extractions SET updated_at = now() - interval '20 s'")
    bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL")
    found = bench.fetch()
    assert found is not None
    with psycopg.connect(database) as holder:
        # Whole backlogs may be held, and for long: each document is looked at less often the longer it has been.
        holder.execute("SELECT FROM file_extractions FOR UPDATE")
        await bench.runner().run(*found)
        seconds = "SELECT extract(epoch FROM scheduled_at - now())::float8 BETWEEN 4 AND 5.5 FROM procrastinate_jobs WHERE status = 'todo'"
        assert bench.one(seconds) == (True,)
        bench.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo'")
    await bench.drain()
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_a_job_that_somebodys_transaction_puts_into_the_queue_anew_is_no_lost_one_if_that_fails(
    bench: Bench, database: str, ends: str
) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    with psycopg.connect(database, autocommit=True) as application:
        application.execute("BEGIN")
        application.execute("SELECT FROM file_extractions FOR UPDATE")
        application.execute("SELECT defer_stage('a', 'validate', 0)")
        running = asyncio.create_task(bench.runner().run(*found))
        await asyncio.sleep(1)
        assert not running.done(), "nobody would look at the document again"
        assert bench.one("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") == (0,)
        application.execute(ends)
    await running
    assert bench.all("SELECT task_name FROM procrastinate_jobs WHERE status = 'todo'") == [("validate",)]
    await bench.drain()
    assert bench.one("SELECT state, requeue_count FROM file_extractions") == ("complete", 0)


async def test_a_suspect_that_a_transaction_holds_when_it_is_to_begin_waits_for_its_retry_and_counts_no_attempt(
    bench: Bench, database: str
) -> None:
    bench.submit("busy")
    bench.submit("suspect")
    started, go_on = asyncio.Event(), asyncio.Event()

    async def hold(document: Document) -> None:
        if document.doc_id == "busy":
            started.set()
            await go_on.wait()

    bench.also["parse"] = hold
    runner = bench.runner()
    jobs = [bench.fetch(), bench.fetch()]
    assert jobs[0] is not None and jobs[1] is not None
    bench.conn.execute("UPDATE file_extractions SET crash_count = 1 WHERE doc_id = 'suspect'")
    running = [asyncio.create_task(runner.run(*jobs[0]))]
    await started.wait()
    running.append(asyncio.create_task(runner.run(*jobs[1])))
    async with asyncio.timeout(30):
        while bench.one("SELECT state FROM file_extractions WHERE doc_id = 'suspect'") != ("working",):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.02)
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'suspect' FOR UPDATE")
        go_on.set()
        await running[0]
        await asyncio.sleep(2)
    await running[1]
    told = bench.one("SELECT state, retry_count, error_message FROM file_extractions WHERE doc_id = 'suspect'")
    assert told == ("retrying", 0, "a: another transaction holds the document.")
    await bench.drain()
    assert bench.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == (2,)


async def test_a_stray_job_does_not_cut_a_backoff_short(bench: Bench) -> None:
    async def fail(document: Document) -> None:
        raise RetryableError("busy")

    bench.also["parse"] = fail
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner(retry_base_delay_seconds=100.0).run(*found)
    await bench.runner().run(Job(99, "validate", None), "a")
    assert bench.calls == STAGE_NAMES[:2]
    assert bench.one("SELECT state, retry_count FROM file_extractions") == ("retrying", 1)


async def test_what_cannot_even_be_sent_to_the_database_fails_the_document(bench: Bench) -> None:
    real = bench.runner()
    stages = dict(real._runs._stages)

    async def surrogate(document: Document, tools: object) -> Document:
        return replace(document, markdown="\ud800", parser="plain 1")

    real._runs._stages = {**stages, "parse": surrogate}
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await real.run(*found)
    state, kind, message = bench.one("SELECT state, error_type, error_message FROM file_extractions")
    assert (state, kind) == ("retrying", "UNKNOWN")
    assert "surrogate" in message
    assert bench.leases.held() == []


async def test_two_cancellations_during_the_last_checkpoint_do_not_cut_it_off(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    reached = asyncio.Event()

    async def hold_the_row(document: Document) -> None:
        bench.conn.execute("BEGIN")
        bench.conn.execute("SELECT FROM file_extractions FOR UPDATE")
        reached.set()

    bench.also["finalize"] = hold_the_row
    running = asyncio.create_task(bench.runner().run(*found))
    await reached.wait()
    for _ in range(2):
        await asyncio.sleep(0.1)
        running.cancel()
    await asyncio.sleep(0.1)
    bench.conn.execute("COMMIT")
    await running
    assert bench.one("SELECT state, claim FROM file_extractions") == ("complete", 1)


async def test_a_job_for_a_finished_document_ends_well_and_one_for_an_unknown_document_fails_loudly(bench: Bench) -> None:
    bench.submit()
    await bench.drain()
    bench.calls.clear()
    await bench.runner().run(Job(1, "validate", None), "a")
    assert bench.calls == []
    with pytest.raises(PermanentError, match="no document"):
        await bench.runner().run(Job(1, "validate", None), "nobody")


async def test_a_lease_is_renewed_while_a_stage_runs_and_lost_when_another_claims(bench: Bench) -> None:
    renewed: list[bool] = []

    async def slow(document: Document) -> None:
        bench.conn.execute("UPDATE file_extractions SET lease_until = now() + interval '1 s'")
        for _ in range(100):
            await asyncio.sleep(0.05)
            if bench.one("SELECT lease_until > now() + interval '1.2 s' FROM file_extractions")[0]:
                renewed.append(True)
                break
        bench.conn.execute("UPDATE file_extractions SET claim = claim + 1")
        await asyncio.sleep(60)  # cancelled when the renewal finds the newer claim

    bench.also["parse"] = slow
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner(lease_seconds=2.0).run(*found)
    assert renewed == [True]
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (1,)
    assert bench.one("SELECT milestone FROM file_extractions") == ("uploaded",)


async def test_a_blocked_event_loop_does_not_lose_the_lease(bench: Bench) -> None:
    async def block(document: Document) -> None:
        time.sleep(3)  # noqa: ASYNC251  # what a badly behaved stage does

    bench.also["parse"] = block
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner(lease_seconds=2.0).run(*found)
    assert bench.one("SELECT state, claim FROM file_extractions") == ("complete", 1)


async def test_results_over_the_carry_limit_are_checkpointed_on_the_way(bench: Bench) -> None:
    bench.submit()
    stored: list[Any] = []

    async def look(document: Document) -> None:
        stored.append(bench.one("SELECT milestone FROM file_extractions")[0])

    bench.also["check"] = look
    await bench.drain(carry_limit_mb=0)
    assert stored == ["parse_complete"]
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


@pytest.mark.parametrize(("in_between", "limit_mb"), [("check", 0), ("chunk", 0), ("check", 64)])
async def test_a_text_that_is_stored_already_is_not_sent_again(bench: Bench, in_between: str, limit_mb: int) -> None:
    async def write_over(document: Document) -> None:
        bench.conn.execute("UPDATE document_markdown SET markdown = 'as it was stored'")

    bench.submit()
    bench.also[in_between] = write_over
    await bench.drain(carry_limit_mb=limit_mb)
    text = "text of a version 1"
    stored = text if limit_mb else "as it was stored"
    assert bench.one("SELECT markdown, markdown_sha256, parser FROM document_markdown") == (stored, sha(text), "plain 1")


@pytest.mark.parametrize(("text", "start"), [("another text", 2), ("text of a version 1", 0)])
async def test_a_text_or_page_map_that_check_has_changed_is_stored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, text: str, start: int
) -> None:
    def made_by(stage: str, document: Document) -> Document:
        made = plain(stage, document)
        if stage == "check" and text != made.markdown:
            made = replace(made, markdown=text)
        return replace(made, pages=(PageMark(1, 2 if stage == "parse" else start),)) if stage in ("parse", "check") else made

    plain = conftest.made_by
    monkeypatch.setattr(conftest, "made_by", made_by)
    bench.submit()
    await bench.drain(carry_limit_mb=0)
    assert bench.one("SELECT markdown, page_map->0->'start' FROM document_markdown") == (text, start)


async def connections(bench: Bench, count: int) -> set[int]:
    """Return the processes of so many connections of the pool, having used them at once."""
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(bench.pool.connection()) for _ in range(count)]
        return {conn.info.backend_pid for conn in held}


async def test_the_connection_that_sent_a_large_text_is_replaced_alone_and_without_a_warning(
    bench: Bench, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.pool = make_pool(bench.settings, database, max_size=3)
    await bench.pool.open()
    try:
        before = await connections(bench, 3)
        bench.submit("a")
        await bench.drain(carry_limit_mb=0)
        assert await connections(bench, 3) == before
        monkeypatch.setattr("jobs.pipeline.durable.SMALL_BYTES", 10)
        bench.submit("b")
        await bench.drain(carry_limit_mb=0)  # a checkpoint after each stage: one of them has a text that is new
        after = await connections(bench, 3)
    finally:
        await bench.pool.close()
    assert len(before & after) == 2
    assert [record for record in caplog.records if record.name == "psycopg.pool" and record.levelno >= logging.WARNING] == []
    assert bench.all("SELECT state FROM file_extractions") == [("complete",)] * 2


@pytest.mark.parametrize(
    ("handoff", "workers", "without"),
    [
        ("queue", ["cpu embed extract"], ["embed", "finalize"]),
        ("inline", ["cpu", "embed", "extract"], ["embed", "finalize"]),
        ("inline", ["cpu", "embed extract"], ["finalize"]),
        ("inline", ["cpu embed extract"], []),
    ],
)
async def test_a_text_is_loaded_for_the_stages_alone_that_read_it_and_stays_as_it_is(
    bench: Bench, handoff: str, workers: list[str], without: list[str]
) -> None:
    """`workers`: the queues that each listens to."""
    read: dict[str, bool] = {}

    def note(stage: str) -> Callable[[Document], Awaitable[None]]:
        async def noted(document: Document) -> None:
            read[stage] = document.markdown is not None

        return noted

    bench.also = {name: note(name) for name in STAGE_NAMES[3:]}
    bench.submit()
    while found := bench.fetch():
        job, doc_id = found
        listening = next(frozenset(queues.split()) for queues in workers if STAGE_BY_NAME[job.stage].queue in queues.split())
        await bench.runner(handoff=handoff, storage_keep_extracted=False).run(replace(job, queues=listening), doc_id)
    assert [name for name, there in read.items() if not there] == without
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)
    text = "text of a version 1"
    assert bench.one("SELECT markdown, markdown_sha256, parser FROM document_markdown") == (text, sha(text), "plain 1")


async def test_the_job_is_finished_in_the_checkpoint_that_ends_the_work(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    assert bench.one("SELECT status, attempts FROM procrastinate_jobs") == ("succeeded", 1)


async def test_a_batch_is_settled_after_its_last_document(bench: Bench) -> None:
    run = bench.one("SELECT begin_batch('b', 'default', NULL, 'c')")[0]
    for doc_id in ("a", "z"):
        bench.conn.execute("SELECT accept_document(%s,'default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,50)", [doc_id, run])
    bench.conn.execute("SELECT seal_batch('b', %s, 2)", [run])

    async def fail(document: Document) -> None:
        if document.doc_id == "z":
            raise ParseError("no")

    bench.also["parse"] = fail
    await bench.drain()
    assert bench.one("SELECT status, completed, failed, total_files FROM batch_status") == ("completed_with_errors", 1, 1, 2)


async def test_results_that_cannot_be_stored_are_dropped_and_the_document_fails_alone(bench: Bench) -> None:
    async def poison(document: Document) -> None:
        bench.conn.execute("ALTER TABLE document_chunks ADD CHECK (content <> 'version')")

    bench.also["extract"] = poison
    bench.submit()
    assert await bench.drain() == 1
    assert bench.one("SELECT state, milestone, error_type FROM file_extractions") == ("failed", "uploaded", "PERMANENT")
    assert bench.one("SELECT count(*) FROM document_chunks") == (0,)


async def test_a_failure_with_results_that_cannot_be_stored_is_recorded_with_what_refuses_them(bench: Bench) -> None:
    bench.conn.execute("ALTER TABLE document_markdown ADD CHECK (parser <> 'plain 1')")

    async def fail(_: Document) -> None:
        raise ParseError("broken")

    bench.also["check"] = fail
    bench.submit()
    await bench.drain()
    assert bench.one("SELECT state, milestone, crash_count FROM file_extractions") == ("failed", "uploaded", 0)
    assert bench.one("SELECT error_type, error_message FROM dead_letters")[0] == "PERMANENT"
    assert "document_markdown" in bench.one("SELECT error_message FROM dead_letters")[0]


async def test_results_that_cannot_be_stored_are_dropped_at_shutdown(bench: Bench) -> None:
    bench.conn.execute("ALTER TABLE document_markdown ADD CHECK (parser <> 'plain 1')")

    async def stop(_: Document) -> None:
        bench.stopping = True
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    bench.also["check"] = stop
    bench.submit()
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    assert bench.one("SELECT state, milestone, crash_count FROM file_extractions") == ("queued", "uploaded", 0)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo' AND task_name = 'validate'") == (1,)


async def test_a_checkpoint_survives_a_connection_that_is_cut_under_it(bench: Bench) -> None:
    async def cut(document: Document) -> None:
        bench.conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    bench.also["finalize"] = cut
    bench.submit()
    assert await bench.drain() == 1
    assert bench.one("SELECT state, retry_count, claim FROM file_extractions") == ("complete", 0, 1)
    assert bench.one("SELECT count(*) FROM document_chunks") == (5,)


async def test_a_cancellation_during_the_last_checkpoint_neither_loses_nor_doubles_it(bench: Bench) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    reached = asyncio.Event()

    async def hold_the_row(document: Document) -> None:
        bench.conn.execute("BEGIN")
        bench.conn.execute("SELECT FROM file_extractions FOR UPDATE")
        reached.set()

    bench.also["finalize"] = hold_the_row
    running = asyncio.create_task(bench.runner().run(*found))
    await reached.wait()
    await asyncio.sleep(0.1)  # the checkpoint waits for the row now
    running.cancel()
    await asyncio.sleep(0.1)
    bench.conn.execute("COMMIT")
    await running
    assert bench.one("SELECT state, claim FROM file_extractions") == ("complete", 1)
    assert bench.all("SELECT status FROM procrastinate_jobs") == [("succeeded",)]
    assert bench.one("SELECT count(*) FROM document_events WHERE event IN ('fenced_off', 'handed_on')") == (0,)


async def test_a_suspect_that_waits_to_be_alone_is_handed_on_at_shutdown(bench: Bench) -> None:
    bench.submit("busy")
    bench.submit("suspect")
    started = asyncio.Event()

    async def hang(document: Document) -> None:
        started.set()
        await asyncio.sleep(60)

    bench.also["parse"] = hang
    runner = bench.runner()
    jobs = [bench.fetch(), bench.fetch()]
    assert jobs[0] is not None
    assert jobs[1] is not None
    busy = asyncio.create_task(runner.run(*jobs[0]))
    await started.wait()
    bench.conn.execute("UPDATE file_extractions SET crash_count = 1 WHERE doc_id = 'suspect'")
    waiting = asyncio.create_task(runner.run(*jobs[1]))
    for _ in range(1000):
        if "suspect" in bench.leases.held():
            break
        await asyncio.sleep(0.01)
    waiting.cancel()
    await waiting
    assert bench.one("SELECT state, lease_until FROM file_extractions WHERE doc_id = 'suspect'") == ("queued", None)
    assert bench.leases.held() == ["busy"]
    busy.cancel()
    await busy
