"""With a real worker: one user's thousand documents do not make another's single one wait, and a limit on documents in work holds."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from models.settings import Settings
from tests.running import wait_for, worker

SUBMIT = "SELECT submit_document('uploads/' || n, doc_id => n, user_id => %s) FROM unnest(%s::text[]) AS n"


def submit(conn: psycopg.Connection, settings: Settings, user: str, count: int) -> None:
    names = [f"{user}{n}" for n in range(count)]
    folder = settings.storage_base_path / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"A short note about {name}.")
    conn.execute(SUBMIT, [user, names])


def count(conn: psycopg.Connection, where: str) -> int:
    row = conn.execute(f"SELECT count(*) FROM file_extractions WHERE {where}").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("handoff", ["inline", "queue"])
def test_a_single_document_is_done_after_a_few_of_another_users_thousand(
    conn: psycopg.Connection, settings: Settings, tmp_path: Path, handoff: str
) -> None:
    submit(conn, settings, "ann", 1000)
    with worker(tmp_path / "log", WORKER_CONCURRENCY="2", HANDOFF=handoff) as process:
        wait_for(lambda: count(conn, "state = 'complete'") > 5, "the first of ann's", process=process)
        submit(conn, settings, "bob", 1)
        wait_for(lambda: count(conn, "user_id = 'bob' AND state = 'complete'") == 1, "bob's one", process=process)
    meanwhile = count(
        conn,
        """user_id = 'ann' AND processing_completed_at > (SELECT created_at FROM file_extractions WHERE user_id = 'bob')
        AND processing_completed_at < (SELECT processing_completed_at FROM file_extractions WHERE user_id = 'bob')""",
    )
    assert meanwhile <= 10
    assert count(conn, "user_id = 'ann' AND state = 'queued' AND milestone = 'uploaded'") > 500, "ann's backlog was there all the time"


def test_a_limit_holds_over_two_workers_and_nothing_waits_for_a_poll(conn: psycopg.Connection, settings: Settings, tmp_path: Path) -> None:
    submit(conn, settings, "ann", 40)
    submit(conn, settings, "bob", 40)
    limits = {"MAX_DOCUMENTS_PER_USER": "1", "WORKER_POLL_SECONDS": "60"}
    with worker(tmp_path / "log", **limits), worker(tmp_path / "log", **limits):
        wait_for(lambda: count(conn, "state = 'complete'") == 80, "all to be done", timeout=50)
    together = conn.execute(
        """SELECT a.doc_id, b.doc_id FROM file_extractions AS a JOIN file_extractions AS b ON a.user_id = b.user_id AND a.id < b.id
        WHERE a.processing_started_at < b.processing_completed_at AND b.processing_started_at < a.processing_completed_at"""
    ).fetchall()
    assert together == []
