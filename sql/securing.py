"""Gives each role its rights to what is in the database, as the table relation_rights has them. Safe to run twice."""

from __future__ import annotations

import psycopg

from sql import query

_TRIES = 6  # for a table that somebody holds for longer than the lock is waited for


def secure(conn: psycopg.Connection) -> list[str]:
    """Secure every table, view and function over an autocommit connection and return the names of what was changed.

    A transaction for each, so that no worker is kept from more than one table. The roles must be there, and whoever is connected must be a
    superuser, or own what is not docmill_owner's yet and be a member of that role. Raises what Postgres says.
    """
    conn.execute(query("grant_schema"))
    row = conn.execute(query("secure_routines")).fetchone()
    changed = [f"{row[0]} functions and types"] if row is not None and row[0] else []
    for (relation,) in conn.execute(query("relations_to_secure")).fetchall():
        row = _secure_relation(conn, relation)
        if row is not None and row[0]:
            changed.append(relation)
    return changed


def _secure_relation(conn: psycopg.Connection, relation: str) -> tuple[bool] | None:
    for tries_left in reversed(range(_TRIES)):
        try:
            return conn.execute(query("secure_relation"), {"relation": relation}).fetchone()
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if not tries_left:
                raise
    return None


def is_secured(conn: psycopg.Connection) -> bool:
    """Say whether the tables belong to docmill_owner, so that what is new is to be secured too."""
    row = conn.execute(query("is_secured")).fetchone()
    return row is not None and bool(row[0])


def may_secure(conn: psycopg.Connection) -> bool:
    """Say whether whoever is connected may give rights: not a worker's login, which may look whether all is migrated."""
    row = conn.execute(query("may_secure")).fetchone()
    return row is not None and bool(row[0])


def act_as_owner(conn: psycopg.Connection) -> None:
    """Make what is created from here on docmill_owner's, where the tables are and whoever is connected may take that role on."""
    conn.execute(query("act_as_owner"))


def act_as_oneself(conn: psycopg.Connection) -> None:
    """Undo act_as_owner."""
    conn.execute(query("act_as_oneself"))
