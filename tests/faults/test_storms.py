"""Faults without end over many documents: workers killed every few seconds, transient faults at random."""

from __future__ import annotations

import contextlib
import signal
import time

import psycopg
import pytest

from tests.faults.harness import STILL_OPEN, Arena, Worker, documents, every

SLOW = "sleep:0.05@stage_started:*"  # as real parsing and embedding would, so that kills hit work
ALONE = "1"  # documents together: sixteen would sleep at once, and all be complete before the first kill


TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def undisturbed_seconds(arena: Arena, count: int) -> float:
    """How long two workers take for other documents of the same kind when nobody disturbs them, their start included."""
    workers = [arena.worker(faults=[SLOW], SMALL_DOCUMENTS_TOGETHER=ALONE) for _ in range(2)]
    began = time.monotonic()
    arena.submit(documents(count, "u"))
    arena.settle(120)
    took = time.monotonic() - began
    for worker in workers:
        worker.signal(signal.SIGTERM)
        worker.wait()
    return took


DONE_BY = "SELECT count(*) FROM document_events WHERE event = 'completed' AND worker LIKE %s"


@pytest.mark.parametrize("count", [60, 400])
def test_workers_killed_every_few_seconds_get_everything_done(arena: Arena, count: int) -> None:
    calm = undisturbed_seconds(arena, count)
    workers = [arena.worker(faults=[SLOW], restart=True, SMALL_DOCUMENTS_TOGETHER=ALONE) for _ in range(2)]
    began, turn = time.monotonic(), 0

    def kill_one() -> None:
        nonlocal turn
        victim: Worker = workers[turn % 2]
        # Not before it has done something: a document that is the first of three short lives would be blamed for them.
        with contextlib.suppress(psycopg.OperationalError):
            if victim.alive() and arena.one(DONE_BY, f"%:{victim.process.pid}") >= 2:
                turn += 1
                victim.signal(signal.SIGKILL)
                arena.fault()

    arena.submit(documents(count))
    with every(2.0, kill_one):
        arena.wait(lambda: arena.one(STILL_OPEN) == 0, "all", 600)
    took = time.monotonic() - began
    arena.settle(60)
    failed = arena.all("SELECT doc_id, error_message FROM file_extractions WHERE state <> 'complete'")
    assert failed == [], "a document was blamed for a kill from outside"
    assert turn, "nobody was killed"
    arena.judge(
        "11 workers killed all the time", f"every few seconds over {count} documents: {calm / took:.0%} of the undisturbed throughput"
    )


TRANSIENT = [
    "raise:RetryableError@stage_started:*;p=0.01",
    "raise:OperationalError@in_checkpoint:*;p=0.01",
    "raise:OperationalError@committed:*;p=0.01",
    "raise:40P01@in_checkpoint:*;p=0.01",
    "raise:57014@in_checkpoint:*;p=0.01",
    "raise:53300@claimed;p=0.005",
    "raise:ENOSPC@stage_done:parse;p=0.01",
    "raise:ConnectionResetError@stage_done:embed;p=0.01",
    "raise:TimeoutError@stage_started:extract;p=0.01",
]


@pytest.mark.parametrize("count", [100, 1000])
def test_transient_faults_at_random_end_complete_without_help(arena: Arena, count: int) -> None:
    arena.submit(documents(count))
    for _ in range(2):
        arena.worker(faults=[*TRANSIENT, f"kill@before_acknowledge;p=0.004;once={arena.mark('kill')};times={count // 50}"], restart=True)
    with every(4, lambda: arena.all(TERMINATE)):
        arena.wait(lambda: arena.one(STILL_OPEN) == 0, "all", 900)
    arena.settle(60)
    arena.faults += arena.one("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled'")
    complete = arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'")
    assert complete >= 0.995 * count, arena.all("SELECT error_message, count(*) FROM file_extractions WHERE state = 'failed' GROUP BY 1")
    arena.judge("R27 transient faults at random", f"{complete / count:.1%} complete without help")
