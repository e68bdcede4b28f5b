"""Workers that die or are paused: at every point of every stage, by what they work on, and between checkpoint and job finish."""

from __future__ import annotations

import signal
import time

import pytest

from models.stages import STAGES
from tests.faults.harness import Arena, documents, samples

POINTS = [
    "claimed",
    *(f"{where}:{stage.name}" for stage in STAGES for where in ("stage_started", "stage_done")),
    *(f"{where}_checkpoint:{stage.reaches}" for stage in STAGES for where in ("before", "in", "after")),
    "before_acknowledge",
]
SHORT_POINTS = [
    "claimed",
    "stage_done:parse",
    "in_checkpoint:chunks_stored",
    "after_checkpoint:embeddings_stored",
    "in_checkpoint:complete",
    "after_checkpoint:complete",
    "before_acknowledge",
]


def killed_at(arena: Arena, points: list[str], **environment: str) -> None:
    """Each document kills the worker that comes by its own point, once."""
    wanted = documents(len(points))
    arena.submit(wanted)
    faults = [f"kill@{point};doc={doc};once={arena.mark(doc)}" for point, doc in zip(points, wanted, strict=True)]
    arena.reconciler()
    for _ in range(2):
        # One document at a time, so that no other's kill comes before its own.
        arena.worker(faults=faults, restart=True, WORKER_CONCURRENCY="1", SMALL_DOCUMENTS_TOGETHER="1", **environment)
    arena.settle(60 + 10 * len(points))
    # The last ones lie behind the document's end.
    arena.wait(lambda: len(arena.marks()) == len(points), "all fault points to be reached", 20)


@pytest.mark.parametrize("checkpoints", ["each", "usual"])
def test_a_kill_at_any_point_leaves_the_rows_of_an_uninterrupted_run(arena: Arena, checkpoints: str) -> None:
    points = [p for p in SHORT_POINTS if checkpoints == "each" or arena.mode == "queue" or "checkpoint" not in p or "complete" in p]
    killed_at(arena, points, CHECKPOINT_SECONDS="0" if checkpoints == "each" else "1")
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("1 kill -9 around commits", f"kill -9 at {len(points)} points, checkpoints: {checkpoints}")


def test_a_kill_at_every_point_of_every_stage_leaves_the_rows_of_an_uninterrupted_run(arena: Arena) -> None:
    killed_at(arena, POINTS, CHECKPOINT_SECONDS="0", MAX_CRASHES="10")
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("1 kill -9 around commits", f"kill -9 at all {len(POINTS)} points")


def test_real_files_survive_kills_too(arena: Arena) -> None:
    wanted = samples()
    arena.submit(wanted)
    points = ["stage_started:parse", "stage_done:parse", "stage_done:embed", "in_checkpoint:complete"]
    faults = [f"kill@{point};once={arena.mark(point)}" for point in points]
    arena.worker(faults=faults, restart=True)
    arena.settle(120)
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("1 kill -9 around commits", f"kill -9 at {len(points)} points on {', '.join(wanted)}")


PAUSES = ["stage_started:chunk", "in_checkpoint:complete", "before_checkpoint:complete", "claimed"]


def test_a_worker_paused_past_its_lease_changes_nothing_when_it_wakes_up(arena: Arena) -> None:
    wanted = documents(12)
    arena.submit(wanted)
    points = dict(zip(wanted, PAUSES, strict=False))
    faults = [f"stop@{point};doc={doc};once={arena.mark(doc)}" for doc, point in points.items()]
    sleepers = [arena.worker(faults=faults, WORKER_CONCURRENCY="1") for _ in points]
    arena.wait(lambda: len(arena.marks()) == len(points), "every pause")
    arena.worker()
    paused = [s for s in sleepers if s.stopped()]
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0, "the rescue", 60)
    arena.fault(0)
    for sleeper in paused:
        sleeper.signal(signal.SIGCONT)
    arena.settle(60)
    time.sleep(1)
    assert all(s.alive() for s in sleepers), "a worker died of its pause"
    arena.judge("2 SIGSTOP beyond the lease", f"{len(paused)} workers stopped at {', '.join(PAUSES)}, rescued, continued")


DEATHS = ["segfault", "exit:3", "abort", "kill"]


@pytest.mark.parametrize("alone", [False, True], ids=["in_company", "alone"])
def test_a_document_that_kills_its_worker_is_a_dead_letter_and_its_neighbours_are_not_blamed(arena: Arena, alone: bool) -> None:
    neighbours = documents(30)
    poison = {f"poison-{death.partition(':')[0]}": b"# Poison\n\nwith " + death.encode() for death in DEATHS[: 2 if alone else 1]}
    wanted = {}
    for number, item in enumerate(neighbours.items()):
        if number == 10:
            wanted.update(poison)
        wanted[item[0]] = item[1]
    arena.submit(wanted)
    faults = [f"{death}@stage_started:chunk;doc={doc}" for death, doc in zip(DEATHS, poison, strict=False)]
    workers = [arena.worker(faults=faults, restart=True) for _ in range(1 if alone else 2)]
    arena.settle(180)
    arena.faults += sum(len(worker.exits) for worker in workers)
    dead = dict(arena.all("SELECT doc_id, error_message FROM dead_letters WHERE resolved_at IS NULL"))
    assert set(dead) == set(poison), dead
    assert all("MAX_CRASHES" in message for message in dead.values())
    arena.accepted(dict.fromkeys(poison, b""))
    arena.judge("3 poison documents", f"{len(poison)} documents kill their worker among 30 neighbours")


def test_a_document_that_takes_all_memory_fails_alone(arena: Arena) -> None:
    arena.submit({**documents(10), "greedy": b"# Greedy\n\ntext"})
    arena.accepted({"greedy": b""})
    arena.worker(faults=["memory:500@stage_started:chunk;doc=greedy"])
    arena.settle(60)
    arena.fault()
    assert arena.all("SELECT doc_id, error_type::text FROM dead_letters") == [("greedy", "RETRYABLE")]
    arena.judge("3 poison documents", "a document asks for more memory than there is, among 10 neighbours")


def test_a_kill_between_checkpoint_and_job_finish_neither_loses_nor_doubles(arena: Arena) -> None:
    wanted = documents(8)
    arena.submit(wanted)
    faults = [f"kill@before_acknowledge;doc={doc};once={arena.mark(doc)}" for doc in list(wanted)[:2]]
    faults += [f"kill@after_checkpoint:complete;doc={doc};once={arena.mark(doc)}" for doc in list(wanted)[2:4]]
    arena.worker(faults=faults, restart=True, WORKER_CONCURRENCY="1", SMALL_DOCUMENTS_TOGETHER="1")
    arena.settle(90)
    assert len(arena.marks()) == 4
    assert arena.one("SELECT count(*) FROM procrastinate_jobs WHERE status NOT IN ('succeeded', 'aborted')") == 0
    arena.judge("7 kill between checkpoint and finish", "kill -9 after the checkpoint and before the acknowledgement, 4 times")
