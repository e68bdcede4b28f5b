"""People see their own rows and nobody else's, whatever they try. Each attempt is made by a real login over TCP with its password."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import pytest
from psycopg import errors, sql

import jobs
from models.errors import SubmitError
from models.settings import load_settings
from tests.walls import MODEL, PEOPLE, Walls, fill


@pytest.fixture(scope="module")
def walls() -> Iterator[Walls]:
    """A server with a database in which alice and bob have a row each in every table. Tests leave it as it is."""
    made = Walls()
    try:
        made.new_database()
        made.raise_walls()
        with made.as_login("postgres") as conn:
            for user in PEOPLE:
                fill(conn, user)
            # A call that both shared.
            conn.execute(
                "INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, cost, outcome, give_up_at, finished_at) "
                "SELECT gen_random_uuid(), 's', 'embedding', ARRAY['alice-doc', 'bob-doc'], ARRAY['alice-batch', 'bob-batch'], "
                "ARRAY['alice', 'bob'], ARRAY[0.5, 0.5], 2, 'ok', now(), now()"
            )
            conn.execute("ANALYZE")
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where submissions through the front door put their files."""
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path))
    load_settings.cache_clear()
    yield
    load_settings.cache_clear()


@pytest.fixture
def alice(walls: Walls) -> Iterator[psycopg.Connection[Any]]:
    """The connection of a person."""
    with walls.as_login("alice") as conn:
        yield conn


def rows(conn: psycopg.Connection[Any], statement: str, *args: object) -> list[tuple[Any, ...]]:
    return conn.execute(cast(LiteralString, statement), args).fetchall()


def contents(conn: psycopg.Connection[Any], relation: str) -> str | None:
    """All that a login sees of a relation, as text; None where it may not look."""
    try:
        found = conn.execute(sql.SQL("SELECT t::text FROM {} AS t").format(sql.Identifier(relation))).fetchall()
    except errors.InsufficientPrivilege:
        return None
    return "\n".join(row[0] for row in found)


OF_USERS = (
    "processing_jobs", "file_extractions", "document_chunks", "chunk_embeddings", "document_events", "dead_letters", "run_summaries",
    "batch_archives", "provider_usage", "procrastinate_jobs", "document_markdown", "cost_totals",
)  # fmt: skip
"""Of which a person sees rows of their own."""
IN_FLIGHT = ("chunk_buffer", "vector_buffer", "extraction_buffer", "hosted_jobs", "folder_files", "embeddings_to_make")
OF_ALL = ("alerts", "alert_conditions", "files_to_remove", "circuit_breakers", "provider_budgets", "reembeddings", "user_logins",
          "relation_rights", "alert_rules", "procrastinate_periodic_defers", "summaries_to_renew")  # fmt: skip


def test_every_relation_has_rights_and_every_function_that_runs_as_its_owner_is_known(walls: Walls) -> None:
    """Whoever makes a table or view gives it a row in relation_rights, and whoever makes such a function thinks about who may call it."""
    with walls.as_login("postgres") as conn:
        there = rows(conn, """SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND (c.relkind IN ('r', 'p', 'v', 'm')
            OR c.relkind = 'S' AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype IN ('a', 'i')))""")  # fmt: skip
        listed = rows(conn, "SELECT relation FROM relation_rights")
        assert sorted(listed) == sorted(there)
        as_owner = rows(conn, "SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace")
        assert {name for (name,) in as_owner} == {
            "acting_user", "alert_of_dead_letter", "confined_to", "embedding_table", "event_id_since", "list_lacking_embeddings",
            "matching_chunks", "may_select", "share_embeddings_with_readers", "weigh_words", "workers_seen",
        }  # fmt: skip
        # A temporary table of the caller's must not stand for one of ours.
        unpinned = rows(
            conn,
            """SELECT p.proname FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND p.prosqlbody IS NULL
            AND NOT coalesce(array_to_string(p.proconfig, ',') LIKE '%%search_path=pg_catalog, public, pg_temp%%', FALSE) AND p.prokind = 'f'
            AND p.proname NOT LIKE 'procrastinate%%' AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')""",
        )
        assert unpinned == []
        views = rows(conn, "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace "
                           "AND NOT coalesce('security_invoker=true' = ANY(reloptions), FALSE)")  # fmt: skip
        assert views == []
        open_tables = rows(conn, """SELECT c.relname FROM pg_class c JOIN relation_rights r ON r.relation = c.relname
            WHERE c.relkind = 'r' AND c.relrowsecurity = (r.rows_of_user IS NOT DISTINCT FROM 'TRUE')""")  # fmt: skip
        assert open_tables == [], "tables with rows of users have row-level security, and no others"
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
            for mode in SEARCHES:
                assert rows(conn, SEARCHES[mode]) == []


SEARCHES = {
    "vector": f"SELECT doc_id FROM search_by_vector('[1,1,1]', '{MODEL}')",
    "text": "SELECT doc_id FROM search_by_text('secret of bob alice')",
    "hybrid": f"SELECT doc_id FROM search_hybrid('secret of bob alice', '[1,1,1]', '{MODEL}')",
    "vector of another user": f"SELECT doc_id FROM search_by_vector('[1,1,1]', '{MODEL}') UNION SELECT doc_id "
    f"FROM search_by_vector('[1,1,1]', '{MODEL}', user_id => 'bob')",
    "text of another user": "SELECT doc_id FROM search_by_text('secret alice') UNION SELECT doc_id FROM search_by_text('secret', user_id => 'bob')",
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


REFUSED = {
    # Becoming somebody else.
    "become another user": "SET ROLE bob",
    "become a worker": "SET ROLE docmill_worker",
    "become an operator": "SET ROLE docmill_operator",
    "become an application": "SET ROLE docmill_app",
    "become the owner": "SET ROLE docmill_owner",
    "log in as another": "SET SESSION AUTHORIZATION bob",
    "grant oneself a role": "GRANT docmill_worker TO alice",
    "grant oneself another's role": "GRANT bob TO alice",
    "become one that bypasses": "ALTER ROLE alice BYPASSRLS",
    "read the mapping": "SELECT * FROM user_logins",
    "change the mapping": "UPDATE user_logins SET user_id = 'bob'",
    "add to the mapping": "INSERT INTO user_logins (login, user_id) VALUES ('alice', 'bob') ON CONFLICT (login) DO UPDATE SET user_id = 'bob'",
    # Switching the walls off.
    "switch it off for a table": "ALTER TABLE file_extractions DISABLE ROW LEVEL SECURITY",
    "switch it off for the session": "SET row_security = off; SELECT * FROM file_extractions",
    "add a policy": "CREATE POLICY mine ON file_extractions USING (TRUE)",
    "drop a policy": "DROP POLICY docmill_reader_own ON file_extractions",
    "replace the function that decides": "CREATE OR REPLACE FUNCTION acting_user() RETURNS text LANGUAGE sql AS $$ SELECT 'bob' $$",
    "change the function that decides": "ALTER FUNCTION acting_user() SECURITY INVOKER",
    "secure a table otherwise": "UPDATE relation_rights SET rows_of_user = 'TRUE'",
    "skip triggers": "SET session_replication_role = replica",
    # Changing anything.
    "insert a document": "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id) VALUES ('x', 'bob', 'f', 'p', 'c')",
    "submit a document": "SELECT submit_document('uploads/x', doc_id => 'x', user_id => 'bob')",
    "take another's name": "SELECT submit_document('uploads/x', doc_id => 'bob-doc', user_id => 'alice')",
    "submit a batch": "SELECT begin_batch('x', 'bob', '/x', 'c')",
    "change a document": "UPDATE file_extractions SET user_id = 'alice'",
    "lock a document": "SELECT * FROM file_extractions FOR UPDATE",
    "lock a table": "BEGIN; LOCK TABLE file_extractions IN EXCLUSIVE MODE",
    "delete a document": "DELETE FROM file_extractions WHERE doc_id = 'bob-doc'",
    "merge into documents": "MERGE INTO file_extractions AS d USING (VALUES ('bob-doc')) AS v (n) ON d.doc_id = v.n WHEN MATCHED THEN DELETE",
    "empty a table": "TRUNCATE document_events",
    "write an event": "INSERT INTO document_events (doc_id, user_id, correlation_id, event) VALUES ('bob-doc', 'bob', 'c', 'x')",
    "remove events": "SET docmill.prune = on; DELETE FROM document_events",
    "insert passages": "INSERT INTO document_chunks (id, doc_id) SELECT id, doc_id FROM document_chunks",
    "write by COPY": "COPY document_chunks FROM STDIN",
    "queue a job": "INSERT INTO procrastinate_jobs (task_name, queue_name) VALUES ('validate', 'cpu')",
    "queue a stage": "SELECT defer_stage('bob-doc', 'validate', 0)",
    "fetch a job": "SELECT * FROM procrastinate_fetch_job_v2(NULL, 1)",
    "fetch a job our way": "SELECT * FROM docmill_fetch_job(NULL, 1, '', TRUE, 0)",
    "cancel a job": "SELECT procrastinate_cancel_job_v1(id, TRUE, FALSE) FROM procrastinate_jobs",
    "raise an alert": "SELECT alert('x', 'y')",
    "start a re-embedding": "SELECT start_reembedding('x')",
    "note a file for removal": "SELECT note_file('uploads/bob')",
    "draw a fencing token": "SELECT nextval('document_claims')",
    "read a sequence": "SELECT last_value FROM document_events_id_seq",
    "trigger that writes as the owner": "CREATE TEMP TABLE t (id uuid, doc_id text, user_id text, embedding vector, embedding_model text);"
    "CREATE TRIGGER t AFTER INSERT ON t REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION list_lacking_embeddings()",
    "trigger that alerts as the owner": "CREATE TEMP TABLE t (id bigint); "
    "CREATE TRIGGER t AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION alert_of_dead_letter()",
    "refer to a document": "CREATE TABLE public.mine (doc_id text REFERENCES file_extractions (doc_id))",
    "refer to it from a temporary table": "CREATE TEMP TABLE mine (doc_id text REFERENCES file_extractions (doc_id))",
    "index a table": "CREATE INDEX ON file_extractions (length(file_name))",
    "collect statistics": "CREATE STATISTICS public.mine ON user_id, file_name FROM file_extractions",
    "read the server's statistics": "SELECT * FROM pg_statistic",
    "read files of the server": "SELECT pg_read_file('postgresql.conf')",
    "run a program": "COPY (SELECT 1) TO PROGRAM 'true'",
    "replicate": "SELECT pg_create_logical_replication_slot('x', 'pgoutput')",
    "end others' sessions": "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'bob'",
}  # fmt: skip
"""What raises an error, whether by Postgres' rights or by ours."""


@pytest.mark.parametrize("attempt", REFUSED)
def test_a_person_is_refused(walls: Walls, alice: psycopg.Connection[Any], attempt: str) -> None:
    before = digest(walls)
    with walls.as_login("bob"), pytest.raises((errors.InsufficientPrivilege, errors.InvalidTableDefinition)) as refusal:
        for part in REFUSED[attempt].split("; "):
            alice.execute(part.encode())
    assert "bob-doc" not in str(refusal.value).split("CONTEXT")[0].replace('"bob-doc"', "")
    assert digest(walls) == before


IN_VAIN = {
    "grant oneself rights": "GRANT ALL ON file_extractions TO alice",
    "cancel another's document": "SELECT cancel_document('bob-doc')",
    "delete another's document": "SELECT delete_document('bob-doc')",
    "delete another's batch": "SELECT delete_batch('bob-batch')",
    "cancel another's jobs": "SELECT drop_waiting_jobs('bob-doc')",
    "have one's name changed by a setting": "ALTER ROLE alice SET docmill.user_id = 'bob'",
    "have the server think one is another": "SET docmill.user_id = 'bob'; SET application_name = 'docmill bob'",
    "say that a job is to be aborted": 'SELECT pg_notify(\'procrastinate_any_queue_v1\', \'{"type": "abort_job_requested", "job_id": 1}\')',
}
"""What Postgres lets anybody do, or what finds nothing to do it to."""


@pytest.mark.parametrize("attempt", IN_VAIN)
def test_a_person_tries_in_vain(walls: Walls, alice: psycopg.Connection[Any], attempt: str) -> None:
    before = digest(walls)
    try:
        for part in IN_VAIN[attempt].split("; "):
            assert alice.execute(part.encode()).statusmessage in ("SET", "ALTER ROLE", "GRANT", "SELECT 1")
    except (errors.InsufficientPrivilege, errors.NoDataFound) as refusal:
        assert "bob" not in str(refusal).split("CONTEXT")[0].replace('"bob-doc"', "").replace('"bob-batch"', "")
    assert digest(walls) == before
    assert rows(alice, "SELECT DISTINCT user_id FROM file_extractions") == [("alice",)]
    with walls.as_login("alice") as again:
        assert rows(again, "SELECT DISTINCT user_id, has_table_privilege('file_extractions', 'INSERT') FROM file_extractions") == [
            ("alice", False)
        ]


def digest(walls: Walls) -> list[str | None]:
    """Everything that is in the tables, to see that it stays."""
    with walls.as_login("postgres") as conn:
        return [contents(conn, relation) for relation in (*OF_USERS, *IN_FLIGHT, "user_logins", "relation_rights", "alerts")]


LEAK = "CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$ BEGIN RAISE NOTICE '%', $1; RETURN TRUE; END $$"
NOTHING: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    # Reading.
    "by name": ("SELECT doc_id FROM file_extractions WHERE doc_id = 'bob-doc'", []),
    "by place": ("SELECT doc_id FROM file_extractions WHERE ctid = '(0,1)' AND user_id <> 'alice'", []),
    "by sampling": ("SELECT DISTINCT user_id FROM document_chunks TABLESAMPLE system (100)", [("alice",)]),
    "by union": ("SELECT user_id FROM document_chunks UNION SELECT user_id FROM dead_letters UNION SELECT user_id FROM document_events", [("alice",)]),
    "by a view of one's own": ("SELECT DISTINCT user_id FROM pg_temp.mine", [("alice",)]),
    "by a cursor of one's own function": ("SELECT pg_temp.count_all()", [(1,)]),
    "by naming another user": ("SELECT DISTINCT user_id FROM file_extractions", [("alice",)]),
    "by whole rows": ("SELECT count(*) FROM file_extractions AS f WHERE f::text LIKE '%bob%'", [(0,)]),
    "a story": ("SELECT count(*) FROM document_story('bob-doc')", [(0,)]),
    "costs": ("SELECT cost_of_document('bob-doc'), cost_of_batch('bob-batch')", [(0, 0)]),
    "files of a run": ("SELECT count(*) FROM run_files((SELECT b FROM processing_jobs AS b WHERE b.batch_id = 'bob-batch'))", [(0,)]),
    "documents in workers' hands": ("SELECT DISTINCT d FROM worker_health AS w, unnest(w.documents) AS d", [("alice-doc",)]),
    # Counting.
    "count": ("SELECT count(*), count(DISTINCT user_id) FROM file_extractions", [(2, 1)]),
    "count passages": ("SELECT count(*) FROM document_chunks", [(1,)]),
    "count jobs": ("SELECT count(DISTINCT docmill_user) FROM procrastinate_jobs", [(1,)]),
    "count by the words' weights": ("SELECT passages FROM weigh_words('secret', NULL)", [(1,)]),
    "count what comes before": ("SELECT ahead FROM turn_of('cpu', 1000000, 0)", [(2,)]),
    "column statistics": ("SELECT count(*) FROM pg_stats WHERE schemaname = 'public' AND tablename IN ('file_extractions', 'document_chunks', "
                          "'document_events', 'procrastinate_jobs')", [(0,)]),  # fmt: skip
    "sequences": ("SELECT count(*) FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL", [(0,)]),
    "others' queries": ("SELECT count(*) FROM pg_stat_activity WHERE usename IN ('bob', 'postgres') AND query NOT LIKE '<insufficient%'", [(0,)]),
    # Inferring.
    "an error for others' rows": ("SELECT doc_id FROM file_extractions WHERE 1 / (CASE WHEN user_id = 'bob' THEN 0 ELSE 1 END) = 1 ORDER BY 1",
                                  [("alice-doc",), ("alice-failed",)]),  # fmt: skip
    "a cast that fails for others' rows": ("SELECT count(*) FROM document_events WHERE CASE WHEN user_id = 'bob' THEN event::int = 1 ELSE TRUE END "
                                           "AND event = 'submitted'", [(2,)]),  # fmt: skip
    "who exists": ("SELECT EXISTS (SELECT FROM file_extractions WHERE content_sha256 IS NOT NULL OR user_id = 'bob')", [(False,)]),
}  # fmt: skip
"""What answers, with nothing of anybody else's in it."""


@pytest.mark.parametrize("attempt", NOTHING)
def test_a_person_learns_nothing(walls: Walls, alice: psycopg.Connection[Any], attempt: str) -> None:
    alice.execute("CREATE TEMP VIEW mine AS SELECT * FROM file_extractions")
    alice.execute(
        "CREATE FUNCTION pg_temp.count_all() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT count(*) FROM public.document_chunks'"
    )
    statement, expected = NOTHING[attempt]
    with walls.as_login("bob"):
        for name in ("docmill.user_id", "docmill.user", "role.user_id", "request.jwt.claim.sub"):
            alice.execute("SELECT set_config(%s, 'bob', FALSE)", [name])
        assert rows(alice, statement.replace("%", "%%")) == expected


def test_a_condition_of_ones_own_is_never_shown_others_rows(alice: psycopg.Connection[Any]) -> None:
    told: list[str] = []
    alice.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
    alice.execute(LEAK.encode())
    alice.execute("CREATE OPERATOR pg_temp.~~> (FUNCTION = pg_temp.leak, RIGHTARG = text)")
    for relation, column in (("file_extractions", "doc_id"), ("document_chunks", "content"), ("dead_letters", "error_message"),
                             ("document_markdown", "markdown"), ("document_status", "doc_id"), ("batch_status", "batch_id")):  # fmt: skip
        alice.execute(f"SELECT FROM {relation} AS t WHERE pg_temp.leak(t.{column})".encode())
        alice.execute(f"SELECT FROM {relation} AS t WHERE OPERATOR(pg_temp.~~>) t.{column}".encode())
        alice.execute(f"SELECT count(*) FILTER (WHERE pg_temp.leak(t.{column})) FROM {relation} AS t".encode())
    assert len(told) >= 18
    assert [line for line in told if "alice" not in line] == []


def test_copying_out_gives_ones_own_rows(alice: psycopg.Connection[Any]) -> None:
    with alice.cursor().copy("COPY file_extractions (doc_id, user_id) TO STDOUT") as copy:
        assert sorted(copy.rows()) == [("alice-doc", "alice"), ("alice-failed", "alice")]


def test_a_temporary_table_does_not_stand_for_one_that_a_function_reads_as_its_owner(alice: psycopg.Connection[Any]) -> None:
    alice.execute("CREATE TEMP TABLE user_logins (login name, user_id text)")
    alice.execute("INSERT INTO user_logins VALUES ('alice', 'bob')")
    alice.execute("CREATE TEMP TABLE pg_roles (rolname name, oid oid)")
    alice.execute("CREATE TEMP TABLE document_chunks (LIKE public.document_chunks)")
    alice.execute("SET search_path = pg_temp, public")
    assert rows(alice, "SELECT acting_user(), confined_to()") == [("alice", "alice")]
    assert rows(alice, "SELECT count(*) FROM matching_chunks('secret', NULL, NULL, NULL, NULL, 10, NULL)") == [(1,)]
    assert rows(alice, "SELECT DISTINCT user_id FROM public.file_extractions") == [("alice",)]


def test_how_rare_a_word_is_among_others_does_not_show_in_the_score(walls: Walls, alice: psycopg.Connection[Any]) -> None:
    asked = "SELECT doc_id, score FROM search_by_text('secret')"
    before = rows(alice, asked)
    assert len(before) == 1
    with walls.as_login("postgres") as conn:
        conn.execute(
            """INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, language,
                embedding, embedding_model)
            SELECT gen_random_uuid(), 'bob-doc', 'bob', 2, i, 'secret', repeat('0', 64), 0, 1, 'en', '[1,0,0]', 'm' FROM generate_series(1, 200) AS i"""
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
    ("acting", "doc_id", "user_id"), [("alice", "x", "bob"), ("alice", "bob-doc", "alice"), ("alice", "bob-doc", "bob"), ("", "x", "alice")]
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
                          "SELECT defer_stage('bob-doc', 'parse', 0)", "SELECT * FROM user_logins", "SET ROLE docmill_worker"):  # fmt: skip
            with pytest.raises(errors.InsufficientPrivilege), web.transaction():
                web.execute("SET LOCAL docmill.user_id = 'alice'")
                web.execute(statement.encode())


def test_an_operator_sees_everything_and_changes_nothing(walls: Walls) -> None:
    with walls.as_login("operator") as conn:
        assert rows(conn, "SELECT DISTINCT user_id FROM file_extractions ORDER BY 1") == [("alice",), ("bob",)]
        assert len(rows(conn, "SELECT FROM search_by_text('secret')")) == 2
        assert rows(conn, "SELECT count(*) FROM worker_health") == [(2,)]
        for statement in ("DELETE FROM file_extractions", "SELECT cancel_document('bob-doc')", "SELECT nextval('document_claims')"):
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute(statement.encode())
