"""Fetching as a worker does, and what there is to fetch, for tests of the queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.rows import dict_row

from sql import query


def submit(conn: psycopg.Connection, user: str, count: int = 1, priority: int = 0, name: str = "") -> None:
    """Submit documents whose ids are the user, the name and a number from 1."""
    conn.execute(
        """SELECT submit_document('uploads/a', doc_id => %(user)s || %(name)s || n, user_id => %(user)s, priority => %(priority)s,
            content_sha256 => repeat('1', 64)) FROM generate_series(1, %(count)s) AS n""",
        {"user": user, "count": count, "priority": priority, "name": name},
    )


def defer(conn: psycopg.Connection, task: str, queue: str = "cpu", **more: object) -> int:
    """Defer a job as procrastinate does and return its id."""
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

    def ids(self, count: int) -> list[int | None]:
        return [found["id"] if (found := self.fetch()) else None for _ in range(count)]

    def documents(self, count: int) -> list[str | None]:
        return [found["args"].get("doc_id", found["task_name"]) if (found := self.fetch()) else None for _ in range(count)]


def finish(conn: psycopg.Connection, user: str | None = None) -> None:
    """End the jobs that have been fetched, all or one user's."""
    conn.execute(
        "UPDATE procrastinate_jobs SET status = 'succeeded' WHERE status = 'doing' AND docmill_user = coalesce(%s, docmill_user)", [user]
    )


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
