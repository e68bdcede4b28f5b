"""The commands that show what goes on, as people run them: explain, logs, watch and status, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from models.settings import Settings
from tests.integration.conftest import Bench
from tests.integration.test_cli import COMMAND, PATIENCE, answer, docmill, eventually, running
from tests.integration.test_views import fill

OWNED = "\x1b]0;owned\x07\u202e.txt"


@pytest.fixture
async def filled(bench: Bench) -> Bench:
    """Documents in all states, one of them with a name and an error that a terminal would obey."""
    await fill(bench)
    bench.conn.execute(
        "UPDATE file_extractions SET file_name = %s, error_message = %s WHERE doc_id IN ('failed', 'retrying')", [OWNED, OWNED]
    )
    bench.conn.execute("UPDATE dead_letters SET error_message = %s", [OWNED])
    bench.conn.execute("UPDATE processing_jobs SET source_path = %s", [OWNED])
    bench.conn.execute("UPDATE circuit_breakers SET state = 'open', reason = %s, try_at = now()", [OWNED])
    bench.conn.execute("UPDATE worker_registry SET worker = %s", [OWNED])
    bench.conn.execute("UPDATE file_extractions SET crash_count = 1 WHERE doc_id = 'waiting 1'")
    return bench


def is_plain(shown: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in shown)


@contextmanager
def on_a_terminal(*arguments: str, lines: int = 60) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command with a pseudo terminal for its output; yields the process and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "LINES": str(lines)}
    process = subprocess.Popen([*COMMAND, *arguments], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_all(process: subprocess.Popen[bytes], ours: int) -> str:
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    process.wait(timeout=PATIENCE)
    return shown.decode("utf-8", "replace")


def test_explain_tells_the_story_and_what_comes_next(filled: Bench) -> None:
    shown = docmill("explain", "failed")
    assert shown.returncode == 0 and is_plain(shown.stdout)
    assert "submitted as a" in shown.stdout and "then: nothing by itself; dead letter" in shown.stdout
    story = answer(docmill("explain", "failed", "--json"))["story"]
    assert [line["tense"] for line in story[-2:]] == ["now", "next"]
    filled.conn.execute("SELECT delete_document('failed')")
    assert "gone; its events are all that is left" in docmill("explain", "failed").stdout
    unknown = docmill("explain", "nobody")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    several = docmill("explain", "wait")
    assert several.returncode == 1 and "waiting 1" in several.stderr and "waiting 2" in several.stderr


def test_status_says_what_is_stuck_and_how_far_a_batch_is(filled: Bench) -> None:
    overview = answer(docmill("status", "--json"))
    assert [(row["cause"], row["documents"]) for row in overview["stuck"]] == [("crashing", 1)]
    assert (overview["batches"][0]["completed"], overview["batches"][0]["failed"]) == (1, 1)
    assert "its worker died or hung 1 times during validate" in docmill("status", COLUMNS="300").stdout
    batch = answer(docmill("status", "--batch", "b", "--json"))
    assert (batch["percent"], batch["unfinished"]) == (33.3, 4)
    assert "33.3 %" in docmill("status", "--batch", "b").stdout
    assert docmill("status", "--batch", "failed").returncode == 1
    assert docmill("status", "failed", "--batch", "b").returncode == 2


def test_watch_in_a_pipe_says_a_line_a_look(filled: Bench) -> None:
    shown = docmill("watch", "--times", "2", "--every", "0.2")
    assert shown.returncode == 0 and is_plain(shown.stdout)
    first, second = shown.stdout.splitlines()
    assert "4 waiting, 1 scheduled, 1 running" in first and "1 workers; 1 dead letters; 1 stuck: its worker died" in second
    looks = [json.loads(line) for line in docmill("watch", "--times", "2", "--every", "0.2", "--json").stdout.splitlines()]
    assert [look["dead_letters"][0]["total"] for look in looks] == [1, 1]


@pytest.mark.parametrize("lines", [60, 12])
def test_watch_on_a_terminal_draws_a_screen_and_obeys_no_name(filled: Bench, lines: int) -> None:
    with on_a_terminal("watch", "--times", "1", lines=lines) as (process, ours):
        shown = read_all(process, ours)
    assert process.returncode == 0
    assert "\x1b[?1049h" in shown and "\x1b[?1049l" in shown, "the screen of before comes back"
    assert "owned\x07" not in shown and "\u202e" not in shown
    if lines == 60:
        assert all(word in shown for word in ("Stuck", "Services", "Queues", "Latest batches", "Workers: 1 alive", "Dead letters: 1 open"))


def test_watch_on_an_empty_database_shows_a_screen(database: str, settings: object) -> None:
    with on_a_terminal("watch", "--times", "1") as (process, ours):
        shown = read_all(process, ours)
    assert process.returncode == 0 and "Workers: 0 alive" in shown


def test_watching_ends_well_with_ctrl_c(filled: Bench) -> None:
    with running("watch", "--every", "0.2") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0


def test_logs_merges_events_and_log_files_in_the_order_of_time(filled: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FILE_PATH", "docmill.log")
    folder = tmp_path / "storage" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docmill.worker-h-1.log").write_text(
        f"2001-01-01 00:00:00.000 INFO     jobs.x: long before {OWNED} doc_id=failed\n"
        "2001-01-01 00:00:00.000 INFO     jobs.x: foreign doc_id=b\n"
    )
    shown = docmill("logs", "failed")
    assert shown.returncode == 0 and is_plain(shown.stdout)
    lines = shown.stdout.splitlines()
    assert "long before" in lines[0] and "submitted as a" in lines[1] and "failed for good at parse" in lines[-1]
    kinds = [json.loads(line)["kind"] for line in docmill("logs", "failed", "--json").stdout.splitlines()]
    assert kinds == ["log", *["event"] * (len(lines) - 1)]
    assert "long before" not in docmill("logs", "failed", "--no-files").stdout
    monkeypatch.delenv("LOG_FILE_PATH")
    assert "LOG_FILE_PATH is not set" in docmill("logs", "failed").stderr


def test_logs_follows_a_document_until_it_is_interrupted(filled: Bench) -> None:
    with running("logs", "waiting 1", "--follow") as process:
        assert process.stdout is not None
        assert "submitted" in process.stdout.readline()
        filled.conn.execute("SELECT cancel_document('waiting 1')")
        assert "cancelled by" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 0


def test_watch_outlives_a_database_that_goes_away(filled: Bench, database: str) -> None:
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    with running("watch", "--every", "0.2") as process, psycopg.connect(database, autocommit=True, dbname="postgres") as admin:
        assert process.stdout is not None
        process.stdout.readline()
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS FALSE")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        seen: list[str] = []
        stdout = process.stdout

        def looked_in_vain() -> bool:
            seen.append(stdout.readline())
            return "cannot be reached" in seen[-1]

        eventually(looked_in_vain)
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS TRUE")
        eventually(lambda: "waiting" in stdout.readline())


@pytest.mark.parametrize(
    "words",
    [
        ("status",), ("explain",), ("logs",), ("cancel",), ("delete", "--yes"), ("summary",), ("extract",), ("dead", "show"),
        ("dead", "requeue"), ("breaker", "reset"), ("search", "words", "--user"), ("search", "--mode", "text", "words", "--batch"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_words_that_are_no_unicode_name_nothing_and_are_no_accident(
    words: tuple[str, ...], settings: Settings, conn: psycopg.Connection
) -> None:
    conn.execute("SELECT submit_document('uploads/x', doc_id => %s)", ["caf\ufffd"])
    done = docmill(*words, "caf\udce9")
    assert done.returncode == (0 if "--user" in words else 1)
    assert "unforeseen" not in done.stderr
    assert conn.execute("SELECT state::text FROM file_extractions").fetchall() == [("queued",)]


def test_a_document_is_found_by_the_name_that_it_was_submitted_with(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "caf\udce9.txt"
    path.write_text("words")
    assert docmill("ingest", "--no-wait", path).returncode == 0
    assert answer(docmill("status", "--json", path.name))["state"] == "queued"
