"""Gives each role its rights to what is in the database, as the table relation_rights has them. Safe to run twice."""

from __future__ import annotations

import psycopg

from sql import query

_TRIES = 6  # for a table that somebody holds for longer than the lock is waited for


def secure_schema(conn: psycopg.Connection) -> list[str]:
    """Secure the schema with the functions and types in it over an autocommit connection and return how many of these changed, in words.

    The roles must be there. Functions of Postgres that an older docmill gave away go back, if a superuser is connected: nobody else could
    give them away. What belongs to a role that whoever is connected is no member of stays with it. Raises what Postgres says.
    """
    conn.execute(query("grant_schema"))
    with conn.transaction():
        conn.execute(query("lock_roles"))
        statements = conn.execute(query("routines_to_secure"), {}).fetchall()
        for (statement,) in statements:
            conn.execute(statement.encode())
    return [f"{len(statements)} functions and types"] if statements else []


def secure(conn: psycopg.Connection) -> list[str]:
    """Secure every table and view over an autocommit connection and return the names of what was changed. The schema comes before.

    A transaction for each, so that no worker is kept from more than one table. The roles must be there, and whoever is connected must be a
    superuser, or own what is not docmill_owner's yet and be a member of that role. Raises what Postgres says.
    """
    changed = []
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
