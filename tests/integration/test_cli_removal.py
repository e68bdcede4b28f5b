"""`docmill cancel` and `docmill delete` as people run them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import Any

import psycopg
import pytest

pytestmark = pytest.mark.usefixtures("settings")
COMMAND = (sys.executable, "-m", "jobs.cli")


def docmill(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=90, env=os.environ, check=False, **more)


def submit(conn: psycopg.Connection, *doc_ids: str, batch_id: str | None = None) -> None:
    run = None
    if batch_id is not None:
        row = conn.execute("SELECT begin_batch(%s, 'default', NULL, 'c')", [batch_id]).fetchone()
        run = row and row[0]
    for doc_id in doc_ids:
        conn.execute(
            "SELECT accept_document(%s, 'default', %s || '.txt', 'uploads/' || %s, NULL, 1, NULL, '{}', 0, 'c', %s, %s, 50)",
            [doc_id, doc_id, doc_id, batch_id, run],
        )


def states(conn: psycopg.Connection) -> dict[str, str]:
    return dict(conn.execute("SELECT doc_id, state FROM file_extractions").fetchall())


def test_cancel_takes_ids_beginnings_file_names_and_batches_and_reports_what_is_none(conn: psycopg.Connection) -> None:
    submit(conn, "apple", "banana", "cherry")
    submit(conn, "one", "two", batch_id="batch")
    done = docmill("cancel", "apple", "ban", "cherry.txt", "batch", "nothing", "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert [(row["kind"], row["id"], row.get("state"), row.get("cancelled")) for row in said["done"]] == [
        ("document", "apple", "cancelled", None),
        ("document", "banana", "cancelled", None),
        ("document", "cherry", "cancelled", None),
        ("batch", "batch", None, 2),
    ]
    assert [row["given"] for row in said["refused"]] == ["nothing"]
    assert set(states(conn).values()) == {"cancelled"}


def test_delete_takes_whole_ids_only(conn: psycopg.Connection) -> None:
    submit(conn, "apple", "banana")
    submit(conn, "one", "two", batch_id="batch")
    refused = docmill("delete", "app", "banana.txt", "bat", "--yes")
    assert refused.returncode == 1
    assert refused.stderr.count("there is no such id") == 3
    assert len(states(conn)) == 4
    done = docmill("delete", "apple", "batch", "--yes")
    assert (done.returncode, done.stdout) == (0, "document apple: deleted\nbatch batch: 2 documents deleted\n")
    assert states(conn) == {"banana": "queued"}


def test_a_name_that_could_be_several_is_refused_with_what_it_could_be(conn: psycopg.Connection) -> None:
    submit(conn, "apple", "apricot")
    submit(conn, "one", batch_id="april")
    done = docmill("cancel", "ap", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["refused"] == [{"given": "ap", "error": '"ap" could be any of 3.'}]
    assert "document apple apple.txt queued" in " ".join(done.stderr.split())
    assert all(name in done.stderr for name in ("apricot", "april"))
    assert set(states(conn).values()) == {"queued"}


@pytest.mark.parametrize(
    "command",
    [("cancel",), ("delete", "--yes"), ("status",), ("status", "--batch"), ("explain",), ("logs",), ("summary",), ("extract",),
     ("extract", "--all", "--batch"), ("dead", "show"), ("dead", "requeue"), ("dead", "requeue", "--all", "--batch"), ("dead", "discard"),
     ("search", "x", "--batch"), ("breaker", "reset"), ("roles", "revoke")],
)  # fmt: skip
def test_an_empty_name_names_nothing_though_every_id_begins_with_it(conn: psycopg.Connection, command: tuple[str, ...]) -> None:
    submit(conn, "apple", batch_id="batch")
    done = docmill(*command, "")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a name must not be empty" in done.stderr
    assert states(conn) == {"apple": "queued"}


@pytest.mark.parametrize(("answer", "left"), [("n\n", {"apple": "queued"}), ("y\n", {})])
def test_a_person_at_a_terminal_is_asked_before_anything_is_deleted(conn: psycopg.Connection, answer: str, left: dict[str, str]) -> None:
    submit(conn, "apple")
    near, far = pty.openpty()
    os.write(near, answer.encode())
    try:
        done = docmill("delete", "apple", stdin=far)
    finally:
        os.close(near)
        os.close(far)
    assert "Delete with everything" in done.stderr
    assert done.returncode == (1 if left else 0)
    assert states(conn) == left
