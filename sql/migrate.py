"""Brings a database to the present schema: procrastinate's own, then ours. Forward only, safe to run twice and from two hosts at once.

No library fits: yoyo-migrations leaves a stale lock row behind a killed run, and neither it nor alembic (which wants SQLAlchemy) would
apply procrastinate's schema under the same lock. See docs/decisions/0002-own-migration-runner.md.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import psycopg
from procrastinate.schema import SchemaManager, migrations_path

from models.errors import ConfigurationError
from sql import query
from sql.securing import act_as_oneself, act_as_owner, is_secured, secure

_LOCK = 0x646F636D696C6C  # "docmill" in ASCII: the key of the session advisory lock that lets one migration run at a time
_TRIES = 5  # of a migration that meets those who use the database in a deadlock


def _applied(conn: psycopg.Connection, component: str) -> set[str]:
    return {row[0] for row in conn.execute(query("applied_migrations"), {"component": component})}


def _own() -> list[Traversable]:
    return sorted((p for p in files("sql").joinpath("migrations").iterdir() if p.name.endswith(".sql")), key=lambda p: p.name)


def _apply(conn: psycopg.Connection, component: str, name: str, path: Path | Traversable) -> None:
    for tries_left in reversed(range(_TRIES)):
        try:
            with conn.transaction():
                # Migrations ship with the packages and hold no caller's text.
                conn.execute(path.read_text(encoding="utf-8").encode())
                conn.execute(query("record_migration"), {"component": component, "name": name})
            return
        except psycopg.errors.DeadlockDetected:
            # With a submitter or a worker, who take the tables in their own order; it has gone on by now.
            if not tries_left:
                raise


def _migrate_procrastinate(conn: psycopg.Connection) -> list[str]:
    """Apply procrastinate's schema to a new database, or the migrations it has gained since to an old one."""
    names = sorted(p.name for p in migrations_path.glob("*.sql"))
    applied = _applied(conn, "procrastinate")
    row = conn.execute(query("procrastinate_exists")).fetchone()
    if row is not None and not row[0]:
        with conn.transaction():
            conn.execute(SchemaManager.get_schema())
            for name in names:
                conn.execute(query("record_migration"), {"component": "procrastinate", "name": name})
        return ["procrastinate schema"]
    if not applied:
        raise ConfigurationError(
            "The database already holds a procrastinate schema that docmill did not make. Use a database of docmill's own, or upgrade that "
            "schema to the installed procrastinate and record its migrations in docmill_migrations (docs/operations.md says how)."
        )
    todo = [name for name in names if name not in applied]
    for name in todo:
        _apply(conn, "procrastinate", name, migrations_path / name)
    return [f"procrastinate {name}" for name in todo]


def migrate(conn: psycopg.Connection) -> list[str]:
    """Apply what is missing over an autocommit connection and return the names of what was applied, in order."""
    conn.execute(query("lock_migrations"), {"key": _LOCK})
    try:
        act_as_owner(conn)
        conn.execute(query("create_migrations_table"))
        done = _migrate_procrastinate(conn)
        applied = _applied(conn, "docmill")
        for path in _own():
            if path.name not in applied:
                _apply(conn, "docmill", path.name, path)
                done.append(path.name)
        if done and is_secured(conn):
            secure(conn)
        return done
    finally:
        if not conn.closed:
            act_as_oneself(conn)
            conn.execute(query("unlock_migrations"), {"key": _LOCK})


def missing_migrations(applied: set[str]) -> list[str]:
    """Return which of docmill's migrations are not among those applied."""
    return [p.name for p in _own() if p.name not in applied]
