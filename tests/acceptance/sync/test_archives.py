"""Archives in a folder that is synced or watched."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import psycopg

from jobs.arguments import derive_doc_id, path_doc_id
from tests.acceptance.sync.commands import COMMAND, archive, complete, states, sync, watching
from tests.running import wait_for, worker


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
