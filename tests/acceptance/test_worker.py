"""What a real worker process says of itself, and how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_document
from jobs.registry import STUCK_EXIT_CODE
from tests.running import REPOSITORY, wait_for, worker


@pytest.fixture(autouse=True)
def short_leases(front_door: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE_SECONDS", "2")


def one(conn: psycopg.Connection, statement: str) -> tuple[Any, ...]:
    row = conn.execute(statement).fetchone()
    return () if row is None else tuple(row)


def test_a_worker_registers_beats_and_signs_off(conn: psycopg.Connection, tmp_path: Path) -> None:
    with worker(tmp_path / "log", "-q", "cpu,embed") as process:
        wait_for(lambda: one(conn, "SELECT count(*) FROM worker_registry") == (1,), "the registration", process=process)
        pid, queues, memory, version = one(conn, "SELECT pid, queues, memory_mb, version FROM worker_registry")
        assert (pid, queues) == (process.pid, ["cpu", "embed"])
        assert memory > 10
        assert version
        first = one(conn, "SELECT heartbeat_at FROM worker_registry")
        wait_for(lambda: one(conn, "SELECT heartbeat_at FROM worker_registry") > first, "a heartbeat", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert one(conn, "SELECT count(*) FROM worker_registry") == (0,)


def test_sigterm_hands_on_what_is_in_hand_and_a_second_signal_leaves_at_once(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(b"some text", file_name="a.txt", doc_id="a")
    with worker(tmp_path / "log", DOCMILL_FAULTS="sleep:60@stage_started:parse") as process:
        wait_for(lambda: one(conn, "SELECT state FROM file_extractions") == ("working",), "the claim", process=process)
        wait_for(lambda: "a" in one(conn, "SELECT documents FROM worker_registry")[0], "the stage", process=process)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: one(conn, "SELECT stopping FROM worker_registry") == (True,), "the stop to be known", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 128 + signal.SIGTERM
    with worker(tmp_path / "log", RECONCILE_SECONDS="0.2"):
        wait_for(lambda: one(conn, "SELECT state FROM file_extractions") == ("complete",), "the document to be taken up")
    assert one(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'aborted' AND task_name <> 'parse'")[0] <= 1


def test_the_grace_is_kept_and_what_is_not_done_by_then_is_handed_on(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(b"some text", file_name="a.txt", doc_id="a")
    with worker(tmp_path / "log", DOCMILL_FAULTS="sleep:60@stage_started:parse", SHUTDOWN_GRACE_SECONDS="0.5") as process:
        wait_for(lambda: "a" in (one(conn, "SELECT documents FROM worker_registry") or ([],))[0], "the stage", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert one(conn, "SELECT milestone, state, retry_count, crash_count, lease_until FROM file_extractions") == (
        "upload_validated", "queued", 0, 0, None,
    )  # fmt: skip
    assert one(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('aborted', 'doing')") == (0,)
    assert one(conn, "SELECT task_name FROM procrastinate_jobs WHERE status = 'todo' AND queue_name = 'cpu'") == ("parse",)


def test_a_worker_whose_event_loop_is_stuck_ends_itself_and_another_takes_over(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(b"some text", file_name="a.txt", doc_id="a")
    with worker(tmp_path / "log", DOCMILL_FAULTS="block:60@stage_started:parse", WATCHDOG_SECONDS="2") as process:
        assert process.wait(timeout=30) == STUCK_EXIT_CODE
    assert "ends itself" in (tmp_path / "log").read_text()
    with worker(tmp_path / "log", RECONCILE_SECONDS="0.2"):
        wait_for(lambda: one(conn, "SELECT state FROM file_extractions") == ("complete",), "the document to be taken up")
    assert one(conn, "SELECT count(*) FROM document_events WHERE event = 'rescued'") == (1,)


def test_every_line_of_a_json_log_parses_and_carries_its_context(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(b"some text", file_name="a.txt", doc_id="a", correlation_id="corr-1")
    submit_document(b"\x7fELF nothing to read", file_name="b.bin", doc_id="b", correlation_id="corr-2")
    with worker(tmp_path / "log", LOG_FORMAT="json", LOG_FILE_PATH="docmill.log"):
        wait_for(lambda: one(conn, "SELECT count(*) FROM file_extractions WHERE state IN ('complete', 'failed')") == (2,), "both to end")
    files = list((tmp_path / "storage" / "logs").glob("*.log"))
    assert len(files) == 1
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    by_document = {line["doc_id"]: line for line in lines if "doc_id" in line}
    assert by_document["a"]["correlation_id"] == "corr-1"
    assert by_document["b"]["correlation_id"] == "corr-2"
    assert by_document["b"]["level"] == "ERROR"
    assert by_document["b"]["stage"] == "validate"
    assert all("doc_id" not in line for line in lines if line["logger"].startswith("procrastinate.worker") and "Stopped" in line["message"])
    assert not any("nothing to read" in json.dumps(line) for line in lines)


def test_a_worker_that_has_grown_too_large_finishes_what_it_has_in_hand_and_ends_and_the_next_goes_on(
    conn: psycopg.Connection, tmp_path: Path
) -> None:
    """A limit below what any worker weighs: each does what it has in hand, and no more, until a supervisor's next one takes over."""
    for doc_id in "abcd":
        submit_document(b"text of " + doc_id.encode(), file_name=f"{doc_id}.txt", doc_id=doc_id)
    limited = {"WORKER_MEMORY_LIMIT_MB": "1", "WORKER_CONCURRENCY": "1", "SHUTDOWN_GRACE_SECONDS": "0", "LOG_LEVEL": "INFO"}
    limited["SMALL_DOCUMENTS_TOGETHER"] = "1"
    # Stages longer than the grace: one that is cut off would be begun again, and its document handed on.
    slow = {"DOCMILL_FAULTS": "sleep:2@stage_started:chunk"}
    lives = 0
    while one(conn, "SELECT count(*) FROM file_extractions WHERE state = 'complete'") < (4,):
        lives += 1
        assert lives <= 4
        before = one(conn, "SELECT count(*) FROM file_extractions WHERE state = 'complete'")
        log = tmp_path / f"log {lives}"
        with worker(log, "-q", "cpu,embed,extract", **limited, **slow) as process:
            assert process.wait(timeout=120) == 0
        assert log.read_text().count("WORKER_MEMORY_LIMIT_MB") == 1
        assert one(conn, "SELECT count(*) FROM file_extractions WHERE state = 'complete'") > before
        assert one(conn, "SELECT count(*) FROM file_extractions WHERE state IN ('working', 'retrying')") == (0,)
        assert one(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'") == (0,)
    assert lives >= 2
    assert one(conn, "SELECT sum(crash_count + retry_count + requeue_count) FROM file_extractions") == (0,)
    assert one(conn, "SELECT count(*) FROM document_events WHERE event IN ('handed_on', 'rescued', 'requeued')") == (0,)
    assert one(conn, "SELECT max(count) FROM (SELECT count(*) FROM document_events WHERE stage = 'chunk' GROUP BY doc_id) AS c") == (1,)


def test_sigterm_ends_the_removal_of_many_files(conn: psycopg.Connection, tmp_path: Path) -> None:
    many = 50_000
    conn.execute(
        "INSERT INTO files_to_remove (path) SELECT 'uploads/' || sha256(n::text::bytea) || '/x' FROM generate_series(1, %s) AS n", [many]
    )
    conn.execute(
        "INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args) "
        "VALUES ('maintenance', 'remove_noted_files', 1000, '{\"timestamp\": 0}')"
    )
    with worker(tmp_path / "log") as process:
        wait_for(lambda: one(conn, "SELECT count(*) FROM files_to_remove") < (many,), "the first removal", process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    assert one(conn, "SELECT count(*) FROM files_to_remove") > (0,)
    assert one(conn, "SELECT status FROM procrastinate_jobs WHERE task_name = 'remove_noted_files' ORDER BY id LIMIT 1") == ("succeeded",)


def test_the_watchdog_is_as_quick_as_it_is_told_to_be_with_long_leases(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(b"some text", file_name="a.txt", doc_id="a")
    with worker(tmp_path / "log", DOCMILL_FAULTS="block:60@stage_started:chunk", LEASE_SECONDS="60", WATCHDOG_SECONDS="3") as process:
        assert process.wait(timeout=40) == 70


def test_a_worker_in_a_container_registers_under_a_name_of_its_own(conn: psycopg.Connection, tmp_path: Path) -> None:
    isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"] + (["--user", "--map-root-user"] if os.getuid() else [])
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    command = [*isolated, sys.executable, "-m", "procrastinate", "--app=procrastinate_app.app", "worker"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=log, stderr=log)
    try:
        wait_for(lambda: conn.execute("SELECT FROM worker_registry").fetchone() is not None, f"the worker; see {log.name}", process=process)
        row = conn.execute("SELECT worker, host, pid, connections > 0 FROM worker_registry").fetchone()
    finally:
        process.kill()
        process.wait()
    assert row is not None
    assert row[0].startswith(f"{socket.gethostname()}:1:")
    assert row[1:] == (socket.gethostname(), 1, True)
