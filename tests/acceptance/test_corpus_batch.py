"""A real mixed batch from zip to summary, with its workers killed on the way; again; and with one file changed."""

from __future__ import annotations

import signal
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_batch
from tests.running import wait_for, worker
from tests.summaries import check

COUNT = "SELECT count(*) FROM file_extractions WHERE state = 'complete'"
UNPACKED = "SELECT coalesce(max(unpacked_count), 0) FROM batch_archives"
FINGERPRINT = """SELECT
    (SELECT array_agg((d.doc_id, d.version, d.state, d.run_id, d.xmin::text) ORDER BY d.id) FROM file_extractions d)::text,
    (SELECT count(*) FROM procrastinate_jobs), (SELECT count(*) FROM document_events), (SELECT count(*) FROM run_summaries)"""
PASSAGES = "SELECT content_sha256 FROM document_chunks WHERE doc_id = %s"


@pytest.fixture(autouse=True)
def short_waits(front_door: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEASE_SECONDS": "4", "RECONCILE_SECONDS": "0.5", "WORKER_POLL_SECONDS": "0.1"}.items():
        monkeypatch.setenv(name, value)


def pack(archive: Path, corpus: Path, changed: dict[str, bytes]) -> int:
    """Zip the good documents of the corpus, their folders kept; `changed` replaces the content of some. Return how many."""
    files = [path for path in sorted((corpus / "good").rglob("*")) if path.is_file()]
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for path in files:
            name = path.relative_to(corpus / "good").as_posix()
            made.writestr(name, changed.get(name, path.read_bytes()))
    return len(files)


def asks(conn: psycopg.Connection) -> Callable[..., Any]:
    def one(statement: str, *params: Any) -> Any:
        row = conn.execute(statement, params).fetchone()
        return None if row is None else row[0] if len(row) == 1 else row

    return one


def reached(one: Callable[..., Any], statement: str, enough: int) -> bool:
    return bool(one(statement) >= enough)


def ended(one: Callable[..., Any], batch: str) -> bool:
    return one("SELECT status FROM processing_jobs WHERE batch_id = %s", batch) in ("completed", "completed_with_errors", "failed")


def run(one: Callable[..., Any], log: Path, batch: str, kill_at: list[tuple[str, int]]) -> None:
    """See a batch through with a worker that is killed whenever a count is reached, and started again."""
    for statement, enough in [*kill_at, ("", 0)]:
        with worker(log) as process:
            if statement:
                wait_for(partial(reached, one, statement, enough), f"{statement} to reach {enough}; see {log}", 240, process)
                process.send_signal(signal.SIGKILL)
                process.wait()
                continue
            wait_for(partial(ended, one, batch), f"the batch to end; see {log}", 400, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0


def summary(one: Callable[..., Any], batch: str) -> dict[str, Any]:
    ui, nested = one(
        """SELECT s.ui_json, s.nested_summary FROM run_summaries s JOIN processing_jobs b USING (run_id) WHERE b.batch_id = %s""", batch
    )
    check(ui, nested)
    return dict(ui)


def test_the_corpus_goes_from_zip_to_summary_whatever_is_killed_and_a_second_run_does_only_what_changed(
    conn: psycopg.Connection, corpus: Path, tmp_path: Path
) -> None:
    one, log, archive = asks(conn), tmp_path / "worker.log", tmp_path / "corpus.zip"
    count = pack(archive, corpus, {})
    assert count >= 200
    batch = submit_batch(archive, batch_id="corpus")
    run(one, log, batch, [(UNPACKED, 30), (COUNT, 60)])
    states: dict[str, int] = dict(conn.execute("SELECT state::text, count(*) FROM file_extractions GROUP BY 1").fetchall())
    assert sum(states.values()) == count
    assert set(states) == {"complete", "failed"}
    assert one("SELECT count(*) FROM file_extractions WHERE state = 'failed' AND error_type <> 'PARSE_ERROR'") == 0, "a kill was blamed"
    assert one("SELECT count(*) FROM run_summaries") == 1
    ui = summary(one, batch)
    assert (ui["totals"]["files"], ui["totals"]["failed"]) == (count, states["failed"])
    assert len(ui["files"]) == count

    before = one(FINGERPRINT)
    assert submit_batch(archive, batch_id="corpus").outcome == "unchanged"
    assert one(FINGERPRINT) == before

    doc_id, name = one(
        """SELECT d.doc_id, d.source_path FROM file_extractions d WHERE d.state = 'complete' AND d.chunk_count >= 4
        AND d.source_path LIKE '%%.md' ORDER BY d.source_path LIMIT 1"""
    )
    old = {row[0] for row in conn.execute(PASSAGES, [doc_id]).fetchall()}
    content = (corpus / "good" / name).read_bytes() + b"\n\n## A late addition\n\nThe seal of pump 17 was replaced in November.\n"
    pack(archive, corpus, {name: content})
    assert submit_batch(archive, batch_id="corpus").outcome == "new_run"
    run(one, log, batch, [])
    new = {row[0] for row in conn.execute(PASSAGES, [doc_id]).fetchall()}
    detail = one("SELECT detail FROM document_events WHERE doc_id = %s AND version = 2 AND stage = 'embed'", doc_id)
    print(f"\n{name}: {len(new)} passages, {len(new - old)} of them changed, {detail} embedded")
    assert 0 < len(new - old) < len(new)
    assert detail["embedded"] == len(new - old)
    assert one("SELECT count(*) FROM file_extractions WHERE version > 1") == 1
    assert one("SELECT count(*) FROM run_summaries") == 2
    assert summary(one, batch)["totals"]["files"] == count
