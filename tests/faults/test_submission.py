"""Submissions that collide: with each other, with the run of what they replace, with a retry, with an open transaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs import submit_document
from models.errors import SubmitConflict
from tests.faults.harness import Arena, documents, every, name_of, text_document


def at_once(arena: Arena, offers: list[dict[str, bytes]]) -> list[str]:
    """Submit each set in a thread and over a connection of its own; return all outcomes."""
    gate, outcomes = threading.Barrier(len(offers)), []

    def run(offer: dict[str, bytes]) -> None:
        with arena.connect() as conn:
            gate.wait()
            for doc_id, content in offer.items():
                outcomes.append(submit_document(content, doc_id=doc_id, file_name=name_of(doc_id), connection=conn).outcome)

    threads = [threading.Thread(target=run, args=(offer,)) for offer in offers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [str(outcome) for outcome in outcomes]


def test_the_same_documents_from_many_clients_at_once_are_worked_on_once(arena: Arena) -> None:
    wanted = documents(10)
    arena.worker()
    outcomes = at_once(arena, [wanted] * 8)
    arena.accepted(wanted)
    arena.settle()
    assert (outcomes.count("accepted"), outcomes.count("unchanged")) == (10, 70)
    assert arena.one("SELECT count(DISTINCT claim) FROM file_extractions WHERE state = 'complete'") >= 1
    arena.fault(70)
    arena.judge("6 colliding submissions", "10 documents from 8 clients at once")


def test_different_contents_at_once_end_with_one_of_them_whole(arena: Arena) -> None:
    offers = [documents(6, variant=variant) for variant in range(4)]
    arena.worker()
    at_once(arena, offers)
    arena.accepted(*offers)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.fault(18)
    arena.judge("6 colliding submissions", "6 documents with 4 contents each from 4 clients at once")


def test_new_content_in_mid_run_wins_and_the_old_never_shows(arena: Arena) -> None:
    old, new = documents(12), documents(12, variant=1)
    arena.submit(old)
    places = ["stage_started:parse", "stage_done:embed", "before_checkpoint:complete", "in_checkpoint:complete"]
    faults = [f"sleep:1.5@{place};doc={doc};once={arena.mark(doc)}" for place, doc in zip(places * 3, old, strict=True)]
    arena.worker(faults=faults, WORKER_CONCURRENCY="12")
    arena.wait(lambda: len(arena.marks()) >= 10, "documents in mid-run")
    arena.submit(new)
    arena.accepted(old, new)
    arena.fault()
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete' OR version <> 2") == 0
    arena.judge("6 colliding submissions", "12 documents resubmitted with new content in mid-run")


def test_a_submission_while_the_document_waits_for_its_retry(arena: Arena) -> None:
    old = documents(6)
    same, new = dict(list(old.items())[:3]), {doc: text_document(90 + i, 1) for i, doc in enumerate(list(old)[3:])}
    arena.submit(old)
    faults = [f"raise:RetryableError@stage_started:embed;doc={doc};once={arena.mark(doc)};times=2" for doc in old]
    arena.worker(faults=faults, RETRY_BASE_DELAY_SECONDS="1")
    arena.wait(lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'retrying'") == 6, "every document to wait")
    arena.submit({**same, **new})
    arena.accepted(old, same, new)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    assert arena.all("SELECT version, count(*) FROM file_extractions GROUP BY 1 ORDER BY 1") == [(1, 3), (2, 3)]
    arena.judge("6 colliding submissions", "submitted again while waiting for a retry, with the same and with new content")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_an_open_transaction_on_one_document_harms_no_other(arena: Arena, ending: str) -> None:
    wanted = documents(8)
    arena.submit(wanted)
    faults = [f"sleep:6@stage_done:parse;doc={doc};once={arena.mark(doc)}" for doc in list(wanted)[:4]]
    arena.worker(faults=faults, WORKER_CONCURRENCY="8")
    arena.reconciler()
    arena.wait(lambda: len(arena.marks()) == 4, "documents in mid-stage")
    with arena.connect() as conn:
        conn.execute("BEGIN")
        new = text_document(77)
        submit_document(new, doc_id="d0000", file_name="d0000.md", connection=conn)
        arena.fault()
        time.sleep(5)  # longer than a lease
        conn.execute(ending)
    arena.accepted({"d0000": new} if ending == "commit" else {})
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    blamed = arena.all("SELECT DISTINCT doc_id FROM document_events WHERE event IN ('rescued', 'fenced_off') AND doc_id <> 'd0000'")
    assert blamed == [], "documents lost their lease because of a lock on another"
    arena.judge("6 colliding submissions", f"a caller's transaction with new content held open beyond the lease, then {ending}")


def test_resubmissions_all_the_time_end_with_the_last_content(arena: Arena) -> None:
    versions = [documents(5, variant=variant) for variant in range(8)]
    arena.worker(), arena.worker()
    pending = list(versions)

    def next_version() -> None:
        if pending:
            try:
                arena.submit(pending[0])
            except SubmitConflict:
                arena.submit(pending[0])
            pending.pop(0)

    with every(0.4, next_version):
        arena.wait(lambda: not pending, "all versions to be submitted")
    arena.submit(versions[-1])
    arena.accepted(*versions)
    arena.fault(35)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete' OR version <> 8") == 0
    arena.judge("6 colliding submissions", "5 documents resubmitted 7 times, every 0.4 s")


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("together", ["1", "16"])
def test_an_open_transaction_over_all_that_a_worker_has_in_hand_keeps_no_other_document_from_it(
    arena: Arena, ends: str, together: str
) -> None:
    held, new, others = documents(6), documents(6, variant=1), documents(10, prefix="other")
    arena.submit(held)
    faults = [f"sleep:1.5@before_checkpoint:complete;doc={doc};once={arena.mark(doc)}" for doc in held]
    arena.worker(faults=faults, WORKER_CONCURRENCY="6", DATABASE_MAX_CONNECTIONS="3", SMALL_DOCUMENTS_TOGETHER=together)
    arena.wait(lambda: len(arena.marks()) == 6, "all to come to their last checkpoint")
    with arena.connect() as application:
        application.execute("BEGIN")
        for doc_id, content in new.items():
            submit_document(content, doc_id=doc_id, file_name=name_of(doc_id), connection=application)
        arena.fault(6)
        arena.submit(others)
        arena.wait(
            lambda: arena.one("SELECT count(*) FROM file_extractions WHERE doc_id LIKE 'other%%' AND state = 'complete'") == 10,
            "the others to be complete",
            30,
        )
        time.sleep(3)  # longer than a lease
        assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 6
        assert arena.one("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") == 0
        application.execute(ends)
    if ends == "COMMIT":
        arena.accepted(held, new)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    # Nobody has died: what was made is written, or fenced off by the new content alone.
    assert arena.one("SELECT count(*) FROM document_events WHERE event IN ('rescued', 'requeued')") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE event = 'fenced_off'") == (6 if ends == "COMMIT" else 0)
    arena.judge("6 colliding submissions", f"an open transaction that resubmits all 6 documents in hand, then {ends}")


def must_be_alone(arena: Arena, offer: dict[str, bytes]) -> dict[str, bytes]:
    """Submit documents that each must be alone in their worker, and return them."""
    with arena.connect() as conn, conn.transaction():
        for doc_id, content in offer.items():
            submit_document(content, doc_id=doc_id, file_name=name_of(doc_id), connection=conn)
        conn.execute("UPDATE file_extractions SET crash_count = 1 WHERE doc_id = ANY(%s)", [list(offer)])
    return offer


@contextmanager
def holding(arena: Arena, doc_ids: str) -> Iterator[None]:
    """Keep a transaction open that holds the documents of which this is the beginning; at the end it is undone."""
    with arena.connect() as application:
        application.execute("BEGIN")
        application.execute("SELECT FROM file_extractions WHERE starts_with(doc_id, %s) FOR UPDATE", [doc_ids])
        arena.fault()
        yield
        application.execute("ROLLBACK")


def test_a_document_that_must_be_alone_does_not_wait_for_one_that_somebodys_transaction_holds(arena: Arena) -> None:
    held, suspects, others = documents(2), documents(2, prefix="suspect"), documents(6, prefix="other")
    arena.submit(held)
    faults = [f"sleep:1@before_checkpoint:complete;doc={doc};once={arena.mark(doc)}" for doc in held]
    arena.worker(faults=faults, WORKER_CONCURRENCY="4", SMALL_DOCUMENTS_TOGETHER="1")
    arena.wait(lambda: len(arena.marks()) == 2, "both to come to their last checkpoint")
    with holding(arena, "d"):
        arena.accepted(must_be_alone(arena, suspects))
        arena.submit(others)
        arena.wait(
            lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == 8, "all others to be complete", 30
        )
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE event IN ('rescued', 'fenced_off')") == 0
    arena.judge("6 colliding submissions", "an open transaction over 2 documents in hand, beside 2 that must be alone")


def test_a_held_document_that_comes_back_while_another_is_alone_keeps_its_lease(arena: Arena) -> None:
    held = documents(1)
    arena.submit(held)
    # Alone for longer than a stage of the held one may take, though none of its own stages does.
    slow = [f"sleep:2@stage_started:{stage};doc=alone;once={arena.mark(stage)}" for stage in ("parse", "check", "chunk", "embed")]
    stops = f"sleep:1.5@before_checkpoint:parse_complete;doc=d0000;once={arena.mark('held')}"
    arena.worker(faults=[stops, *slow], CHECKPOINT_SECONDS="0", STAGE_TIMEOUT_SECONDS="4", SMALL_DOCUMENTS_TOGETHER="1")
    arena.reconciler()
    arena.wait(lambda: len(arena.marks()) == 1, "its checkpoint")
    with holding(arena, "d0000"):
        alone = must_be_alone(arena, {"alone": text_document(700)})
        arena.wait(lambda: len(arena.marks()) == 2, "the other to be alone")
    arena.accepted(alone)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE doc_id = 'd0000' AND event IN ('rescued', 'fenced_off')") == 0
    arena.judge("6 colliding submissions", "an open transaction over 1 document in hand, which ends while another must be alone")


def test_what_waits_behind_a_held_document_that_is_alone_goes_to_another_worker(arena: Arena) -> None:
    alone = must_be_alone(arena, {"alone": text_document(700)})
    arena.worker(faults=[f"sleep:1@before_checkpoint:complete;doc=alone;once={arena.mark('alone')}"], WORKER_CONCURRENCY="4")
    arena.wait(lambda: len(arena.marks()) == 1, "its last checkpoint")
    others = documents(4)
    with holding(arena, "alone"):
        arena.submit(others)
        arena.wait(lambda: arena.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'") > 1, "others to be fetched")
        arena.worker(WORKER_CONCURRENCY="4")
        arena.wait(
            lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == 4, "the others to be complete", 40
        )
    arena.accepted(alone)
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    assert arena.one("SELECT count(*) FROM document_events WHERE event IN ('rescued', 'fenced_off')") == 0
    arena.judge("6 colliding submissions", "an open transaction over a document that is alone, with others fetched behind it")


def test_a_worker_with_too_much_memory_ends_though_somebodys_transaction_holds_what_it_has_in_hand(arena: Arena) -> None:
    held, others = documents(1), documents(5, prefix="other")
    arena.submit(held)
    stops = f"sleep:2@before_checkpoint:upload_validated;doc=d0000;once={arena.mark('held')}"
    worker = arena.worker(
        faults=[stops], CHECKPOINT_SECONDS="0", WORKER_MEMORY_LIMIT_MB="30", SMALL_DOCUMENTS_TOGETHER="1", SHUTDOWN_GRACE_SECONDS="3"
    )
    arena.wait(lambda: len(arena.marks()) == 1, "its first checkpoint")
    with holding(arena, "d0000"):
        arena.wait(lambda: not worker.alive(), "the worker to end", 40)
        arena.worker()
        arena.submit(others)
        arena.wait(
            lambda: arena.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == 5, "the others to be complete", 40
        )
    arena.settle()
    assert arena.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == 0
    arena.judge("6 colliding submissions", "an open transaction over 1 document in hand of a worker that is to end for its memory")
