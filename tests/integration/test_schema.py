"""The database refuses what the design forbids."""

from __future__ import annotations

import threading

import psycopg
import pytest
from procrastinate.schema import migrations_path

from models.stages import STAGES, Milestone, State
from sql.migrate import migrate, procrastinates_migrations


def submit(conn: psycopg.Connection, doc_id: str = "a", sha: str | None = "1" * 64, **more: object) -> str:
    names = ", ".join(f"{name} => %({name})s" for name in more)
    row = conn.execute(
        f"SELECT submit_document('uploads/a', doc_id => %(doc_id)s, content_sha256 => %(sha)s{', ' if names else ''}{names})",
        {"doc_id": doc_id, "sha": sha, **more},
    ).fetchone()
    assert row is not None
    return str(row[0])


def one(conn: psycopg.Connection, statement: str, *args: object) -> tuple[object, ...]:
    row = conn.execute(statement, args).fetchone()
    assert row is not None
    return tuple(row)


def test_the_migrations_of_procrastinate_are_found_where_it_has_them() -> None:
    assert procrastinates_migrations() == sorted(migrations_path.glob("*.sql"))
    assert procrastinates_migrations()


def test_every_table_view_function_and_column_has_a_comment(conn: psycopg.Connection) -> None:
    ours = "c.relnamespace = 'public'::regnamespace AND c.relname NOT LIKE 'procrastinate%%'"
    relations = conn.execute(
        f"SELECT c.relname FROM pg_class c WHERE {ours} AND c.relkind IN ('r', 'v', 'p', 'm') AND obj_description(c.oid) IS NULL"
    ).fetchall()
    columns = conn.execute(
        f"""SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE {ours} AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped
            AND col_description(c.oid, a.attnum) IS NULL"""
    ).fetchall()
    functions = conn.execute(
        """SELECT p.proname FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND obj_description(p.oid) IS NULL
        AND p.proname NOT LIKE 'procrastinate%%'
        AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')"""
    ).fetchall()
    assert (relations, columns, functions) == ([], [], [])


def test_sql_and_python_agree_on_milestones_states_and_stages(conn: psycopg.Connection) -> None:
    labels = "SELECT enumlabel FROM pg_enum WHERE enumtypid = %s::regtype ORDER BY enumsortorder"
    assert [r[0] for r in conn.execute(labels, ["document_milestone"])] == list(Milestone)
    assert [r[0] for r in conn.execute(labels, ["document_state"])] == list(State)
    for stage in STAGES:
        assert one(conn, "SELECT due_stage(%s), stage_queue(%s)", stage.due_at, stage.name) == (stage.name, stage.queue)
    assert one(conn, "SELECT due_stage('complete')") == (None,)


def test_a_new_document_has_one_waiting_job_and_an_event(conn: psycopg.Connection) -> None:
    assert submit(conn, priority=7) == "a"
    assert one(conn, "SELECT milestone, state, status, version, served_version FROM file_extractions") == (
        "uploaded", "queued", "pending", 1, None,
    )  # fmt: skip
    assert one(conn, "SELECT queue_name, task_name, queueing_lock, args, priority, status FROM procrastinate_jobs") == (
        "cpu", "validate", "validate:a", {"doc_id": "a"}, 7, "todo",
    )  # fmt: skip
    assert one(conn, "SELECT event FROM document_events") == ("submitted",)


def test_the_same_content_again_does_nothing(conn: psycopg.Connection) -> None:
    submit(conn)
    submit(conn)
    assert one(conn, "SELECT count(*), max(version), max(claim) FROM file_extractions") == (1, 1, 0)
    assert one(conn, "SELECT count(*) FROM procrastinate_jobs") == (1,)
    assert one(conn, "SELECT count(*) FROM document_events") == (1,)


def test_new_content_is_a_new_version_that_fences_off_the_old_one(conn: psycopg.Connection) -> None:
    submit(conn)
    conn.execute("UPDATE file_extractions SET state = 'working', claim = 1, lease_until = now() + interval '1 min'")
    submit(conn, sha="2" * 64)
    assert one(conn, "SELECT version, milestone, state, claim, lease_until FROM file_extractions") == (2, "uploaded", "queued", 2, None)
    assert one(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (1,)


def test_another_users_doc_id_is_refused(conn: psycopg.Connection) -> None:
    submit(conn, user_id="ann")
    with pytest.raises(psycopg.errors.UniqueViolation):
        submit(conn, user_id="bob")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\b", "a\nb", ""])
def test_a_path_that_leaves_storage_is_refused(conn: psycopg.Connection, path: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        conn.execute("SELECT submit_document(%s)", [path])


@pytest.mark.parametrize("doc_id", ["", "x" * 201, "a\tb", "a\x7fb"])
def test_a_bad_doc_id_is_refused(conn: psycopg.Connection, doc_id: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        submit(conn, doc_id=doc_id)


def test_a_derived_doc_id_is_stable_and_per_user(conn: psycopg.Connection) -> None:
    first = one(conn, "SELECT submit_document('uploads/x', content_sha256 => repeat('1', 64))")
    again = one(conn, "SELECT submit_document('uploads/x', content_sha256 => repeat('1', 64))")
    other = one(conn, "SELECT submit_document('uploads/x', user_id => 'bob')")
    assert first == again != other


def work_to(conn: psycopg.Connection, milestone: str) -> None:
    conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'")
    conn.execute("UPDATE file_extractions SET milestone = %s", [milestone])


def test_milestones_never_go_back_within_a_version(conn: psycopg.Connection) -> None:
    submit(conn)
    work_to(conn, "chunks_stored")
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute("UPDATE file_extractions SET milestone = 'parse_complete'")


def test_a_carried_document_may_jump_to_complete(conn: psycopg.Connection) -> None:
    submit(conn)
    work_to(conn, "uploaded")
    conn.execute("UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = 1")
    assert one(conn, "SELECT status FROM document_status") == ("complete",)


@pytest.mark.parametrize(
    "change",
    [
        "state = 'complete'",  # complete without the milestone
        "state = 'working'",  # working without a lease
        "state = 'retrying'",  # queued cannot become retrying
        "version = 2",  # a new version without a new claim
        "claim = -1",
        "state = 'failed'",  # failed without a reason
        "served_version = 2",
    ],
)
def test_an_invalid_state_is_refused(conn: psycopg.Connection, change: str) -> None:
    submit(conn)
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute(f"UPDATE file_extractions SET {change}")


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ("queued", "state = 'working', lease_until = now()"),  # under the claim of whoever had it before
        ("queued", "milestone = 'extracted'"),  # with nobody working on it
        ("failed", "milestone = 'embeddings_stored'"),
        ("working", "state = 'duplicate', lease_until = NULL"),  # of nothing
        ("working", "version = version + 5, claim = claim + 1, state = 'queued', lease_until = NULL"),
        ("working", "doc_id = 'b'"),
        ("working", "user_id = 'bob'"),
    ],
)
def test_a_document_changes_hands_content_and_place_only_as_it_may(conn: psycopg.Connection, state: str, change: str) -> None:
    submit(conn)
    if state == "failed":
        conn.execute("SELECT fail_document(d, 'PERMANENT', 'm', '{}') FROM file_extractions AS d")
    elif state == "working":
        work_to(conn, "uploaded")
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute(f"UPDATE file_extractions SET {change}")


def test_a_batch_takes_in_documents_of_its_own_user_alone(conn: psycopg.Connection) -> None:
    conn.execute("SELECT begin_batch('b', 'bob', '/folder', 'c')")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        conn.execute("SELECT accept_document('a','ann','f','p',NULL,1,NULL,'{}',0,'c','b',NULL,50)")
    conn.execute("SELECT accept_document('a','bob','f','p',NULL,1,NULL,'{}',0,'c','b',NULL,50)")
    assert one(conn, "SELECT delete_batch('b')") == (1,)


def test_who_begins_a_batch_at_the_same_moment_as_another_begins_a_run_of_it(database: str) -> None:
    failures: list[Exception] = []
    together = threading.Barrier(4)

    def begin() -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            for number in range(100):
                together.wait(10)
                try:
                    conn.execute("SELECT begin_batch(%s, 'ann', '/folder', 'c')", [f"b{number}"])
                except psycopg.Error as error:
                    failures.append(error)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("change", ["UPDATE document_events SET event = 'x'", "TRUNCATE document_events"])
def test_events_cannot_be_changed(conn: psycopg.Connection, change: str) -> None:
    submit(conn)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        conn.execute(change.encode())


@pytest.mark.parametrize("forged", [2**63 - 1, -(2**63)])
def test_an_event_with_an_odd_number_breaks_no_view(conn: psycopg.Connection, forged: int) -> None:
    for doc_id in ("a", "b", "c"):
        submit(conn, doc_id)
    conn.execute(
        """INSERT INTO document_events (id, at, doc_id, user_id, correlation_id, event) OVERRIDING SYSTEM VALUE
        VALUES (%s, now() - interval '9 years', 'a', 'ann', 'c', 'x')""",
        [forged],
    )
    for ago in ("0", "1 hour", "10 years"):
        one(conn, "SELECT event_id_since(now() - %s::interval)", ago)
    assert one(conn, "SELECT sum(submitted) FROM throughput") == (3,)


def test_a_status_word_for_every_milestone_and_state(conn: psycopg.Connection) -> None:
    submit(conn)
    seen = []
    for milestone in list(Milestone)[:-1]:
        work_to(conn, milestone)
        working = one(conn, "SELECT status FROM document_status")[0]
        conn.execute("UPDATE file_extractions SET state = 'queued', lease_until = NULL")
        seen += [one(conn, "SELECT status FROM document_status")[0], working]
    assert seen == [
        "uploaded", "uploaded", "parse_queued", "parsing", "parse_complete", "parse_complete", "parse_validated", "parse_validated",
        "embedding_queued", "embedding_in_progress", "embeddings_stored", "embeddings_stored", "extracted", "extracted",
    ]  # fmt: skip


def test_submit_does_not_hang_behind_an_open_transaction_and_keeps_the_callers_lock_timeout(database: str) -> None:
    with psycopg.connect(database) as holder, psycopg.connect(database, autocommit=True) as other:
        submit(holder)
        other.execute("SET lock_timeout = '77s'")
        accept = "SELECT accept_document('a','default','f','p',NULL,1,repeat('1',64),'{}',0,'c',NULL,NULL,50)"
        with pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute(accept)
        holder.rollback()
        other.execute(accept)
        assert one(other, "SHOW lock_timeout") == ("77s",)


def test_migrate_runs_twice_and_from_two_hosts_at_once(empty_database: str) -> None:
    done: list[list[str]] = []

    def run() -> None:
        with psycopg.connect(empty_database, autocommit=True) as conn:
            done.append(migrate(conn))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, done)) == [False, False, False, True]


def test_a_batch_ends_once_it_is_sealed_and_its_documents_have_ended(conn: psycopg.Connection) -> None:
    run = one(conn, "SELECT begin_batch('b', 'default', '/folder', 'c')")[0]
    conn.execute("SELECT accept_document('a','default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,50)", [run])
    work_to(conn, "uploaded")
    conn.execute("UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = 1")
    assert one(conn, "SELECT settle_batch('b')") == (None,)
    assert one(conn, "SELECT seal_batch('b', %s, 1)", run) == ("completed",)
    assert one(conn, "SELECT status, completed, failed FROM batch_status") == ("completed", 1, 0)


def test_a_new_version_starts_with_clean_counts(conn: psycopg.Connection) -> None:
    submit(conn)
    conn.execute("UPDATE file_extractions SET crash_count = 2, lone_crash_count = 2, requeue_count = 9, retry_count = 3, alone = TRUE")
    submit(conn, sha="2" * 64)
    counts = "SELECT crash_count, lone_crash_count, requeue_count, retry_count, alone FROM file_extractions"
    assert one(conn, counts) == (0, 0, 0, 0, False)


def test_the_functions_work_whatever_the_callers_search_path_is(conn: psycopg.Connection) -> None:
    conn.execute("CREATE SCHEMA app")
    conn.execute("SET search_path = app")
    conn.execute("SELECT public.submit_document('uploads/a', doc_id => 'a', content_sha256 => repeat('1', 64))")
    conn.execute("SELECT * FROM public.search_by_text('anything')")
    conn.execute("SET search_path = public")
    assert one(conn, "SELECT count(*) FROM procrastinate_jobs") == (1,)


def test_a_waiting_twin_waits_no_longer_than_the_job_it_stands_for(conn: psycopg.Connection) -> None:
    submit(conn)
    conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 hour'")
    twin = one(conn, "SELECT defer_stage('a', 'validate', 0, now() + interval '1 minute')")
    assert one(conn, "SELECT id, scheduled_at < now() + interval '2 minutes' FROM procrastinate_jobs") == (twin[0], True)
    conn.execute("SELECT defer_stage('a', 'validate', 0)")
    assert one(conn, "SELECT count(*), max(scheduled_at) FROM procrastinate_jobs") == (1, None)


def test_an_older_run_of_a_batch_takes_no_documents_from_a_newer_one(conn: psycopg.Connection) -> None:
    first = one(conn, "SELECT begin_batch('b', 'default', NULL, 'c')")[0]
    second = one(conn, "SELECT begin_batch('b', 'default', NULL, 'c')")[0]
    accept = "SELECT accept_document('a','default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,50)"
    conn.execute(accept, [second])
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
        conn.execute(accept, [first])
    assert one(conn, "SELECT run_id FROM file_extractions") == (second,)
