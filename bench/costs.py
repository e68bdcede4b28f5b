"""What work costs beside time: CPU seconds of processes and their children, and what a Postgres server has done meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import psycopg

from bench.cpu import cpu_seconds

_DONE = """SELECT d.xact_commit + d.xact_rollback, w.wal_bytes::float8, i.fsyncs::float8, i.writes::float8
    FROM pg_stat_database AS d, pg_stat_wal AS w,
        (SELECT sum(o.fsyncs) AS fsyncs, sum(o.writes) AS writes FROM pg_stat_io AS o WHERE o.object = 'wal') AS i
    WHERE d.datname = current_database()"""


@dataclass(frozen=True, slots=True)
class Spent:
    """What has been spent, of the CPU in seconds."""

    workers: float
    postgres: float
    here: float
    """By this process: submitting."""
    transactions: float
    wal_bytes: float
    wal_syncs: float
    wal_writes: float

    def __sub__(self, before: Spent) -> Spent:
        return Spent(*(getattr(self, name) - getattr(before, name) for name in self.__slots__))

    @property
    def cpu(self) -> float:
        """CPU seconds of all processes."""
        return self.workers + self.postgres + self.here


def spent(conn: psycopg.Connection, postmaster: int, workers: Iterable[int]) -> Spent:
    """Return what has been spent up to now by the server, on the connection's database, by workers and by this process."""
    time.sleep(0.1)
    conn.execute("SELECT pg_stat_force_next_flush()")
    row = conn.execute(_DONE).fetchone()
    assert row is not None
    done, wal, syncs, writes = row
    return Spent(cpu_seconds(*workers), cpu_seconds(postmaster), time.process_time(), done, wal, syncs, writes)
