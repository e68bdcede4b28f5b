"""`docmill ingest` on archives: a zip is a batch that it unpacks and sees through; a zip in a folder is part of the folder's."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psycopg
import pytest

from tests.archives import Raw, raw_zip, write_zip, zip_bytes
from tests.integration.test_cli import answer, docmill, eventually, running

pytestmark = pytest.mark.usefixtures("settings")


def test_a_zip_is_a_batch_whose_files_are_reported_and_the_second_time_nothing_is_done(tmp_path: Path, conn: psycopg.Connection) -> None:
    path = tmp_path / "batch.zip"
    inner = zip_bytes({"deep.txt": "A text about gardening."})
    bad = [Raw(b"bad.txt", crc=1), Raw(b"__MACOSX/._x"), Raw(b"in.zip", inner)]
    path.write_bytes(raw_zip([Raw(b"a/pumps.md", b"# Pumps\n\nHearing protection is needed."), *bad]))
    done = docmill("ingest", path, "--batch-id", "mine", "--json")
    made = answer(done)
    assert done.returncode == 1, done.stderr
    states = {document["file"]: document["state"] for document in made["documents"]}
    assert states == {"batch.zip/a/pumps.md": "complete", "batch.zip/bad.txt": "failed", "batch.zip/in.zip/deep.txt": "complete"}
    assert (made["batches"][0]["batch_id"], made["batches"][0]["files"], made["skipped"]) == ("mine", 3, 1)
    assert conn.execute("SELECT batch_id, status, total_files FROM processing_jobs").fetchall() == [("mine", "completed_with_errors", 3)]
    again = docmill("ingest", path, "--batch-id", "mine")
    assert "nothing to do: 3 documents unchanged (1 of them not complete)" in again.stdout
    shown = docmill("status", "mine")
    assert "2: 0 to be unpacked, 0 failed, 0 cancelled; 4 of 4 files unpacked" in shown.stdout


def test_a_zip_that_is_bad_as_a_whole_is_reported_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "text.zip").write_text("no archive")
    done = docmill("ingest", tmp_path / "broken.zip", tmp_path / "text.zip", "--json")
    errors = {document["file"]: document["error_message"] for document in answer(done)["documents"]}
    assert done.returncode == 1
    assert "end is missing" in errors["broken.zip"]
    assert "no zip archive by its content" in errors[str(tmp_path / "text.zip")]


def test_a_zip_in_a_folder_is_unpacked_as_part_of_it(tmp_path: Path, conn: psycopg.Connection) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("A text about pumps.")
    write_zip(folder / "more.zip", {"b.txt": "A text about valves."})
    done = docmill("ingest", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert {document["file"]: document["state"] for document in answer(done)["documents"]} == {
        "a.txt": "complete",
        "more.zip/b.txt": "complete",
    }
    assert conn.execute("SELECT status, total_files FROM processing_jobs").fetchall() == [("completed", 2)]
    assert docmill("ingest", folder).stdout == "nothing to do: 2 documents unchanged\n"


def test_the_numbers_of_a_batch_add_up_and_an_archive_that_fails_is_told_of_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("The same text about pumps.")
    (folder / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    done = docmill("ingest", folder, "--batch-id", "mine")
    assert ("3 documents: 2 complete, 1 failed" in done.stdout, "broken.zip" in done.stderr) == (True, False), done.stderr
    assert "  files         3: 2 completed, 1 failed, 0 cancelled, 0 unfinished\n" in docmill("status", "mine").stdout
    assert "  files         3: 2 succeeded (duplicates among them: 1), 1 failed\n" in docmill("summary", "mine").stdout
    batches = [
        answer(docmill("status", "mine", "--json")),
        answer(docmill("status", "--json"))["batches"][0],
        answer(docmill("watch", "--times", "1", "--json"))["batches"][0],
    ]
    assert [(batch["total_files"], batch["completed"], batch["failed"]) for batch in batches] == [(3, 2, 1)] * 3


def test_why_an_archive_has_to_wait_is_told_meanwhile(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "batch.zip", {"a.txt": "A text."})
    away = f"raise:StorageAway@unpack_listed;once={tmp_path / 'away'}"
    done = docmill("ingest", path, "--json", DOCMILL_FAULTS=away, RETRY_BASE_DELAY_SECONDS="0.1", RETRY_MAX_DELAY_SECONDS="1")
    assert answer(done)["counts"] == {"complete": 1}
    assert "batch.zip: trying again in" in done.stderr


def test_without_waiting_the_archive_is_left_to_a_worker(tmp_path: Path, conn: psycopg.Connection) -> None:
    path = write_zip(tmp_path / "batch.zip", {"a.txt": "A text."})
    done = docmill("ingest", path, "--no-wait")
    assert done.returncode == 0
    assert "docmill worker" in done.stderr
    assert conn.execute("SELECT state FROM batch_archives").fetchall() == [("waiting",)]


@pytest.mark.parametrize("command", ["ingest", "sync"])
def test_without_waiting_an_archive_that_is_new_or_changed_is_counted(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_zip(folder / "more.zip", {"b.txt": "A text about valves."})
    told = docmill(command, folder, "--no-wait").stdout
    assert told.startswith("0 documents, 1 archive to be unpacked, in "), told
    (folder / "a.txt").write_text("A text about pumps.")
    assert docmill(command, folder).returncode == 0
    assert docmill(command, folder, "--no-wait").stdout == "nothing to do: 2 documents unchanged\n"
    write_zip(folder / "more.zip", {"b.txt": "A text about valves.", "c.txt": "Another."})
    told = docmill(command, folder, "--no-wait").stdout
    assert told.startswith("1 document: 1 unchanged, 1 archive to be unpacked, in "), told


def test_an_interrupted_wait_says_that_the_archive_is_still_to_be_unpacked(tmp_path: Path, conn: psycopg.Connection) -> None:
    path = write_zip(tmp_path / "batch.zip", {"a.txt": "A text."})
    with running("ingest", path, "--no-worker") as waiting:
        eventually(lambda: conn.execute("SELECT count(*) FROM batch_archives").fetchone() == (1,))
        time.sleep(0.5)  # past the submission, in the wait
        waiting.send_signal(signal.SIGINT)
        printed, told = waiting.communicate(timeout=60)
    assert (waiting.returncode, printed) == (130, "")
    assert "1 archives are still to be unpacked" in told
    again = docmill("ingest", path, "--json")
    assert json.loads(again.stdout)["counts"] == {"complete": 1}


@pytest.mark.parametrize("given", [["a.txt"], ["a.zip", "a.zip"]])
def test_a_batch_id_is_for_one_folder_or_zip(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_zip(tmp_path / "a.zip", {"a.txt": "a"})
    done = docmill("ingest", *(tmp_path / name for name in given), "--batch-id", "x")
    assert done.returncode == 2
    assert "--batch-id" in done.stderr
