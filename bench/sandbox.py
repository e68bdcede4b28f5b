"""What the sandbox costs: the same file parsed in this process and in a warm child, and what a new child costs.

Usage: python -m bench.sandbox [--tries 200]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

from bench.cpu import cpu_seconds
from jobs.adapters.parsers import parse_file
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType

Call = tuple[StoredFile, str, FileType, str, int]


def call(path: Path) -> Call:
    found = sniff(path, path.name)
    return StoredFile(path), path.name, found.file_type, found.mime_type, 10_000


def here(arguments: Call, tries: int) -> float:
    """Return the median milliseconds of a parse in this process."""
    parse_file(*arguments)
    times = []
    for _ in range(tries):
        started = time.perf_counter()
        parse_file(*arguments)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


async def in_children(calls: list[Call], tries: int) -> tuple[list[float], float]:
    """Return the median milliseconds of each call in a warm child, and the milliseconds of the first call of all."""
    sandbox = ProcessSandbox(children=1, calls_per_child=1_000_000)
    medians = []
    started = time.perf_counter()
    await sandbox.run(parse_file, *calls[0])
    first = (time.perf_counter() - started) * 1000
    for arguments in calls:
        await sandbox.run(parse_file, *arguments)
        times = []
        for _ in range(tries):
            started = time.perf_counter()
            await sandbox.run(parse_file, *arguments)
            times.append((time.perf_counter() - started) * 1000)
        medians.append(statistics.median(times))
    await sandbox.aclose()
    return medians, first


async def new_children(count: int) -> tuple[float, float]:
    """Return the CPU milliseconds and the median milliseconds by the clock of a trivial call for which a new child is made."""
    sandbox = ProcessSandbox(children=1, calls_per_child=1)
    await sandbox.run(abs, -1)
    times, before = [], cpu_seconds(os.getpid())
    for _ in range(count):
        started = time.perf_counter()
        await sandbox.run(abs, -1)
        times.append((time.perf_counter() - started) * 1000)
    await asyncio.sleep(0.2)  # for the end of the last one
    cpu_ms = (cpu_seconds(os.getpid()) - before) / count * 1000
    await sandbox.aclose()
    return cpu_ms, statistics.median(times)


def main() -> None:
    """Print a line for each of three samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200)
    given = parser.parse_args()
    samples = Path(__file__).parents[1] / "samples"
    names = ["onboarding-guide.md", "warranty-policy.docx", "supply-contract.pdf"]
    calls = [call(samples / name) for name in names]
    plain = [here(arguments, given.tries) for arguments in calls]
    children, first = asyncio.run(in_children(calls, given.tries))
    print("| file | here | in a child | price |\n|---|---|---|---|")
    for name, alone, isolated in zip(names, plain, children, strict=True):
        print(f"| {name} | {alone:.2f} ms | {isolated:.2f} ms | {isolated - alone:.2f} ms |")
    cpu_ms, clock_ms = asyncio.run(new_children(given.tries))
    print(f"\nthe first call, for which all is started: {first:.0f} ms")
    print(f"a later one with a new child: {clock_ms:.0f} ms, {cpu_ms:.0f} ms of the CPU")


if __name__ == "__main__":
    main()
