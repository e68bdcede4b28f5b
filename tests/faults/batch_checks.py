"""What must be true of the batches of `batch_play`: at any time, and once everything has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
from tests.faults.batch_play import Play
from tests.faults.batch_workers import Batches
from tests.faults.batch_world import BAD, SOURCES, sha
from tests.faults.invariant import ALWAYS, IN_THE_END, ask
from tests.summaries import check

VIEWS = "SELECT viewname FROM pg_views WHERE schemaname = 'public' AND viewname NOT LIKE 'pg_%' ORDER BY 1"
NEEDED = """SELECT file_path FROM file_extractions d WHERE NOT is_refused_entry(d)
    UNION SELECT file_path FROM batch_archives WHERE state IN ('waiting', 'unpacking', 'unpacked')"""
STATES = """SELECT d.state::text FROM processing_jobs b JOIN file_extractions d USING (batch_id, run_id) WHERE b.batch_id = %(batch)s
    UNION ALL SELECT a.state FROM processing_jobs b JOIN batch_archives a USING (batch_id, run_id)
    WHERE b.batch_id = %(batch)s AND a.state <> 'unpacked'"""
DOCUMENTS = """SELECT d.doc_id, d.content_sha256, d.state::text, d.metadata, d.run_id = b.run_id
    FROM file_extractions d LEFT JOIN processing_jobs b USING (batch_id)"""
BATCHES = """SELECT batch_id, run_id, status, completed_at IS NOT NULL, given_up OR sealed_at IS NULL,
    ARRAY(SELECT d.doc_id FROM file_extractions d WHERE d.run_id = b.run_id) FROM processing_jobs b"""
OWNERS = """SELECT file_path FROM file_extractions UNION SELECT file_path FROM batch_archives
    UNION SELECT zip_path FROM processing_jobs WHERE zip_path IS NOT NULL"""
PILES = ({"complete", "duplicate"}, {"failed"}, {"cancelled"}, {"queued", "working", "retrying", "waiting", "unpacking"})


def at_any_time(play: Play) -> None:
    """Readers see whole documents, and every original is there."""
    assert ask(play.conn, ALWAYS) == {}
    assert [path for (path,) in play.conn.execute(NEEDED).fetchall() if not (play.storage / path).is_file()] == []


def look(play: Play) -> None:
    """Everything that can be looked at can be, and says the same."""
    for (view,) in play.conn.execute(VIEWS).fetchall():
        play.conn.execute(f"SELECT * FROM {view}").fetchall()
    for doc_id in play.wanted:
        if jobs.get_document(doc_id) is not None:
            assert play.conn.execute("SELECT * FROM explain_document(%s)", [doc_id]).fetchall() != []
            jobs.should_reprocess(doc_id)
    for source in SOURCES:
        if (batch := jobs.get_batch(source.batch_id)) is not None:
            summary, statistics = jobs.run_summary(batch.batch_id, present=True), jobs.batch_statistics(batch.batch_id)
            assert summary is not None and statistics is not None
            check(summary.ui_json, summary.nested_summary)
            assert told(summary.ui_json["totals"]) == counts(play, batch.batch_id)
            assert statistics.files == summary.ui_json["totals"]["files"]
            assert len(jobs.list_batch_documents(batch.batch_id)) <= statistics.files


def told(totals: dict[str, Any]) -> list[int]:
    return [totals[key] for key in ("files", "succeeded", "failed", "cancelled", "unfinished")]


def counts(play: Play, batch: str) -> list[int]:
    """Files of the batch's run, counted here: all, succeeded, failed, cancelled, unfinished."""
    states = [row[0] for row in play.conn.execute(STATES, {"batch": batch}).fetchall()]
    return [len(states), *(sum(state in pile for state in states) for pile in PILES)]


def at_the_end(play: Batches) -> None:
    """Nothing is lost, doubled or left, and what was submitted last is there as it was asked for."""
    wrong = ask(play.conn, IN_THE_END)
    assert [words for words in wrong if not (play.pruned and ("event" in words or "dead letter that says why" in words))] == [], wrong
    there = {row[0]: row[1:] for row in play.conn.execute(DOCUMENTS).fetchall()}
    for batch, documents in play.runs.items():
        for doc_id in documents:
            check_document(play, batch, doc_id, there.get(doc_id))
    found = play.conn.execute(BATCHES).fetchall()
    assert {row[0] for row in found} - play.vague == play.runs.keys() - play.gone - play.vague
    for row in found:
        check_batch(play, *row)
    check_files(play)


def check_document(play: Play, batch: str, doc_id: str, found: tuple[Any, ...] | None) -> None:
    wanted = play.wanted[doc_id]
    words = f"{batch} {doc_id} {wanted} {found}"
    if wanted.content is None:
        return
    assert wanted.there == "maybe" or (found is not None) == (wanted.there == "yes"), words
    if found is None:
        return
    content, state, metadata, is_in_run = found
    assert is_in_run or batch in play.stopped, words
    if wanted.there != "maybe":
        assert content == (None if wanted.content == BAD else sha(wanted.content)), words
        assert wanted.content != BAD or state == "failed", words
    if wanted.content != BAD and wanted.cancelled != "maybe":
        assert (state == "cancelled") == (wanted.cancelled == "yes"), words
    assert play.metadata.get(doc_id) is None or metadata == {"x": play.metadata[doc_id]}, words


def check_batch(play: Play, batch: str, run: Any, status: str, has_ended: bool, given_up: bool, documents: list[str]) -> None:
    """The run has ended, and what is told of it is what the tables hold."""
    files, succeeded, *_, unfinished = found = counts(play, batch)
    assert (has_ended, unfinished) == (True, 0)
    assert batch in play.vague or set(documents) <= play.runs[batch].keys(), "it holds what was left out of it"
    by_counts = "completed" if succeeded == files else "completed_with_errors" if succeeded else "failed"
    assert status == ("cancelled" if status == "cancelled" else "failed" if given_up else by_counts), (batch, status, found)
    assert status != "cancelled" or batch in play.stopped | play.vague
    summary = jobs.run_summary(batch)
    assert summary is not None and summary.run_id == run
    check(summary.ui_json, summary.nested_summary)
    if {file["doc_id"] for file in summary.ui_json["files"]} - {None} <= set(documents):
        assert (told(summary.ui_json["totals"]), summary.ui_json["batch"]["status"]) == (found, status), batch
    else:  # those that somebody took up again have left a run that was cancelled
        assert batch in play.stopped | play.vague, "a summary tells of documents that are gone"


def check_files(play: Batches) -> None:
    """Every file in the storage is somebody's."""
    play.remove_orphans()
    at_any_time(play)
    folders = {str(Path(row[0]).parent) for row in play.conn.execute(OWNERS).fetchall()}
    assert [file for file in play.storage.glob("uploads/*/*") if str(file.parent.relative_to(play.storage)) not in folders] == []
    assert play.conn.execute("SELECT path FROM files_to_remove").fetchall() == []
    assert list(play.storage.glob("temp/*")) == []
