"""Re-embedding under searches: passages a second, and how long a search takes before, during and after it.

Usage: python -m bench.reembedding [--passages 20000] [--dimensions 256] [--workers 1] [--ingest 0]

From the `hash` provider (384 dimensions) to word hashes of other dimensions, so that what is measured is everything but the model.
Every search asks with the model that serves at that moment. `--ingest N` submits N small documents when it begins.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import statistics
import time
import uuid
from collections import defaultdict
from pathlib import Path

import psycopg
from pgvector.psycopg import register_vector

from bench.running import WORDS, bench_server, fresh_settings, small_documents, submit_all, url_of, workers
from jobs.adapters.embedders import HashedWords
from jobs.maintenance import look_after_index
from models.settings import Settings

COLUMNS = "id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, language, embedding, embedding_model"
TYPES = ["uuid", "text", "text", "int4", "int4", "text", "text", "int4", "int4", "text", "vector", "text"]
PER_DOCUMENT = 20
STATE = "SELECT state, done, total, to_move FROM reembedding_status ORDER BY id DESC LIMIT 1"


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(200)) for _ in range(80))


def load(conn: psycopg.Connection, passages: int, embedder: HashedWords) -> float:
    """Write passages where searches look, as complete documents; return the seconds that the copying took."""
    rng = random.Random(1)
    names = [f"d{number:06}" for number in range(passages // PER_DOCUMENT)]
    conn.execute(
        "INSERT INTO file_extractions (doc_id, file_name, file_path, file_type, correlation_id) "
        "SELECT name, name, name, 'text', 'bench' FROM unnest(%s::text[]) AS name",
        [names],
    )
    conn.execute("UPDATE file_extractions SET state = 'working', claim = 1, lease_until = now() + interval '1 min'")
    conn.execute(
        "UPDATE file_extractions SET state = 'complete', milestone = 'complete', lease_until = NULL, served_version = 1, chunk_count = %s",
        [PER_DOCUMENT],
    )
    rows = []
    for name in names:
        for index in range(PER_DOCUMENT):
            content = text(rng)
            vector = embedder._vector(content).astype("float32")
            sha256 = hashlib.sha256(content.encode()).hexdigest()
            rows.append((uuid.uuid4(), name, "default", 1, index, content, sha256, 0, 1, "en", vector, embedder.model))
    started = time.perf_counter()
    for begin in range(0, len(rows), PER_DOCUMENT):
        with conn.cursor().copy(f"COPY document_chunks ({COLUMNS}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
            copy.set_types(TYPES)
            for row in rows[begin : begin + PER_DOCUMENT]:
                copy.write_row(row)
    elapsed = time.perf_counter() - started
    conn.execute("ANALYZE document_chunks")
    return elapsed


def search(conn: psycopg.Connection, question: str) -> tuple[float, int]:
    """Return the milliseconds of a search for ten passages with the serving model, and how many it found."""
    row = conn.execute("SELECT embedding_model, dimensions FROM serving_embeddings").fetchone()
    assert row is not None
    vector = HashedWords(row[1])._vector(question).astype("float32")
    started = time.perf_counter()
    found = conn.execute("SELECT chunk_id FROM search_by_vector(%s, %s)", [vector, row[0]]).fetchall()
    return (time.perf_counter() - started) * 1000, len(found)


def watch(conn: psycopg.Connection, seconds: float | None) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Search until the run is complete, or for some seconds; return milliseconds and wall-clock seconds by state, and short results."""
    rng = random.Random(2)
    times: dict[str, list[float]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    short, began = 0, time.perf_counter()
    while True:
        now = time.perf_counter()
        row = conn.execute(STATE).fetchone()
        state = "none" if row is None else str(row[0])
        milliseconds, found = search(conn, text(rng))
        times[state].append(milliseconds)
        short += found != 10
        time.sleep(0.02)
        spent[state] += time.perf_counter() - now
        if (state == "complete" and seconds is None) or (seconds is not None and now - began > seconds):
            return times, spent, short


def line(name: str, values: list[float], more: str = "") -> None:
    ordered = sorted(values)
    slow = ordered[int(len(ordered) * 0.95)]
    print(f"| {name} | {len(values)} | {statistics.median(values):.1f} | {slow:.1f} | {ordered[-1]:.1f} | {more} |")


def run(settings: Settings, given: argparse.Namespace, folder: Path) -> None:
    old, new = HashedWords(384), HashedWords(given.dimensions)
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        register_vector(conn)
        copied = load(conn, given.passages, old)
        print(
            f"{given.passages} passages copied in {copied:.1f} s ({given.passages / copied:.0f}/s), {PER_DOCUMENT} a statement", flush=True
        )
        asyncio.run(look_after_index(settings, old.model, old.dimensions))
        before, _, short = watch(conn, 5)
        conn.execute("SELECT start_reembedding(%s)", [new.model])
        if given.ingest:
            asyncio.run(submit_all(settings, small_documents(folder / "texts", given.ingest)))
        with workers(settings, given.workers):
            times, spent, missed = watch(conn, None)
        times.pop("complete")
        after, _, short_after = watch(conn, 5)
        row = conn.execute("SELECT total, started_at, ready_at, switched_at, moved_at, ended_at, listed_at FROM reembeddings").fetchone()
        counts = conn.execute("SELECT count(*), count(DISTINCT embedding_model) FROM document_chunks").fetchone()
        waits = conn.execute(
            "SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM processing_completed_at - created_at)) "
            "FROM file_extractions WHERE processing_completed_at IS NOT NULL"
        ).fetchone()
    assert row is not None
    total, started, ready, switched, moved, ended, listed = row
    print(
        f"\n{given.passages} passages, {old.model} -> {new.model}, {given.workers} worker(s), {given.ingest} documents ingested meanwhile"
    )
    made, went = (ready - listed).total_seconds(), (moved - switched).total_seconds()
    print(f"listed after {(listed - started).total_seconds():.1f} s; made and indexed: {total / made:.0f} passages/s")
    print(f"switched after {(switched - ready).total_seconds():.2f} s; moved, index included: {total / went:.0f} passages/s; ", end="")
    print(f"cleared after {(ended - moved).total_seconds():.1f} s")
    print(f"(passages, models) at the end: {counts}; searches with fewer than ten results: {short + missed + short_after}")
    if given.ingest and waits is not None:
        print(f"documents: median {waits[0]:.1f} s from submission to completion")
    print("\n| searches | count | median ms | p95 ms | worst ms | seconds in state |\n|---|---|---|---|---|---|")
    line("before", before["none"])
    for state, values in times.items():
        line(f"while {state}", values, f"{spent[state]:.1f}")
    line("after", after["complete"])


def main() -> None:
    """Load, re-embed, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ingest", type=int, default=0)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        run(fresh_settings(server, folder, "reembedding", embedding_provider="hash"), given, folder)


if __name__ == "__main__":
    main()
