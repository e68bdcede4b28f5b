"""A migration that meets somebody's long transaction keeps nobody else from working, and is applied when that has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from loguru import logger

from jobs import clock
from jobs.leases import LeaseKeeper
from models.settings import Settings
from sql import giving_way
from sql import migrate as migrations
from tests.running import REPOSITORY, wait_for

BEFORE, LOCKING = "0024", "0024_backlog.sql"
"""It builds indexes on file_extractions, which stops writers, and drops some, which stops readers too."""
WAITS = """SELECT l.pid FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
    WHERE d.datname = current_database() AND l.locktype = 'relation' AND NOT l.granted AND l.mode <> 'RowExclusiveLock'"""


@pytest.fixture
def old(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The conninfo of a database as an earlier release left it, with the documents a, b and c."""
    own = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "_own", lambda: [path for path in own if path.name < BEFORE])
            migrations.migrate(conn)
        for doc_id in "abc":
            conn.execute("SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => repeat('1', 64))", [doc_id])
    return empty_database


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}", level="WARNING")
    yield lines
    logger.remove(sink)


@contextmanager
def holding(database: str, statement: str) -> Iterator[psycopg.Connection]:
    """An application's transaction that has done something and stays open."""
    with psycopg.connect(database, application_name="a long report") as conn:
        conn.execute(statement)
        yield conn


def migrating(database: str, done: list[list[str] | BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            with psycopg.connect(database, autocommit=True) as conn:
                done.append(migrations.migrate(conn))
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def pending(database: str) -> Callable[[], bool]:
    def waits() -> bool:
        with psycopg.connect(database, autocommit=True) as conn:
            return conn.execute(WAITS).fetchone() is not None

    return waits


def asked(database: str, statement: str) -> object:
    """One value, or an error after half a minute behind a lock."""
    with psycopg.connect(database, autocommit=True, options="-c lock_timeout=30s") as conn:
        row = conn.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize(
    "held",
    ["SELECT count(*) FROM file_extractions", "UPDATE file_extractions SET metadata = '{}' WHERE doc_id = 'c'"],
    ids=["read", "written"],
)
def test_others_go_on_while_a_migration_waits_for_a_transaction_and_it_is_applied_when_that_ends(
    old: str, held: str, tmp_path: Path, warnings: list[str]
) -> None:
    lease = """UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '10 s'
        WHERE doc_id = 'a' RETURNING claim"""
    lost: list[bool] = []
    leases = LeaseKeeper(Settings(database_url=old, storage_base_path=tmp_path, lease_seconds=10), old)  # type: ignore[arg-type]
    done: list[list[str] | BaseException] = []
    with holding(old, held) as holder:
        claim = int(str(asked(old, lease)))
        leases.hold("a", claim, claimed_at=clock.seconds(), on_lost=lost.append)
        threads = [migrating(old, done), migrating(old, done)]
        try:
            for _ in range(2):
                wait_for(pending(old), "the migration to wait")
                assert asked(old, "UPDATE file_extractions SET priority = priority + 1 WHERE doc_id = 'b' RETURNING priority") != 0
                renewed = asked(old, "SELECT lease_until FROM file_extractions WHERE doc_id = 'a'")
                wait_for(lambda was=renewed: asked(old, "SELECT lease_until FROM file_extractions WHERE doc_id = 'a'") != was, "a renewal")  # type: ignore[misc]
            assert done == []
            assert warnings
            assert all(f"pid {holder.info.backend_pid} " in line and "a long report" in line and LOCKING in line for line in warnings)
            assert "idle in transaction" in warnings[0]
            assert "file_extractions" in warnings[0]
        finally:
            holder.rollback()
            for thread in threads:
                thread.join()
            leases.close()
    assert sorted(done, key=str) == [["0024_backlog.sql", *(p.name for p in migrations._own() if p.name > LOCKING)], []]
    assert lost == []
    assert asked(old, f"SELECT count(*) FROM docmill_migrations WHERE name = '{LOCKING}'") == 1


def test_a_migration_that_waits_for_another_holds_no_snapshot_that_an_index_build_would_wait_for(database: str) -> None:
    done: list[list[str] | BaseException] = []
    with psycopg.connect(database, autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(%s)", [migrations._LOCK])
        waiting = migrating(database, done)
        try:
            for _ in range(2):
                first.execute("CREATE INDEX CONCURRENTLY ON file_extractions (file_size)")
            assert done == []
        finally:
            first.execute("SELECT pg_advisory_unlock(%s)", [migrations._LOCK])
            waiting.join()
    assert done == [[]]


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes what is still to be applied one migration with these statements, and the patience short."""

    def replace(statements: str) -> None:
        path = tmp_path / "9999_later.sql"
        path.write_text(statements, encoding="utf-8")
        monkeypatch.setattr(migrations, "_own", lambda: [path])
        monkeypatch.setattr(giving_way, "PATIENCE_SECONDS", 0.2)

    return replace


def test_a_migration_that_works_for_long_is_left_alone(database: str, only: Callable[[str], None], warnings: list[str]) -> None:
    only("SELECT pg_sleep(1.5); CREATE TABLE later ();")
    with psycopg.connect(database, autocommit=True) as conn:
        assert migrations.migrate(conn) == ["9999_later.sql"]
    assert warnings == []


def test_a_migration_that_somebody_else_cancels_is_not_tried_again(database: str, only: Callable[[str], None]) -> None:
    only("SELECT pg_sleep(60);")
    done: list[list[str] | BaseException] = []
    thread = migrating(database, done)
    sleeps = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    wait_for(lambda: asked(database, f"SELECT count(*) {sleeps}") == 1, "the migration to begin")
    asked(database, f"SELECT pg_cancel_backend(pid) {sleeps}")
    thread.join()
    assert isinstance(done[0], psycopg.errors.QueryCanceled)


def test_functions_keep_no_lock_timeout_of_a_migration(conn: psycopg.Connection) -> None:
    """It is created with SET lock_timeout FROM CURRENT, which would be a migration's own limit."""
    kept = "SELECT c FROM pg_proc, unnest(proconfig) AS c WHERE proname = 'accept_document' AND c LIKE 'lock_timeout=%'"
    assert conn.execute(kept).fetchall() == [("lock_timeout=0",)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_ended_while_it_waits_leaves_nobody_waiting_behind_it(old: str, end: signal.Signals, tmp_path: Path) -> None:
    """The caller's transaction goes on, so nothing but the end of the command gets its session out of the way."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DATABASE_URL": old, "STORAGE_BASE_PATH": str(tmp_path)}
    with holding(old, "UPDATE file_extractions SET metadata = '{}' WHERE doc_id = 'c'"):
        command = subprocess.Popen([sys.executable, "-m", "jobs.cli", "migrate"], env=environment, stderr=subprocess.PIPE, text=True)
        wait_for(pending(old), "the migration to wait", process=command)  # type: ignore[arg-type]
        command.send_signal(end)
        _, said = command.communicate(timeout=60)
        assert "Traceback" not in said
        sessions = (
            f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'docmill %:{command.pid}'"
        )
        wait_for(lambda: asked(old, sessions) == 0, "the end of its sessions")
        asked(old, "UPDATE file_extractions SET priority = 1 WHERE doc_id = 'b' RETURNING priority")
