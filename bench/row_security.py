"""What row-level security costs and whether searches stay right under it: recall and latency of readers, and a worker's hot statements.

Usage: python -m bench.row_security [--passages 50000] [--dimensions 128] [--queries 40]

A reader's search is set beside the owner's with the same user as a filter, and beside exact search over that user's vectors. `rules alone`
is the same search by word where nothing but the policies keeps users apart, as it would be if it did not run as the tables' owner.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector.psycopg import register_vector
from psycopg.conninfo import make_conninfo

from bench.running import WORDS, bench_server, fresh_settings, url_of
from jobs.pipeline.rows import chunk_params
from jobs.roles import create_roles, grant_as, grant_to_person
from jobs.vector_array import register_vector_array
from models.chunks import Chunk
from models.documents import Document
from models.settings import Settings
from models.stages import Milestone
from sql import query

USERS = {"small": 0.01, "large": 0.5}
"""User -> part of all passages; the rest is others'."""
SEARCHES = {
    "vector": "SELECT chunk_id FROM search_by_vector(%(vector)s, 'bench', user_id => %(user)s)",
    "text": "SELECT chunk_id FROM search_by_text(%(text)s, user_id => %(user)s)",
    "hybrid": "SELECT chunk_id FROM search_hybrid(%(text)s, %(vector)s, 'bench', user_id => %(user)s)",
}
RUNS_AS = ("matching_chunks(text, text, text, text, jsonb, integer, text)", "weigh_words(text, text)")
Vectors = NDArray[np.float32]


def connect(settings: Settings, login: str | None = None) -> psycopg.Connection[Any]:
    """Return an autocommit connection, as the owner or as a login."""
    url = url_of(settings) if login is None else make_conninfo(url_of(settings), user=login)
    conn = psycopg.connect(url, autocommit=True)
    register_vector(conn)
    register_vector_array(conn)
    return conn


def load(conn: psycopg.Connection[Any], count: int, vectors: Vectors) -> list[str]:
    """Store passages, ten a document, with the vector index; return whose each is."""
    shares = [user for user, share in USERS.items() for _ in range(int(share * count / 10))]
    owners = [*shares, *(f"other{n % 50}" for n in range(count // 10 - len(shares)))]
    random.Random(3).shuffle(owners)
    conn.execute(
        "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id) "
        "SELECT 'd' || n, o, 'f', 'uploads/' || n, 'c' FROM unnest(%s::text[]) WITH ORDINALITY AS v (o, n)",
        [owners],
    )
    words = random.Random(4)
    for start in range(0, count, 5000):
        texts = [" ".join([*words.choices(WORDS, k=40), f"w{words.randrange(2000)}"]) for _ in range(5000)]
        conn.execute(
            """INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end,
                language, embedding, embedding_model)
            SELECT ('00000000-0000-0000-0000-' || lpad(to_hex(%s + v.n - 1), 12, '0'))::uuid, 'd' || (%s + v.n - 1) / 10 + 1,
                (%s::text[])[(%s + v.n - 1) / 10 + 1], 1, (%s + v.n - 1) %% 10, v.content, repeat('0', 64), 0, 1, 'en', v.embedding, 'bench'
            FROM unnest(%s::text[], %b::vector[]) WITH ORDINALITY AS v (content, embedding, n)""",
            [start, start, owners, start, start, texts, list(vectors[start : start + 5000])],
        )
    built = f"hnsw ((embedding::vector({vectors.shape[1]})) vector_cosine_ops)"
    conn.execute(f"CREATE INDEX ON document_chunks USING {built} WHERE embedding_model = 'bench'".encode())
    conn.execute("VACUUM ANALYZE")
    return [owners[number // 10] for number in range(count)]


def timed(conn: psycopg.Connection[Any], statement: str, asked: Sequence[dict[str, Any]]) -> tuple[float, float, list[set[int]]]:
    """Return the median and the 95th percentile in milliseconds, and what each query found, as numbers of passages."""
    took, found = [], []
    for params in asked:
        started = time.perf_counter()
        rows = conn.execute(statement.encode(), params).fetchall()
        took.append((time.perf_counter() - started) * 1000)
        found.append({int(row[0].hex[-12:], 16) for row in rows})
    return statistics.median(took), statistics.quantiles(took, n=20)[-1], found


def searches(settings: Settings, owners: list[str], vectors: Vectors, count: int) -> None:
    """Print recall and latency of each way to search, for each user."""
    rng, words = np.random.default_rng(5), random.Random(6)
    print("\n| user | search | asked by | recall@10 | median ms | p95 ms |\n|---|---|---|---|---|---|")
    for user in USERS:
        own = np.array([number for number, owner in enumerate(owners) if owner == user])
        wanted = [
            vectors[rng.integers(len(vectors))] + 0.05 * rng.standard_normal(vectors.shape[1], dtype=np.float32) for _ in range(count)
        ]
        texts = [f"{words.choice(WORDS)} {words.choice(WORDS)} w{words.randrange(2000)}" for _ in wanted]
        exact = [set(own[np.argsort(-(vectors[own] @ vector))[:10]].tolist()) for vector in wanted]
        with connect(settings) as owner, connect(settings, user) as reader:
            for name, statement in SEARCHES.items():
                for who, conn, whose in (("owner, filter", owner, user), ("reader", reader, None)):
                    asked = [{"vector": v, "text": t, "user": whose} for v, t in zip(wanted, texts, strict=True)]
                    timed(conn, statement, asked[:3])
                    median, slow, found = timed(conn, statement, asked)
                    recall = statistics.mean(len(a & b) / len(b) for a, b in zip(found, exact, strict=True))
                    print(f"| {user} | {name} | {who} | {f'{recall:.3f}' if name == 'vector' else ''} | {median:.1f} | {slow:.1f} |")
            for function in RUNS_AS:
                owner.execute(f"ALTER FUNCTION {function} SECURITY INVOKER".encode())
            median, slow, _ = timed(reader, SEARCHES["text"], [{"text": text, "user": None} for text in texts])
            print(f"| {user} | text | reader, rules alone | | {median:.1f} | {slow:.1f} |")
            for function in RUNS_AS:
                owner.execute(f"ALTER FUNCTION {function} SECURITY DEFINER".encode())


def statements(dimensions: int) -> dict[str, Callable[[psycopg.Connection[Any]], None]]:
    """Return a worker's hot statements, each as what is run inside of a transaction that is rolled back."""
    vectors = np.random.default_rng(8).standard_normal((20, dimensions), dtype=np.float32)
    chunks = tuple(Chunk(uuid4(), n, "A passage about pumps and valves. " * 20, "0" * 64) for n in range(20))
    document = Document(doc_id="d1", version=2, user_id="small", file_name="f", file_path="f", milestone=Milestone.EMBEDDINGS_STORED,
                        chunks=chunks, vectors=vectors, embedding_model="other")  # fmt: skip
    (params,) = chunk_params(document)

    def submit(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT submit_document('uploads/x', doc_id => %s, user_id => 'small')", [str(uuid4())])

    def fetch(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT id FROM docmill_fetch_job(NULL, NULL, '', TRUE, 0)")

    def store(conn: psycopg.Connection[Any]) -> None:
        conn.execute(query("store_chunks"), params)

    def advance(conn: psycopg.Connection[Any]) -> None:
        conn.execute("UPDATE file_extractions SET state = 'working', lease_until = now(), claim = claim + 1 WHERE doc_id = 'd7'")

    return {"submit a document": submit, "fetch a job": fetch, "update a document": advance, "store 20 passages": store}


def overhead(settings: Settings, dimensions: int, times: int = 100) -> None:
    """Print what each statement takes the owner, whom nothing holds, and a worker under row-level security, in turn."""
    print("\n| statement | owner, median (fastest) ms | worker, median (fastest) ms |\n|---|---|---|")
    with connect(settings) as owner, connect(settings, "crew") as crew:
        owner.execute(
            b"SELECT submit_document('uploads/' || n, doc_id => 'waits' || n, user_id => 'u' || n % 9) FROM generate_series(1, 500) AS n"
        )
        for name, run in statements(dimensions).items():
            took: dict[str, list[float]] = {"owner": [], "worker": []}
            for _ in range(times):
                for who, conn in (("owner", owner), ("worker", crew), ("worker", crew), ("owner", owner)):
                    with conn.transaction(force_rollback=True):
                        started = time.perf_counter()
                        run(conn)
                        took[who].append((time.perf_counter() - started) * 1000)
            cells = [f"{statistics.median(took[who]):.2f} ({min(took[who]):.2f})" for who in ("owner", "worker")]
            print(f"| {name} | {cells[0]} | {cells[1]} |")


def main() -> None:
    """Load, make the roles, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--queries", type=int, default=40)
    given = parser.parse_args()
    # Of 16 dimensions in truth, as passages' vectors are of fewer than they have; nothing else has neighbours to speak of.
    rng = np.random.default_rng(1)
    spread = rng.standard_normal((16, given.dimensions), dtype=np.float32)
    vectors = rng.standard_normal((given.passages, 16), dtype=np.float32) @ spread
    vectors += 0.1 * rng.standard_normal(vectors.shape, dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with bench_server() as (server, folder):
        settings = fresh_settings(server, folder, "walls", embedding_provider="hash")
        with connect(settings) as conn:
            for login in (*USERS, "crew"):
                conn.execute(f"CREATE ROLE {login} LOGIN".encode())
            owners = load(conn, given.passages, vectors)
        create_roles(settings)
        for user in USERS:
            grant_to_person(settings, user, user)
        grant_as(settings, "crew", "worker")
        print(f"{given.passages:,} passages, {given.dimensions} dimensions; {', '.join(f'{u}: {s:.0%}' for u, s in USERS.items())}")
        searches(settings, owners, vectors, given.queries)
        overhead(settings, given.dimensions)


if __name__ == "__main__":
    main()
