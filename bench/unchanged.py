"""An unchanged re-run of 10,000 documents: `docmill ingest` and `docmill sync` of a folder, beside CocoIndex, taking turns.

Usage: python -m bench.unchanged --peer /path/to/python [--files 10000] [--rounds 5]

`--peer`: an interpreter with cocoindex and asyncpg in an environment of its own (python3 -m venv E; E/bin/pip install cocoindex asyncpg
numpy); without it docmill runs alone. All work on the same folder of texts of about 8,000 characters and the same server, each in a process
that runs already; what is measured is one run that finds nothing to do. CPU: of the process that runs, not of Postgres.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import psycopg

from bench.running import bench_server, fresh_settings, small_documents
from jobs.batch import submit_folder
from jobs.front import close_async
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions
from models.settings import Settings


def own(settings: Settings, folder: Path) -> dict[str, Callable[[], Awaitable[int]]]:
    """Return docmill's runs, each of which tells how many files it found unchanged."""

    async def ingest() -> int:
        made = await submit_folder(settings, folder)
        return sum(file.submission is not None and file.submission.outcome == "unchanged" for file in made.files)

    async def sync(options: SyncOptions) -> int:
        return len((await FolderSync(settings, folder, options).run()).plan.unchanged)

    return {"docmill ingest": ingest, "docmill sync": lambda: sync(SyncOptions())}


async def measure(
    settings: Settings, folder: Path, files: int, rounds: int, peer: subprocess.Popen[str] | None
) -> dict[str, list[tuple[float, float]]]:
    """Return seconds of the clock and of the CPU for each."""
    runs = own(settings, folder)
    found: dict[str, list[tuple[float, float]]] = {}

    def ask() -> tuple[float, float]:
        assert peer is not None and peer.stdin is not None and peer.stdout is not None
        peer.stdin.write("again\n")
        peer.stdin.flush()
        clock, cpu = map(float, peer.stdout.readline().split())
        return clock, cpu

    if peer is not None:
        print(f"CocoIndex, first run: {(await asyncio.to_thread(ask))[0]:.1f} s", flush=True)
    began = time.perf_counter()
    await runs["docmill sync"]()
    print(f"docmill, first submission: {time.perf_counter() - began:.1f} s", flush=True)
    await asyncio.sleep(2.1)  # a file is believed to be as it looks once it has been left alone
    await runs["docmill sync"]()
    for _ in range(rounds):
        if peer is not None:
            found.setdefault("CocoIndex", []).append(await asyncio.to_thread(ask))
        for name, run in runs.items():
            began, cpu = time.perf_counter(), time.process_time()
            unchanged = await run()
            assert unchanged == files, f"{name}: {unchanged} unchanged"
            found.setdefault(name, []).append((time.perf_counter() - began, time.process_time() - cpu))
    await close_async()
    return found


def main() -> None:
    """Print medians, and how much longer than docmill's each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", type=Path)
    given = parser.parse_args()
    with bench_server() as (server, folder), ExitStack() as stack:
        documents = folder / "documents"
        small_documents(documents, given.files)
        settings = fresh_settings(server, folder, "unchanged", embedding_provider="hash")
        peer = None
        if given.peer is not None:
            with psycopg.connect(server.get_uri(), autocommit=True) as conn:
                conn.execute("CREATE DATABASE peer")
            with psycopg.connect(server.get_uri(database="peer"), autocommit=True) as conn:
                conn.execute("CREATE EXTENSION vector")
            script = Path(__file__).with_name("cocoindex_peer.py")
            command = [str(given.peer), str(script), server.get_uri(database="peer"), str(documents), str(folder / "peer")]
            peer = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        found = asyncio.run(measure(settings, documents, given.files, given.rounds, peer))
        if peer is not None and peer.stdin is not None:
            peer.stdin.close()
    print(f"{given.files:,} files unchanged, medians of {given.rounds}, load {os.getloadavg()[0]:.1f}\n")
    print("| what | s | CPU s | CocoIndex takes |\n|---|---|---|---|")
    for name, runs in found.items():
        clock, cpu = (statistics.median(each) for each in zip(*runs, strict=True))
        ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(found["CocoIndex"], runs, strict=True)) if given.peer else 0
        print(f"| {name} | {clock:.2f} | {cpu:.2f} | {f'{ratio:.2f} times as long' if ratio else ''} |")


if __name__ == "__main__":
    main()
