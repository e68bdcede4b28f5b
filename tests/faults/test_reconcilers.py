"""Reconcilers that die half way, race each other, and race a worker that finishes."""

from __future__ import annotations

import signal
import time
from functools import partial

from tests.faults.harness import Arena, documents

DOING = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'"
REPAIRS = ["rescue_document", "end_abandoned_job", "requeue_lost_document"]


def leave_work_behind(arena: Arena, count: int = 12) -> None:
    """Documents under expired leases, jobs fetched and never claimed, documents without a job."""
    arena.submit(documents(count))
    stop = "stop@stage_started:embed;doc=d0003"
    # One document at a time, so that others go on waiting.
    worker = arena.worker(faults=[stop], WORKER_CONCURRENCY="4", CHECKPOINT_SECONDS="0", SMALL_DOCUMENTS_TOGETHER="1")
    arena.wait(worker.stopped, "the worker to be stopped")
    worker.signal(signal.SIGKILL)
    worker.wait()
    with arena.connect() as conn:
        first = "id IN (SELECT id FROM procrastinate_jobs WHERE status = 'todo' ORDER BY id LIMIT 2)"
        for change in ("UPDATE procrastinate_jobs SET status = 'doing'", "DELETE FROM procrastinate_jobs"):
            assert conn.execute(f"{change} WHERE {first}".encode()).rowcount == 2
    arena.fault(1 + 2 + 2)


def test_a_reconciler_killed_before_or_after_any_repair_is_made_up_for(arena: Arena) -> None:
    leave_work_behind(arena)
    faults = [f"kill@{when}_repair:{name};once={arena.mark(f'{when}-{name}')}" for name in REPAIRS for when in ("before", "after")]
    arena.worker(faults=faults, restart=True)
    arena.settle(120)
    arena.wait(lambda: arena.one(DOING) == 0, "abandoned jobs to be ended")
    assert len(arena.marks()) == len(faults)
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("9 reconcilers", "killed before and after each kind of repair")


def test_reconcilers_at_the_same_moment_repair_each_thing_once(arena: Arena) -> None:
    leave_work_behind(arena, 20)
    for _ in range(3):
        arena.worker(faults=["sleep:0.3@before_repair:*", "sleep:0.1@after_repair:*"])
    arena.settle(120)
    arena.wait(lambda: arena.one(DOING) == 0, "abandoned jobs to be ended")
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    twice = arena.all(
        "SELECT doc_id, claim FROM document_events WHERE event IN ('rescued', 'requeued') GROUP BY 1, 2, event HAVING count(*) > 1"
    )
    assert twice == []
    arena.judge("9 reconcilers", "three at the same moment, slowed down between looking and repairing")


def test_a_reconciler_that_races_a_finish_leaves_one_of_the_two(arena: Arena) -> None:
    wanted = documents(8)
    arena.submit(wanted)
    # Around the length of a lease, after which the lease runs out and Postgres ends the silent transaction.
    pauses = dict(zip(wanted, (1.5, 1.9, 2.0, 2.1, 2.5, 4.0), strict=False))
    places = ["in_checkpoint:complete", "before_checkpoint:complete"]
    worker = arena.worker(
        faults=[f"stop@{places[i % 2]};doc={doc};once={arena.mark(doc)}" for i, doc in enumerate(pauses)], WORKER_CONCURRENCY="1"
    )
    reconcilers = [arena.reconciler() for _ in range(2)]

    def has_stopped(times: int) -> bool:  # for the next document perhaps within the same moment
        return len(arena.marks()) == times and worker.stopped()

    for times, pause in enumerate(pauses.values(), 1):
        arena.wait(partial(has_stopped, times), "the worker to stop at its last checkpoint")
        time.sleep(pause)
        arena.fault(0)
        worker.signal(signal.SIGCONT)
    arena.settle(60)
    assert all(process.alive() for process in (worker, *reconcilers))
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("9 reconcilers", "two race a worker that is paused for about a lease around its last commit")
