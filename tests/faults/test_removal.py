"""New content, cancel and delete while each stage runs; late workers of deleted documents; originals that are deleted under load."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jobs
from jobs.front import close_sync
from models.errors import NotFound, SubmitConflict
from models.stages import STAGES
from tests.faults.harness import Arena, documents, every, name_of, sha, text_document


@pytest.fixture(autouse=True)
def front_door(arena: Arena) -> Iterator[None]:
    """The pools of the front door end with the arena's database."""
    yield
    close_sync()


def files_of(arena: Arena) -> list[Path]:
    """The stored files that the rows refer to."""
    return [arena.folder / "storage" / path for (path,) in arena.all("SELECT file_path FROM file_extractions")]


def submit(arena: Arena, wanted: dict[str, bytes]) -> None:
    for doc_id, content in wanted.items():
        jobs.submit_document(content, doc_id=doc_id, file_name=name_of(doc_id))
    arena.accepted(wanted)


def delete(arena: Arena, wanted: dict[str, bytes]) -> None:
    for doc_id in wanted:
        assert jobs.delete_document(doc_id)
    arena.removed(wanted)


def cancel(arena: Arena, wanted: dict[str, bytes]) -> None:
    for doc_id in wanted:
        assert jobs.cancel_document(doc_id) == "cancelled"


def delete_and_submit(arena: Arena, wanted: dict[str, bytes]) -> None:
    delete(arena, wanted)
    submit(arena, wanted)


def submit_new(arena: Arena, wanted: dict[str, bytes]) -> None:
    submit(arena, documents(len(wanted), variant=1))


DEEDS: dict[str, tuple[Callable[[Arena, dict[str, bytes]], None], dict[str, int]]] = {
    "new content": (submit_new, {"complete": 7}),
    "cancel": (cancel, {"cancelled": 7}),
    "delete": (delete, {}),
    "delete and submit": (delete_and_submit, {"complete": 7}),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_deed_while_each_stage_runs_wins(arena: Arena, deed: str) -> None:
    wanted = documents(7)
    arena.submit(wanted)
    faults = [f"sleep:20@stage_started:{stage.name};doc={doc};once={arena.mark(doc)}" for stage, doc in zip(STAGES, wanted, strict=True)]
    arena.worker(faults=faults, WORKER_CONCURRENCY="8")
    arena.wait(lambda: len(arena.marks()) == 7, "a document in each stage")
    act, expected = DEEDS[deed]
    act(arena, wanted)
    arena.fault(7)
    arena.settle(60)
    assert dict(arena.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1")) == expected
    fenced = "SELECT count(DISTINCT doc_id) FROM document_events WHERE event = 'fenced_off'"
    arena.wait(lambda: bool(arena.one(fenced) == 7), "all seven to be fenced off")
    assert all(path.exists() for path in files_of(arena))
    if deed == "cancel":
        submit(arena, wanted)
        arena.settle(60)
        assert dict(arena.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1")) == {"complete": 7}
    arena.judge("14 cancel and delete", f"{deed} while each of the seven stages runs")


PAUSES = ["stage_started:parse", "stage_done:embed", "before_checkpoint:complete", "in_checkpoint:complete"]


def test_a_late_worker_of_a_deleted_document_writes_nothing_to_its_successor(arena: Arena) -> None:
    wanted = documents(len(PAUSES))
    arena.submit(wanted)
    faults = [f"stop@{point};doc={doc};once={arena.mark(doc)}" for doc, point in zip(wanted, PAUSES, strict=True)]
    sleepers = [arena.worker(faults=faults, WORKER_CONCURRENCY="1") for _ in PAUSES]
    arena.wait(lambda: len(arena.marks()) == len(PAUSES) and all(s.stopped() for s in sleepers), "every pause")
    delete(arena, wanted)
    new = documents(len(PAUSES), variant=1)
    submit(arena, new)
    arena.worker()
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0, "the successors", 60)
    arena.fault(0)
    for sleeper in sleepers:
        sleeper.signal(signal.SIGCONT)
    arena.settle(60)
    time.sleep(1)
    assert all(s.alive() for s in sleepers), "a worker died of its pause"
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete' OR version <> 1") == 0
    arena.judge("14 cancel and delete", f"workers stopped at {', '.join(PAUSES)}, deleted, submitted again, worked on, continued")


@pytest.mark.parametrize("policy", ["skip", "reuse"])
def test_the_original_of_duplicates_is_deleted_under_load(arena: Arena, policy: str) -> None:
    content = text_document(500)
    copies = {f"copy{number:02}": content for number in range(12)}
    others = documents(25)
    submit(arena, {"original": content})
    for _ in range(2):
        arena.worker(DUPLICATE_POLICY=policy)
    arena.settle()
    submit(arena, {**dict(list(copies.items())[:6]), **others})
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE duplicate_of = 'original'") > 1, "the first duplicates")
    delete(arena, {"original": content})
    submit(arena, copies)
    arena.fault()
    arena.settle()
    # Those that ended as duplicates in the moment of the delete are found by the reconciler.
    orphans = """SELECT count(*) FROM file_extractions d WHERE state = 'duplicate' AND NOT EXISTS (
        SELECT FROM file_extractions o WHERE o.doc_id = d.duplicate_of AND o.state = 'complete')"""
    arena.wait(lambda: arena.one(orphans) == 0, "duplicates to find their new original")
    arena.settle()
    found = dict(arena.all("SELECT state::text, count(*) FROM file_extractions WHERE doc_id LIKE 'copy%%' GROUP BY 1"))
    assert found == ({"complete": 1, "duplicate": 11} if policy == "skip" else {"complete": 12})
    arena.judge("15 duplicates", f"the original of 12 duplicates deleted under load, policy {policy}")


@pytest.mark.parametrize("policy", ["skip", "reuse"])
def test_equals_at_once_are_parsed_once_whatever_happens_to_the_first(arena: Arena, policy: str) -> None:
    content = text_document(501)
    copies = {f"copy{number:02}": content for number in range(10)}
    submit(arena, copies)
    faults = [f"kill@stage_started:chunk;doc=copy*;once={arena.mark('kill')}"]
    for _ in range(3):
        arena.worker(faults=faults, restart=True, DUPLICATE_POLICY=policy, CHECKPOINT_SECONDS="0")
    arena.settle()
    found = dict(arena.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1"))
    assert found == ({"complete": 1, "duplicate": 9} if policy == "skip" else {"complete": 10})
    parsed = "SELECT count(*) FROM document_events WHERE stage = 'parse' AND event = 'stage_completed' AND NOT detail ? 'reused_from'"
    assert arena.one(parsed) == 1
    assert arena.one("SELECT count(*) FROM document_events WHERE stage = 'embed' AND (detail->>'embedded')::int > 0") == 1
    arena.judge("15 duplicates", f"10 equals at once, the worker of the first killed, policy {policy}")


def test_a_batch_is_cancelled_and_deleted_under_load(arena: Arena) -> None:
    wanted = documents(200, "b")  # so many that some are left when the first are complete
    with arena.connect() as conn:
        run = conn.execute("SELECT begin_batch('batch', 'default', NULL, 'c')").fetchone()
        assert run is not None
        for doc_id, content in wanted.items():
            jobs.submit_document(content, doc_id=doc_id, file_name=name_of(doc_id), connection=conn)
        conn.execute("UPDATE file_extractions SET batch_id = 'batch', run_id = %s", run)
        conn.execute("SELECT seal_batch('batch', %s, %s)", [run[0], len(wanted)])
    arena.worker(), arena.worker()
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") > 5, "some to be complete")
    cancelled = jobs.cancel_batch("batch")
    arena.fault()
    arena.settle()
    found = dict(arena.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1"))
    assert found["cancelled"] >= cancelled > 0
    assert sum(found.values()) == len(wanted)
    assert arena.one("SELECT status FROM processing_jobs") == "cancelled"
    assert jobs.delete_batch("batch") == len(wanted)
    time.sleep(2)
    assert arena.one("SELECT (SELECT count(*) FROM file_extractions) + (SELECT count(*) FROM processing_jobs)") == 0
    assert arena.one("SELECT (SELECT count(*) FROM document_chunks) + (SELECT count(*) FROM document_markdown)") == 0
    arena.removed(wanted)
    arena.judge("14 cancel and delete", f"a batch of 200 cancelled under load ({cancelled} at once) and deleted")


def test_a_storm_of_submissions_cancels_and_deletes_ends_with_what_was_submitted_last(arena: Arena) -> None:
    contents = [text_document(600 + number) for number in range(3)]
    ids = [f"d{number:02}" for number in range(8)]
    chance = random.Random(7)
    for policy in ("reuse", "skip"):
        arena.worker(faults=["kill@before_checkpoint:*;p=0.01"], restart=True, DUPLICATE_POLICY=policy)
    deeds = 0

    def deed() -> None:
        nonlocal deeds
        doc_id = chance.choice(ids)
        try:
            match chance.randrange(4):
                case 0:
                    jobs.delete_document(doc_id)
                case 1 if arena.one("SELECT count(*) FROM file_extractions WHERE doc_id = %s", doc_id):
                    jobs.cancel_document(doc_id)
                case _:
                    jobs.submit_document(chance.choice(contents), doc_id=doc_id, file_name=name_of(doc_id))
            deeds += 1
        except (SubmitConflict, NotFound):
            pass

    with every(0.03, deed), every(0.05, deed), every(0.07, deed):
        time.sleep(8)
    last = {doc_id: contents[number % 3] for number, doc_id in enumerate(ids)}
    submit(arena, last)
    arena.fault(deeds)
    arena.settle()
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'duplicate')") == 0, "all to end")
    assert dict(arena.all("SELECT doc_id, content_sha256 FROM file_extractions")) == {
        doc_id: sha(content) for doc_id, content in last.items()
    }
    assert all(path.exists() for path in files_of(arena))
    arena.judge("14 cancel and delete", f"{deeds} random submissions, cancels and deletes of 8 documents with 3 contents, and kills")
