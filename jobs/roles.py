"""The roles that keep users apart: making them, giving them to logins, and saying who has which. docs/row-security.md describes them.

Everything here needs an administrator: a superuser, or a role with CREATEROLE that owns docmill's tables. Roles belong to the cluster; what
they may do, and which login is which user, to the database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql as composing
from psycopg.rows import dict_row

from jobs.arguments import check_name
from jobs.database import conninfo_of, unreachable
from jobs.sessions import connect
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings
from sql import query
from sql.migrate import alone
from sql.securing import secure, secure_schema

ROLES = {
    "owner": ("docmill_owner", "docmill: owns the tables and runs migrations; not bound by row-level security."),
    "worker": ("docmill_worker", "docmill: works on all documents. For workers."),
    "operator": ("docmill_operator", "docmill: sees everything and changes nothing. For the dashboard and for monitoring."),
    "reader": ("docmill_reader", "docmill: sees the rows of the user that its login is mapped to. For people."),
    "app": ("docmill_app", "docmill: sees and submits for the user that docmill.user_id names. For trusted applications."),
}
"""What a login can be -> the group role, and what it is for."""
_NAMES = [name for name, _ in ROLES.values()]


class RoleError(DocmillError):
    """A role cannot be made, granted or taken away as asked."""


@dataclass(frozen=True, slots=True)
class Login:
    """A login, which of docmill's roles it may take on, and which user it is."""

    login: str
    roles: list[str]
    user_id: str | None
    exists: bool
    """False: the role has been dropped, and only its mapping is left."""


@contextmanager
def _administration(settings: Settings) -> Iterator[psycopg.Connection]:
    """Yield an autocommit connection; what Postgres refuses for want of rights is a RoleError that says who may."""
    try:
        conn = connect(settings, conninfo_of(settings, direct=True))
    except psycopg.Error as error:
        raise unreachable(error) from error
    with conn:
        try:
            yield conn
        except psycopg.errors.InsufficientPrivilege as error:
            raise RoleError(
                f'The role "{conn.info.user}" may not do this: {error.diag.message_primary}. It takes a superuser, or the owner of '
                "docmill's tables with CREATEROLE; docs/row-security.md has the SQL for administrators."
            ) from error
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction) as error:
            raise ConfigurationError("The database lacks docmill's present tables: run `docmill migrate` first.") from error


def _one(conn: psycopg.Connection, name: str, **params: Any) -> dict[str, Any]:
    row = conn.cursor(row_factory=dict_row).execute(query(name), params).fetchone()
    if row is None:
        raise RoleError(f'There is no role "{params.get("login")}": make the login first, as docs/row-security.md shows.')
    return row


def _do(conn: psycopg.Connection, name: str, **names: str) -> None:
    """Run a statement that takes names of roles, which no parameter can stand for."""
    conn.execute(composing.SQL(query(name)).format(**{key: composing.Identifier(value) for key, value in names.items()}))


def _refuse_strangers(conn: psycopg.Connection) -> None:
    """Raise a RoleError where others have put functions into docmill's schema, or may: one could be called as docmill_owner."""
    if strangers := [name for (name,) in conn.execute(query("strangers_in_schema"))]:
        raise RoleError(
            f"These may put functions into the schema of docmill's tables, or have: {', '.join(strangers)}. Such a function could be "
            "called with the rights of docmill_owner. REVOKE CREATE ON SCHEMA from them, drop what is theirs there, and run this again. "
            "Who owns the database has it by pg_database_owner: give the schema, or the database, another owner."
        )


def create_roles(settings: Settings) -> tuple[list[str], list[str]]:
    """Make the roles that are missing, then give docmill's tables to docmill_owner with policies and rights; return what of both was new.

    Whoever has owned the tables becomes a member of docmill_owner, so that nothing that logs in as that role loses its rights. RoleError
    where others have put functions into docmill's schema, or may.
    """
    with _administration(settings) as conn, alone(conn):
        oneself = _one(conn, "about_oneself")
        if oneself["owner"] is None:
            raise ConfigurationError("The database lacks docmill's present tables: run `docmill migrate` first.")
        missing = [name for (name,) in conn.execute(query("missing_roles"), {"roles": _NAMES})]
        if missing and not oneself["may_create"]:
            raise RoleError(
                f'The role "{oneself["name"]}" may not make roles: it takes a superuser or CREATEROLE. Or let an administrator make '
                f"{', '.join(missing)} and run this again; docs/row-security.md has the SQL."
            )
        if not oneself["superuser"] and not oneself["owns_tables"]:
            raise RoleError(f'docmill\'s tables belong to "{oneself["owner"]}": connect as that role, or as a superuser.')
        with conn.transaction():
            conn.execute(query("lock_roles"))
            for name, comment in ROLES.values():
                if name in missing:
                    _do(conn, "create_role", role=name)
                    statement = composing.SQL(query("comment_role"))
                    conn.execute(statement.format(role=composing.Identifier(name), comment=composing.Literal(comment)))
            if not oneself["superuser"] and not _one(conn, "is_member_of_owner")["is_member"]:
                conn.execute(query("take_on_owner"))
            if not oneself["owner_is_superuser"] and oneself["owner"] not in (oneself["name"], _NAMES[0]):
                # Workers may still log in as the role that has owned the tables: they go on.
                _do(conn, "grant_role", role=_NAMES[0], login=oneself["owner"])
        secured = secure_schema(conn)
        _refuse_strangers(conn)
        return missing, [*secured, *secure(conn)]


def _roles_of(conn: psycopg.Connection, login: str) -> dict[str, Any]:
    return _one(conn, "about_login", login=login, roles=_NAMES)


def grant_to_person(settings: Settings, login: str, user_id: str) -> None:
    """Let a login see the rows of one user and nothing else. RoleError for a login that would see more anyway."""
    check_name("user_id", user_id)
    with _administration(settings) as conn, conn.transaction():
        conn.execute(query("lock_roles"))
        known = _roles_of(conn, login)
        others = [name for name in known["roles"] if name != ROLES["reader"][0]]
        if known["sees_all"] or others:
            why = "is a superuser or has BYPASSRLS" if known["sees_all"] else f"has {', '.join(others)}"
            raise RoleError(f'"{login}" {why} and would see more than the rows of "{user_id}". Give the person a login of their own.')
        if known["may_create"]:
            raise RoleError(
                f'"{login}" may create functions in the schema of docmill\'s tables, and such a function could be called with the rights '
                "of docmill_owner. REVOKE CREATE ON SCHEMA from it first."
            )
        _do(conn, "grant_role", role=ROLES["reader"][0], login=login)
        conn.execute(query("map_login"), {"login": login, "user_id": user_id})


def grant_as(settings: Settings, login: str, kind: str, *, indexes: bool = False) -> None:
    """Let a login be a worker, an operator, an application or an owner. `indexes`: a worker that may also build the vector indexes."""
    with _administration(settings) as conn, conn.transaction():
        conn.execute(query("lock_roles"))
        known = _roles_of(conn, login)
        if known["user_id"] is not None:
            raise RoleError(f'"{login}" is the login of a person, user "{known["user_id"]}": revoke that first.')
        _do(conn, "grant_role", role=ROLES[kind][0], login=login)
        if indexes:
            _do(conn, "let_take_on_owner", login=login)


def revoke(settings: Settings, login: str) -> bool:
    """Take all of docmill's roles and its user from a login; return whether it had any. A login that is gone loses its mapping."""
    with _administration(settings) as conn, conn.transaction():
        conn.execute(query("lock_roles"))
        mapped = conn.execute(query("unmap_login"), {"login": login}).fetchone() is not None
        try:
            roles = _roles_of(conn, login)["roles"]
        except RoleError:
            if mapped:
                return True
            raise
        for name in roles:
            _do(conn, "revoke_role", role=name, login=login)
        return mapped or bool(roles)


def list_logins(settings: Settings) -> list[Login]:
    """Return all logins that may take on one of docmill's roles or are mapped to a user, by name; superusers are left out."""
    with _administration(settings) as conn:
        found = conn.cursor(row_factory=dict_row).execute(query("list_logins"), {"roles": _NAMES}).fetchall()
        return [Login(**row) for row in found]
