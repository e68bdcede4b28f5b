"""Batches under real workers: last documents that end at once, workers that die before they can say so, callers that hold the batch."""

from __future__ import annotations

import time
from uuid import UUID

import psycopg
import pytest

from jobs.submit import Place, prepare
from models.settings import load_settings
from sql import query
from tests.faults.harness import Arena, documents, name_of, text_document
from tests.summaries import check

GATE = """
CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock_shared(42); RETURN NULL; END $$;
CREATE TRIGGER gate AFTER UPDATE OF state ON file_extractions FOR EACH ROW WHEN (NEW.state = 'complete') EXECUTE FUNCTION wait_at_gate();
"""
AT_GATE = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 42 AND NOT granted"
OPEN_BATCHES = "SELECT count(*) FROM processing_jobs WHERE settled_at IS NULL"


def begin(conn: psycopg.Connection, batch_id: str, wanted: dict[str, bytes]) -> UUID:
    """Open a run of a batch and submit its documents, all in whatever transaction the connection is in."""
    row = conn.execute("SELECT begin_batch(%s, 'default', '/data/' || %s, 'c')", [batch_id, batch_id]).fetchone()
    assert row is not None
    for doc_id, content in wanted.items():
        place = Place(batch_id=batch_id, source_path=f"/data/{batch_id}/{name_of(doc_id)}")
        params = prepare(load_settings(), content, place=place, doc_id=doc_id, file_name=name_of(doc_id))
        conn.execute(query("accept_document"), {**params, "run_id": row[0]})
    return UUID(str(row[0]))


def submit_batch(conn: psycopg.Connection, batch_id: str, wanted: dict[str, bytes]) -> None:
    run = begin(conn, batch_id, wanted)
    conn.execute("SELECT seal_batch(%s, %s, %s)", [batch_id, run, len(wanted)])


def check_summaries(arena: Arena, batches: int) -> None:
    """Every batch has ended, and has just one summary of its run that says so."""
    arena.wait(lambda: arena.one(OPEN_BATCHES) == 0, "every batch to end", 30)
    rows = arena.all(
        "SELECT b.status, s.ui_json, s.nested_summary, b.total_files FROM processing_jobs b JOIN run_summaries s USING (run_id)"
    )
    assert len(rows) == batches == arena.one("SELECT count(*) FROM run_summaries"), "a summary is missing, or of no present run"
    for status, ui, nested, files in rows:
        check(ui, nested)
        assert (ui["batch"]["status"], ui["totals"]["files"], ui["totals"]["unfinished"]) == (status, files, 0)


def test_last_documents_that_end_in_the_same_moment_end_their_batch_once(arena: Arena) -> None:
    wanted = documents(12)
    names = list(wanted)
    with arena.connect() as conn:
        for number in range(6):
            submit_batch(conn, f"batch{number}", {doc_id: wanted[doc_id] for doc_id in names[2 * number : 2 * number + 2]})
    arena.accepted(wanted)
    with arena.connect() as gate:
        gate.execute(GATE)
        gate.execute("SELECT pg_advisory_lock(42)")
        for _ in range(2):
            arena.worker(WORKER_CONCURRENCY="6", DATABASE_MAX_CONNECTIONS="20", SMALL_DOCUMENTS_TOGETHER="1")
        # Every document stands before its last commit; then all of them go through at once.
        arena.wait(lambda: arena.one(AT_GATE) == len(wanted), "every document to stand at the gate")
        gate.execute("SELECT pg_advisory_unlock(42)")
        arena.fault(len(wanted))
    arena.settle()
    check_summaries(arena, 6)
    assert arena.all("SELECT DISTINCT status, total_files FROM processing_jobs") == [("completed", 2)]
    arena.judge("13 batches", "the last two documents of 6 batches committed in the same moment")


def test_a_worker_killed_between_a_last_document_and_its_batch_leaves_no_batch_open(arena: Arena) -> None:
    wanted = documents(6)
    with arena.connect() as conn:
        for number, (doc_id, content) in enumerate(wanted.items()):
            submit_batch(conn, f"batch{number}", {doc_id: content})
    arena.accepted(wanted)
    faults = [f"kill@committed:complete;doc={doc_id};once={arena.mark(doc_id)}" for doc_id in wanted]
    arena.worker(faults=faults, restart=True, WORKER_CONCURRENCY="1", SMALL_DOCUMENTS_TOGETHER="1")
    arena.settle()
    check_summaries(arena, 6)
    assert len(arena.marks()) == 6
    arena.judge("13 batches", "kill -9 between the commit of a last document and the end of its batch")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_batch_submitted_in_a_callers_long_transaction_stops_no_worker(arena: Arena, ending: str) -> None:
    mine, other = documents(8), documents(16, prefix="e")
    with arena.connect() as conn:
        submit_batch(conn, "mine", mine)
    arena.accepted(mine, other)
    faults = [f"sleep:2@stage_done:parse;doc={doc};once={arena.mark(doc)}" for doc in mine]
    arena.worker(faults=faults, WORKER_CONCURRENCY="4"), arena.worker(faults=faults, WORKER_CONCURRENCY="4")
    arena.reconciler()
    arena.wait(lambda: len(arena.marks()) == 8, "every document of the batch in mid-stage")
    new = {"d0000": text_document(77), "f0000": text_document(78)}
    with arena.connect() as caller:
        caller.execute("BEGIN")
        run = begin(caller, "mine", new)
        caller.execute("SELECT seal_batch('mine', %s, 2)", [run])
        arena.fault()
        # While the caller thinks, all that is not his gets done and ends, the documents of the old run among it.
        with arena.connect() as conn:
            submit_batch(conn, "other", other)
        ended = "SELECT count(*) FROM file_extractions WHERE state = 'complete' AND doc_id <> 'd0000'"
        arena.wait(lambda: arena.one(ended) == 7 + 16, "everything that the caller does not hold", 30)
        arena.wait(lambda: arena.one("SELECT status FROM processing_jobs WHERE batch_id = 'other'") == "completed", "the other batch", 10)
        time.sleep(3)  # longer than a lease
        caller.execute(ending)
    arena.accepted(new if ending == "commit" else {})
    arena.settle()
    check_summaries(arena, 2)
    assert arena.all("SELECT status, total_files FROM processing_jobs ORDER BY batch_id") == [
        ("completed", 2 if ending == "commit" else 8),
        ("completed", 16),
    ]
    blamed = arena.all("SELECT DISTINCT doc_id FROM document_events WHERE event IN ('rescued', 'fenced_off') AND doc_id <> 'd0000'")
    assert blamed == [], "documents lost their lease because of a lock on a batch"
    arena.judge("13 batches", f"a known batch submitted with changes in a transaction held open beyond the lease, then {ending}")
