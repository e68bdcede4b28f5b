"""How many files of a batch have failed, been cancelled or are unfinished: views, functions, summary, commands and pages say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest

import jobs
from jobs.adapters.storage import LocalStorage
from models.settings import Settings
from sql import query
from tests.archives import zip_bytes
from tests.integration.batches import accept, add_archive, begin, seal
from tests.integration.conftest import Bench
from tests.integration.test_cli import answer, docmill, eventually, running
from tests.integration.test_serve_metrics import read, value
from tests.running import served
from tests.sites import client

COUNTED = {"files": 12, "succeeded": 3, "failed": 2, "cancelled": 2, "unfinished": 5}
"""What stands in the batch below; the earlier run and the unpacked archive add nothing."""
OF_VIEW = "SELECT files, files_succeeded, files_failed, files_cancelled, files_unfinished"
WORKING = "UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 h' WHERE doc_id = ANY(%s)"
UNDER_WAY = "UPDATE batch_archives SET entry_count = 9, unpacked_count = 2 WHERE state = 'unpacking'"


def end(conn: psycopg.Connection, state: str, *doc_ids: str) -> None:
    """Let documents end so without working on them."""
    ended: dict[str, LiteralString] = {
        "complete": "milestone = 'complete', served_version = version",
        "duplicate": "duplicate_of = 'complete 1'",
        "failed": "error_type = 'PERMANENT', error_message = 'no way'",
        "cancelled": "error_message = NULL",
    }
    conn.execute(WORKING, [list(doc_ids)])
    made = f"state = %s, lease_until = NULL, processing_completed_at = now(), {ended[state]}"
    conn.execute(f"UPDATE file_extractions SET {made} WHERE doc_id = ANY(%s)", [state, list(doc_ids)])


@pytest.fixture
def run(conn: psycopg.Connection) -> UUID:
    """A batch whose archives were replaced once: an earlier run has a failed, a cancelled and a waiting one."""
    first = begin(conn)
    for state in ("failed", "cancelled", "waiting"):
        add_archive(conn, first, f"old {state}.zip/", state, "bad" if state == "failed" else None)
    run = begin(conn)
    names = ("complete 1", "complete 2", "duplicate", "failed", "cancelled", "queued", "retrying", "working")
    accept(conn, run, *names)
    seal(conn, run, len(names))
    end(conn, "complete", "complete 1", "complete 2")
    for state in ("duplicate", "failed", "cancelled"):
        end(conn, state, state)
    conn.execute(WORKING, [["retrying"]])
    conn.execute("UPDATE file_extractions SET state = 'retrying', lease_until = NULL WHERE doc_id = 'retrying'")
    conn.execute(WORKING, [["working"]])
    for state in ("failed", "cancelled", "waiting", "unpacking", "unpacked"):
        add_archive(conn, run, f"{state}.zip/", state, "bad" if state == "failed" else None)
    return run


def counts_of(row: Any) -> dict[str, int]:
    return dict(zip(COUNTED, row, strict=True))


def as_told(row: dict[str, Any]) -> dict[str, int]:
    """The counts in an answer of `docmill status` or `watch`."""
    return {"succeeded": row["completed"], **{word: row[word] for word in ("failed", "cancelled", "unfinished")}}


@pytest.mark.usefixtures("run")
def test_the_views_count_each_file_of_the_current_run_once(conn: psycopg.Connection) -> None:
    for view in ("batch_status", "batch_progress"):
        assert counts_of(conn.execute(f"{OF_VIEW} FROM {view}").fetchone()) == COUNTED, view
    conn.execute(UNDER_WAY)
    progress = conn.execute("SELECT files, files_expected, files_ended, percent::float8 FROM batch_progress").fetchone()
    assert progress == (12, 19, 7, 36.8), "seven entries are still to come out of an archive"


@pytest.mark.usefixtures("run")
def test_what_counted_documents_alone_goes_on_doing_so(conn: psycopg.Connection) -> None:
    status = "SELECT total_files, pending, processing, completed, failed, archives, archives_open, archives_failed FROM batch_status"
    assert conn.execute(status).fetchone() == (8, 1, 2, 3, 2, 5, 2, 1)
    progress = (
        "SELECT queued, working, retrying, complete, duplicate, failed, cancelled, archives_open, ended, unfinished FROM batch_progress"
    )
    assert conn.execute(progress).fetchone() == (1, 1, 1, 2, 1, 1, 1, 2, 5, 3)


@pytest.mark.usefixtures("run", "front_door")
def test_each_file_has_the_outcome_that_it_is_counted_as(conn: psycopg.Connection) -> None:
    one_by_one = "SELECT f.outcome, count(*) FROM processing_jobs AS b, run_files(b) AS f GROUP BY 1"
    found: dict[str, int] = dict(conn.execute(one_by_one).fetchall())
    assert {"files": sum(found.values()), **found} == COUNTED
    verdict = conn.execute("SELECT v.files, v.unfinished FROM processing_jobs AS b, run_verdict(b) AS v").fetchone()
    assert verdict == (COUNTED["files"], COUNTED["unfinished"])
    figures = jobs.batch_statistics("b")
    assert figures is not None
    of_archives = (figures.archives_open, figures.archives_failed)
    assert (figures.files, figures.failed, figures.cancelled, *of_archives) == (12, 1, 1, 2, 1)
    summary = jobs.run_summary("b", present=True)
    assert summary is not None
    totals = summary.ui_json["totals"]
    assert {word: totals[word] for word in COUNTED} == COUNTED
    outcomes = [card["outcome"] for card in summary.ui_json["files"]]
    assert {word: outcomes.count(word) for word in COUNTED if word != "files"} | {"files": len(outcomes)} == COUNTED


@pytest.mark.usefixtures("run", "settings")
def test_the_commands_say_what_the_views_say(conn: psycopg.Connection) -> None:
    counted = {word: count for word, count in COUNTED.items() if word != "files"}
    batch = answer(docmill("status", "b", "--json"))
    assert (as_told(batch), batch["files"], batch["total_files"]) == (counted, 12, 12)
    latest = answer(docmill("status", "--json"))["batches"]
    watched = answer(docmill("watch", "--times", "1", "--json"))["batches"]
    assert [as_told(row) for row in (*latest, *watched)] == [counted] * 2
    totals = answer(docmill("summary", "b", "--json"))["totals"]
    assert {word: totals[word] for word in COUNTED} == COUNTED
    left = "5 unfinished (1 queued, 1 working, 1 retrying, 2 to be unpacked)"
    shown = docmill("status", "b", COLUMNS="200").stdout
    assert f"  files         12: 3 completed, 2 failed, 2 cancelled, {left}\n" in shown
    assert "5: 2 to be unpacked, 1 failed, 1 cancelled; 0 of 0 files unpacked" in shown
    assert "12: 3 succeeded (duplicates among them: 1), 2 failed, 2 cancelled, 5 unfinished\n" in docmill("summary", "b").stdout
    conn.execute(UNDER_WAY)
    assert (
        f"  files         19: 3 completed, 2 failed, 2 cancelled, {left}, 7 still packed\n" in docmill("status", "b", COLUMNS="200").stdout
    )


def told(html: str) -> str:
    """What a page says, without its tags."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


@pytest.mark.usefixtures("run")
def test_the_pages_and_metrics_say_what_the_views_say(conn: psycopg.Connection, settings: Settings, tmp_path: Path) -> None:
    LocalStorage.prepared(settings)
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        page = told(visitor.get("/batch?id=b").text)
        everything, listed, found = told(visitor.get("/").text), told(visitor.get("/batches").text), read(visitor.get("/metrics").text)
    assert "Files 7 of 12 ended Completed 3, 1 of them duplicate Failed 2, 1 of them archives Cancelled 2, 1 of them archives" in page
    assert "Unfinished 5: 1 queued, 1 working, 1 retrying, 2 archives to unpack" in page
    assert "58.3 % 7 of 12, 2 failed, 2 cancelled" in everything
    assert "7 / 12 2 2 cancelled" in listed
    for state, count in (("failed", COUNTED["failed"]), ("cancelled", COUNTED["cancelled"])):
        assert value(found, "docmill_documents", state=state) + value(found, "docmill_archives", state=state) == count
    assert (value(found, "docmill_archives", state="waiting"), value(found, "docmill_archives", state="unpacking")) == (1, 1)


def test_when_a_batch_ends_its_last_total_is_its_files(conn: psycopg.Connection, run: UUID) -> None:
    conn.execute(
        "UPDATE batch_archives SET state = 'failed', error_message = 'bad', ended_at = now() WHERE state IN ('waiting', 'unpacking')"
    )
    conn.execute("UPDATE file_extractions SET lease_until = NULL, state = 'cancelled' WHERE state IN ('queued', 'working', 'retrying')")
    conn.execute("SELECT settle_batch('b')")
    settled = conn.execute(f"{OF_VIEW}, total_files, files_expected, percent::int, status FROM batch_progress").fetchone()
    assert settled == (12, 3, 4, 5, 0, 12, 12, 100, "completed_with_errors")
    kept = conn.execute("SELECT file_count, success_count, error_count FROM run_summaries WHERE run_id = %s", [run]).fetchone()
    assert kept == (12, 3, 9)


@pytest.mark.usefixtures("settings")
def test_a_batch_that_failed_with_its_archive_is_through(conn: psycopg.Connection) -> None:
    run = begin(conn)
    accept(conn, run, "failed")
    seal(conn, run, 1)
    add_archive(conn, run, "bad.zip/", "waiting")
    end(conn, "failed", "failed")
    half = "SELECT percent::float8, files_unfinished FROM batch_progress"
    assert conn.execute(half).fetchone() == (50.0, 1), "an archive that waits is not yet done"
    conn.execute("SELECT end_archive(a.id, 'failed', 'bad') FROM batch_archives AS a")
    conn.execute("SELECT settle_batch('b')")
    assert conn.execute("SELECT percent::int, status FROM batch_progress").fetchone() == (100, "failed")


@pytest.mark.usefixtures("settings")
def test_an_archive_that_is_cancelled_while_a_command_waits_for_it_is_told_of(tmp_path: Path, conn: psycopg.Connection) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in.zip").write_bytes(zip_bytes({"a.txt": "A text."}))
    with running("ingest", tmp_path / "folder", "--batch-id", "b", "--no-worker", "--json") as waiting:
        eventually(lambda: conn.execute("SELECT count(*) FROM batch_archives").fetchone() == (1,))
        docmill("cancel", "b")
        printed, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 1
    assert '"cancelled": 1' in printed
    assert answer(docmill("status", "b", "--json"))["cancelled"] == 1


async def test_counting_asks_for_the_documents_of_the_batches_that_are_asked_for(bench: Bench) -> None:
    """A list of the latest batches must not count the documents of all."""
    conn = bench.conn
    conn.execute("INSERT INTO processing_jobs (batch_id, correlation_id) SELECT 'batch ' || n, 'c' FROM generate_series(1, 500) AS n")
    conn.execute(
        """INSERT INTO file_extractions (doc_id, batch_id, run_id, file_name, file_path, correlation_id)
        SELECT b.batch_id || n, b.batch_id, b.run_id, 'f', 'p', 'c' FROM processing_jobs AS b, generate_series(1, 10) AS n"""
    )
    conn.execute("ANALYZE file_extractions, processing_jobs, batch_archives")
    for name, params in (
        ("latest_batches", {"limit": 10}), ("page_newest_batches", {"limit": 5}), ("page_batches", {"limit": 26, "before": None}),
        ("page_batch", {"batch_id": "batch 7"}), ("show_batch", {"batch_id": "batch 7"}),
    ):  # fmt: skip
        plan = "\n".join(line for (line,) in conn.execute("EXPLAIN " + query(name), params))
        assert "Seq Scan on file_extractions" not in plan, name


@pytest.mark.usefixtures("settings")
def test_a_batch_is_not_said_to_be_through_while_a_file_of_it_is_unfinished(conn: psycopg.Connection) -> None:
    run = begin(conn)
    conn.execute(
        """INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, error_message, ended_at)
        SELECT 'b', %s, 'ann', n || '.zip/', '', 'uploads/z', 'failed', 'bad', now() FROM generate_series(1, 1999) AS n""",
        [run],
    )
    add_archive(conn, run, "last.zip/", "waiting")
    seal(conn, run, 0)
    said = "SELECT files_ended, files_expected, percent::float8 FROM batch_progress"
    assert conn.execute(said).fetchone() == (1999, 2000, 99.9)
    conn.execute("SELECT end_archive(a.id, 'failed', 'bad') FROM batch_archives AS a WHERE a.state = 'waiting'")
    assert conn.execute(said).fetchone() == (2000, 2000, 100.0)
