"""One sync of a folder after the other: real processes and real workers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest

from jobs.arguments import path_doc_id
from tests.acceptance.sync.commands import COMMAND, complete, put, states, sync
from tests.running import worker


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
