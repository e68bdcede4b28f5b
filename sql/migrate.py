"""Brings a database to the present schema: procrastinate's own, then ours. Forward only, safe to run twice and from two hosts at once.

No library fits: yoyo-migrations leaves a stale lock row behind a killed run, and neither it nor alembic (which wants SQLAlchemy) would
apply procrastinate's schema under the same lock. See docs/decisions/0002-own-migration-runner.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

import psycopg
from loguru import logger

from models.errors import ConfigurationError
from sql import query
from sql.giving_way import Watcher
from sql.securing import act_as_oneself, act_as_owner, is_secured, may_secure, secure, secure_schema

_LOCK = 0x646F636D696C6C  # "docmill" in ASCII: the key of the session advisory lock that lets one migration run at a time
_TRIES = 5  # of a migration that meets those who use the database in a deadlock
_LOCK_SECONDS = 0.2  # between two looks whether somebody else still migrates
_LONGEST_PAUSE = 30.0  # seconds between two tries of one that found others in its way
_Migration = tuple[str, str, Path | Traversable]  # component, name, file


@contextmanager
def alone(conn: psycopg.Connection) -> Iterator[None]:
    """Wait until nobody else migrates or gives rights here, and keep all others from it meanwhile.

    Between the questions no snapshot is held: an index that is being built beside would wait for it.
    """
    while conn.execute(query("try_lock_migrations"), {"key": _LOCK}).fetchone() != (True,):
        time.sleep(_LOCK_SECONDS)
    try:
        yield
    finally:
        if not conn.closed:
            conn.execute(query("unlock_migrations"), {"key": _LOCK})


def _applied(conn: psycopg.Connection) -> set[tuple[str, str]]:
    return set(conn.execute(query("applied_migrations")))


def _own() -> list[Traversable]:
    return sorted((p for p in files("sql").joinpath("migrations").iterdir() if p.name.endswith(".sql")), key=lambda p: p.name)


def procrastinates_migrations() -> list[Path]:
    """Return the files of procrastinate.schema.migrations_path in order, without importing it: each command asks for them as it starts."""
    package = find_spec("procrastinate")
    assert package is not None and package.origin is not None
    return sorted(Path(package.origin).parent.joinpath("sql", "migrations").glob("*.sql"), key=lambda p: p.name)


def _apply(conn: psycopg.Connection, watcher: Watcher, migration: _Migration) -> None:
    """Apply one migration, however often it has to give way to others who hold a table that it needs."""
    component, name, path = migration
    deadlocks = waits = 0
    while True:
        try:
            with conn.transaction():
                # Migrations ship with the packages and hold no caller's text.
                conn.execute(path.read_text(encoding="utf-8").encode())
                conn.execute(query("record_migration"), {"component": component, "name": name})
            return
        except psycopg.errors.DeadlockDetected:
            # With a submitter or a worker, who take the tables in their own order; it has gone on by now.
            deadlocks += 1
            if deadlocks == _TRIES:
                raise
        except psycopg.errors.QueryCanceled:
            hindrance = watcher.take_hindrance()
            if hindrance is None:  # by somebody else, who will have meant it
                raise
            pause = min(2.0**waits, _LONGEST_PAUSE)
            waits += 1
            logger.warning("{} has given way, so that others can write: {}. Trying again in {:g} s", name, hindrance, pause)
            time.sleep(pause)


def _make_procrastinate(conn: psycopg.Connection) -> list[str]:
    """Apply procrastinate's whole schema to a new database, which then has all its migrations."""
    row = conn.execute(query("procrastinate_exists")).fetchone()
    if row is not None and not row[0]:
        from procrastinate.schema import SchemaManager  # noqa: PLC0415 - for a new database alone

        with conn.transaction():
            conn.execute(SchemaManager.get_schema())
            for path in procrastinates_migrations():
                conn.execute(query("record_migration"), {"component": "procrastinate", "name": path.name})
        return ["procrastinate schema"]
    if not any(component == "procrastinate" for component, _ in _applied(conn)):
        raise ConfigurationError(
            "The database already holds a procrastinate schema that docmill did not make. Use a database of docmill's own, or upgrade that "
            "schema to the installed procrastinate and record its migrations in docmill_migrations (docs/operations.md says how)."
        )
    return []


def _missing(applied: set[tuple[str, str]]) -> list[_Migration]:
    theirs = [("procrastinate", path.name, path) for path in procrastinates_migrations()]
    ours = [("docmill", path.name, path) for path in _own()]
    return [migration for migration in (*theirs, *ours) if migration[:2] not in applied]


def _called(migration: _Migration) -> str:
    component, name, _ = migration
    return name if component == "docmill" else f"{component} {name}"


def migrate(conn: psycopg.Connection) -> list[str]:
    """Apply what is missing over an autocommit connection and return the names of what was applied, in order.

    A transaction that holds a table is waited for without an end, but never with others waiting behind: see giving_way.
    """
    with alone(conn):
        try:
            return _migrate(conn)
        finally:
            if not conn.closed:
                act_as_oneself(conn)


def _migrate(conn: psycopg.Connection) -> list[str]:
    if is_secured(conn) and may_secure(conn):
        # The owner can replace only functions that are its own, which an older docmill has left to whoever made them.
        secure_schema(conn)
    conn.execute(query("load_vector"))
    act_as_owner(conn)
    conn.execute(query("create_migrations_table"))
    done = _make_procrastinate(conn)
    if missing := _missing(_applied(conn)):
        with Watcher(conn) as watcher:
            for migration in missing:
                _apply(conn, watcher, migration)
        done += map(_called, missing)
    if is_secured(conn) and (done or may_secure(conn)):
        # Also where nothing was missing: whoever applied the last ones may have died before this.
        secure(conn)
    return done


def missing_migrations(applied: set[tuple[str, str]]) -> list[str]:
    """Return the names of docmill's and procrastinate's migrations that are not among those applied, which are (component, name)."""
    return [_called(migration) for migration in _missing(applied)]
