"""Users take turns, whatever lies in the queue; within a user priority and age decide; nothing is fetched twice and nothing left lying."""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from procrastinate.manager import JobManager
from procrastinate.worker import Worker
from psycopg.rows import dict_row

from sql import query


def submit(conn: psycopg.Connection, user: str, count: int = 1, priority: int = 0, name: str = "") -> None:
    conn.execute(
        """SELECT submit_document('uploads/a', doc_id => %(user)s || %(name)s || n, user_id => %(user)s, priority => %(priority)s,
            content_sha256 => repeat('1', 64)) FROM generate_series(1, %(count)s) AS n""",
        {"user": user, "count": count, "priority": priority, "name": name},
    )


def defer(conn: psycopg.Connection, task: str, queue: str = "cpu", **more: object) -> int:
    given = {"priority": 0, "lock": None, "args": "{}", "scheduled_at": None, **more}
    row = conn.execute(
        """SELECT procrastinate_defer_jobs_v1(ARRAY[ROW(%(queue)s, %(task)s, %(priority)s, %(lock)s, NULL, %(args)s::jsonb,
            %(scheduled_at)s::timestamptz)::procrastinate_job_to_defer_v1])""",
        {"task": task, "queue": queue, **given},
    ).fetchone()
    assert row is not None
    return int(row[0][0])


class Fetcher:
    """Fetches as one worker does: it knows whom it served last."""

    def __init__(self, conn: psycopg.Connection, queues: list[str] | None = None, limit: int = 0) -> None:
        self._conn = conn
        row = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
        assert row is not None
        self.params: dict[str, Any] = {
            "queues": queues, "worker_id": row[0], "after_user": "", "others_first": True, "max_documents": limit,
        }  # fmt: skip

    def fetch(self) -> dict[str, Any] | None:
        row = self._conn.cursor(row_factory=dict_row).execute(query("fetch_job"), self.params).fetchone()
        assert row is not None
        if row["id"] is None:
            return None
        self.params["others_first"] = row["docmill_user"] != ""
        self.params["after_user"] = row["docmill_user"] or self.params["after_user"]
        return row

    def users(self, count: int) -> list[str | None]:
        return [found["docmill_user"] if (found := self.fetch()) else None for _ in range(count)]

    def documents(self, count: int) -> list[str | None]:
        return [found["args"].get("doc_id", found["task_name"]) if (found := self.fetch()) else None for _ in range(count)]


@pytest.fixture
def fetcher(conn: psycopg.Connection) -> Fetcher:
    return Fetcher(conn)


def finish(conn: psycopg.Connection, user: str | None = None) -> None:
    conn.execute(
        "UPDATE procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing' AND docmill_user = coalesce(%s, docmill_user)", [user]
    )


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


def test_a_job_deferred_by_hand_is_its_documents_users(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 1)
    assert fetcher.users(1) == ["ann"]
    defer(conn, "parse", args='{"doc_id": "ann1"}')
    defer(conn, "parse", args='{"doc_id": "unknown"}')
    conn.execute("INSERT INTO processing_jobs (batch_id, user_id, correlation_id) VALUES ('b', 'bob', 'c')")
    defer(conn, "unpack", args='{"batch_id": "b"}')
    assert fetcher.users(3) == ["", "bob", "ann"]


def test_a_worker_takes_only_what_waits_in_its_queues(conn: psycopg.Connection) -> None:
    submit(conn, "ann", 2)
    submit(conn, "bob", 1)
    conn.execute("SELECT defer_stage('bob1', 'embed', 0)")
    defer(conn, "own", queue="elsewhere")
    assert Fetcher(conn, ["embed", "extract"]).documents(2) == ["bob1", None]
    assert Fetcher(conn, []).documents(1) == [None]
    assert Counter(Fetcher(conn, ["elsewhere", "cpu"]).users(5)) == {"": 1, "ann": 2, "bob": 1, None: 1}


def test_with_all_queues_the_best_job_of_any_queue_is_taken(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 2)
    submit(conn, "ann", 1, priority=5, name="urgent")
    conn.execute("UPDATE procrastinate_jobs SET queue_name = 'embed' WHERE args ->> 'doc_id' = 'annurgent1'")
    assert fetcher.documents(4) == ["annurgent1", "ann1", "ann2", None]


def test_a_fetched_job_is_marked_as_procrastinate_marks_it(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    def row(job_id: int) -> Any:
        return conn.execute(
            """SELECT status, attempts, abort_requested, scheduled_at, worker_id,
                (SELECT array_agg(e.type ORDER BY e.id) FROM procrastinate_events e WHERE e.job_id = j.id)
            FROM procrastinate_jobs j WHERE id = %s""",
            [job_id],
        ).fetchone()

    submit(conn, "ann", 2)
    ours = fetcher.fetch()
    theirs = conn.execute("SELECT id FROM procrastinate_fetch_job_v2(NULL, %s)", [fetcher.params["worker_id"]]).fetchone()
    assert ours is not None and theirs is not None
    assert row(ours["id"]) == row(theirs[0])
    assert row(ours["id"])[0] == "doing"
    assert ours["docmill_user"] == "ann"


def test_jobs_with_a_lock_run_one_at_a_time_and_in_their_order(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    late = defer(conn, "low", lock="l", priority=-1)
    first, second = defer(conn, "first", lock="l"), defer(conn, "second", lock="l", queue="own")
    free = defer(conn, "free", priority=-9)
    found = [(job := fetcher.fetch()) and job["id"] for _ in range(3)]
    assert found == [first, free, None]
    finish(conn)
    assert Fetcher(conn, ["cpu"]).fetch() is None, "a job of the same lock in another queue comes before"
    found = [(job := fetcher.fetch()) and job["id"] for _ in range(2)]
    assert found == [second, None]
    finish(conn)
    found = [(job := fetcher.fetch()) and job["id"] for _ in range(2)]
    assert found == [late, None]


def test_a_scheduled_job_waits_for_its_time_and_idle_workers_are_told(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    due = defer(conn, "due", queue="own", scheduled_at="2000-01-01")
    also = defer(conn, "also", queue="own", scheduled_at="2000-01-02")
    defer(conn, "later", scheduled_at="2999-01-01")
    conn.execute("LISTEN procrastinate_any_queue_v1")
    conn.execute('LISTEN "procrastinate_queue_v1#own"')
    found = [(job := fetcher.fetch()) and job["id"] for _ in range(3)]
    assert found == [due, also, None]
    told = {(n.channel, n.payload) for n in conn.notifies(timeout=0.2)}
    payload = f'{{"type" : "job_inserted", "job_id" : {due}}}'
    assert told == {("procrastinate_any_queue_v1", payload), ("procrastinate_queue_v1#own", payload)}


def test_due_retries_of_one_user_do_not_stand_in_the_way_of_another(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 1500)
    conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() - interval '1 hour'")
    submit(conn, "bob", 1)
    assert set(fetcher.users(2)) == {"ann", "bob"}
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE scheduled_at IS NULL").fetchone() == (1501,)


def test_procrastinates_own_fetch_works_beside_ours(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 3)
    assert fetcher.documents(1) == ["ann1"]
    row = conn.execute("SELECT args ->> 'doc_id' FROM procrastinate_fetch_job_v2(NULL, %s)", [fetcher.params["worker_id"]]).fetchone()
    assert row == ("ann2",)
    assert fetcher.documents(2) == ["ann3", None]


def in_parallel(database: str, count: int, work: Callable[[psycopg.Connection], Any]) -> list[Any]:
    """Do the work over so many connections of its own at once and return what each returned."""
    results: list[Any] = []
    barrier = threading.Barrier(count)

    def run() -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            barrier.wait()
            results.append(work(conn))

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


@pytest.mark.parametrize("limit", [0, 100])
def test_eight_at_once_fetch_every_job_once_and_none_comes_away_empty_while_work_waits(
    database: str, conn: psycopg.Connection, limit: int
) -> None:
    submit(conn, "ann", 100)
    submit(conn, "bob", 50)
    conn.execute("UPDATE procrastinate_jobs SET queue_name = 'embed' WHERE id % 3 = 0")
    for n in range(50):
        defer(conn, f"own {n}", queue="own")

    def take(mine: psycopg.Connection) -> list[int | None]:
        fetcher = Fetcher(mine, limit=limit)
        return [(job := fetcher.fetch()) and job["id"] for _ in range(25)]

    found = [job for taken in in_parallel(database, 8, take) for job in taken]
    assert None not in found
    assert len(set(found)) == 200


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


def test_a_limit_counts_documents_and_not_the_users_other_jobs(conn: psycopg.Connection) -> None:
    conn.execute("INSERT INTO processing_jobs (batch_id, user_id, correlation_id) VALUES ('b', 'ann', 'c')")
    defer(conn, "unpack", args='{"batch_id": "b"}')
    submit(conn, "ann", 3)
    assert Fetcher(conn, limit=1).documents(3) == ["unpack", "ann1", None]


def rows_read(conn: psycopg.Connection) -> tuple[int, int]:
    """How many rows scans of the whole table and of its indexes have read so far."""
    conn.execute("SELECT pg_stat_force_next_flush()")
    row = conn.execute(
        """SELECT seq_tup_read, (SELECT sum(i.idx_tup_read) FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid)
        FROM pg_stat_user_tables AS t WHERE t.relname = 'procrastinate_jobs'"""
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


def test_at_scale_a_fetch_reads_a_few_rows_also_by_a_plan_made_when_the_table_was_empty(conn: psycopg.Connection) -> None:
    fetchers = [Fetcher(conn), Fetcher(conn, ["cpu"]), Fetcher(conn, limit=5)]
    for fetcher in fetchers * 10:
        assert fetcher.fetch() is None
    conn.execute(
        """INSERT INTO procrastinate_jobs (queue_name, task_name, docmill_user, scheduled_at, status)
        SELECT queue, 'validate', 'user ' || n % 40,
            CASE WHEN n % 4 = 0 THEN now() + interval '1 day' END,
            CASE WHEN n % 4 = 1 THEN 'succeeded' ELSE 'todo' END::procrastinate_job_status
        FROM generate_series(1, 10000) AS n, unnest(ARRAY['cpu', 'embed']) AS queue"""
    )
    for state in ("never analyzed", "analyzed"):
        before = rows_read(conn)
        for fetcher in fetchers * 10:
            assert fetcher.fetch() is not None
        after = rows_read(conn)
        assert after[0] == before[0], f"{state}: a fetch read the table from end to end"
        # One look at each queue and user, and as many rows as they have in work.
        assert after[1] - before[1] < 30 * 150, f"{state}: {(after[1] - before[1]) / 30:.0f} rows a fetch"
        conn.execute("ANALYZE procrastinate_jobs")


def digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def test_an_upgrade_of_procrastinates_fetch_is_noticed(conn: psycopg.Connection) -> None:
    """docmill_fetch_job and DocmillJobManager.fetch_job stand in for these: compare what has changed, carry it over, then change this."""
    columns = conn.execute(
        """SELECT string_agg(column_name || ' ' || udt_name, ', ' ORDER BY ordinal_position) FROM information_schema.columns
        WHERE table_name = 'procrastinate_jobs' AND column_name NOT LIKE 'docmill%'"""
    ).fetchone()
    body = conn.execute("SELECT prosrc FROM pg_proc WHERE proname = 'procrastinate_fetch_job_v2'").fetchone()
    assert columns is not None and body is not None
    found = {
        "columns": digest(columns[0]),
        "fetch_job": digest(body[0]),
        "JobManager.fetch_job": digest(inspect.getsource(JobManager.fetch_job)),
        "Worker._fetch_and_process_jobs": digest(inspect.getsource(Worker._fetch_and_process_jobs)),
        "Worker._handle_notification": digest(inspect.getsource(Worker._handle_notification)),
    }
    assert found == {
        "columns": "a1565fef5968bc9a",
        "fetch_job": "91ad15acf5b3d7f1",
        "JobManager.fetch_job": "bb65608952b5ac41",
        "Worker._fetch_and_process_jobs": "4de336a3f291be50",
        "Worker._handle_notification": "cfe6457278bdb7b3",
    }
