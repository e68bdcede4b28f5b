"""Searching and looking on a streaming replica, which takes no writes at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psycopg
import pytest

from jobs import submit_document
from jobs.front import close_sync
from models.settings import load_settings
from tests.faults.cluster import Cluster, Replica
from tests.running import REPOSITORY, served, wait_for, worker

SHOWING = [
    "/",
    "/batches",
    "/documents",
    "/document?id=d0",
    "/dead-letters",
    "/workers",
    "/queues",
    "/providers",
    "/metrics",
    "/search?q=seals",
]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def replica(cluster: Cluster) -> Iterator[Replica]:
    replica = Replica(cluster)
    yield replica
    replica.close()


def docmill(conninfo: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(
        command, env={**os.environ, "DATABASE_URL": conninfo}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_replica_answers_searches_and_shows_everything_and_refuses_the_rest(
    cluster: Cluster, replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = cluster.create_database()
    for name, value in {
        "DATABASE_URL": cluster.conninfo(database), "STORAGE_BASE_PATH": str(tmp_path / "storage"), "EMBEDDING_PROVIDER": "hash",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    load_settings.cache_clear()
    with worker(tmp_path / "log") as process, psycopg.connect(cluster.conninfo(database), autocommit=True) as conn:
        for number in range(5):
            submit_document(f"Document {number} is about seals and pumps.".encode(), doc_id=f"d{number}", file_name="a.txt")
        open_ones = "SELECT count(*) FROM file_extractions WHERE state <> 'complete'"
        wait_for(lambda: conn.execute(open_ones).fetchone() == (0,), "all documents", process=process)
    close_sync()
    load_settings.cache_clear()
    replica.catch_up()
    there = replica.conninfo(database)
    found = docmill(there, "search", "seals", "--json")
    assert len(json.loads(found.stdout)) == 5, found.stderr
    shown = docmill(there, "explain", "d0")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    with psycopg.connect(there, autocommit=True) as conn:
        for (view,) in conn.execute("SELECT viewname FROM pg_views WHERE schemaname = 'public'").fetchall():
            conn.execute(f'SELECT * FROM "{view}" LIMIT 1')
        for file in sorted((REPOSITORY / "sql" / "inspect").glob("*.sql")):
            conn.execute(file.read_text().encode())
    with served(tmp_path / "serve.log", DATABASE_URL=there, SERVE_READ_ONLY="true") as address:
        for path in SHOWING:
            assert httpx2.get(address + path, timeout=30).status_code == 200, path
        assert httpx2.get(address + "/readyz?only=database,migrations", timeout=30).status_code == 200
    refused = docmill(there, "ingest", str(REPOSITORY / "README.md"), "--no-wait")
    assert refused.returncode != 0
    assert "read-only" in refused.stderr
    assert "Traceback" not in refused.stderr
