"""What a person with a login may try, and what becomes of it. Each attempt is made by a real login over TCP with its password."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg import errors

from jobs.roles import grant_as
from tests.walls import Walls, digest, rows

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
    "add to the mapping": "INSERT INTO user_logins (login, user_id) VALUES ('alice', 'bob') ON CONFLICT (login) "
    "DO UPDATE SET user_id = 'bob'",
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
    "insert a document": "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id) "
    "VALUES ('x', 'bob', 'f', 'p', 'c')",
    "insert a document of a name that is taken": "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id) "
    "VALUES ('bob-doc', 'alice', 'f', 'p', 'c')",
    "submit a document": "SELECT submit_document('uploads/x', doc_id => 'x', user_id => 'bob')",
    "take another's name": "SELECT submit_document('uploads/x', doc_id => 'bob-doc', user_id => 'alice')",
    "submit a batch": "SELECT begin_batch('x', 'bob', '/x', 'c')",
    "change a document": "UPDATE file_extractions SET user_id = 'alice'",
    "lock a document": "SELECT * FROM file_extractions FOR UPDATE",
    "lock a table": "BEGIN; LOCK TABLE file_extractions IN EXCLUSIVE MODE",
    "delete a document": "DELETE FROM file_extractions WHERE doc_id = 'bob-doc'",
    "merge into documents": "MERGE INTO file_extractions AS d USING (VALUES ('bob-doc')) AS v (n) ON d.doc_id = "
    "v.n WHEN MATCHED THEN DELETE",
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
    "trigger that writes as the owner": "CREATE TEMP TABLE t (id uuid, doc_id text, user_id text, embedding "
    "vector, embedding_model text);"
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
}
"""What raises an error, whether by Postgres' rights or by ours."""


@pytest.mark.parametrize("attempt", REFUSED)
def test_a_person_is_refused(walls: Walls, alice: psycopg.Connection[Any], attempt: str) -> None:
    before = digest(walls)
    with pytest.raises((errors.InsufficientPrivilege, errors.InvalidTableDefinition)) as refusal:
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
    "say that a job is to be aborted": """SELECT pg_notify('procrastinate_any_queue_v1',
        '{"type": "abort_job_requested", "job_id": 1}')""",
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
        asked = "SELECT DISTINCT user_id, has_table_privilege('file_extractions', 'INSERT') FROM file_extractions"
        assert rows(again, asked) == [("alice", False)]


LEAK = """CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
    $$ BEGIN RAISE NOTICE '%', $1; RETURN TRUE; END $$"""
NOTHING: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    # Reading.
    "by name": ("SELECT doc_id FROM file_extractions WHERE doc_id = 'bob-doc'", []),
    "by place": ("SELECT doc_id FROM file_extractions WHERE ctid = '(0,1)' AND user_id <> 'alice'", []),
    "by sampling": ("SELECT DISTINCT user_id FROM document_chunks TABLESAMPLE system (100)", [("alice",)]),
    "by union": (
        "SELECT user_id FROM document_chunks UNION SELECT user_id FROM dead_letters UNION SELECT user_id FROM document_events",
        [("alice",)],
    ),
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
    "column statistics": (
        "SELECT count(*) FROM pg_stats WHERE schemaname = 'public' AND tablename IN "
        "('file_extractions', 'document_chunks', "
        "'document_events', 'procrastinate_jobs')",
        [(0,)],
    ),
    "sequences": ("SELECT count(*) FROM pg_sequences WHERE schemaname = 'public' AND last_value IS NOT NULL", [(0,)]),
    "others' queries": (
        "SELECT count(*) FROM pg_stat_activity WHERE usename IN ('bob', 'postgres') AND query NOT LIKE '<insufficient%'",
        [(0,)],
    ),
    # Inferring.
    "an error for others' rows": (
        "SELECT doc_id FROM file_extractions WHERE 1 / (CASE WHEN user_id = 'bob' THEN 0 ELSE 1 END) = 1 ORDER BY 1",
        [("alice-doc",), ("alice-failed",)],
    ),
    "a cast that fails for others' rows": (
        "SELECT count(*) FROM document_events WHERE CASE WHEN user_id = 'bob' THEN event::int = 1 ELSE TRUE END AND event = 'submitted'",
        [(2,)],
    ),
    "who exists": ("SELECT EXISTS (SELECT FROM file_extractions WHERE content_sha256 IS NOT NULL OR user_id = 'bob')", [(False,)]),
}
"""What answers, with nothing of anybody else's in it."""


@pytest.mark.parametrize("attempt", NOTHING)
def test_a_person_learns_nothing(alice: psycopg.Connection[Any], attempt: str) -> None:
    alice.execute("CREATE TEMP VIEW mine AS SELECT * FROM file_extractions")
    alice.execute(
        "CREATE FUNCTION pg_temp.count_all() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT count(*) FROM public.document_chunks'"
    )
    statement, expected = NOTHING[attempt]
    for name in ("docmill.user_id", "docmill.user", "role.user_id", "request.jwt.claim.sub"):
        alice.execute("SELECT set_config(%s, 'bob', FALSE)", [name])
    assert rows(alice, statement.replace("%", "%%")) == expected


def test_a_condition_of_ones_own_is_never_shown_others_rows(alice: psycopg.Connection[Any]) -> None:
    told: list[str] = []
    alice.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
    alice.execute(LEAK.encode())
    alice.execute("CREATE OPERATOR pg_temp.~~> (FUNCTION = pg_temp.leak, RIGHTARG = text)")
    for relation, column in (
        ("file_extractions", "doc_id"),
        ("document_chunks", "content"),
        ("dead_letters", "error_message"),
        ("document_markdown", "markdown"),
        ("document_status", "doc_id"),
        ("batch_status", "batch_id"),
    ):
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


def test_a_login_that_may_take_on_the_owner_becomes_no_superuser(walls: Walls) -> None:
    """Functions that run as their owner run as docmill_owner, which is less than whoever made them."""
    grant_as(walls.settings(), walls.new_login("builder"), "worker", indexes=True)
    is_superuser = "SELECT r.rolsuper FROM pg_roles AS r WHERE r.rolname = 'builder'"
    with walls.as_login("builder") as conn:
        with pytest.raises(errors.InsufficientPrivilege), conn.transaction():
            conn.execute("SET ROLE docmill_owner")
            climb = "BEGIN EXECUTE 'ALTER ROLE builder SUPERUSER'; RETURN NEW; END"
            conn.execute(f"CREATE FUNCTION climb() RETURNS trigger LANGUAGE plpgsql AS $${climb}$$".encode())
            conn.execute("CREATE TRIGGER climb BEFORE INSERT ON alerts FOR EACH ROW EXECUTE FUNCTION climb()")
            conn.execute("RESET ROLE")
            conn.execute(
                "INSERT INTO dead_letters (doc_id, version, user_id, stage, error_type, error_message, correlation_id) "
                "VALUES ('bob-doc', 1, 'bob', 'parse', 'PERMANENT', 'x', 'c')"
            )
        with pytest.raises(errors.InsufficientPrivilege), conn.transaction():
            conn.execute("SET ROLE docmill_owner")
            conn.execute("ALTER FUNCTION pg_catalog.lpad(text, integer) SECURITY DEFINER")
        assert rows(conn, is_superuser) == [(False,)]
