"""Small documents that are taken up together: what strikes one of them, or all, loses and doubles none."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter

import pytest

from tests.faults.harness import Arena, documents
from tests.running import descendants
from tests.servers import OpenAIServer
from tests.servers.faults import NAMED, always, never

POINTS = [
    "claimed",
    "stage_done:validate",
    "stage_started:extract",
    "before_checkpoint:complete",
    "in_checkpoint:complete",
    "committed:complete",
]
HOSTED_POINTS = ["in_checkpoint:chunks_stored", "committed:chunks_stored", "call_entered", "call_answered", "keeping", "kept"]
WAITED_POINTS = [("claimed", 20), ("call_answered", 2), ("keeping", 20), ("kept", 20), ("before_checkpoint:complete", 20)]
"""With how many others before it are spared."""
WAITING = "SELECT count(*) FROM file_extractions WHERE state = 'retrying' AND milestone = 'chunks_stored'"
TEXTS = 4
"""Most texts of one request: fewer than a document has, so that what is kept of one is needed after a kill."""
UNFINISHED = "SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'failed')"
GROUPS = "SELECT count(*) FROM (SELECT FROM file_extractions WHERE state = 'complete' GROUP BY xmin::text HAVING count(*) > 2) AS g"


KEPT_TOGETHER = "SELECT count(*) FROM (SELECT FROM document_markdown GROUP BY xmin::text HAVING count(*) > 2) AS g"
"""A text is written once, before its document is embedded; who was in a request with few others is completed with few."""


def together(arena: Arena) -> None:
    """Fail unless several documents were completed in one transaction, which is what all this is about."""
    assert arena.mode == "queue" or arena.one(GROUPS) > 0, "no documents were taken up together"


def paid_again(arena: Arena, server: OpenAIServer) -> Counter[str]:
    """Return how many texts of each document were embedded once more than needed."""
    texts = dict(arena.all("SELECT content, min(doc_id) FROM document_chunks GROUP BY content HAVING count(DISTINCT doc_id) = 1"))
    assert texts.keys() <= server.tally.seen.keys()
    again: Counter[str] = Counter()
    for text, doc_id in texts.items():
        again[doc_id] += server.tally.seen[text] - 1
    return again


def hosted(server: OpenAIServer) -> dict[str, str]:
    """Settings for a service that takes a few texts at a time."""
    return {
        "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": server.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32",
        "EMBEDDING_MAX_TEXTS": str(TEXTS), "EMBEDDING_CONCURRENT_REQUESTS": "2",
    }  # fmt: skip


def progress(arena: Arena, done: int) -> None:
    """Wait until more than so many are complete."""
    arena.wait(lambda: bool(arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") > done), "progress", 60)


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_with_several_in_hand_loses_and_doubles_none(arena: Arena, point: str) -> None:
    wanted = documents(200)
    arena.submit(wanted)
    faults = [f"kill@{point};doc={doc};once={arena.mark(doc)}" for doc in list(wanted)[10::90]]
    arena.worker(faults=faults, restart=True)
    arena.reconciler()
    arena.settle(180)
    assert arena.marks(), "the fault point was never reached"
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    together(arena)
    arena.judge("16 small documents together", f"kill -9 at {point} of some of 200")


@pytest.mark.parametrize(("point", "doc", "after"), [("call_answered", "*", 90), ("keeping", "d0020", 1), ("kept", "d0020", 1)])
def test_what_was_kept_before_a_kill_is_not_paid_for_again(arena: Arena, point: str, doc: str, after: int) -> None:
    """Killed when most have had the first of their two requests: only the second may have been under way."""
    with OpenAIServer(dimensions=32, latency=0.05) as server:
        arena.environment |= hosted(server)
        arena.submit(documents(64))
        arena.worker(faults=[f"kill@{point};doc={doc};once={arena.mark('kill')};after={after}"], restart=True)
        arena.reconciler()
        arena.settle(120)
        assert len(arena.marks()) == 1, "the fault point was never reached"
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
        again = paid_again(arena, server)
        assert max(again.values(), default=0) <= TEXTS, again
        arena.judge("16 small documents together", f"kill -9 at {point} after {after} others, embedded by a service", compared=False)


@pytest.mark.parametrize("point", HOSTED_POINTS)
def test_a_worker_killed_with_several_at_a_service_loses_and_doubles_none(arena: Arena, point: str) -> None:
    wanted = documents(200)
    with OpenAIServer(dimensions=32, latency=0.05) as server:
        arena.environment |= hosted(server)
        arena.submit(wanted)
        # A call is known by the first of its documents, which need not be one that was chosen.
        chosen = ["*"] * 3 if point.startswith("call_") else list(wanted)[10::90]
        faults = [f"kill@{point};doc={doc};once={arena.mark(f'{number}')}" for number, doc in enumerate(chosen)]
        arena.worker(faults=faults, restart=True)
        arena.reconciler()
        arena.settle(180)
        assert arena.marks(), "the fault point was never reached"
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
        assert arena.mode == "queue" or arena.one(KEPT_TOGETHER) > 0, "no documents were taken up together"
        arena.judge("16 small documents together", f"kill -9 at {point} of some of 200 embedded by a service", compared=False)


@pytest.mark.parametrize(("point", "after"), WAITED_POINTS)
def test_a_worker_killed_with_several_that_waited_for_a_service_loses_and_doubles_none(arena: Arena, point: str, after: int) -> None:
    """They wait at the service with their passages stored, and are taken up together once it is back."""
    with OpenAIServer(dimensions=32, latency=0.05) as server:
        arena.environment |= hosted(server) | {"EMBEDDING_MAX_TEXTS": "256", "BREAKER_OPEN_SECONDS": "60"}
        server.script(always(NAMED["502_html"]))
        arena.submit(documents(400))  # more than a worker has in hand
        first = arena.worker()
        arena.wait(lambda: arena.one(WAITING) == 400, "the documents to wait for the service")
        first.signal(signal.SIGTERM)
        first.wait()
        # All are due at once, as after a long outage.
        arena.one("WITH due AS (UPDATE circuit_breakers SET try_at = now() WHERE state = 'open') SELECT 1")
        arena.one("WITH due AS (UPDATE file_extractions SET not_before = now() WHERE state = 'retrying') SELECT 1")
        arena.one("WITH due AS (UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo') SELECT 1")
        server.script(never)
        arena.worker(faults=[f"kill@{point};once={arena.mark('kill')};after={after}"], restart=True)
        arena.reconciler()
        arena.settle(180)
        assert len(arena.marks()) == 1, "the fault point was never reached"
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
        together(arena)
        did = f"kill -9 at {point} after {after} others of 400 that waited for a service"
        arena.judge("16 small documents together", did, compared=False)


def test_a_lease_that_is_lost_by_all_at_once_is_made_good_by_another_worker(arena: Arena) -> None:
    wanted = documents(60)
    arena.submit(wanted)
    points = ["stage_done:check", "in_checkpoint:complete"]
    faults = [f"stop@{point};once={arena.mark(point)}" for point in points]
    sleepers = [arena.worker(faults=faults) for _ in points]
    arena.wait(lambda: len(arena.marks()) == len(points), "both to be stopped")
    arena.worker()
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0, "the rescue", 180)
    arena.fault(0)
    for sleeper in sleepers:
        sleeper.signal(signal.SIGCONT)
    arena.settle(60)
    time.sleep(1)
    assert all(sleeper.alive() for sleeper in sleepers), "a worker died of its pause"
    arena.judge("16 small documents together", "two workers paused beyond their leases with several in hand each")


def test_parsers_killed_under_several_documents_cost_none_of_them(arena: Arena) -> None:
    wanted = documents(200)
    arena.submit(wanted)
    # Without this a document goes on without the extraction that was killed.
    worker = arena.worker(EXTRACTION_REQUIRED="true")
    killed, rounds, until = 0, 0, time.monotonic() + 120
    while killed < 8 and time.monotonic() < until and arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'"):
        _, *found = descendants(worker.process.pid)
        template, parsers = found[:1], found[1:]
        rounds += bool(parsers)
        for process in parsers if rounds % 2 else template if parsers else ():  # with the template all that it has made goes
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            arena.fault()
            killed += 1
        time.sleep(2 if killed else 0.02)
    arena.wait(lambda: arena.one(UNFINISHED) == 0, "every document to end", 120)
    assert killed, "no parser was seen"
    # A text that takes its parser down by itself is a dead letter; one that was in it by chance is complete once it is tried again.
    for (doc_id,) in arena.all("SELECT doc_id FROM dead_letters WHERE resolved_at IS NULL AND error_type = 'PARSE_ERROR'"):
        arena.one("SELECT requeue_document(%s)", doc_id)
    arena.settle(120)
    together(arena)
    arena.judge("16 small documents together", f"kill -9 of {killed} parsing processes, and of what they are forked from, under 200")


def test_a_worker_told_to_stop_with_several_in_hand_hands_each_on(arena: Arena) -> None:
    wanted = documents(200)
    arena.submit(wanted)
    for _ in range(3):
        worker = arena.worker()
        done = arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'")
        progress(arena, done)
        worker.signal(signal.SIGTERM)
        worker.wait()
        arena.fault()
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state = 'working'") == 0
    arena.worker()
    arena.settle(180)
    assert arena.one("SELECT max(crash_count + retry_count) FROM file_extractions") == 0
    arena.judge("16 small documents together", "SIGTERM three times in the middle of 200")
