"""Making the roles and giving them to logins: safe to run twice, and clear about who may."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psycopg
import pytest
from pgvector.psycopg import register_vector
from psycopg import errors
from psycopg.rows import dict_row

import sql.migrate
from jobs import reembedding
from jobs.cli import main
from jobs.database import make_pool
from jobs.maintenance import index_name, look_after_index
from jobs.roles import RoleError, create_roles, grant_as, grant_to_person, list_logins, revoke
from models.errors import ConfigurationError, SubmitError
from models.settings import load_settings
from sql import query
from sql.migrate import alone, migrate
from sql.securing import secure
from tests.acceptance.test_backup import run, tool
from tests.reembedding import NEW, Shelf
from tests.walls import MODEL, Walls, fill, rows


@pytest.fixture(scope="module")
def clean() -> Iterator[Walls]:
    """A server of this module's own: roles are a server's and not a database's."""
    made = Walls()
    yield made
    made.close()


def test_the_roles_are_made_in_a_database_with_data_and_a_second_time_nothing_is_done(clean: Walls) -> None:
    clean.new_database()
    with clean.as_login("postgres") as conn:
        fill(conn, "alice")
        fill(conn, "bob")
        conn.execute("VACUUM ANALYZE")  # the catalogs too: plans change
    settings = clean.settings()
    with pytest.raises(RoleError, match="There is no role"):
        grant_to_person(settings, "ann", "alice")
    made, secured = create_roles(settings)
    assert "docmill_reader" in made
    assert "file_extractions" in secured
    assert create_roles(settings) == ([], [])
    grant_to_person(settings, clean.new_login("ann"), "alice")
    with clean.as_login("ann") as conn:
        assert rows(conn, "SELECT doc_id FROM document_chunks") == [("alice-doc",)]
    # In another database of the server the login is nobody's, until somebody says whose it is there.
    clean.new_database()
    assert create_roles(clean.settings())[0] == []
    with clean.as_login("postgres") as conn:
        fill(conn, "alice")
    with clean.as_login("ann") as conn:
        assert rows(conn, "SELECT doc_id FROM document_chunks") == []


def test_a_person_has_one_user_and_nobody_who_sees_more_is_made_a_person(clean: Walls) -> None:
    clean.new_database()
    settings = clean.settings()
    create_roles(settings)
    for name in ("ben", "crew", "chief"):
        clean.new_login(name)
    clean.new_login("root", "SUPERUSER")
    clean.new_login("auditor", "BYPASSRLS")
    grant_to_person(settings, "ben", "u1")
    grant_to_person(settings, "ben", "u2")
    grant_as(settings, "crew", "worker", indexes=True)
    grant_as(settings, "chief", "owner")
    assert {(one.login, *one.roles, one.user_id) for one in list_logins(settings) if one.login in ("ben", "crew", "chief")} == {
        ("ben", "docmill_reader", "u2"), ("crew", "docmill_owner", "docmill_worker", None), ("chief", "docmill_owner", None),
    }  # fmt: skip
    for login, why in (("crew", "docmill_worker"), ("chief", "docmill_owner"), ("root", "superuser"), ("auditor", "BYPASSRLS")):
        with pytest.raises(RoleError, match=why):
            grant_to_person(settings, login, "u1")
    with pytest.raises(RoleError, match='user "u2"'):
        grant_as(settings, "ben", "operator")
    with pytest.raises(SubmitError):
        grant_to_person(settings, "ben", "")
    assert revoke(settings, "ben") is True
    assert revoke(settings, "ben") is False
    with clean.as_login("ben") as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute("SELECT FROM file_extractions")
    grant_to_person(settings, "ben", "u1")
    with clean.as_login("postgres") as conn:
        conn.execute("DROP ROLE ben")
    assert [one.exists for one in list_logins(settings) if one.login == "ben"] == [False]
    assert revoke(settings, "ben") is True


@pytest.fixture
def settings_anew() -> Iterator[None]:
    """Settings are read from the environment as the test has it."""
    load_settings.cache_clear()
    yield
    load_settings.cache_clear()


@pytest.mark.usefixtures("settings_anew")
def test_the_command_makes_grants_lists_and_revokes(
    clean: Walls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.new_database()
    monkeypatch.setenv("DATABASE_URL", clean.url("postgres"))

    def docmill(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["roles", *arguments])
        return end.value.code, *capsys.readouterr()

    clean.new_login("dora")
    assert "secured file_extractions" in docmill("create")[1]
    assert json.loads(docmill("create", "--json")[1]) == {"created": [], "secured": []}
    assert docmill("grant", "dora")[0] == 2
    assert docmill("grant", "dora", "--user", "d", "--as", "app")[0] == 2
    assert docmill("grant", "dora", "--as", "app", "--indexes")[0] == 2
    assert docmill("grant", "dora", "--user", "d")[:2] == (0, 'dora sees the rows of "d" and nothing else.\n')
    assert {"login": "dora", "roles": ["docmill_reader"], "user_id": "d", "exists": True} in json.loads(docmill("list", "--json")[1])
    code, _, complaint = docmill("grant", "nobody-there", "--user", "d")
    assert code == 1
    assert 'There is no role "nobody-there"' in complaint
    assert docmill("revoke", "dora")[0] == 0
    assert "dora" not in docmill("list")[1]


def test_whoever_may_not_make_roles_is_told_who_may(clean: Walls) -> None:
    clean.new_database("template1")
    with pytest.raises(ConfigurationError, match="docmill migrate"):
        create_roles(clean.settings())
    clean.new_database()
    clean.new_login("guest")
    with pytest.raises(RoleError, match='belong to "postgres"'):
        create_roles(clean.settings("guest"))
    create_roles(clean.settings())
    clean.new_login("reader")
    grant_to_person(clean.settings(), "reader", "alice")
    for deed in (lambda: grant_to_person(clean.settings("reader"), "guest", "bob"), lambda: revoke(clean.settings("reader"), "reader")):
        with pytest.raises(RoleError, match="may not do this"):
            deed()


def test_an_administrator_without_superuser_migrates_and_secures_a_database_of_their_own() -> None:
    apart = Walls()
    try:
        apart.new_database("template1")
        with apart.as_login("postgres") as conn:
            conn.execute("CREATE EXTENSION vector")
            conn.execute(f"ALTER DATABASE {apart.database} OWNER TO {apart.new_login('dba', 'CREATEROLE')}".encode())
        with apart.as_login("dba") as conn:
            migrate(conn)
        settings = apart.settings("dba")
        assert len(create_roles(settings)[0]) == 5
        assert create_roles(settings) == ([], [])
        grant_to_person(settings, apart.new_login("alice"), "alice")
        with apart.as_login("postgres") as conn:
            fill(conn, "alice")
            fill(conn, "bob")
        with apart.as_login("alice") as conn:
            assert rows(conn, "SELECT doc_id FROM document_chunks") == [("alice-doc",)]
        with apart.as_login("dba") as conn:
            assert migrate(conn) == []
    finally:
        apart.close()


def test_workers_that_log_in_as_the_former_owner_go_on(clean: Walls) -> None:
    clean.new_database("template1")
    with clean.as_login("postgres") as conn:
        conn.execute("CREATE EXTENSION vector")
        conn.execute(f"ALTER DATABASE {clean.database} OWNER TO {clean.new_login('former')}".encode())
    with clean.as_login("former") as conn:
        migrate(conn)
        create_roles(clean.settings())
        fill(conn, "alice")
        assert rows(conn, "SELECT doc_id FROM document_chunks") == [("alice-doc",)]
        assert migrate(conn) == []


def test_what_a_later_migration_makes_is_the_owners_and_secured(clean: Walls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean.new_database()
    create_roles(clean.settings())
    later = tmp_path / "9999_later.sql"
    later.write_text(
        "CREATE TABLE notes (user_id text, note text); CREATE FUNCTION noted() RETURNS int LANGUAGE sql AS 'SELECT 1'; "
        "CALL pin_search_path(); "
        "INSERT INTO relation_rights (relation, rows_of_user, reader) VALUES ('notes', 'user_id = (SELECT acting_user())', 'SELECT'); "
        "INSERT INTO notes VALUES ('alice', 'a'), ('bob', 'b');",
        encoding="utf-8",
    )
    own = sql.migrate._own()
    monkeypatch.setattr(sql.migrate, "_own", lambda: [*own, later])
    grant_as(clean.settings(), clean.new_login("deployer"), "owner")
    grant_to_person(clean.settings(), clean.new_login("alice"), "alice")
    with clean.as_login("deployer") as conn:
        assert migrate(conn) == ["9999_later.sql"]
        assert rows(conn, "SELECT current_user::text") == [("deployer",)]
        owners = rows(conn, "SELECT relowner::regrole::text FROM pg_class WHERE relname = 'notes' UNION ALL "
                            "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'noted'")  # fmt: skip
        assert owners == [("docmill_owner",), ("docmill_owner",)]
    with clean.as_login("alice") as conn:
        assert rows(conn, "SELECT note FROM notes") == [("a",)]


def test_a_migration_whose_process_died_before_the_rights_were_given_is_made_up_for_by_the_next(
    clean: Walls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean.new_database()
    create_roles(clean.settings())
    later = tmp_path / "9999_later.sql"
    later.write_text(
        "CREATE TABLE notes (user_id text, note text); CALL pin_search_path(); "
        "INSERT INTO relation_rights (relation, rows_of_user, worker) VALUES ('notes', 'user_id = (SELECT acting_user())', 'SELECT');",
        encoding="utf-8",
    )
    own = sql.migrate._own()
    monkeypatch.setattr(sql.migrate, "_own", lambda: [*own, later])

    def die(_: psycopg.Connection) -> list[str]:
        raise KeyboardInterrupt

    with clean.as_login("postgres") as conn:
        monkeypatch.setattr(sql.migrate, "secure", die)
        with pytest.raises(KeyboardInterrupt):
            migrate(conn)
        may = "SELECT has_table_privilege('docmill_worker', 'notes', 'SELECT')"
        assert rows(conn, may) == [(False,)]
        monkeypatch.setattr(sql.migrate, "secure", secure)
        assert migrate(conn) == []
        assert rows(conn, may) == [(True,)]
    grant_as(clean.settings(), clean.new_login("plain_worker"), "worker")
    with clean.as_login("plain_worker") as conn:
        assert migrate(conn) == [], "who may not give rights may look whether all is there"


def test_an_index_that_another_login_builds_is_not_taken_for_a_broken_one(clean: Walls) -> None:
    clean.new_database()
    create_roles(clean.settings())
    grant_as(clean.settings(), clean.new_login("watcher"), "operator")
    name = index_name(MODEL, 3)
    with clean.as_login("postgres") as conn, clean.as_login("watcher") as watcher:
        conn.execute(f"CREATE INDEX {name} ON document_chunks (doc_id)".encode())
        conn.execute("UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = %s::regclass", [name])  # as while it is being built
        told = f"SELECT health FROM index_health WHERE index_name = '{name}'"
        assert rows(watcher, told) == [("invalid",)]
        conn.execute(query("try_lock_index"), {"name": name})
        assert rows(watcher, told) == [("building",)]
        assert rows(watcher, "SELECT rule FROM alert_findings WHERE rule = 'index_invalid'") == []
        assert rows(watcher, "SELECT count(*) > 1 FROM pg_stat_activity WHERE backend_type = 'client backend'") == [(False,)]
        with watcher.cursor(row_factory=dict_row) as cursor:
            facts = cursor.execute(query("database_facts")).fetchone()
        assert facts is not None
        assert facts["connections"] >= 2


def test_a_dump_of_a_walled_database_is_walled_again_where_it_is_restored(clean: Walls, tmp_path: Path) -> None:
    dumped = clean.new_database()
    create_roles(clean.settings())
    grant_to_person(clean.settings(), clean.new_login("alice"), "alice")
    with clean.as_login("postgres") as conn:
        fill(conn, "alice")
        fill(conn, "bob")
    dump = tmp_path / "docmill.dump"
    run(tool("pg_dump"), "--format=custom", f"--file={dump}", clean.url("postgres", dumped))
    clean.new_database("template1")
    run(tool("pg_restore"), "--no-owner", "--exit-on-error", f"--dbname={clean.url('postgres')}", dump)
    with clean.as_login("alice") as conn:
        assert rows(conn, "SELECT doc_id FROM document_chunks") == [("alice-doc",)]
    made, secured = create_roles(clean.settings())
    assert made == []
    assert "file_extractions" in secured, "it belongs to whoever has restored it until then"
    assert create_roles(clean.settings()) == ([], [])
    with clean.as_login("alice") as conn:
        assert rows(conn, "SELECT doc_id FROM search_by_text('secret')") == [("alice-doc",)]


async def test_a_vector_index_is_built_by_whoever_may_and_by_nobody_else(clean: Walls) -> None:
    clean.new_database()
    create_roles(clean.settings())
    grant_as(clean.settings(), clean.new_login("plain"), "worker")
    grant_as(clean.settings(), clean.new_login("builder"), "worker", indexes=True)
    with clean.as_login("postgres") as conn:
        fill(conn, "alice")
    limits = {"vector_index_threshold": 1}
    assert await look_after_index(clean.settings("plain", **limits), MODEL, 3) == "not allowed"
    assert await look_after_index(clean.settings("builder", **limits), MODEL, 3) == "built"
    assert await look_after_index(clean.settings("plain", **limits), MODEL, 3) == "ready"


@pytest.mark.usefixtures("settings_anew")
async def test_a_re_embedding_by_workers_that_may_build_no_index_goes_on_where_the_owner_does_it(
    clean: Walls, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean.new_database()
    create_roles(clean.settings())
    grant_as(clean.settings(), clean.new_login("plain"), "worker")
    monkeypatch.setenv("DATABASE_URL", clean.url("postgres"))
    monkeypatch.setenv("VECTOR_INDEX_THRESHOLD", "5")
    monkeypatch.setattr(reembedding, "FAILED_SECONDS", 0.05)  # a minute, four times

    def index() -> object:
        with pytest.raises(SystemExit) as end:
            main(["index"])
        return end.value.code

    settings = clean.settings("plain", vector_index_threshold=5)
    async with make_pool(settings, clean.url("plain")) as pool:
        shelf = Shelf(clean.as_login("postgres"), pool, settings)
        for number in range(10):
            shelf.put(f"d{number}", f"pump {number}")
        assert await asyncio.to_thread(index) == 0
        shelf.start()
        made, asked = shelf.slice(), set()
        while (pause := await shelf.step(made)) is not None:
            await asyncio.sleep(pause)
            state, why = shelf.one("SELECT state, coalesce(error_message, '') FROM reembeddings")
            if "`docmill index`" in why:
                assert (state, shelf.one("SELECT string_agg(step, ' ') FROM reembedding_steps()")) not in asked, "it did not help"
                asked.add((state, shelf.one("SELECT string_agg(step, ' ') FROM reembedding_steps()")))
                assert await asyncio.to_thread(index) == 0
                shelf.conn.execute("UPDATE reembeddings SET error_message = NULL")
        assert shelf.state() == "complete"
        assert {("running", "index"), ("switched", "list"), ("switched", "finish")} <= asked
        assert shelf.all("SELECT indexname FROM pg_indexes WHERE indexname LIKE '%%hnsw%%'") == [index_name(NEW.model, NEW.dimensions)]
        shelf.conn.close()


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_readers_search_is_right_among_many_passages_of_others(clean: Walls, share: float) -> None:
    """The same passages as an exact search over the reader's own, with the index that would otherwise be full of others'."""
    clean.new_database()
    create_roles(clean.settings())
    grant_to_person(clean.settings(), clean.new_login("alice"), "alice")
    count, dimensions = 8000, 16
    rng = np.random.default_rng(7)
    with clean.as_login("postgres") as conn:
        register_vector(conn)
        for user in ("alice", "bob"):
            added = "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id) VALUES (%s, %s, 'f', 'p', 'c')"
            conn.execute(added,
                         [user, user])  # fmt: skip
        vectors = list(rng.standard_normal((count, dimensions), dtype=np.float32))
        owners = ["alice" if number < count * share else "bob" for number in range(count)]
        conn.execute(
            """INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end,
                language, embedding, embedding_model)
            SELECT gen_random_uuid(), v.owner, v.owner, 1, v.n, 'common w' || v.n %% 50, repeat('0', 64), 0, 1, 'en', v.embedding, 'm'
            FROM unnest(%b::vector[], %s::text[]) WITH ORDINALITY AS v (embedding, owner, n)""",
            [vectors, owners],
        )
        conn.execute("CREATE INDEX ON document_chunks USING hnsw ((embedding::vector(16)) vector_cosine_ops) WHERE embedding_model = 'm'")
        conn.execute("ANALYZE document_chunks")
    wanted = rng.standard_normal(dimensions, dtype=np.float32)
    own = [number for number in range(count) if owners[number] == "alice"]
    nearest = sorted(own, key=lambda n: -float(vectors[n] @ wanted) / float(np.linalg.norm(vectors[n])))[:10]
    with clean.as_login("alice") as conn:
        register_vector(conn)
        found = conn.execute("SELECT chunk_index - 1 FROM search_by_vector(%b::vector, 'm', limit_to => 10)", [wanted]).fetchall()
        assert len({number for (number,) in found} & set(nearest)) >= 9
        by_words = rows(conn, "SELECT DISTINCT doc_id FROM search_by_text('common w7', limit_to => 50)")
        assert by_words == [("alice",)]
        assert len(rows(conn, "SELECT FROM search_by_text('w7', limit_to => 1000)")) == sum(number % 50 == 6 for number in own)


def test_one_at_a_time_gives_rights_and_none_while_somebody_migrates(clean: Walls) -> None:
    clean.new_database()
    settings, login = clean.settings(), clean.new_login("somebody")
    create_roles(settings)
    deeds: list[Callable[[], object]] = [
        lambda: grant_to_person(settings, login, "alice"), lambda: revoke(settings, login), lambda: grant_as(settings, login, "worker"),
        lambda: create_roles(settings),
    ]  # fmt: skip
    with clean.as_login("postgres") as conn, ThreadPoolExecutor(1) as threads:
        for deed in deeds:
            with alone(conn), conn.transaction():
                conn.execute(query("lock_roles"))
                begun = threads.submit(deed)
                with pytest.raises(TimeoutError):
                    begun.result(timeout=0.5)
            begun.result(timeout=30)
