"""Retrieval quality on SciFact (BEIR) through docmill's search functions, beside published figures; and HNSW beside exact search.

Usage: python -m bench.retrieval [--passages chunks|documents|given] [--threads 2] [--language en]

`chunks` (default) cuts the 5,183 abstracts with docmill's chunker and embeds the passages with the default model; a document ranks where
its best passage ranks. `documents` embeds each abstract whole, as published figures do, but in windows, so that nothing is cut off.
`given` takes the vectors that come with the corpus (each abstract cut off at 256 tokens, as published) and needs seconds, not minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector.psycopg import register_vector

from bench.running import bench_server, fresh_settings, url_of
from jobs.adapters.embedders import make_embedder
from jobs.stages.chunk import cut
from models.chunks import Chunk
from models.settings import Settings

CORPUS = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[2] / "shared" / "corpus")) / "retrieval" / "scifact"
PUBLISHED = (
    ("published: all-MiniLM-L6-v2, exact", 0.6451, 0.7833),
    ("published: BM25 (bm25s)", 0.6874, 0.8187),
    ("published: BM25 (Anserini)", 0.6789, None),
    ("published: text-embedding-3-small", 0.7337, None),
)
SEARCHES = {
    "vector": "SELECT doc_id FROM search_by_vector(%(vector)s, %(model)s, limit_to => %(limit)s)",
    "full text": "SELECT doc_id FROM search_by_text(%(text)s, limit_to => %(limit)s)",
    "hybrid": "SELECT doc_id FROM search_hybrid(%(text)s, %(vector)s, %(model)s, limit_to => %(limit)s)",
}
COLUMNS = (
    "id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, "
    "char_start, char_end, language, embedding, embedding_model"
)
TYPES = ["uuid", "text", "text", "int4", "int4", "text", "text", "text[]", "int4", "int4", "text", "vector", "text"]


@dataclass(frozen=True, slots=True)
class Query:
    """One judged query."""

    text: str
    vector: NDArray[np.float32]
    relevant: dict[str, int]
    """doc_id -> grade."""


def read_lines(name: str) -> list[dict[str, Any]]:
    with (CORPUS / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def documents() -> dict[str, str]:
    return {row["_id"]: f"{row['title']} {row['text']}" for row in read_lines("corpus.jsonl")}


def judgements() -> dict[str, dict[str, int]]:
    """Return query id -> doc_id -> grade."""
    found: dict[str, dict[str, int]] = {}
    for line in (CORPUS / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        found.setdefault(query, {})[document] = int(grade)
    return found


def ndcg(ranked: Sequence[str], relevant: dict[str, int], depth: int = 10) -> float:
    """Return nDCG at a depth as trec_eval counts it."""
    gained = sum(relevant.get(name, 0) / math.log2(rank + 2) for rank, name in enumerate(ranked[:depth]))
    best = sum(grade / math.log2(rank + 2) for rank, grade in enumerate(sorted(relevant.values(), reverse=True)[:depth]))
    return gained / best


def recall(ranked: Sequence[str], relevant: dict[str, int], depth: int = 10) -> float:
    return len(set(ranked[:depth]) & relevant.keys()) / len(relevant)


async def made(settings: Settings, passages: str) -> tuple[list[tuple[str, Chunk]], NDArray[np.float32], list[Query], str]:
    """Return the passages with their doc_ids, one vector each, the judged queries, and the model's name."""
    size, overlap = (settings.chunk_size, settings.chunk_overlap) if passages == "chunks" else (20_000, 0)
    cuts = [(name, chunk) for name, text in documents().items() for chunk in cut(text, (), doc_id=name, size=size, overlap=overlap)]
    embedder = make_embedder(settings)
    asked = {row["_id"]: row["text"] for row in read_lines("queries.jsonl")}
    if passages == "given":
        vectors, query_vectors = (np.load(CORPUS / f"scifact_{part}.f16.npy").astype(np.float32) for part in ("doc", "q"))
        assert len(vectors) == len(cuts)
    else:
        started = time.perf_counter()
        vectors = await embedder.embed([chunk.content for _, chunk in cuts])
        print(f"{len(cuts)} passages embedded at {len(cuts) / (time.perf_counter() - started):.1f} a second", flush=True)
        query_vectors = await embedder.embed(list(asked.values()), "query")
    judged = judgements()
    queries = [Query(text, query_vectors[row], judged[name]) for row, (name, text) in enumerate(asked.items()) if name in judged]
    return cuts, vectors, queries, embedder.model


def store(conn: psycopg.Connection, cuts: list[tuple[str, Chunk]], vectors: NDArray[np.float32], model: str, language: str | None) -> None:
    """Write passages where searches look, as complete documents."""
    conn.execute(
        "INSERT INTO file_extractions (doc_id, file_name, file_path, file_type, correlation_id) "
        "SELECT name, name, name, 'text', 'bench' FROM unnest(%s::text[]) AS name",
        [sorted({name for name, _ in cuts})],
    )
    with conn.cursor().copy(f"COPY document_chunks ({COLUMNS}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
        copy.set_types(TYPES)
        for (name, chunk), vector in zip(cuts, vectors, strict=True):
            place = (chunk.index, chunk.content, chunk.content_sha256, list(chunk.heading_path), chunk.char_start, chunk.char_end)
            copy.write_row((chunk.id, name, "default", 1, *place, language, vector, model))
    conn.execute("ANALYZE document_chunks")


def measure(conn: psycopg.Connection, queries: list[Query], model: str, limit: int) -> list[tuple[str, float, float, float]]:
    """Return for each kind of search its name, nDCG@10, recall@10 and median milliseconds."""
    rows = []
    for name, statement in SEARCHES.items():
        gains, recalls, times = [], [], []
        for query in queries:
            started = time.perf_counter()
            params = {"text": query.text, "vector": query.vector, "model": model, "limit": limit}
            found = conn.execute(statement.encode(), params).fetchall()
            times.append((time.perf_counter() - started) * 1000)
            ranked = list(dict.fromkeys(doc_id for (doc_id,) in found))
            gains.append(ndcg(ranked, query.relevant))
            recalls.append(recall(ranked, query.relevant))
        rows.append((name, statistics.mean(gains), statistics.mean(recalls), statistics.median(times)))
    return rows


def neighbours(conn: psycopg.Connection, queries: list[Query], model: str) -> list[set[Any]]:
    """Return the ids of each query's ten nearest passages."""
    asked = "SELECT chunk_id FROM search_by_vector(%s, %s)"
    return [{chunk_id for (chunk_id,) in conn.execute(asked, [query.vector, model])} for query in queries]


def main() -> None:
    """Load, search, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", choices=["chunks", "documents", "given"], default="chunks")
    parser.add_argument("--threads", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--language", default="en", help="of the corpus, as finalize would set it; '' for unknown")
    given = parser.parse_args()
    with bench_server() as (server, folder):
        settings = fresh_settings(server, folder, "retrieval", embedding_provider="local", embedding_threads=given.threads)
        cuts, vectors, queries, model = asyncio.run(made(settings, given.passages))
        with psycopg.connect(url_of(settings), autocommit=True) as conn:
            register_vector(conn)
            store(conn, cuts, vectors, model, given.language or None)
            # Passages of one document crowd each other out of ten results, not of a hundred.
            rows = measure(conn, queries, model, 100 if given.passages == "chunks" else 10)
            exact = neighbours(conn, queries, model)
            conn.execute(
                f"CREATE INDEX ON document_chunks USING hnsw ((embedding::vector({vectors.shape[1]})) vector_cosine_ops) "
                f"WHERE embedding_model = '{model}'".encode()
            )
            conn.execute("SET enable_seqscan = off")
            indexed = neighbours(conn, queries, model)
    print(f"\n{len(cuts)} passages ({given.passages}) of 5,183 documents, {len(queries)} queries, {model}\n")
    print("| search | nDCG@10 | recall@10 | median ms |\n|---|---|---|---|")
    for name, gain, share, milliseconds in rows:
        print(f"| {name} | {gain:.4f} | {share:.4f} | {milliseconds:.1f} |")
    for name, gain, published in PUBLISHED:
        print(f"| {name} | {gain:.4f} | {'' if published is None else f'{published:.4f}'} | |")
    agreement = statistics.mean(len(a & b) / len(b) for a, b in zip(indexed, exact, strict=True))
    print(f"\nrecall@10 of HNSW beside exact search: {agreement:.4f}")


if __name__ == "__main__":
    main()
