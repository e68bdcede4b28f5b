"""A real worker on files that mean harm: each costs its own document, what a limit cuts is shown, and the worker stays as it is."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_batch, submit_document
from jobs.adapters.archives import is_archive
from tests.running import descendants, wait_for, worker
from tests.unit.small_files import pdf

CORPUS = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[3] / "shared" / "corpus")) / "hostile"
SAMPLE = re.compile(r"gen/(zip/(?!bomb_many)|pdf/(?!form_xobject_laughs|tounicode|many|mediabox)|wrongtype/)")
"""Of the corpus, those that are cheap."""
ENDED = "SELECT count(*) FROM file_extractions WHERE state IN ('complete', 'failed', 'duplicate')"


@pytest.fixture(autouse=True)
def quick(front_door: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_PROVIDER", "hash")
    monkeypatch.setenv("MAX_PAGES", "1000")
    monkeypatch.setenv("MAX_RETRY_ATTEMPTS", "0")


def one(conn: psycopg.Connection, statement: str, *args: Any) -> tuple[Any, ...]:
    row = conn.execute(statement, args).fetchone()
    return () if row is None else tuple(row)


def test_a_document_that_a_limit_cut_is_complete_and_shown_as_cut(conn: psycopg.Connection, tmp_path: Path) -> None:
    submit_document(pdf(*(f"page {number}" for number in range(5))), file_name="long.pdf", doc_id="long")
    submit_document(pdf("one", "two"), file_name="short.pdf", doc_id="short")
    with worker(tmp_path / "log", MAX_PAGES="3"):
        wait_for(lambda: one(conn, ENDED) == (2,), "both to end")
    assert conn.execute("SELECT doc_id, state::text, reason, pages_kept, pages_of FROM incomplete_documents").fetchall() == [
        ("long", "complete", "the page limit of 3 (MAX_PAGES)", 3, 5)
    ]
    assert "cut by the page limit of 3 (MAX_PAGES)" in str(conn.execute("SELECT * FROM explain_document('long')").fetchall())
    submit_document(pdf(*(f"leaf {number}" for number in range(5))), file_name="whole.pdf", doc_id="whole")
    with worker(tmp_path / "log", MAX_PAGES="3", PARTIAL_PARSE="fail"):
        wait_for(lambda: one(conn, ENDED) == (3,), "the third to end")
    state, error_type, message = one(
        conn, "SELECT state::text, error_type::text, error_message FROM file_extractions WHERE doc_id = 'whole'"
    )
    assert (state, error_type) == ("failed", "PARSE_ERROR")
    assert "'whole.pdf'" in message
    assert "5 pages, more than the limit of 3" in message


def test_hostile_files_end_as_expected_and_leave_the_worker_as_it_was(conn: psycopg.Connection, tmp_path: Path) -> None:
    if not CORPUS.exists():
        pytest.skip("no corpus: set DOCMILL_CORPUS")
    with (CORPUS / "MANIFEST.tsv").open(encoding="utf-8") as rows:
        files = [row for row in csv.DictReader(rows, delimiter="\t", quoting=csv.QUOTE_NONE) if SAMPLE.match(row["path"])]
    assert len(files) > 50
    for row in files:
        if is_archive(CORPUS / row["path"], row["path"]):
            submit_batch(CORPUS / row["path"], batch_id=row["path"])
        else:
            submit_document(CORPUS / row["path"], doc_id=row["path"])
    left = """SELECT (SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'failed', 'duplicate'))
        + (SELECT count(*) FROM processing_jobs WHERE completed_at IS NULL)"""
    with worker(tmp_path / "log", PARSE_TIMEOUT_SECONDS="60") as process:
        wait_for(lambda: one(conn, left) == (0,), "all to end", timeout=300, process=process)
        kept = descendants(process.pid)[1:]
    assert kept
    assert not any(Path(f"/proc/{pid}").exists() for pid in kept)
    assert one(conn, "SELECT sum(crash_count), count(*) FILTER (WHERE error_type IN ('UNKNOWN', 'RETRYABLE')) FROM file_extractions") == (
        0,
        0,
    )
    complete = "SELECT count(*) FILTER (WHERE state IN ('complete', 'duplicate')) FROM file_extractions WHERE %s IN (doc_id, batch_id)"
    ended = {row["path"]: one(conn, complete, row["path"])[0] for row in files}
    expected = {row["path"]: row["expected"] for row in files}
    assert [path for path, words in expected.items() if words.startswith("fail") and ended[path]] == []
    assert [path for path, words in expected.items() if words in ("ok", "ok-part") and not ended[path]] == []
