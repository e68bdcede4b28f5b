"""A real worker without superuser, BYPASSRLS or ownership does everything, for an application and people who are kept apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import jobs
from jobs.front import close_sync
from jobs.roles import grant_as
from models.settings import load_settings
from tests.archives import write_zip
from tests.running import REPOSITORY, served, wait_for, worker
from tests.walls import Walls, rows

SAMPLES = [path for path in sorted((REPOSITORY / "samples").iterdir()) if path.name != "README.md"]
QUICK = {
    "LEASE_SECONDS": "5",
    "RECONCILE_SECONDS": "0.2",
    "WORKER_POLL_SECONDS": "0.1",
    "PARSE_PROCESSES": "1",
    "EMBEDDING_PROVIDER": "hash",
}
UNFINISHED = "SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'failed', 'cancelled', 'duplicate')"
OPEN = "SELECT count(*) FROM processing_jobs WHERE status IN ('pending', 'processing')"


@pytest.fixture
def walls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walls]:
    """A server with an empty database; the front door of this process comes in as the application's login."""
    made = Walls()
    try:
        made.new_database()
        made.raise_walls()
        for name, value in {**QUICK, "DATABASE_URL": made.url("web"), "STORAGE_BASE_PATH": str(tmp_path / "storage")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        load_settings.cache_clear()
        yield made
    finally:
        close_sync()
        load_settings.cache_clear()
        made.close()


def docmill(walls: Walls, login: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a login."""
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    environment = {**QUICK, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "DATABASE_URL": walls.url(login),
                   "STORAGE_BASE_PATH": str(Path.cwd() / "storage")}  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_worker_with_a_plain_login_does_all_the_work_of_a_walled_database(walls: Walls, tmp_path: Path) -> None:
    with walls.as_login("web") as web, walls.as_login("operator") as operator:
        for user, files in (("alice", SAMPLES), ("bob", SAMPLES[:2])):
            with web.transaction():
                web.execute("SELECT set_config('docmill.user_id', %s, TRUE)", [user])
                for path in files:
                    jobs.submit_document(path, doc_id=f"{user}-{path.name}", user_id=user, connection=web)
                folder = write_zip(tmp_path / f"{user}.zip", {"a.md": f"# A\n\nPumps of {user}.", "b.md": f"# B\n\nValves of {user}."})
                jobs.submit_batch(folder, batch_id=f"{user}-zip", user_id=user, connection=web)
        with worker(tmp_path / "worker.log", DATABASE_URL=walls.url("worker")) as process:

            def ended() -> bool:
                return rows(operator, UNFINISHED) == [(0,)] and rows(operator, OPEN) == [(0,)]

            wait_for(ended, f"all of it; see {tmp_path / 'worker.log'}", 240, process)
            found = rows(operator, "SELECT user_id, state::text, count(*) FROM file_extractions GROUP BY 1, 2 ORDER BY 1, 2")
            assert found == [("alice", "complete", len(SAMPLES) + 2), ("bob", "complete", 4)]
            assert rows(operator, "SELECT count(*) FROM document_events WHERE event IN ('handed_on', 'rescued', 'failed')") == [(0,)]
            with web.transaction():
                web.execute("SET LOCAL docmill.user_id = 'bob'")
                assert jobs.delete_document(f"bob-{SAMPLES[0].name}", connection=web)
                jobs.submit_document(
                    b"# New\n\nOther text.", doc_id=f"bob-{SAMPLES[1].name}", user_id="bob", file_name="n.md", connection=web
                )
            wait_for(lambda: rows(operator, "SELECT version, state::text FROM file_extractions WHERE doc_id = %s", f"bob-{SAMPLES[1].name}")
                     == [(2, "complete")], "the new version", process=process)  # fmt: skip
        assert process.returncode == 0
        log = (tmp_path / "worker.log").read_text(encoding="utf-8")
        assert "permission denied" not in log
        assert "row-level security" not in log
        assert rows(operator, "SELECT status FROM processing_jobs ORDER BY batch_id") == [("completed",), ("completed",)]
    nobody_breaks_it_off(walls, tmp_path)
    as_people_see_it(walls, tmp_path)
    reembed_and_prune(walls, tmp_path)


def nobody_breaks_it_off(walls: Walls, tmp_path: Path) -> None:
    """A person can notify, as everybody can, but what is to be aborted stands in the rows of the jobs."""
    with walls.as_login("web") as web, web.transaction():
        web.execute("SET LOCAL docmill.user_id = 'alice'")
        jobs.submit_document(b"# Slow\n\nText.", doc_id="alice-slow", user_id="alice", file_name="slow.md", connection=web)
    environment = {"DATABASE_URL": walls.url("worker"), "DOCMILL_FAULTS": "sleep:3@stage_started:chunk"}
    with walls.as_login("bob") as bob, walls.as_login("operator") as operator:
        with worker(tmp_path / "worker.log", **environment) as process:
            look = "SELECT claim_job_id FROM file_extractions WHERE doc_id = 'alice-slow' AND state = 'working' AND lease_until > now()"
            wait_for(lambda: bool(rows(operator, look)), "it to be worked on", process=process)
            for told in ("", "x", "[]", "{}", '{"type": 1}', '{"type": "job_inserted"}', '{"type": "abort_job_requested", "job_id": "x"}'):
                bob.execute("SELECT pg_notify('procrastinate_any_queue_v1', %s)", [told])
            for _ in range(10):
                for (number,) in rows(operator, "SELECT id FROM procrastinate_jobs WHERE status = 'doing'"):
                    abort = json.dumps({"type": "abort_job_requested", "job_id": number})
                    bob.execute("SELECT pg_notify('procrastinate_any_queue_v1', %s)", [abort])
                time.sleep(0.1)
            ended = "SELECT FROM file_extractions WHERE doc_id = 'alice-slow' AND state = 'complete'"
            wait_for(lambda: bool(rows(operator, ended)), "it to be complete", process=process)
        events = rows(operator, "SELECT event FROM document_events WHERE doc_id = 'alice-slow' AND event <> 'stage_completed' ORDER BY id")
    assert events == [("submitted",), ("completed",)]


def as_people_see_it(walls: Walls, tmp_path: Path) -> None:
    """The commands and pages of a person show that person's rows."""
    status = docmill(walls, "bob", "status", "--json")
    assert {row["state"]: row["documents"] for row in json.loads(status.stdout)["documents"]} == {"complete": 3}, status.stderr
    found = json.loads(docmill(walls, "bob", "search", "pumps", "--json", "--limit", "100").stdout)
    assert found["passages"] if isinstance(found, dict) else found
    assert "alice" not in json.dumps(found)
    refused = docmill(walls, "bob", "delete", "--yes", f"bob-{SAMPLES[1].name}")
    assert refused.returncode == 1
    assert "may not do this" in refused.stderr
    explained = docmill(walls, "bob", "explain", f"bob-{SAMPLES[1].name}")
    assert explained.returncode == 0, explained.stderr
    assert docmill(walls, "bob", "explain", f"alice-{SAMPLES[1].name}").returncode == 1
    with served(tmp_path / "serve.log", DATABASE_URL=walls.url("bob")) as address:
        for page in ("/", "/documents", "/batches", "/queues", "/workers", "/search?q=pumps"):
            with urllib.request.urlopen(address + page, timeout=30) as answer:
                text = answer.read().decode()
            assert answer.status == 200
            assert "alice" not in text, page


def reembed_and_prune(walls: Walls, tmp_path: Path) -> None:
    """A worker that may build indexes goes over to another model, and prunes."""
    grant_as(walls.settings(), "worker", "worker", indexes=True)
    with walls.as_login("operator") as operator:
        begun = docmill(walls, "worker", "reembed", "start", "--to", "fast")
        assert begun.returncode == 0, begun.stderr
        with worker(
            tmp_path / "worker.log", DATABASE_URL=walls.url("worker"), VECTOR_INDEX_THRESHOLD="1", EMBEDDING_PROVIDER="fast"
        ) as process:
            wait_for(lambda: rows(operator, "SELECT state FROM reembeddings") == [("complete",)], "the re-embedding", 120, process)
        assert rows(operator, "SELECT count(DISTINCT embedding_model) FROM document_chunks") == [(1,)]
        assert rows(operator, "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'document_chunks_hnsw%%'") == [(1,)]
    pruned = docmill(walls, "worker", "prune")
    assert pruned.returncode == 0, pruned.stderr
    with walls.as_login("worker") as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("ALTER TABLE document_chunks DISABLE ROW LEVEL SECURITY")
