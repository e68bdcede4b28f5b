"""`docmill status` and `docmill summary` of batches that have not ended, or not well."""

from __future__ import annotations

import json

import psycopg
import pytest

from tests.integration.batches import accept, begin, seal
from tests.integration.test_cli import docmill
from tests.summaries import check

pytestmark = pytest.mark.usefixtures("settings")
WIDE = {"COLUMNS": "200"}


def archive(conn: psycopg.Connection, run: object, entry_path: str, state: str, error: str | None = None) -> None:
    conn.execute(
        """INSERT INTO batch_archives (
                batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, entry_count, unpacked_count, error_message,
                ended_at)
            VALUES ('batch-1', %s, 'ann', %s, '', 'uploads/z', %s, 10, 4, %s, CASE WHEN %s = 'failed' THEN now() END)""",
        [run, entry_path, state, error, state],
    )


def test_the_status_of_a_batch_shows_its_archives_and_why_it_failed(conn: psycopg.Connection) -> None:
    run = begin(conn, "batch-1", "/data/in.zip")
    archive(conn, run, "", "unpacking")
    archive(conn, run, "inner.zip/", "failed", "inner.zip is encrypted.")
    shown = docmill("status", "batch-1", **WIDE)
    assert shown.returncode == 0, shown.stderr
    assert "(the batch)" in shown.stdout
    assert "unpacking" in shown.stdout
    assert "inner.zip is encrypted." in shown.stdout
    found = json.loads(docmill("status", "batch-1", "--json").stdout)
    assert [(a["entry_path"], a["state"], a["entry_count"], a["unpacked_count"]) for a in found["archives"]] == [
        ("", "unpacking", 10, 4), ("inner.zip/", "failed", 10, 4),
    ]  # fmt: skip
    conn.execute("SELECT fail_batch('batch-1', 'the wrong zip')")
    assert "the wrong zip" in docmill("status", "batch-1", **WIDE).stdout


def test_the_status_of_a_large_batch_lists_what_failed_and_counts_the_rest(conn: psycopg.Connection) -> None:
    run = begin(conn, "batch-1")
    conn.execute("SET session_replication_role = replica")
    conn.execute(
        """INSERT INTO file_extractions (
                doc_id, batch_id, run_id, file_name, file_path, source_path, state, error_type, error_message, correlation_id)
            SELECT 'd' || n, 'batch-1', %s, n || '.txt', 'uploads/' || n, 'file ' || to_char(n, 'FM0000'), s.state, s.error, 'no', 'c'
            FROM generate_series(1, 1300) AS n
            CROSS JOIN LATERAL (
                SELECT CASE WHEN n %% 10 > 0 THEN 'failed' ELSE 'queued' END::document_state AS state,
                    CASE WHEN n %% 10 > 0 THEN 'PERMANENT' END::document_error_type AS error
            ) AS s""",
        [run],
    )
    conn.execute("SET session_replication_role = origin")
    archive(conn, run, "inner.zip/", "failed", "inner.zip is encrypted.")
    shown = docmill("status", "batch-1", **WIDE)
    assert shown.returncode == 0, shown.stderr
    assert [name for name in ("file 0001", "file 1111", "file 1112", "file 0010") if name in shown.stdout] == ["file 0001", "file 1111"]
    assert "300 more documents" in shown.stdout
    assert len(json.loads(docmill("status", "batch-1", "--json").stdout)["documents"]) == 1300


def test_the_summary_of_a_batch_that_goes_on_tells_how_it_stands(conn: psycopg.Connection) -> None:
    run = begin(conn, "batch-1")
    accept(conn, run, "a", "c", batch_id="batch-1")
    seal(conn, run, 2, "batch-1")
    shown = docmill("summary", "batch-", **WIDE)
    assert "being worked on" in shown.stdout
    assert "2 unfinished" in shown.stdout
    ui, nested = (json.loads(docmill("summary", "batch-1", "--json", *more).stdout) for more in ((), ("--nested",)))
    check(ui, nested)
    begin(conn, "batch-2")
    unclear = docmill("summary", "batch-")
    assert (unclear.returncode, unclear.stdout) == (1, "")
    assert "batch-2" in unclear.stderr
