"""Users take turns, whatever lies in the queue; within a user priority and age decide; a limit on documents in work holds exactly."""

from __future__ import annotations

from collections import Counter

import psycopg
import pytest

from tests.fetching import Fetcher, defer, finish, in_parallel, submit


@pytest.fixture
def fetcher(conn: psycopg.Connection) -> Fetcher:
    return Fetcher(conn)


def test_a_single_document_does_not_wait_behind_another_users_backlog(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 2000)
    assert fetcher.users(4) == ["ann"] * 4
    submit(conn, "bob")
    assert fetcher.users(3) == ["bob", "ann", "ann"]


def test_who_has_least_in_work_goes_first(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 20)
    fetcher.fetch()
    submit(conn, "bob", 20)
    submit(conn, "cid", 20)
    assert Counter(fetcher.users(8)) == {"ann": 2, "bob": 3, "cid": 3}
    finish(conn, "bob")
    assert fetcher.users(3) == ["bob"] * 3


def test_users_with_nothing_in_work_take_turns(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    for user in "abcd":
        submit(conn, user, 10)
    turns = []
    for _ in range(8):
        turns += fetcher.users(1)
        finish(conn)
    assert turns == ["a", "b", "c", "d"] * 2


def test_a_user_is_reached_however_many_others_are_busy(conn: psycopg.Connection) -> None:
    for n in range(120):
        submit(conn, f"user {n:03}", 3)
    submit(conn, "zoe", 2)
    conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE args ->> 'doc_id' ~ '1$'")
    assert Fetcher(conn, limit=1).users(2) == [None, None]
    finish(conn, "zoe")
    assert Fetcher(conn, limit=1).users(2) == ["zoe", None]
    # Without a limit everybody else has one in work, and fifty of those are looked at in a fetch.
    finish(conn, "zoe")
    submit(conn, "zoe", 1, name="more")
    found = Fetcher(conn).users(3 * 120)
    assert found.index("zoe") < 120


def test_the_highest_priority_goes_first_within_a_user_and_does_not_push_others_aside(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 2, name="plain")
    submit(conn, "ann", 2, priority=9, name="urgent")
    submit(conn, "bob", 2, priority=-5, name="last")
    assert fetcher.documents(6) == ["annurgent1", "boblast1", "annurgent2", "boblast2", "annplain1", "annplain2"]


def test_documents_that_have_been_begun_go_before_new_ones_of_their_user(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 3)
    assert fetcher.documents(1) == ["ann1"]
    conn.execute("UPDATE file_extractions SET processing_started_at = now() WHERE doc_id = 'ann1'")
    conn.execute("SELECT defer_stage('ann1', 'parse', 0, now())")
    submit(conn, "ann", 1, priority=1, name="urgent")
    assert fetcher.documents(3) == ["annurgent1", "ann1", "ann2"]


def test_jobs_that_are_nobodys_take_turns_with_all_users(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 9)
    submit(conn, "bob", 9)
    for name in ("first", "second", "third"):
        defer(conn, name, queue="own")
    assert fetcher.documents(7) == ["first", "ann1", "second", "bob1", "third", "ann2", "bob2"]


def test_nobodys_jobs_of_a_priority_below_0_wait_until_no_document_does(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    defer(conn, "background", queue="embed", priority=-10)
    submit(conn, "ann", 2)
    submit(conn, "bob", 1, priority=-20)
    defer(conn, "own")
    assert fetcher.documents(6) == ["own", "ann1", "bob1", "ann2", "background", None]


def archive(conn: psycopg.Connection, user: str) -> int:
    conn.execute("INSERT INTO processing_jobs (batch_id, user_id, correlation_id) VALUES (%s, %s, 'c')", [f"batch of {user}", user])
    row = conn.execute(
        """INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path)
        SELECT b.batch_id, b.run_id, b.user_id, '', '', 'uploads/z' FROM processing_jobs AS b WHERE b.user_id = %s RETURNING id""",
        [user],
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_a_job_is_its_documents_or_archives_users_however_it_was_deferred(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 1)
    assert fetcher.users(1) == ["ann"]
    defer(conn, "parse", args='{"doc_id": "ann1"}')
    defer(conn, "parse", args='{"doc_id": "unknown"}')
    defer(conn, "unpack", args=f'{{"archive_id": {archive(conn, "bob")}}}')
    defer(conn, "unpack", args='{"archive_id": "no number"}')
    defer(conn, "the application's own", args='{"doc_id": "ann1"}')
    assert fetcher.users(6) == ["", "bob", "", "ann", "", None]


def test_due_retries_of_one_user_do_not_stand_in_the_way_of_another(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 1500)
    conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() - interval '1 hour'")
    submit(conn, "bob", 1)
    assert set(fetcher.users(2)) == {"ann", "bob"}
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE scheduled_at IS NULL").fetchone() == (1501,)


def test_the_limit_holds_exactly_however_many_fetch_at_once(database: str, conn: psycopg.Connection) -> None:
    submit(conn, "ann", 300)
    submit(conn, "bob", 300)
    conn.execute("UPDATE procrastinate_jobs SET queue_name = 'embed' WHERE id % 2 = 0")
    most: Counter[str] = Counter()

    def work(mine: psycopg.Connection) -> int:
        fetcher, done = Fetcher(mine, limit=3), 0
        for _ in range(60):
            job = fetcher.fetch()
            if job is None:
                continue
            for user, count in mine.execute("SELECT docmill_user, count(*) FROM procrastinate_jobs WHERE status = 'doing' GROUP BY 1"):
                most[user] = max(most[user], count)
            mine.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', FALSE)", [job["id"]])
            done += 1
        return done

    done = in_parallel(database, 8, work)
    assert most == {"ann": 3, "bob": 3}, "the limit is reached and never passed"
    assert sum(done) == conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'").fetchone()[0]  # type: ignore[index]  # a count has a row


def test_a_limit_counts_documents_and_not_the_users_archives(conn: psycopg.Connection) -> None:
    defer(conn, "unpack", args=f'{{"archive_id": {archive(conn, "ann")}}}')
    submit(conn, "ann", 3)
    assert Fetcher(conn, limit=1).documents(3) == ["unpack", "ann1", None]
