"""SIGTERM: what is in hand ends or is handed on within the grace, a second signal leaves at once, and nothing is blamed for it."""

from __future__ import annotations

import signal
import time

import pytest

from jobs import delete_document
from tests.faults.harness import Arena, documents, text_document

PLACES = [
    "stage_started:validate",
    "stage_started:parse",
    "stage_done:embed",
    "before_checkpoint:complete",
    "in_checkpoint:complete",
    "committed:complete",
]


def stopped_at(arena: Arena, sleep: float, grace: float) -> float:
    """Stop a worker with documents at all kinds of places, and return how long it took to leave."""
    wanted = documents(len(PLACES) + 4)
    arena.submit(wanted)
    # Work is cut off when the grace is over; a transaction is not, it takes as long as it takes.
    faults = [
        f"sleep:{min(sleep, 4) if place.startswith(('in_', 'committed')) else sleep}@{place};doc={doc};once={arena.mark(doc)}"
        for place, doc in zip(PLACES, wanted, strict=False)
    ]
    worker = arena.worker(
        faults=faults, SHUTDOWN_GRACE_SECONDS=str(grace), WORKER_CONCURRENCY=str(len(PLACES)), CHECKPOINT_SECONDS="0",
        LEASE_SECONDS="10",  # longer than the checkpoint is held up, which would else be cut off and lose its claim
    )  # fmt: skip
    arena.wait(lambda: len(arena.marks()) == len(PLACES), "documents at every place")
    worker.signal(signal.SIGTERM)
    arena.fault()
    at = time.monotonic()
    assert worker.wait(60) == 0
    return time.monotonic() - at


@pytest.mark.parametrize(("sleep", "grace"), [(2, 30), (25, 1)], ids=["within_grace", "grace_exceeded"])
def test_a_stopped_worker_finishes_or_hands_on_what_it_has_and_blames_nobody(arena: Arena, sleep: float, grace: float) -> None:
    took = stopped_at(arena, sleep, grace)
    assert took < 20
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state NOT IN ('queued', 'complete')") == 0, arena.situation()
    assert arena.one("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('aborted', 'doing')") == 0
    assert arena.one("SELECT count(*) FROM worker_registry") == 0
    arena.worker()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete' OR crash_count > 0") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE event IN ('rescued', 'fenced_off')") == 0
    arena.judge("8 SIGTERM", f"in mid-stage and in the checkpoint, {sleep} s of work left, {grace} s of grace")


def test_a_second_signal_leaves_at_once(arena: Arena) -> None:
    wanted = documents(10)
    arena.submit(wanted)
    faults = [f"sleep:60@stage_started:chunk;once={arena.mark('chunk')};times=4"]
    worker = arena.worker(faults=faults, SHUTDOWN_GRACE_SECONDS="50", WORKER_CONCURRENCY="4")
    arena.wait(lambda: len(arena.marks()) == 4, "documents in hand")
    worker.signal(signal.SIGTERM)
    time.sleep(1)
    assert worker.alive()
    worker.signal(signal.SIGTERM)
    arena.fault(2)
    assert worker.wait(20) == 128 + signal.SIGTERM
    arena.worker()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("8 SIGTERM", "a second signal while four documents are in hand")


def test_a_worker_told_to_stop_while_the_database_is_away_leaves_too(arena: Arena) -> None:
    arena.submit(documents(6))
    worker = arena.worker(faults=["sleep:2@stage_done:parse"], SHUTDOWN_GRACE_SECONDS="3")
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'working'") > 0, "documents in hand")
    arena.cluster.stop("immediate")
    worker.signal(signal.SIGTERM)
    arena.fault(2)
    try:
        # The grace and a few seconds, not a connection timeout after the other: a supervisor's patience ends too.
        worker.wait(25)
    finally:
        arena.cluster.start()
    arena.worker()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("8 SIGTERM", "while Postgres is away")


@pytest.mark.parametrize("held", [4, 60], ids=["within_grace", "grace_exceeded"])
def test_a_stopped_worker_waits_for_somebodys_transaction_for_its_grace(arena: Arena, held: int) -> None:
    wanted = documents(4)
    arena.submit(wanted)
    faults = [f"sleep:1@before_checkpoint:complete;doc={doc};once={arena.mark(doc)}" for doc in wanted]
    worker = arena.worker(faults=faults, SHUTDOWN_GRACE_SECONDS="8", WORKER_CONCURRENCY="4")
    arena.wait(lambda: len(arena.marks()) == 4, "all to come to their last checkpoint")
    with arena.connect() as application:
        application.execute("BEGIN")
        application.execute("UPDATE file_extractions SET metadata = '{\"a\": 1}'")
        time.sleep(2)
        worker.signal(signal.SIGTERM)
        arena.fault()
        at = time.monotonic()
        if held == 4:
            time.sleep(held)
            application.execute("COMMIT")
        assert worker.wait(60) == 0
        assert time.monotonic() - at < 8 + 12
        assert held > 4 or arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
        application.execute("COMMIT")
    arena.worker()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE event = 'failed'") == 0
    assert held > 4 or arena.one("SELECT count(*) FROM document_events WHERE event IN ('rescued', 'fenced_off', 'handed_on')") == 0
    arena.judge("8 SIGTERM", f"while another transaction holds all documents for {held} s more, 8 s of grace")


def test_a_worker_that_removes_files_waits_for_no_transaction_that_notes_them_too(arena: Arena) -> None:
    for number in range(2):
        if number > 0:
            delete_document("x")
        arena.submit({"x": text_document(number)})
    removals = "SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'remove_noted_files' AND status = 'succeeded'"
    with arena.connect() as caller:
        caller.execute("BEGIN")
        delete_document("x", connection=caller)
        worker = arena.worker()
        arena.fault()
        arena.wait(lambda: arena.one(removals) >= 1, "the noted files to be looked at", 20)
        worker.signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        caller.execute("ROLLBACK")
    arena.worker()
    arena.settle()
    arena.judge("8 SIGTERM", "SIGTERM while a transaction that is left open notes files for removal", compared=False)
