"""People see their own rows and nobody else's, whatever they try. Each attempt is made by a real login over TCP with its password."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

import jobs
from models.errors import SubmitError
from models.settings import load_settings
from tests.walls import IN_FLIGHT, MODEL, OF_ALL, OF_USERS, Walls, contents, digest, rows


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where submissions through the front door put their files."""
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path))
    load_settings.cache_clear()
    yield
    load_settings.cache_clear()


def test_every_relation_has_rights_and_every_function_that_runs_as_its_owner_is_known(walls: Walls) -> None:
    """Whoever makes a table or view gives it a row in relation_rights, and whoever makes such a function thinks about who may call it."""
    with walls.as_login("postgres") as conn:
        there = rows(conn, """SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace
            AND (c.relkind IN ('r', 'p', 'v', 'm')
            OR c.relkind = 'S' AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype IN
            ('a', 'i')))""")  # fmt: skip
        listed = rows(conn, "SELECT relation FROM relation_rights")
        assert sorted(listed) == sorted(there)
        as_owner = rows(conn, "SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace")
        assert {name for (name,) in as_owner} == {
            "acting_user", "adopt_job", "alert_of_dead_letter", "confined_to", "embedding_table", "event_id_since",
            "list_lacking_embeddings", "matching_chunks", "may_select", "share_embeddings_with_readers", "weigh_words", "workers_seen",
        }  # fmt: skip
        # A temporary table of the caller's must not stand for one of ours.
        unpinned = rows(
            conn,
            """SELECT p.proname FROM pg_proc p
            WHERE p.pronamespace = 'public'::regnamespace AND p.prosqlbody IS NULL AND p.prokind = 'f'
                AND NOT coalesce(array_to_string(p.proconfig, ',') LIKE '%%search_path=pg_catalog, public, pg_temp%%', FALSE)
                AND p.proname NOT LIKE 'procrastinate%%'
                AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')""",
        )
        assert unpinned == []
        views = rows(conn, "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace "
                           "AND NOT coalesce('security_invoker=true' = ANY(reloptions), FALSE)")  # fmt: skip
        assert views == []
        assert (
            rows(conn, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND NOT relrowsecurity")
            == []
        )
        assert rows(conn, "SELECT rolname FROM pg_roles WHERE rolname LIKE 'docmill%%' AND (rolsuper OR rolbypassrls OR rolcanlogin)") == []


def test_a_person_sees_their_rows_of_every_table_and_view_and_of_nobody_elses(walls: Walls, alice: psycopg.Connection[Any]) -> None:
    with walls.as_login("operator") as operator:
        relations = [row[0] for row in rows(operator, "SELECT relation FROM relation_rights WHERE relation <> 'document_claims'")]
        everything = {relation: contents(operator, relation) or "" for relation in relations}
    seen = {relation: contents(alice, relation) for relation in relations}
    assert {relation for relation, text in seen.items() if text is not None and "bob" in text} == set()
    for relation in OF_USERS:
        assert "alice" in (seen[relation] or ""), relation
        assert "bob" in everything[relation], f"{relation}: the test must be able to fail"
    for relation in IN_FLIGHT:
        assert seen[relation] is None, relation
    for relation in OF_ALL:
        assert seen[relation] is None, relation
    assert len(everything["provider_usage"].splitlines()) == 3
    assert len((seen["provider_usage"] or "").splitlines()) == 1, "a call that others shared is not shown"
    assert rows(alice, "SELECT cost_of_document('alice-doc'), cost_of_document('bob-doc')") == [(2, 0)]


@pytest.mark.parametrize("login", ["nobody", "unmapped", "web"])
def test_a_login_that_is_no_user_sees_nothing(walls: Walls, login: str) -> None:
    with walls.as_login(login) as conn:
        for name in ("docmill.user_id", "docmill.user", "app.user_id"):
            conn.execute("SELECT set_config(%s, '', FALSE)", [name])
        for relation in (*OF_USERS, *IN_FLIGHT, "document_status", "batch_status", "dead_letter_queue"):
            assert contents(conn, relation) in (None, ""), relation
        if login != "nobody":
            assert rows(conn, "SELECT acting_user(), confined_to()") == [(None, "")]
            for asked in SEARCHES.values():
                assert rows(conn, asked) == []


SEARCHES = {
    "vector": f"SELECT doc_id FROM search_by_vector('[1,1,1]', '{MODEL}')",
    "text": "SELECT doc_id FROM search_by_text('secret of bob alice')",
    "hybrid": f"SELECT doc_id FROM search_hybrid('secret of bob alice', '[1,1,1]', '{MODEL}')",
    "vector of another user": f"SELECT doc_id FROM search_by_vector('[1,1,1]', '{MODEL}') UNION SELECT doc_id "
    f"FROM search_by_vector('[1,1,1]', '{MODEL}', user_id => 'bob')",
    "text of another user": "SELECT doc_id FROM search_by_text('secret alice') UNION SELECT doc_id FROM "
    "search_by_text('secret', user_id => 'bob')",
    "text in a batch": "SELECT doc_id FROM search_by_text('secret', batch_id => 'alice-batch') UNION "
    "SELECT doc_id FROM search_by_text('secret', batch_id => 'bob-batch')",
    "inner vector": f"SELECT c.doc_id FROM nearest_chunks('[1,1,1]', '{MODEL}', NULL, NULL, NULL, NULL, 10) AS f "
    "LEFT JOIN document_chunks AS c ON c.id = f.chunk_id",
    "inner text": "SELECT c.doc_id FROM matching_chunks('secret', NULL, NULL, NULL, NULL, 10, NULL) AS f "
    "LEFT JOIN document_chunks AS c ON c.id = f.chunk_id",
    "inner text of another user": "SELECT c.doc_id FROM matching_chunks('secret', NULL, NULL, NULL, NULL, 10, NULL) AS f "
    "LEFT JOIN document_chunks AS c ON c.id = f.chunk_id UNION ALL "
    "SELECT f.chunk_id::text FROM matching_chunks('secret', 'bob', NULL, NULL, NULL, 10, NULL) AS f",
    "quoted": "SELECT doc_id FROM search_by_text('secret', user_id => 'alice') UNION "
    "SELECT doc_id FROM search_by_text('secret', user_id => $$' OR c.user_id = 'bob$$, batch_id => $$' OR true --$$)",
}


@pytest.mark.parametrize("mode", SEARCHES)
def test_a_search_finds_the_askers_passages_only(alice: psycopg.Connection[Any], mode: str) -> None:
    assert rows(alice, SEARCHES[mode]) == [("alice-doc",)]


def test_who_may_not_read_passages_may_not_search_them_as_their_owner(walls: Walls) -> None:
    with walls.as_login("nobody") as conn:
        for call in (
            "matching_chunks('secret', NULL, NULL, NULL, NULL, 10, NULL)",
            "weigh_words('secret', NULL)",
            "search_by_text('secret')",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                rows(conn, f"SELECT * FROM {call}")
        assert rows(conn, "SELECT * FROM workers_seen()") == []


def test_how_rare_a_word_is_among_others_does_not_show_in_the_score(walls: Walls, alice: psycopg.Connection[Any]) -> None:
    asked = "SELECT doc_id, score FROM search_by_text('secret')"
    before = rows(alice, asked)
    assert len(before) == 1
    with walls.as_login("postgres") as conn:
        conn.execute(
            """INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256,
                char_start, char_end, language,
                embedding, embedding_model)
            SELECT gen_random_uuid(), 'bob-doc', 'bob', 2, i, 'secret', repeat('0', 64), 0, 1, 'en', '[1,0,0]',
            'm' FROM generate_series(1, 200) AS i"""
        )
        try:
            assert rows(alice, asked) == before
            assert len(rows(conn, asked + " WHERE doc_id LIKE '%%doc'")) > 1
        finally:
            conn.execute("DELETE FROM document_chunks WHERE version = 2")


def test_notifications_say_nothing_of_what_happened_to_whom(walls: Walls, alice: psycopg.Connection[Any]) -> None:
    channels = ("docmill_alerts", "procrastinate_any_queue_v1", "procrastinate_queue_v1#cpu", "procrastinate_queue_v1#maintenance")
    for channel in channels:
        alice.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
    with walls.as_login("postgres") as conn:
        conn.execute("SELECT submit_document('uploads/noise', doc_id => 'bob-noise', user_id => 'bob')")
        conn.execute("SELECT fail_document(d, 'PERMANENT', 'secret of bob', '{}') FROM file_extractions AS d WHERE d.doc_id = 'bob-noise'")
        conn.execute("SELECT delete_document('bob-noise')")
    heard = [notice.payload for notice in alice.notifies(timeout=10, stop_after=2)]
    assert len(heard) >= 2
    assert {key for payload in heard for key in json.loads(payload)} <= {"id", "at", "kind", "type", "job_id"}
    assert "bob" not in "".join(heard)


def test_an_application_sees_and_submits_for_the_user_that_it_names_in_this_transaction(walls: Walls) -> None:
    with walls.as_login("web") as web:
        with web.transaction():
            web.execute("SET LOCAL docmill.user_id = 'alice'")
            assert rows(web, "SELECT DISTINCT user_id FROM file_extractions") == [("alice",)]
            assert rows(web, SEARCHES["text"]) == [("alice-doc",)]
        assert rows(web, "SELECT count(*) FROM file_extractions") == [(0,)], "the name goes with its transaction"
        with web.transaction(force_rollback=True):
            web.execute("SELECT set_config('docmill.user_id', 'bob', TRUE)")
            assert jobs.submit_document(b"new", doc_id="bob-new", user_id="bob", connection=web).outcome == "accepted"
            assert rows(web, "SELECT docmill_user, args ->> 'doc_id' FROM procrastinate_jobs ORDER BY id DESC LIMIT 1") == [
                ("bob", "bob-new")
            ]
            assert jobs.submit_document(b"newer", doc_id="bob-new", user_id="bob", connection=web).outcome == "new_version"
            assert rows(web, "SELECT cancel_document('bob-new')") == [("cancelled",)]
            assert rows(web, "SELECT delete_document('bob-new'), delete_document('alice-doc')") == [(True, False)]
            assert rows(web, "SELECT event FROM document_events WHERE doc_id = 'bob-new' ORDER BY id DESC LIMIT 1") == [("deleted",)]
            zipped = rows(web, "SELECT outcome FROM submit_zip('bob-zip', 'bob', 'z', 'uploads/z', repeat('0', 64), '{}', 0, 'c', 1000)")
            assert zipped == [("accepted",)]


@pytest.mark.parametrize(
    ("acting", "doc_id", "user_id"),
    [("alice", "x", "bob"), ("alice", "bob-doc", "alice"), ("alice", "bob-doc", "bob"), ("", "x", "alice")],
)
def test_an_application_submits_for_nobody_else_and_under_nobody_elses_name(walls: Walls, acting: str, doc_id: str, user_id: str) -> None:
    before = digest(walls)
    with walls.as_login("web") as web, pytest.raises(SubmitError), web.transaction():
        web.execute("SELECT set_config('docmill.user_id', %s, TRUE)", [acting])
        jobs.submit_document(b"new", doc_id=doc_id, user_id=user_id, connection=web)
    assert digest(walls) == before


def test_an_application_takes_no_batch_of_another_user(walls: Walls) -> None:
    with walls.as_login("web") as web:
        with pytest.raises(errors.UniqueViolation, match="is taken"), web.transaction():
            web.execute("SET LOCAL docmill.user_id = 'alice'")
            web.execute("SELECT begin_batch('bob-batch', 'alice', '/x', 'c')")
        for statement in ("SELECT begin_batch('x', 'bob', '/x', 'c')", "UPDATE processing_jobs SET user_id = 'bob'",
                          "SELECT defer_stage('bob-doc', 'parse', 0)", "SELECT * FROM user_logins", "SET ROLE "
                          "docmill_worker"):  # fmt: skip
            with pytest.raises(errors.InsufficientPrivilege), web.transaction():
                web.execute("SET LOCAL docmill.user_id = 'alice'")
                web.execute(statement.encode())
        for statement in ("SELECT accept_document('x','alice','f','p',NULL,1,NULL,'{}',0,'c','bob-batch',NULL,1000)",
                          "UPDATE file_extractions SET batch_id = 'bob-batch'",
                          "UPDATE batch_archives SET batch_id = 'bob-batch'",
                          "UPDATE run_summaries SET batch_id = 'bob-batch'"):  # fmt: skip
            with pytest.raises(errors.ForeignKeyViolation), web.transaction():
                web.execute("SET LOCAL docmill.user_id = 'alice'")
                web.execute(statement.encode())


@pytest.mark.parametrize("column", ["id", "at"])
def test_an_application_writes_events_under_no_time_or_number_of_its_choice(walls: Walls, column: str) -> None:
    value = {"id": "1000000", "at": "'2001-01-01'"}[column]
    names = "doc_id, user_id, correlation_id, event"
    with walls.as_login("web") as web:
        with pytest.raises(errors.InsufficientPrivilege), web.transaction():
            web.execute("SET LOCAL docmill.user_id = 'alice'")
            web.execute(f"INSERT INTO document_events ({column}, {names}) OVERRIDING SYSTEM VALUE VALUES ({value}, 'x', 'alice', 'c', 'x')")
        with web.transaction(force_rollback=True):
            web.execute("SET LOCAL docmill.user_id = 'alice'")
            web.execute(f"INSERT INTO document_events ({names}) VALUES ('x', 'alice', 'c', 'x')")
            assert rows(web, "SELECT event FROM document_events WHERE doc_id = 'x'") == [("x",)]


def test_a_job_that_was_there_before_its_document_serves_the_application_that_submits_it(walls: Walls) -> None:
    try:
        with walls.as_login("worker") as worker, walls.as_login("web") as web:
            worker.execute("SELECT defer_stage('early', 'validate', 0)")
            web.execute("SET statement_timeout = '10s'")
            with web.transaction(force_rollback=True):
                web.execute("SET LOCAL docmill.user_id = 'alice'")
                web.execute("SELECT submit_document('uploads/early', doc_id => 'early', user_id => 'alice')")
                seen = rows(web, "SELECT status, docmill_user FROM procrastinate_jobs WHERE queueing_lock = 'validate:early'")
                assert seen == [("todo", "alice")]
            with web.transaction(force_rollback=True):
                web.execute("SET LOCAL docmill.user_id = 'bob'")
                web.execute("SELECT adopt_job('early', 'validate'), adopt_job('alice-doc', 'validate')")
                assert rows(web, "SELECT DISTINCT docmill_user FROM procrastinate_jobs") == [("bob",)]
    finally:
        walls.admin.execute("DELETE FROM procrastinate_jobs WHERE queueing_lock = 'validate:early'")


def test_everybody_is_told_who_holds_their_document_up_and_nothing_of_others(walls: Walls) -> None:
    admin = walls.admin
    try:
        admin.execute(
            """UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() - interval '5 minutes',
                claimed_by = (SELECT w.worker FROM worker_registry AS w WHERE doc_id = ANY(w.documents))
            WHERE doc_id IN ('alice-doc', 'bob-doc')"""
        )
        admin.execute("UPDATE worker_registry SET heartbeat_at = now() + interval '1 hour'")
        for login in ("alice", "web", "operator", "worker"):
            with walls.as_login(login) as conn, conn.transaction():
                if login == "web":
                    conn.execute("SET LOCAL docmill.user_id = 'alice'")
                ((what,),) = rows(conn, "SELECT e.what FROM explain_document('alice-doc') AS e WHERE e.tense = 'now'")
                assert "an open transaction holds it" in what
                both = [("alice-doc", "held"), ("bob-doc", "held")]
                seen = rows(conn, "SELECT doc_id, cause FROM stuck_documents WHERE state = 'working' ORDER BY doc_id")
                assert seen == (both[:1] if login in ("alice", "web") else both)
    finally:
        admin.execute("UPDATE file_extractions SET state = 'queued', lease_until = NULL WHERE state = 'working'")
        admin.execute("UPDATE worker_registry SET heartbeat_at = now()")


def test_an_operator_sees_everything_and_changes_nothing(walls: Walls) -> None:
    with walls.as_login("operator") as conn:
        assert rows(conn, "SELECT DISTINCT user_id FROM file_extractions ORDER BY 1") == [("alice",), ("bob",)]
        assert len(rows(conn, "SELECT FROM search_by_text('secret')")) == 2
        assert rows(conn, "SELECT count(*) FROM worker_health") == [(2,)]
        for statement in ("DELETE FROM file_extractions", "SELECT cancel_document('bob-doc')", "SELECT nextval('document_claims')"):
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute(statement.encode())
