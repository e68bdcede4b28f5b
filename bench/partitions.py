"""document_chunks in one piece and in hash partitions by user: the SQL of docs/scaling.md tried on a copy, and what it does to searches.

Usage: python -m bench.partitions [--passages 40000] [--users 4,40] [--searches 200]

Each table has an HNSW index for the model, built after loading. Searches go through search_by_vector, for one user and for all. Then the
pipeline itself works on the partitioned table: a worker ingests, serves and deletes documents.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
from pathlib import Path

import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from bench.replica import fill
from bench.running import bench_server, fresh_settings, small_documents, submit_all, url_of, wait_until_ended, workers

DIMENSIONS = 128
INDEX = (
    f"CREATE INDEX ON document_chunks USING hnsw ((embedding::vector({DIMENSIONS})) vector_cosine_ops) WHERE embedding_model = 'bench'"
).encode()
SEARCHES = {"one user's": ", user_id => 'u1'", "everybody's": ""}


def partitioning() -> bytes:
    """Return the SQL by which docs/scaling.md partitions."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = re.search(r"```sql\n(-- partition by user\n.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1].encode()


def measure(conn: psycopg.Connection, count: int) -> dict[str, tuple[float, float]]:
    """Return for each kind of search its median and p95 in milliseconds."""
    found = {}
    for name, given in SEARCHES.items():
        numbers, times = np.random.default_rng(7), []
        for _ in range(count):
            vector = numbers.standard_normal(DIMENSIONS).astype(np.float32)
            began = time.perf_counter()
            rows = conn.execute(f"SELECT doc_id FROM search_by_vector(%s, 'bench'{given})".encode(), [vector]).fetchall()
            times.append((time.perf_counter() - began) * 1000)
            assert len(rows) == 10
        found[name] = statistics.median(times), statistics.quantiles(times, n=20)[-1]
    return found


def build(conn: psycopg.Connection) -> float:
    began = time.perf_counter()
    conn.execute(INDEX)
    conn.execute("VACUUM ANALYZE document_chunks")
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=40_000)
    parser.add_argument("--users", default="4,40")
    parser.add_argument("--searches", type=int, default=200)
    given = parser.parse_args()
    print("| passages of | table | index built in | searches of one user: median, p95 ms | of all: median, p95 ms |\n|---|---|---|---|---|")
    with bench_server() as (server, folder):
        for users in map(int, given.users.split(",")):
            settings = fresh_settings(server, folder, f"users{users}", embedding_provider="hash")
            fill(url_of(settings), given.passages, users, DIMENSIONS)
            with psycopg.connect(url_of(settings), autocommit=True) as conn:
                register_vector(conn)
                conn.execute("SET maintenance_work_mem = '512MB'")
                for table in ("in one piece", "in 8 partitions"):
                    if table != "in one piece":
                        conn.execute(partitioning())
                    seconds, times = build(conn), measure(conn, given.searches)
                    cells = " | ".join(f"{median:.1f}, {p95:.1f}" for median, p95 in times.values())
                    print(f"| {users} users | {table} | {seconds:.0f} s | {cells} |", flush=True)
        with psycopg.connect(url_of(settings), autocommit=True) as conn:
            conn.execute("DELETE FROM file_extractions")  # which no worker has ever seen
        with workers(settings):
            count = 30
            asyncio.run(submit_all(settings, small_documents(folder / "documents", count)))
            with psycopg.connect(url_of(settings), autocommit=True) as conn:
                seconds = wait_until_ended(settings, count, time.perf_counter(), 120)
                states = conn.execute("SELECT state::text, count(*) FROM file_extractions GROUP BY 1").fetchall()
                chunks = conn.execute("SELECT count(*) FROM document_chunks WHERE embedding_model <> 'bench'").fetchone()
                conn.execute("SELECT delete_document(doc_id) FROM file_extractions")
                left = conn.execute("SELECT count(*) FROM document_chunks").fetchone()
    print(f"\nA worker on the partitioned table: {states} after {seconds:.1f} s, {chunks} passages; after deleting all: {left}")


if __name__ == "__main__":
    main()
