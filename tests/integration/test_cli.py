"""The command as people run it: real processes, a real worker inside, a real database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import pytest

pytestmark = pytest.mark.usefixtures("settings")
COMMAND = (sys.executable, "-m", "jobs.cli")
PATIENCE = 90  # seconds; only a command that hangs comes near


def docmill(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE, env=os.environ | environment, check=False
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command at work."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good files, an empty one, one that cannot be read, and names that a terminal would obey."""
    made = tmp_path / "documents"
    (made / "sub").mkdir(parents=True)
    (made / "pumps.md").write_text("# Pumps\n\n## Noise\n\nHearing protection is needed above 85 dB.\n")
    (made / "sub" / "contract.txt").write_text("The penalty for late delivery is two percent a week.")
    (made / "sub" / "\x1b]0;owned\x07\x1b[31mred.txt").write_text("A passage \x1b[31mwith an escape\x1b[0m about gardening.")
    (made / "empty.txt").write_bytes(b"")
    os.mkfifo(made / "pipe")
    (made / ".DS_Store").write_text("x")
    return made


def test_a_folder_with_bad_files_is_ingested_searched_and_shown_whole_or_in_part_and_the_second_time_nothing_is_done(
    folder: Path, conn: psycopg.Connection
) -> None:
    first = docmill("ingest", folder, folder / "missing.txt", "--json")
    assert first.returncode == 1, first.stderr
    made = answer(first)
    states = {document["file"]: document["state"] for document in made["documents"]}
    assert states == {
        "pumps.md": "complete",
        "sub/contract.txt": "complete",
        "sub/\x1b]0;owned\x07\x1b[31mred.txt": "complete",
        "empty.txt": "failed",
        "pipe": "refused",
        str(folder / "missing.txt"): "refused",
    }
    assert made["skipped"] == 1
    failures = {document["file"]: document["error_message"] for document in made["documents"] if document["state"] != "complete"}
    assert "empty" in failures["empty.txt"]
    assert "does not exist" in failures[str(folder / "missing.txt")]
    assert first.stdout.isascii()
    check_status(made["batches"][0]["batch_id"])

    jobs = conn.execute("SELECT count(*) FROM procrastinate_jobs").fetchone()
    second = docmill("ingest", folder)
    assert second.returncode == 1, "one of the unchanged documents has failed"
    assert "4 unchanged (1 of them not complete)" in second.stdout
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs").fetchone() == jobs
    good = docmill("ingest", folder / "sub")
    assert (good.returncode, good.stdout) == (0, "nothing to do: 2 documents unchanged\n")

    for shown in (second, docmill("status"), docmill("status", made["batches"][0]["batch_id"][:8]), docmill("search", "gardening")):
        assert all(letter.isprintable() or letter == "\n" for letter in shown.stdout + shown.stderr)
        assert shown.stdout


def test_a_path_that_cannot_be_looked_at_is_refused_like_any_other_and_keeps_none_from_going_on(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("A good text.")
    done = docmill("ingest", tmp_path / ("x" * 300), tmp_path / "good.txt", "--no-wait", "--json")
    assert [document["state"] for document in answer(done)["documents"]] == ["refused", "queued"]
    assert "has too long a name" in answer(done)["documents"][0]["error_message"]
    assert "has too long a name" in docmill("ingest", "--batch-id", "june", tmp_path / ("x" * 300), COLUMNS="2000").stdout


def check_status(batch_id: str) -> None:
    """Status shows everything, one document or one batch."""
    overview = answer(docmill("status", "--json"))
    assert {row["state"]: row["documents"] for row in overview["documents"]} == {"complete": 3, "failed": 1}
    assert [row["file_name"] for row in overview["dead_letters"]] == ["empty.txt"]
    batch = answer(docmill("status", batch_id, "--json"))
    assert (batch["status"], batch["total_files"], len(batch["documents"])) == ("completed_with_errors", 4, 4)
    document = answer(docmill("status", "pumps.md", "--json"))
    assert [event["event"] for event in document["events"]] == ["submitted", *["stage_completed"] * 6, "completed"]
    assert answer(docmill("status", document["doc_id"][:13], "--json"))["doc_id"] == document["doc_id"]
    shown = docmill("status", "empty.txt")
    assert shown.returncode == 0
    assert "PERMANENT: empty.txt: the file is empty" in shown.stdout
    unknown = docmill("status", "no such thing")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert '"no such thing"' in unknown.stderr


def test_search_finds_the_passage_with_its_file_and_heading_in_every_mode(folder: Path) -> None:
    docmill("ingest", folder / "pumps.md", folder / "sub" / "contract.txt", "--user", "ann")
    asked = ("search", "hearing protection noise", "--json", "--mode")
    for mode in ("hybrid", "vector", "text"):
        found = answer(docmill(*asked, mode, "--user", "ann", "--type", "text", "--limit", "1"))
        assert [(row["file_name"], row["heading_path"]) for row in found] == [("pumps.md", ["Pumps", "Noise"])], mode
        assert answer(docmill(*asked, mode, "--user", "bob")) == [], mode
    assert answer(docmill(*asked, "hybrid", "--metadata", "year=2026")) == []
    nowhere = docmill(*asked, "text", "--batch", "no-such-batch")
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert 'There is no batch "no-such-batch"' in nowhere.stderr


def test_a_folder_without_a_file_to_take_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("x")
    done = docmill("ingest", tmp_path / "empty")
    assert done.returncode == 0
    assert done.stdout.strip() == "0 documents: there is no file that docmill takes, 1 hidden, system or linked files skipped"


def test_without_waiting_documents_are_left_to_a_worker(folder: Path, conn: psycopg.Connection) -> None:
    queued = docmill("ingest", folder / "sub", "--no-wait", "--priority", "7", "--json")
    assert queued.returncode == 0
    assert answer(queued)["counts"] == {"queued": 2}
    assert conn.execute("SELECT DISTINCT priority FROM procrastinate_jobs").fetchall() == [(7,)]
    with running("worker", "--concurrency", "1") as worker:
        seen = docmill("ingest", folder / "sub", "--no-worker", "--json")
        assert (seen.returncode, answer(seen)["counts"]) == (0, {"complete": 2})
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=PATIENCE)
        assert worker.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_wait_says_that_documents_stay_queued(folder: Path, conn: psycopg.Connection, number: signal.Signals) -> None:
    with running("ingest", folder / "sub", "--no-worker") as waiting:
        eventually(lambda: conn.execute("SELECT sealed_at FROM processing_jobs").fetchone() not in {None, (None,)})
        time.sleep(0.5)  # past the submission, in the wait: either must do
        waiting.send_signal(number)
        printed, told = waiting.communicate(timeout=PATIENCE)
        assert waiting.returncode == 130
    assert printed == ""
    assert "2 of 2 documents stay queued" in told
    assert "docmill worker" in told
    again = docmill("ingest", folder / "sub")
    assert again.returncode == 0, again.stderr


def test_an_interrupted_worker_inside_leaves_every_document_queued_or_ended(tmp_path: Path, conn: psycopg.Connection) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03}.txt").write_text(f"Document {number}. " * 50)
    with running("ingest", folder, "--json") as process:
        eventually(lambda: conn.execute("SELECT count(*) >= 3 FROM file_extractions WHERE state = 'complete'").fetchone() == (True,))
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=PATIENCE)
        assert (process.returncode, printed) == (130, ""), told
    assert conn.execute("SELECT count(*) FROM file_extractions WHERE state NOT IN ('queued', 'complete')").fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE status NOT IN ('todo', 'succeeded')").fetchone() == (0,)
    again = docmill("ingest", folder, "--json")
    assert (again.returncode, answer(again)["counts"]) == (0, {"complete": 150})
    assert conn.execute("SELECT status, total_files FROM processing_jobs").fetchone() == ("completed", 150)


def test_a_worker_inside_that_dies_ends_the_command(folder: Path, conn: psycopg.Connection) -> None:
    conn.execute("ALTER TABLE procrastinate_workers RENAME TO somewhere_else")  # no worker can sign on
    done = docmill("ingest", folder / "sub")
    assert (done.returncode, done.stdout) == (1, "")
    assert "The worker in this process has stopped" in done.stderr
    assert "stay queued" in done.stderr
    assert "Traceback" not in done.stderr
    assert conn.execute("SELECT DISTINCT state FROM file_extractions").fetchall() == [("queued",)]


def test_every_command_says_that_the_database_cannot_be_reached() -> None:
    for arguments in (("ingest", "."), ("status",), ("search", "x"), ("migrate",), ("worker",)):
        done = docmill(*arguments, DATABASE_TIMEOUT="1", DATABASE_URL="postgresql://nobody:hunter22@127.0.0.1:1/none")
        assert (done.returncode, done.stdout) == (3, ""), arguments
        assert "DATABASE_URL" in done.stderr, arguments
        assert "hunter22" not in done.stderr, arguments
        assert "Traceback" not in done.stderr, arguments


def test_a_setting_out_of_range_and_a_wrong_command_line_are_usage_errors(folder: Path) -> None:
    wrong = docmill("status", WORKER_CONCURRENCY="0")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "WORKER_CONCURRENCY='0' is too small; allowed: 1 to 1000" in wrong.stderr
    for arguments in (("ingest",), ("ingest", folder, "--user", ""), ("worker", "--queues", "gpu"), ("search", "x", "--type", "tiff")):
        done = docmill(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "Traceback" not in done.stderr


def test_the_release_is_told_whatever_the_settings_and_the_database_are() -> None:
    done = docmill("--version", LOG_LEVEL="LOUD", DATABASE_URL="postgresql://127.0.0.1:1/none")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"docmill {version('docmill')}\n", "")


def test_an_empty_path_is_not_the_working_directory(folder: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for arguments in (("ingest", "--no-wait", ""), ("ingest", "--no-wait", "pumps.md", ""), ("sync", "--dry-run", "")):
        done = docmill(*arguments)
        assert (done.returncode, done.stdout, "must not be empty" in done.stderr) == (2, "", True), arguments
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (0,)


def test_a_failure_inside_is_told_once(folder: Path) -> None:
    done = docmill("ingest", folder / "empty.txt")
    assert done.returncode == 1
    assert "empty" in done.stdout
    assert "ERROR" not in done.stderr


def test_a_command_whose_stderr_is_closed_does_its_work(conn: psycopg.Connection) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" 2>&-', *COMMAND, "status", "--json"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, answer(done)["documents"]) == (0, [])


def test_migrating_says_what_was_applied_and_the_second_time_that_nothing_was(empty_database: str) -> None:
    unready = docmill("status", DATABASE_URL=empty_database)
    assert unready.returncode == 2
    assert "docmill migrate" in unready.stderr
    first = docmill("migrate", DATABASE_URL=empty_database)
    assert "applied 0001_documents.sql" in first.stdout
    second = docmill("migrate", DATABASE_URL=empty_database)
    assert (second.returncode, second.stdout) == (0, "The schema is current.\n")
