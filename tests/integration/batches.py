"""Batches for tests: begun, filled and sealed with the functions that submitters call, worked on by a bench."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, LiteralString
from uuid import UUID

import psycopg

from jobs.reconcile import Reconciler
from models.documents import Document
from models.errors import PermanentError
from tests.integration.conftest import Bench
from tests.summaries import check

BATCH = "SELECT status, completed_at IS NOT NULL, error_message, total_files FROM processing_jobs"


def begin(conn: psycopg.Connection, batch_id: str = "b", source_path: str | None = "/data/in") -> UUID:
    row = conn.execute("SELECT begin_batch(%s, 'ann', %s, 'corr')", [batch_id, source_path]).fetchone()
    assert row is not None
    return UUID(str(row[0]))


def accept(conn: psycopg.Connection, run: UUID, *doc_ids: str, folder: str = "/data/in", content: str = "1", batch_id: str = "b") -> None:
    for doc_id in doc_ids:
        conn.execute(
            "SELECT accept_document(%s, 'ann', %s, 'uploads/a', %s, 7, repeat(%s, 64), '{}', 0, 'corr', %s, %s, 1000)",
            [doc_id, f"{doc_id}.txt", f"{folder}/{doc_id}.txt", content, batch_id, run],
        )


def seal(conn: psycopg.Connection, run: UUID, count: int, batch_id: str = "b") -> None:
    conn.execute("SELECT seal_batch(%s, %s, %s)", [batch_id, run, count])


def batch_of(bench: Bench, *doc_ids: str) -> UUID:
    run = begin(bench.conn)
    accept(bench.conn, run, *doc_ids)
    seal(bench.conn, run, len(doc_ids))
    return run


def add_archive(conn: psycopg.Connection, run: UUID, entry_path: str, state: str, error: str | None = None) -> None:
    conn.execute(
        """INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, error_message, ended_at)
            VALUES ('b', %s, 'ann', %s, '', 'uploads/z', %s, %s, CASE WHEN %s IN ('failed', 'unpacked', 'cancelled') THEN now() END)""",
        [run, entry_path, state, error, state],
    )
    if state in ("waiting", "unpacking"):
        conn.execute("SELECT defer_unpacking(a.id) FROM batch_archives AS a WHERE a.run_id = %s AND a.entry_path = %s", [run, entry_path])


def summary(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """The only summary there is, held against its schema."""
    (row,) = bench.all("SELECT ui_json, nested_summary, file_count, success_count, error_count FROM run_summaries")
    ui, nested = row[0], row[1]
    check(ui, nested)
    totals = ui["totals"]
    assert row[2:] == (totals["files"], totals["succeeded"], totals["failed"] + totals["cancelled"])
    return ui, nested


def refuse(*doc_ids: str) -> Callable[[Document], Any]:
    async def run(document: Document) -> None:
        if document.doc_id in doc_ids:
            raise PermanentError(f"{document.file_name}: no")

    return run


def at_once(database: str, *statements: LiteralString) -> list[Any]:
    """Run statements at the same moment, each over a connection of its own; return what each answered, or its error."""
    gate = threading.Barrier(len(statements))
    answers: list[Any] = [None] * len(statements)

    def run(place: int) -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            gate.wait()
            try:
                row = conn.execute(statements[place]).fetchone()
                answers[place] = row and row[0]
            except psycopg.Error as error:
                answers[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(statements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def reconciler(bench: Bench, **changes: Any) -> Reconciler:
    """One that judges at once: as if it had run for longer than a lease."""
    return Reconciler(bench.settings.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 60.0, **changes}), bench.pool)
