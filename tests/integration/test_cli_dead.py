"""`docmill dead` as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from jobs import retry_document
from models.errors import SubmitConflict

pytestmark = pytest.mark.usefixtures("front_door")
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e\nname.txt"


def docmill(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "dead", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ | environment, check=False)


def answer(*arguments: object) -> Any:
    done = docmill(*arguments, "--json")
    assert done.stdout, done.stderr
    assert done.stdout.isascii()
    return json.loads(done.stdout)


def fail(conn: psycopg.Connection, doc_id: str, *, name: str = "f.txt", stage: str = "validate", error: str = "PERMANENT") -> int:
    """Have a document fail as the runner would and return the number of its dead letter."""
    conn.execute("SELECT submit_document('uploads/a', doc_id => %s, file_name => %s, content_sha256 => %s)", [doc_id, name, "1" * 64])
    conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE args ->> 'doc_id' = %s", [doc_id])
    conn.execute(
        "UPDATE file_extractions SET state = 'failed', claim = 1, error_type = %s, error_message = 'm' WHERE doc_id = %s", [error, doc_id]
    )
    row = conn.execute(
        """INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message, traceback, context)
        VALUES (%s, 1, 'default', 'c', %s, %s, %s, %s, '{"worker": "host:1"}') RETURNING id""",
        [doc_id, stage, error, f"{name}: is empty", f"Traceback\n  {name}"],
    ).fetchone()
    assert row is not None
    return int(row[0])


def states(conn: psycopg.Connection) -> dict[str, str]:
    return dict(conn.execute("SELECT doc_id, state FROM file_extractions").fetchall())


def test_letters_are_listed_and_shown_and_nothing_in_them_moves_the_terminal(conn: psycopg.Connection) -> None:
    assert docmill("list").stdout == "There is no open dead letter.\n"
    first, second = fail(conn, "a"), fail(conn, "b", name=HOSTILE, stage="parse", error="TIMEOUT")
    listed = answer("list")
    assert (listed["total"], [row["id"] for row in listed["dead_letters"]]) == (2, [second, first])
    assert [row["id"] for row in answer("list", "--limit", 1)["dead_letters"]] == [second]
    assert answer("list", "--limit", 1)["total"] == 2
    for filters, found in (
        (("--stage", "parse"), [second]), (("--error-type", "permanent"), [first]), (("--user", "bob"), []), (("--batch", "b"), []),
    ):  # fmt: skip
        assert [row["id"] for row in answer("list", *filters)["dead_letters"]] == found
    shown = answer("show", "b")
    assert (shown["id"], shown["state"], shown["context"], shown["how_to_requeue"]) == (
        second, "failed", {"worker": "host:1"}, f"SELECT requeue_dead_letter({second});",
    )  # fmt: skip
    assert answer("show", first)["doc_id"] == "a"
    for printed in (docmill("list"), docmill("show", second)):
        assert printed.returncode == 0
        assert "TIMEOUT" in printed.stdout
        assert all(letter.isprintable() or letter == "\n" for letter in printed.stdout + printed.stderr)


def test_a_letter_whose_document_somebody_holds_is_not_waited_for_for_ever_and_keeps_no_other(
    conn: psycopg.Connection, database: str, settings: Any
) -> None:
    held, _ = fail(conn, "a"), fail(conn, "b")
    waits = conn.execute("SELECT proconfig FROM pg_proc WHERE proname = 'lock_dead_letter'").fetchone()
    assert waits is not None
    assert "lock_timeout=5s" in waits[0]
    conn.execute("ALTER FUNCTION lock_dead_letter SET lock_timeout = '50ms'")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'a' FOR UPDATE")
        done = docmill("requeue", held, "b")
        with pytest.raises(SubmitConflict):
            retry_document("a")
    assert (done.returncode, states(conn)) == (1, {"a": "failed", "b": "queued"})
    assert done.stderr == f'docmill: another transaction holds document "a" of dead letter {held}; try again once it has ended\n'


def test_letters_are_requeued_by_number_and_by_document_and_each_failure_is_told(conn: psycopg.Connection) -> None:
    first = fail(conn, "a")
    fail(conn, "b")
    fail(conn, "c")
    done = docmill("requeue", first, "b", "nobody", "4711", first)
    assert done.returncode == 1
    assert done.stdout == f"dead letter {first}: requeued, goes on at validate\ndead letter {first + 1}: requeued, goes on at validate\n"
    assert 'There is no dead letter "nobody"' in done.stderr
    assert 'There is no dead letter "4711"' in done.stderr
    assert states(conn) == {"a": "queued", "b": "queued", "c": "failed"}
    again = docmill("requeue", first)
    assert (again.returncode, again.stdout) == (1, "")
    assert f'dead letter {first} (document "a", version 1) was requeued at' in again.stderr
    made = answer("requeue", "c", "a")
    assert ([row["stage"] for row in made["requeued"]], [row["given"] for row in made["refused"]]) == (["validate"], ["a"])


def test_discarded_letters_are_gone_and_their_documents_stay_failed(conn: psycopg.Connection) -> None:
    number = fail(conn, "a")
    assert docmill("discard", "a").stdout == f"dead letter {number}: discarded\n"
    assert docmill("discard", "a").returncode == 1
    assert answer("show", "a")["resolution"] == "discarded"
    assert states(conn) == {"a": "failed"}
    assert answer("list") == {"total": 0, "dead_letters": []}


def test_all_letters_or_those_that_match_are_requeued(conn: psycopg.Connection) -> None:
    for doc_id in "abc":
        fail(conn, doc_id, stage="parse", error="TIMEOUT" if doc_id == "b" else "UNKNOWN")
    assert answer("requeue", "--all", "--error-type", "TIMEOUT")["requeued"] == 1
    assert states(conn) == {"a": "failed", "b": "queued", "c": "failed"}
    done = docmill("requeue", "--all", "--stage", "parse")
    assert (done.returncode, done.stdout) == (0, "2 dead letters requeued\n")
    assert docmill("requeue", "--all").stdout == "0 dead letters requeued\n"
    assert set(states(conn).values()) == {"queued"}


def test_requeueing_can_give_a_priority(conn: psycopg.Connection) -> None:
    for doc_id in ("a", "b", "c"):
        fail(conn, doc_id)
    assert docmill("requeue", "a", "--priority", "5").returncode == 0
    assert docmill("requeue", "b").returncode == 0
    assert docmill("requeue", "--all", "--priority", "-4").returncode == 0
    assert dict(conn.execute("SELECT doc_id, priority FROM file_extractions").fetchall()) == {"a": 5, "b": 0, "c": -4}


def test_requeueing_reopens_the_batch(conn: psycopg.Connection) -> None:
    conn.execute("SELECT seal_batch('b', begin_batch('b', 'default', '/folder', 'c'), 2)")
    for doc_id in ("x", "y"):
        fail(conn, doc_id)
    conn.execute("UPDATE file_extractions d SET batch_id = 'b', run_id = b.run_id FROM processing_jobs b")
    assert conn.execute("SELECT settle_batch('b')").fetchone() == ("failed",)
    assert answer("requeue", "x")["batches_reopened"] == 1
    assert conn.execute("SELECT status, completed_at FROM processing_jobs").fetchone() == ("processing", None)
    assert answer("requeue", "--all", "--batch", "b") == {"requeued": 1, "batches_reopened": 0}


def test_a_number_that_is_also_a_doc_id_is_refused_with_both_meanings(conn: psycopg.Connection) -> None:
    first = fail(conn, "a")
    second = fail(conn, str(first))
    done = docmill("requeue", first)
    assert (done.returncode, done.stdout) == (1, "")
    assert f'"{first}" is a doc_id, whose dead letter is {second}, and the number of one of document "a"' in done.stderr
    assert docmill("requeue", second, "a").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [(), ("requeue",), ("requeue", "1", "--all"), ("requeue", "1", "--stage", "parse"), ("requeue", "--stage", "parse"), ("discard",),
     ("show",), ("list", "--stage", "none"), ("list", "--error-type", "none")],
)  # fmt: skip
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    done = docmill(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_absent_database_is_told() -> None:
    done = docmill("list", DATABASE_TIMEOUT="1", DATABASE_URL="postgresql://nobody:hunter22@127.0.0.1:1/none")
    assert (done.returncode, done.stdout) == (3, "")
    assert "hunter22" not in done.stderr
