"""Searches of a primary alone, and shared with a streaming replica, while documents come in; and how far the replica is behind.

Usage: python -m bench.replica [--passages 20000] [--seconds 15] [--clients 4] [--rounds 3]

Clients of one process each run hybrid searches one after another. On one machine the replica has no cores of its own: what counts is
what the primary's clients gain when others are sent elsewhere, not the sum. Each cluster is bound to one of two cores where there are two,
so that the replica stands for a machine of its own; the clients share them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.queues import Queue
from uuid import UUID

import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from bench.running import WORDS, end_cleanly
from tests.faults.cluster import Cluster, Replica

DIMENSIONS = 384
SEARCH = "SELECT count(*) FROM search_hybrid(%s, %s, 'bench')"


def fill(conninfo: str, passages: int, users: int = 20, dimensions: int = DIMENSIONS) -> None:
    """Write passages of 50 to a document, which belong to so many users in turn; without a vector index."""
    rng = random.Random(1)
    with psycopg.connect(conninfo, autocommit=True) as conn:
        register_vector(conn)
        conn.execute(
            "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, file_type, correlation_id) "
            "SELECT 'd' || n, 'u' || n %% %s, 'd', 'd', 'text', 'bench' FROM generate_series(0, %s) AS n",
            [users, passages // 50],
        )
        vectors = np.random.default_rng(1).standard_normal((passages, dimensions)).astype(np.float32)
        columns = "id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, embedding, embedding_model"
        with conn.cursor().copy(f"COPY document_chunks ({columns}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
            copy.set_types(["uuid", "text", "text", "int4", "int4", "text", "text", "int4", "int4", "vector", "text"])
            for number, vector in enumerate(vectors):
                text = f"{number} " + " ".join(rng.choices(WORDS, k=100)) + f" w{number % 997}"
                document = number // 50
                copy.write_row(
                    (
                        UUID(int=number),
                        f"d{document}",
                        f"u{document % users}",
                        1,
                        number % 50,
                        text,
                        f"{number:064x}",
                        0,
                        len(text),
                        vector,
                        "bench",
                    )
                )
        conn.execute("VACUUM ANALYZE document_chunks")
        conn.execute("VACUUM ANALYZE file_extractions")


def search_on(conninfo: str, seconds: float, seed: int, answers: Queue[list[float]]) -> None:
    """Search again and again, and answer with the milliseconds of each."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    times: list[float] = []
    with psycopg.connect(conninfo, autocommit=True) as conn:
        register_vector(conn)
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            vector = numbers.standard_normal(DIMENSIONS).astype(np.float32)
            conn.execute(SEARCH, [f"w{rng.randrange(997)} {rng.choice(WORDS)}", vector])
            times.append((time.perf_counter() - began) * 1000)
    answers.put(times)


def searches(places: list[str], seconds: float) -> tuple[float, float, float]:
    """Return searches a second of clients at these places, and the median and p95 of their milliseconds."""
    spawn = get_context("spawn")
    answers: Queue[list[float]] = spawn.Queue()
    clients = [spawn.Process(target=search_on, args=(where, seconds, seed, answers)) for seed, where in enumerate(places)]
    for client in clients:
        client.start()
    times = [taken for _ in clients for taken in answers.get()]
    for client in clients:
        client.join()
    return len(times) / seconds, statistics.median(times), statistics.quantiles(times, n=20)[-1]


def bind(cluster: Cluster, core: int) -> None:
    """Keep the processes of a server, and those to come, on a core."""
    cores = sorted(os.sched_getaffinity(0))
    for pid in cluster.processes():
        os.sched_setaffinity(pid, {cores[core % len(cores)]})


def lag(primary: str, replica: str, count: int = 200) -> list[float]:
    """Return the milliseconds from a commit on the primary until a reader of the replica sees it, sorted."""
    taken = []
    with psycopg.connect(primary, autocommit=True) as here, psycopg.connect(replica, autocommit=True) as there:
        here.execute("CREATE TABLE bench_lag (number integer)")
        time.sleep(1)
        for number in range(count):
            here.execute("INSERT INTO bench_lag VALUES (%s)", [number])
            began = time.perf_counter()
            while there.execute("SELECT count(*) FROM bench_lag").fetchone() != (number + 1,):
                pass
            taken.append((time.perf_counter() - began) * 1000)
    return sorted(taken)


def writer(conninfo: str) -> subprocess.Popen[bytes]:
    """Start a process that writes to the primary as ingestion does: many commits, some of them with vectors."""
    program = (
        "import psycopg, sys, time\n"
        "conn = psycopg.connect(sys.argv[1], autocommit=True)\n"
        "conn.execute('CREATE TABLE IF NOT EXISTS bench_written (number bigint, vector text)')\n"
        "while True:\n"
        "    conn.execute(\"INSERT INTO bench_written SELECT n, repeat('x', 1500) FROM generate_series(1, 10) AS n\")\n"
        "    time.sleep(0.01)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, conninfo])


def main() -> None:
    """Fill, copy, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    end_cleanly()
    primary = Cluster(shared_buffers="512MB", max_wal_size="2GB", maintenance_work_mem="512MB")
    replica = None
    try:
        database = primary.create_database()
        fill(primary.conninfo(database), given.passages)
        with psycopg.connect(primary.conninfo(database), autocommit=True) as conn:
            conn.execute(
                f"CREATE INDEX ON document_chunks USING hnsw ((embedding::vector({DIMENSIONS})) vector_cosine_ops) "
                "WHERE embedding_model = 'bench'".encode()
            )
        print("filled", file=sys.stderr, flush=True)
        replica = Replica(primary)
        replica.catch_up()
        bind(primary, 0)
        bind(replica, 1)
        here, there = primary.conninfo(database), replica.conninfo(database)
        found: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(given.rounds):
            for name, places in {
                "all clients at the primary": [here] * given.clients,
                "half of them at the replica": [here, there] * (given.clients // 2),
                "all of them at the replica": [there] * given.clients,
            }.items():
                found.setdefault(name, []).append(searches(places, given.seconds))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
        print("| what | searches/s | median ms | p95 ms |\n|---|---|---|---|")
        for name, rounds in found.items():
            print(f"| {name} | " + " | ".join(f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True)) + " |")
        for name, load in {"a quiet primary": None, "a primary that is written to": writer(here)}.items():
            with psycopg.connect(here, autocommit=True) as conn:
                conn.execute("DROP TABLE IF EXISTS bench_lag")
            times = lag(here, there)
            print(f"\nFrom commit to being seen on the replica of {name}: median {statistics.median(times):.1f} ms, "
                  f"p95 {times[int(0.95 * len(times))]:.1f} ms, worst {times[-1]:.1f} ms")  # fmt: skip
            if load is not None:
                load.kill()
                load.wait()
    finally:
        if replica is not None:
            replica.close()
        primary.close()


if __name__ == "__main__":
    main()
