"""Walls in databases that are not as docmill makes them today: older, restored, with a schema for extensions, with grants of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import errors

import sql.migrate
from jobs.roles import ROLES, RoleError, create_roles, grant_to_person
from models.errors import ConfigurationError
from sql import query
from sql.migrate import migrate
from tests.walls import OF_USERS, PEOPLE, Walls, contents, fill, rows

OF_OTHERS = """SELECT p.oid::regprocedure::text FROM pg_proc AS p
WHERE p.pronamespace = 'public'::regnamespace AND p.proowner <> 'docmill_owner'::regrole
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = p.oid AND d.deptype = 'e')
UNION ALL
SELECT t.oid::regtype::text FROM pg_type AS t
WHERE t.typnamespace = 'public'::regnamespace AND t.typowner <> 'docmill_owner'::regrole
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.objid = t.oid AND d.deptype = 'e') AND t.typelem = 0
UNION ALL
SELECT p.oid::regprocedure::text FROM pg_proc AS p
WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proowner = 'docmill_owner'::regrole"""
"""What should be docmill_owner's and is not, and what should not and is."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Walls]:
    """A server of this module's own, with docmill's roles, a superuser and a `dba` that is none."""
    made = Walls()
    try:
        made.new_database()
        made.raise_walls()
        made.new_login("dba", "CREATEROLE")
        with made.as_login("postgres") as conn:
            for name, _ in ROLES.values():
                conn.execute(f"GRANT {name} TO dba WITH ADMIN OPTION".encode())
        yield made
    finally:
        made.close()


@pytest.fixture
def new(elsewhere: Walls) -> Walls:
    """A new database without any tables, with vector, that belongs to `dba`."""
    elsewhere.new_database("template1")
    with elsewhere.as_login("postgres") as conn:
        conn.execute("CREATE EXTENSION vector")
        conn.execute(f"ALTER DATABASE {elsewhere.database} OWNER TO dba".encode())
    return elsewhere


def raise_as_before(conn: psycopg.Connection[Any]) -> None:
    """Raise the walls with what the database has for it."""
    conn.execute(query("grant_schema"))
    conn.execute("SELECT secure_routines()")
    for relation in rows(conn, query("relations_to_secure")):
        conn.execute("SELECT secure_relation(%s)", relation)


def migrate_at_once(walls: Walls, login: str) -> list[list[str]]:
    """Migrate from two hosts at once and return what each has applied."""
    done: list[list[str]] = []

    def run() -> None:
        with walls.as_login(login) as conn:
            done.append(migrate(conn))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def assert_walls_stand(walls: Walls) -> None:
    with walls.as_login("postgres") as conn:
        assert rows(conn, OF_OTHERS) == []
        for user in PEOPLE:
            fill(conn, user)
            grant_to_person(walls.settings(), user, user)
    with walls.as_login("alice") as conn:
        assert rows(conn, "SELECT doc_id FROM search_by_text('secret')") == [("alice-doc",)]
        assert rows(conn, "SELECT doc_id FROM search_by_vector('[1,1,1]', 'm')") == [("alice-doc",)]
        for relation in OF_USERS:
            assert "bob" not in (contents(conn, relation) or ""), relation


@pytest.mark.parametrize(("login", "walled_at"), [("postgres", 20), ("postgres", 22), ("postgres", 30), ("dba", 20), ("dba", 33)])
def test_a_database_whose_walls_an_older_docmill_raised_is_migrated_by_the_same_login(
    new: Walls, monkeypatch: pytest.MonkeyPatch, login: str, walled_at: int
) -> None:
    own = sql.migrate._own()
    monkeypatch.setattr(sql.migrate, "_own", lambda: own[:walled_at])
    with new.as_login(login) as conn:
        migrate(conn)
        raise_as_before(conn)
        of_oneself = "SELECT count(*) > 0 FROM pg_proc WHERE proowner = current_user::regrole AND proname = 'acting_user'"
        assert rows(conn, of_oneself) == [(True,)], "the test must be able to fail"
        given_away = (
            "SELECT count(*) > 0 FROM pg_proc WHERE proowner = 'docmill_owner'::regrole AND pronamespace = 'pg_catalog'::regnamespace"
        )
        assert rows(conn, given_away) == [(login == "postgres",)]
    monkeypatch.setattr(sql.migrate, "_own", lambda: own)
    assert sorted(migrate_at_once(new, login)) == [[], [path.name for path in own[walled_at:]]]
    assert_walls_stand(new)
    assert create_roles(new.settings(login)) == ([], [])


def test_functions_are_the_owners_where_a_superuser_has_helped_with_a_migration(new: Walls, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sql.migrate._own()
    monkeypatch.setattr(sql.migrate, "_own", lambda: own[:28])
    with new.as_login("dba") as conn:
        migrate(conn)
    monkeypatch.setattr(sql.migrate, "_own", lambda: own)
    with new.as_login("postgres") as conn:
        migrate(conn)
    create_roles(new.settings())
    assert_walls_stand(new)


def test_functions_and_types_are_the_owners_whether_by_command_or_by_sql(new: Walls) -> None:
    with new.as_login("postgres") as conn:
        migrate(conn)
        conn.execute("CALL secure_database()")
        assert rows(conn, OF_OTHERS) == []
    assert create_roles(new.settings()) == ([], [])
    new.new_database()
    create_roles(new.settings())
    assert_walls_stand(new)


def test_what_others_make_in_the_schema_stays_theirs(new: Walls) -> None:
    with new.as_login("postgres") as conn:
        migrate(conn)
        create_roles(new.settings())
        conn.execute("CREATE FUNCTION theirs() RETURNS integer LANGUAGE sql AS 'SELECT 1'")
        conn.execute("CREATE TYPE their_type AS ENUM ('a')")
        migrate(conn)
        create_roles(new.settings())
        owners = "SELECT pg_get_userbyid(proowner) FROM pg_proc WHERE proname = 'theirs'"
        assert rows(conn, owners + " UNION ALL SELECT pg_get_userbyid(typowner) FROM pg_type WHERE typname = 'their_type'") == [
            ("postgres",),
            ("postgres",),
        ]


def test_who_reads_by_public_has_the_rights_of_its_columns_too(new: Walls) -> None:
    with new.as_login("postgres") as conn:
        migrate(conn)
        conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC")
        create_roles(new.settings())
        may = "SELECT has_column_privilege('docmill_app', 'document_events', 'event', 'INSERT')"
        assert rows(conn, may) == [(True,)]
        assert create_roles(new.settings()) == ([], [])


def test_who_makes_roles_before_migrating_is_told_to_migrate(new: Walls, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sql.migrate._own()
    monkeypatch.setattr(sql.migrate, "_own", lambda: own[:30])
    with new.as_login("dba") as conn:
        migrate(conn)
    with pytest.raises(ConfigurationError, match="docmill migrate"):
        create_roles(new.settings("dba"))
    monkeypatch.setattr(sql.migrate, "_own", lambda: own)
    with new.as_login("dba") as conn:
        migrate(conn)
    create_roles(new.settings("dba"))
    assert_walls_stand(new)


def test_each_migration_applies_in_a_connection_of_its_own_without_a_superuser(new: Walls, monkeypatch: pytest.MonkeyPatch) -> None:
    own = sql.migrate._own()
    for count in range(1, len(own) + 1):
        monkeypatch.setattr(sql.migrate, "_own", lambda count=count: own[:count])
        with new.as_login("dba") as conn:
            assert migrate(conn)[-1] == own[count - 1].name


PLANTED = """CREATE FUNCTION public.ts_rank(text, tsvector, tsquery, integer) RETURNS real LANGUAGE plpgsql AS $$
BEGIN UPDATE user_logins SET user_id = 'bob' WHERE login = 'alice'; RETURN 1; END $$"""


@pytest.mark.parametrize("by_sql", [False, True])
def test_nobody_may_put_functions_beside_those_that_run_as_the_owner(elsewhere: Walls, by_sql: bool) -> None:
    """As in a database of Postgres 14, where everybody may create things in `public`."""
    elsewhere.new_database()
    with elsewhere.as_login("postgres") as conn:
        conn.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        if by_sql:
            conn.execute("CALL secure_database()")
        else:
            create_roles(elsewhere.settings())
        assert rows(conn, "SELECT has_schema_privilege('docmill_owner', 'public', 'CREATE')") == [(True,)]
    assert_walls_stand(elsewhere)
    with elsewhere.as_login("alice") as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute(PLANTED.encode())
    with elsewhere.as_login("postgres") as conn, elsewhere.as_login("alice") as alice:
        conn.execute(PLANTED.encode())
        assert rows(alice, "SELECT doc_id FROM search_by_text('secret')") == [("alice-doc",)]
        assert rows(conn, "SELECT user_id FROM user_logins WHERE login = 'alice'") == [("alice",)], "not even one that was there is called"


@pytest.mark.parametrize(
    ("who", "opening"),
    [
        ("docmill_reader", "GRANT CREATE ON SCHEMA public TO docmill_reader"),
        ("alice", "GRANT CREATE ON SCHEMA public TO alice"),
        ("web", "GRANT CREATE ON SCHEMA public TO web"),
        ("nobody", "GRANT CREATE ON SCHEMA public TO PUBLIC; SET ROLE nobody; "
                   "CREATE FUNCTION public.format(text, regclass) RETURNS text RETURN ''"),
        ("nobody", "GRANT CREATE ON SCHEMA public TO PUBLIC; SET ROLE nobody; "
                   "CREATE OPERATOR public.@@@ (FUNCTION = int4um, RIGHTARG = integer)"),
    ],
)  # fmt: skip
def test_who_may_put_functions_there_or_has_done_so_is_told_of(elsewhere: Walls, who: str, opening: str) -> None:
    elsewhere.new_database()
    create_roles(elsewhere.settings())
    grant_to_person(elsewhere.settings(), "alice", "alice")
    with elsewhere.as_login("postgres") as conn:
        for part in opening.split("; "):
            conn.execute(part.encode())
        conn.execute("RESET ROLE")
        with pytest.raises(RoleError, match=who):
            create_roles(elsewhere.settings())
        with pytest.raises(errors.InsufficientPrivilege, match=who):
            conn.execute("CALL secure_database()")


def test_who_may_put_functions_there_is_made_no_person(elsewhere: Walls) -> None:
    elsewhere.new_database()
    create_roles(elsewhere.settings())
    with elsewhere.as_login("postgres") as conn:
        conn.execute("GRANT CREATE ON SCHEMA public TO bob")
    with pytest.raises(RoleError, match="may create"):
        grant_to_person(elsewhere.settings(), "bob", "bob")


def test_a_function_that_is_none_of_docmills_and_runs_as_its_owner_stays_the_owners(new: Walls) -> None:
    """As a pooler's, which looks passwords up."""
    with new.as_login("postgres") as conn:
        migrate(conn)
        conn.execute("CREATE FUNCTION user_lookup() RETURNS bigint SECURITY DEFINER RETURN (SELECT count(*) FROM pg_shadow)")
        create_roles(new.settings())
        conn.execute("CALL secure_database()")
        assert rows(conn, "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'user_lookup'") == [("postgres",)]


@pytest.mark.parametrize(("grantee", "login"), [("alice", "alice"), ("PUBLIC", "alice"), ("nobody", "nobody"), ("PUBLIC", "nobody")])
def test_who_was_granted_all_tables_before_sees_nothing_of_others(elsewhere: Walls, grantee: str, login: str) -> None:
    elsewhere.new_database()
    with elsewhere.as_login("postgres") as conn:
        conn.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {grantee}".encode())
        for user in PEOPLE:
            fill(conn, user)
    create_roles(elsewhere.settings())
    grant_to_person(elsewhere.settings(), "alice", "alice")
    with elsewhere.as_login("postgres") as conn:
        tables = [
            name for (name,) in rows(conn, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
        ]
    with elsewhere.as_login(login) as conn:
        seen = {table: contents(conn, table) for table in tables}
    assert {table for table, text in seen.items() if "bob" in (text or "")} == set()
    if login == "nobody":
        assert {table for table, text in seen.items() if text} == set()


@pytest.mark.parametrize("by_sql", [False, True])
def test_vector_may_lie_in_a_schema_of_its_own(elsewhere: Walls, by_sql: bool) -> None:
    elsewhere.new_database("template1")
    with elsewhere.as_login("postgres") as conn:
        conn.execute("CREATE SCHEMA docs; CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
        conn.execute(f"ALTER DATABASE {elsewhere.database} SET search_path = docs, extensions".encode())
    with elsewhere.as_login("postgres") as conn:
        migrate(conn)
        if by_sql:
            conn.execute("CALL secure_database()")
        else:
            create_roles(elsewhere.settings())
        for user in PEOPLE:
            fill(conn, user)
    assert create_roles(elsewhere.settings()) == ([], [])
    grant_to_person(elsewhere.settings(), "alice", "alice")
    with elsewhere.as_login("alice") as conn:
        assert rows(conn, "SELECT doc_id FROM search_by_vector('[1,1,1]', 'm')") == [("alice-doc",)]
    with elsewhere.as_login("worker") as conn:
        assert rows(conn, "SELECT count(*) FROM document_chunks WHERE embedding <=> '[1,1,1]' < 1") == [(2,)]
