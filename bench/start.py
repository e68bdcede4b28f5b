"""What a worker that waits takes of memory, and how long it takes from its start to its first fetch, on a migrated database.

Usage: python -m bench.start [--rounds 10]

Memory from /proc once it has fetched; the fetch is seen in pg_stat_activity, so its time is right to some milliseconds. `docmill --help`
beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psycopg

from bench.cpu import memory_mb
from bench.running import bench_server, environment, fresh_settings, url_of, workers
from models.settings import Settings

HOSTED: dict[str, object] = {
    "embedding_provider": "openai",
    "embedding_base_url": "http://127.0.0.1:9/v1",
    "extraction_provider": "openai",
    "extraction_base_url": "http://127.0.0.1:9/v1",
}
FETCHED = "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE '%%:' || %s AND query LIKE '%%docmill_fetch_job%%'"


def start(settings: Settings) -> tuple[float, float, float]:
    """Start a worker and return the seconds until it has fetched, and its Rss and Pss two seconds later, in MB."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        began = time.perf_counter()
        with workers(settings) as (process,):
            while conn.execute(FETCHED, [process.pid]).fetchone() is None:
                time.sleep(0.0005)  # other queries follow on the same connection, and another fetch half a second later
            seconds = time.perf_counter() - began
            time.sleep(2)
            return seconds, memory_mb(process.pid), memory_mb(process.pid, "Pss")


def command_seconds(settings: Settings, argument: str) -> float:
    """Return the seconds that `docmill` takes with an argument."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jobs.cli", argument]
    subprocess.run(command, env=environment(settings), cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print medians for local and hosted providers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        print("| providers | fetched after s | lowest and highest | Rss MB | Pss MB | load |\n|---|---|---|---|---|---|")
        providers: dict[str, dict[str, object]] = {"local": {"embedding_provider": "local"}, "hosted": HOSTED}
        for name, changes in providers.items():
            settings = fresh_settings(server, folder, f"start_{name}", **changes)
            found = [start(settings) for _ in range(given.rounds)]
            seconds, rss, pss = (sorted(values) for values in zip(*found, strict=True))
            print(
                f"| {name} | {median(seconds):.2f} | {seconds[0]:.2f} to {seconds[-1]:.2f} | {median(rss):.1f} | {median(pss):.1f} "
                f"| {os.getloadavg()[0]:.1f} |",
                flush=True,
            )
        for argument in ("--help", "status"):
            taken = sorted(command_seconds(settings, argument) for _ in range(given.rounds))
            print(f"docmill {argument}: {median(taken):.2f} s, {taken[0]:.2f} to {taken[-1]:.2f}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
