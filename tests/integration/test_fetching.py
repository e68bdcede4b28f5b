"""A fetch takes what procrastinate's own would be allowed to take, once and without delay, and costs the same however much waits."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections import Counter
from typing import Any, LiteralString

import psycopg
import pytest
from procrastinate.manager import JobManager
from procrastinate.worker import Worker

from jobs.connector import DocmillConnector
from jobs.fetching import DocmillJobManager
from models.settings import Settings
from sql import migrate as migrations
from tests.fetching import Fetcher, defer, finish, in_parallel, submit

own = migrations._own()


@pytest.fixture
def fetcher(conn: psycopg.Connection) -> Fetcher:
    return Fetcher(conn)


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
    found = fetcher.ids(3)
    assert found == [first, free, None]
    finish(conn)
    assert Fetcher(conn, ["cpu"]).fetch() is None, "a job of the same lock in another queue comes before"
    found = fetcher.ids(2)
    assert found == [second, None]
    finish(conn)
    found = fetcher.ids(2)
    assert found == [late, None]


def test_a_scheduled_job_waits_for_its_time_and_idle_workers_are_told(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    due = defer(conn, "due", queue="own", scheduled_at="2000-01-01")
    also = defer(conn, "also", queue="own", scheduled_at="2000-01-02")
    defer(conn, "later", scheduled_at="2999-01-01")
    conn.execute("LISTEN procrastinate_any_queue_v1")
    conn.execute('LISTEN "procrastinate_queue_v1#own"')
    found = fetcher.ids(3)
    assert found == [due, also, None]
    told = {(n.channel, n.payload) for n in conn.notifies(timeout=0.2)}
    payload = f'{{"type" : "job_inserted", "job_id" : {due}}}'
    assert told == {("procrastinate_any_queue_v1", payload), ("procrastinate_queue_v1#own", payload)}


def test_procrastinates_own_fetch_works_beside_ours(conn: psycopg.Connection, fetcher: Fetcher) -> None:
    submit(conn, "ann", 3)
    assert fetcher.documents(1) == ["ann1"]
    row = conn.execute("SELECT args ->> 'doc_id' FROM procrastinate_fetch_job_v2(NULL, %s)", [fetcher.params["worker_id"]]).fetchone()
    assert row == ("ann2",)
    assert fetcher.documents(2) == ["ann3", None]


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
        return fetcher.ids(25)

    found = [job for taken in in_parallel(database, 8, take) for job in taken]
    assert None not in found
    assert len(set(found)) == 200


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


async def test_a_job_that_arrives_while_a_fetch_looks_is_not_left_lying(conn: psycopg.Connection, settings: Settings) -> None:
    class Connector(DocmillConnector):
        async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
            found = await super().execute_query_one_async(query, **arguments)
            if not looked:
                looked.append(found["id"])
                submit(conn, "ann")
                jobs.wake()
            return found

    looked: list[int | None] = []
    connector = Connector(settings)
    jobs = DocmillJobManager(connector, max_documents_per_user=0)
    row = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
    assert row is not None
    await connector.open_async()
    try:
        job = await jobs.fetch_job(None, row[0])
        nothing = await jobs.fetch_job(None, row[0])
    finally:
        await connector.close_async()
    assert job is not None
    assert (looked, job.task_kwargs, nothing) == ([None], {"doc_id": "ann1"}, None)


@pytest.mark.parametrize(("stage", "at_once"), [("validate", 1), ("embed", 2)])
async def test_no_more_is_fetched_until_who_takes_others_along_has_claimed_them(
    conn: psycopg.Connection, settings: Settings, stage: str, at_once: int
) -> None:
    """Which is so where others are taken along for the job's stage, and these are jobs of validate."""
    submit(conn, "ann", 3)
    connector = DocmillConnector(settings)
    jobs = DocmillJobManager(connector, max_documents_per_user=0)
    jobs.takes_along = frozenset({stage})
    row = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
    assert row is not None
    await connector.open_async()
    try:
        await jobs.fetch_job(None, row[0])
        second = asyncio.create_task(jobs.fetch_job(None, row[0]))
        await asyncio.sleep(0.05)
        fetched = conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'").fetchone()
        jobs.claimed()
        assert await second is not None
        assert await jobs.fetch_job(None, row[0]) is not None  # nobody says so, and it goes on all the same
    finally:
        await connector.close_async()
    assert fetched == (at_once,)


def test_an_upgrade_of_a_queue_in_use_gives_each_job_its_user_and_old_workers_go_on(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(empty_database, autocommit=True) as conn, psycopg.connect(empty_database, autocommit=True) as old_worker:
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "_own", lambda: [path for path in own if path.name < "0011"])
            migrations.migrate(conn)
        submit(conn, "ann", 20)
        submit(conn, "bob", 2)
        conn.execute("UPDATE file_extractions SET processing_started_at = now() WHERE doc_id = 'ann20'")
        conn.execute("UPDATE procrastinate_jobs SET scheduled_at = now() WHERE args ->> 'doc_id' IN ('ann20', 'bob2')")
        row = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
        assert row is not None
        theirs = "SELECT args ->> 'doc_id', worker_id FROM procrastinate_fetch_job_v2(NULL, %s)"
        before = [old_worker.execute(theirs, row, prepare=True).fetchone() for _ in range(8)]
        migrations.migrate(conn)
        after = [old_worker.execute(theirs, row, prepare=True).fetchone() for _ in range(2)]
        assert before + after == [(f"ann{n}", row[0]) for n in range(1, 11)]
        assert Fetcher(conn).documents(5) == ["bob1", "bob2", "ann20", "ann11", "ann12"]


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


def test_only_what_is_claimed_afterwards_is_fetched_without_waiting_for_the_disk(conn: psycopg.Connection) -> None:
    """A task of an application claims nothing: a fetch that a crash of the server undid would have it run twice."""
    usual = conn.execute("SHOW synchronous_commit").fetchone()
    for task, waits in (("the application's own", True), ("validate", False)):
        if waits:
            defer(conn, task)
        else:
            submit(conn, "ann")
        with conn.transaction():
            found = Fetcher(conn).fetch()
            assert found is not None and found["task_name"] == task
            now = conn.execute("SHOW synchronous_commit").fetchone()
        assert now == (usual if waits else ("off",))
