"""A million documents waiting against a thousand: what a document costs, what the reconciler costs, and what submitting them takes.

Usage: python -m bench.backlog [--waiting 1000 1000000] [--documents 300] [--rounds 5] [--lives 3000] [--files 5000] [--only PART ...]
    [--json FILE]

The parts, each against every backlog of `--waiting`:

submitting: the backlog itself, through SQL's submit_document in transactions of 10,000; memory of the submitter and of its backend as it
goes. Then `--files` documents through the front door, from Python, with the memory of that process.
worker: `--documents` small texts before the backlog (a higher priority) through one worker, the databases taking turns; from the 30th
document that is complete until the last. CPU: of the worker with its children, and of all of Postgres.
statements: what a worker asks the database for a document that is carried through, without the work: fetch, claim, last checkpoint with
its job, and settling. In the order in which they wait, from the first on; then the same with a snapshot held open since before the first,
as a backup does, so that nothing dead can go.
reconciler: one pass, seconds of the clock and of its backend's CPU, and how many passes a whole sweep takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.cpu import cpu_seconds, memory_mb
from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, small_documents, url_of, workers
from jobs.database import make_pool
from jobs.front import close_async
from jobs.reconcile import WINDOW, Reconciler
from jobs.submit import accept
from models.settings import Settings
from sql import query

CHUNK = 10_000
WARM = 30
AT_ONCE = 16
"""Files that go through the front door at the same time."""
PARTS = ["submitting", "worker", "reconciler", "statements"]
SUBMIT = """SELECT count(submit_document('backlog/' || n, doc_id => 'backlog ' || n,
    content_sha256 => encode(sha256(convert_to(n::text, 'UTF8')), 'hex'))) FROM generate_series(%s::int8, %s::int8) AS n"""
SIZES = """SELECT relname, n_live_tup, n_dead_tup, n_tup_upd, n_tup_hot_upd, pg_table_size(relid) / 1e6, pg_indexes_size(relid) / 1e6
    FROM pg_stat_user_tables WHERE relname IN ('file_extractions', 'procrastinate_jobs', 'worker_registry') ORDER BY 1"""
DONE: dict[str, Any] = {
    "worker": "bench:1", "file_sizes": [8000], "hashes": [None], "file_types": ["text"], "mime_types": ["text/plain"],
    "page_counts": [None],
    "chunk_counts": [9], "duplicates_of": [None], "extractions": ["{}"],
    "events": ['[{"stage": "finalize", "event": "completed", "attempt": 0, "detail": {}}]'],
}  # fmt: skip


def load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def backend(conn: psycopg.Connection) -> int:
    return conn.info.backend_pid


def submit_backlog(settings: Settings, count: int) -> None:
    """Submit documents with SQL, in chunks, and print memory as it goes."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        started, own, seen = time.perf_counter(), cpu_seconds(backend(conn)), []
        for start in range(1, count + 1, CHUNK):
            conn.execute(SUBMIT, [start, min(count, start + CHUNK - 1)])
            seen.append((memory_mb(os.getpid()), memory_mb(backend(conn), "Private_Dirty")))
        taken, cpu = time.perf_counter() - started, cpu_seconds(backend(conn)) - own
        conn.execute("VACUUM (ANALYZE) file_extractions, procrastinate_jobs, procrastinate_events, document_events")
    marks = [seen[len(seen) * part // 4 - 1] for part in (1, 2, 3, 4)] if len(seen) >= 4 else seen
    memory = ", ".join(f"{own:.0f} / {other:.0f}" for own, other in marks)
    each = cpu / max(1, count) * 1e6
    print(f"submitted {count:,} in {taken:.0f} s ({each:.0f} us CPU each); MB of submitter / backend: {memory}; {load()}", flush=True)


def submit_files(settings: Settings, count: int) -> None:
    """Submit documents through the front door and print this process' memory as it goes."""
    marks: list[float] = []

    async def submit() -> None:
        for start in range(0, count, AT_ONCE):
            chunk = range(start, min(start + AT_ONCE, count))
            names = ((f"front {number}", f"front door {number}".encode()) for number in chunk)
            await asyncio.gather(*(accept(settings, text, doc_id=name, file_name="front.txt", priority=-1) for name, text in names))
            if chunk.stop * 5 // count > start * 5 // count:
                marks.append(memory_mb(os.getpid()))
        await close_async()

    started = time.perf_counter()
    asyncio.run(submit())
    each = (time.perf_counter() - started) / count
    megabytes = ", ".join(f"{mark:.0f}" for mark in marks)
    print(f"front door: {count:,} documents, {AT_ONCE} at a time, {each * 1e3:.1f} ms each; MB: {megabytes}; {load()}", flush=True)


def one_round(settings: Settings, server_pid: int, paths: list[Path], number: int) -> tuple[float, float, float]:
    """Work on documents that go before the backlog; return seconds, and CPU seconds of worker and Postgres, for each."""

    async def submit() -> None:
        for path in paths:
            content = path.read_bytes() + f"\n\nRound {number}".encode()
            await accept(settings, content, doc_id=f"{number} {path.name}", file_name=path.name, priority=1)
        await close_async()

    asyncio.run(submit())
    done = "SELECT count(*) FROM file_extractions WHERE state = 'complete' AND doc_id LIKE %s || ' %%'"
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings) as started:

        def at(count: int) -> tuple[float, float, float]:
            while (row := conn.execute(done, [str(number)]).fetchone()) is None or row[0] < count:
                time.sleep(0.05)
            return time.perf_counter(), cpu_seconds(started[0].pid), cpu_seconds(server_pid)

        conn.execute("SET enable_seqscan = off")
        first, last = at(WARM), at(len(paths))
    clock, worker, postgres = ((end - begin) / (len(paths) - WARM) for begin, end in zip(first, last, strict=True))
    return clock, worker, postgres


def live(conn: psycopg.Connection, count: int) -> tuple[float, float]:
    """Take documents through the statements of a worker; return seconds and CPU seconds of the backend for each."""
    cursor = conn.cursor(row_factory=dict_row)
    registered = conn.execute("SELECT worker_id FROM procrastinate_register_worker_v1()").fetchone()
    assert registered is not None
    fetch = {"queues": None, "worker_id": registered[0], "after_user": "", "others_first": True, "max_documents": 0}
    begun, own = time.perf_counter(), cpu_seconds(backend(conn))
    for _ in range(count):
        job = cursor.execute(query("fetch_job"), fetch).fetchone()
        assert job is not None
        if job["id"] is None:
            raise RuntimeError("nothing waits any more")
        about = {"doc_id": job["args"]["doc_id"], "job_id": job["id"], "worker": "bench:1", "lease_seconds": 60, "serialise": True}
        claimed = cursor.execute(query("claim_document"), about).fetchone()
        assert claimed is not None
        done = {"doc_ids": [about["doc_id"]], "claims": [claimed["claim"]], "job_ids": [job["id"]]}
        cursor.execute(query("complete_documents"), DONE | done)
        cursor.execute(query("settle_batch"), {"batch_id": "none"})
    return (time.perf_counter() - begun) / count, (cpu_seconds(backend(conn)) - own) / count


@contextmanager
def snapshot(settings: Settings) -> Iterator[None]:
    """Hold a snapshot open, as a backup does."""
    with psycopg.connect(url_of(settings)) as conn:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT 1")
        yield


def statements(settings: Settings, name: str, count: int) -> None:
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        conn.execute("VACUUM (ANALYZE) file_extractions, procrastinate_jobs")
        parts = [live(conn, count // 3) for _ in range(3)]
        with snapshot(settings):
            held = [live(conn, count // 3) for _ in range(3)]
        for what, made in (("statements", parts), ("with a snapshot held", held)):
            told = ", ".join(f"{clock * 1e3:.2f} ms ({cpu * 1e3:.2f})" for clock, cpu in made)
            print(f"{name}: {what}, by thirds of {count:,}, clock (CPU): {told}; {load()}", flush=True)
        for relation, alive, dead, updates, hot, table, index in conn.execute(SIZES):
            share = f"{hot / updates:.2f} HOT" if updates else "no updates"
            print(f"{name}: {relation}: {alive:,} rows, {dead:,} dead, {share}, {table:.0f} MB, indexes {index:.0f} MB", flush=True)


async def reconcile(settings: Settings, name: str, server_pid: int) -> None:
    pool = make_pool(settings, url_of(settings))
    await pool.open()
    try:
        reconciler = Reconciler(settings, pool)
        reconciler._awake_since -= 2 * settings.lease_seconds  # as one that has been awake for long enough
        await reconciler.pass_once()
        taken = []
        for _ in range(5):
            began, cpu = time.perf_counter(), cpu_seconds(server_pid)
            await reconciler.pass_once()
            taken.append((time.perf_counter() - began, cpu_seconds(server_pid) - cpu))
    finally:
        await pool.close()
    clock, cpu = (statistics.median(each) for each in zip(*taken, strict=True))
    print(
        f"{name}: a pass of the reconciler {clock * 1e3:.0f} ms, Postgres' CPU {cpu * 1e3:.0f} ms, a window of {WINDOW}; {load()}",
        flush=True,
    )


def main() -> None:
    """Fill two databases and print what each measurement found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lives", type=int, default=3_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add_option(parser)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        server_pid = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
        made = {count: fresh_settings(server, folder, f"waiting_{count}", embedding_provider="hash", log_level="CRITICAL")
                for count in given.waiting}  # fmt: skip
        for count, settings in made.items():
            submit_backlog(settings, count)
        if "submitting" in given.only:
            submit_files(fresh_settings(server, folder, "front_door"), given.files)
        if "worker" in given.only:
            work(made, server_pid, small_documents(folder / "documents", given.documents + WARM), given.rounds, given.json)
        for count, settings in made.items() if "reconciler" in given.only else ():
            asyncio.run(reconcile(settings, f"{count:,} waiting", server_pid))
        for count, settings in made.items() if "statements" in given.only else ():
            if count < 2 * given.lives:
                submit_backlog_more(settings, given.lives)
            statements(settings, f"{count:,} waiting", given.lives)


def work(made: dict[int, Settings], server_pid: int, paths: list[Path], rounds: int, into: Path | None) -> None:
    """Take turns between the databases, and print what a document costs in each."""
    found: dict[int, list[tuple[float, float, float]]] = {count: [] for count in made}
    for number in range(rounds):
        for count, settings in made.items():
            clock, worker, postgres = (each * 1e3 for each in one_round(settings, server_pid, paths, number))
            found[count].append((clock, worker, postgres))
            write_row(into, "backlog", waiting=count, clock_ms=clock, worker_ms=worker, postgres_ms=postgres)
    for count, each in found.items():
        clock, worker, postgres = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"worker, {count:,} waiting: {clock:.1f} ms a document, CPU {worker:.1f} ms worker, {postgres:.1f} ms Postgres; {load()}")


def submit_backlog_more(settings: Settings, lives: int) -> None:
    """Have enough wait in the small database for the statements, which use two lives of each."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        conn.execute(SUBMIT, [10_000_001, 10_000_000 + 2 * lives])


if __name__ == "__main__":
    main()
