"""Bulk vectors: rows a second through docmill's checkpoint against plain COPY, index builds, and recall with and without filters.

Usage: python -m bench.vectors [--vectors 100000] [--rounds 5] [--written 10000] [--passages 100] [--at-once 1]
    [--role docmill_worker] [--only written index]

The vectors are those that come with SciFact (384 dimensions), each many times with a little noise; the texts its abstracts, cut at 1,000
characters. written: documents of so many passages, complete in one checkpoint each (row, markdown, passages, event, job), against plain
binary COPY of the same rows, a transaction for each document, into a table with the same columns and indexes, into such a one with the
document's text into another, into one with the foreign key and the trigger of document_chunks too, as COPY into that table itself would
meet them, and into one with a primary key alone; alternately, medians, all tables growing alike. --at-once: over so many connections
of this one process, as a worker writes what it has in hand. --role docmill_worker: the checkpoint is written as a role that row
security applies to, for which Postgres refuses COPY. index: built as maintenance builds it, and with other settings of the server; then
rows a second into the standing index. recall@10: search_by_vector against exact search, for the queries that come with the corpus.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector.psycopg import register_vector
from psycopg.types.json import Jsonb

from bench.copying import COPY, TYPES, rows_of
from bench.cpu import cpu_seconds
from bench.retrieval import CORPUS, documents
from bench.running import bench_server, fresh_settings, url_of
from jobs.pipeline.checkpoint import Outcome, checkpoint
from jobs.pipeline.claims import NotClaimed, claim_document
from jobs.pipeline.work import Work
from jobs.roles import create_roles
from jobs.vector_array import register_vectors
from models.chunks import Chunk
from models.documents import Document, FileType
from models.settings import Settings
from models.stages import Milestone, State

Way = Callable[[psycopg.AsyncConnection[Any], list[Work]], Awaitable[None]]
MODEL = "scifact"
INDEXES = {
    "as maintenance builds it, 64 MB": ("64MB", 2, "vector"),
    "1 GB, no parallel workers": ("1GB", 0, "vector"),
    "1 GB, 2 parallel workers": ("1GB", 2, "vector"),
    "1 GB, 2 parallel workers, halfvec": ("1GB", 2, "halfvec"),
}


def jittered(count: int) -> NDArray[np.float32]:
    """Return unit vectors: the corpus' own, over and over, each with noise of its own."""
    own = np.load(CORPUS / "scifact_doc.f16.npy").astype(np.float32)
    rng = np.random.default_rng(1)
    rows = own[np.arange(count) % len(own)] + rng.normal(0, 0.02, (count, own.shape[1])).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


class Corpus:
    """Documents of some passages each, out of the vectors and the abstracts."""

    def __init__(self, vectors: NDArray[np.float32], passages: int) -> None:
        self._vectors, self._passages = vectors, passages
        self._texts = [text[:1000] for text in documents().values()]

    def __len__(self) -> int:
        return len(self._vectors) // self._passages

    def fill(self, work: Work, number: int) -> Work:
        """Give a claimed document everything that its last checkpoint writes."""
        start = number * self._passages
        made = []
        for i in range(self._passages):
            text = f"{self._texts[(start + i) % len(self._texts)]} {start + i}"
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            made.append(Chunk(uuid.uuid5(uuid.NAMESPACE_URL, f"{work.document.doc_id}:{i}"), i, text, sha256, char_end=len(text)))
        text = "\n\n".join(chunk.content for chunk in made)
        work.document = replace(
            work.document, milestone=Milestone.COMPLETE, file_type=FileType.TEXT, mime_type="text/plain", markdown=text, parser="bench",
            markdown_sha256=hashlib.sha256(text.encode()).hexdigest(), chunks=tuple(made), embedding_model=MODEL,
            vectors=self._vectors[start : start + self._passages], raw_extraction={"language": {"code": "en"}},
        )  # fmt: skip
        return work


async def claimed(conn: psycopg.AsyncConnection[Any], corpus: Corpus, numbers: Iterable[int], name: str) -> list[Work]:
    """Submit and claim documents; one in a hundred has the tag 1, five in a hundred the tag 5."""
    made = []
    for number in numbers:
        tags = '{"one": true, "five": true}' if number % 100 == 0 else '{"five": true}' if number % 100 < 5 else "{}"
        content = hashlib.sha256(f"{name} {number}".encode()).hexdigest()
        submitted = "SELECT submit_document('x', doc_id => %s, content_sha256 => %s, metadata => %s)"
        await conn.execute(submitted, [f"{name} {number}", content, tags])
        work = await claim_document(
            conn, f"{name} {number}", job_id=0, worker="bench:1", lease_seconds=3600, reconcile_seconds=5, serialise=True
        )
        assert not isinstance(work, NotClaimed)
        made.append(corpus.fill(work, number))
    return made


def by_checkpoint(role: str) -> Way:
    """Return what completes the documents as a role."""

    async def write(conn: psycopg.AsyncConnection[Any], works: list[Work]) -> None:
        await conn.execute(f"SET ROLE {role}".encode())
        for work in works:
            await checkpoint(conn, work, Outcome(State.COMPLETE), worker="bench:1")
        await conn.execute("RESET ROLE")

    return write


def by_copy(table: str, texts: str | None = None) -> Way:
    """Return what writes the same passages with COPY alone, and into `texts` the documents' markdown."""
    statement = COPY % table.encode()

    async def write(conn: psycopg.AsyncConnection[Any], works: list[Work]) -> None:
        for work in works:
            async with conn.transaction():
                async with conn.cursor() as cursor, cursor.copy(statement) as copy:
                    copy.set_types(TYPES)
                    for row in rows_of(work.document):
                        await copy.write_row(row)
                if texts is not None:
                    await copy_text(conn, texts, work.document)

    return write


async def copy_text(conn: psycopg.AsyncConnection[Any], table: str, document: Document) -> None:
    columns = b"(doc_id, version, markdown, markdown_sha256, page_map, parser, parse_metadata)"
    async with conn.cursor() as cursor, cursor.copy(b"COPY %b %b FROM STDIN (FORMAT BINARY)" % (table.encode(), columns)) as copy:
        copy.set_types(["text", "int4", "text", "text", "jsonb", "text", "jsonb"])
        row = (document.doc_id, document.version, document.markdown, document.markdown_sha256, Jsonb([]), document.parser, Jsonb({}))
        await copy.write_row(row)


async def written(settings: Settings, corpus: Corpus, rows: int, passages: int, rounds: int, at_once: int, role: str) -> None:
    """Print rows a second of each way to write, and its share of COPY with the indexes and of COPY with foreign key and trigger."""
    ways = {
        "COPY, primary key alone": by_copy("bare"),
        "COPY, same columns and indexes": by_copy("same"),
        "COPY, and the document's text": by_copy("beside", "texts"),
        "COPY, and foreign key and trigger": by_copy("checked"),
        "checkpoint": by_checkpoint(role),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    if role != "NONE":
        await asyncio.to_thread(create_roles, settings)
    async with AsyncExitStack() as opened:
        conns = [
            await opened.enter_async_context(await psycopg.AsyncConnection.connect(url_of(settings), autocommit=True))
            for _ in range(at_once)
        ]
        for each in conns:
            await register_vectors(each)
        conn, pids = conns[0], [os.getpid(), *(each.info.backend_pid for each in conns)]
        for table in ("same", "beside", "checked"):
            await conn.execute(f"CREATE TABLE {table} (LIKE document_chunks INCLUDING ALL)".encode())
        await conn.execute("ALTER TABLE checked ADD FOREIGN KEY (doc_id) REFERENCES file_extractions (doc_id) ON DELETE CASCADE")
        await conn.execute(
            "CREATE TRIGGER checked_lacking AFTER INSERT ON checked REFERENCING NEW TABLE AS fresh "
            "FOR EACH STATEMENT EXECUTE FUNCTION list_lacking_embeddings()"
        )
        await conn.execute("CREATE TABLE texts (LIKE document_markdown INCLUDING ALL)")
        await conn.execute("CREATE TABLE bare (LIKE document_chunks INCLUDING DEFAULTS, PRIMARY KEY (id))")
        for number in range(rounds):
            works = await claimed(conn, corpus, range(rows // passages), f"round {number}")
            for name, write in ways.items():
                await conn.execute("CHECKPOINT")
                began, cpu = time.perf_counter(), sum(map(own_cpu, pids))
                await asyncio.gather(*(write(each, works[i::at_once]) for i, each in enumerate(conns)))
                seconds[name].append((time.perf_counter() - began, sum(map(own_cpu, pids)) - cpu))
        await conn.execute("DROP TABLE same, beside, checked, bare, texts")
    bases = seconds["COPY, same columns and indexes"], seconds["COPY, and foreign key and trigger"]
    for name, found in seconds.items():
        clock, cpu = (statistics.median(each) for each in zip(*found, strict=True))
        ratios = [statistics.median(b[i] / f[i] for b, f in zip(base, found, strict=True)) for base in bases for i in (0, 1)]
        told = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {rows / clock:.0f} | {rows / cpu:.0f} | {told} | {os.getloadavg()[0]:.1f} |", flush=True)


def own_cpu(pid: int) -> float:
    """Return the CPU seconds of one process; this one has children that are none of the matter."""
    return time.process_time() if pid == os.getpid() else cpu_seconds(pid)


def recall(conn: psycopg.Connection, queries: NDArray[np.float32], metadata: str | None, distance: str = "") -> tuple[float, float]:
    """Return recall@10 against exact search and the median milliseconds; `distance` other than search_by_vector's own if given."""
    shares, times = [], []
    for vector in queries:
        exact = (
            "SELECT c.id FROM document_chunks AS c JOIN file_extractions AS d USING (doc_id) WHERE d.metadata @> coalesce(%s, '{}')::jsonb"
        )
        with conn.transaction():
            conn.execute("SET LOCAL enable_indexscan = off")
            true = {row[0] for row in conn.execute(f"{exact} ORDER BY c.embedding <=> %s LIMIT 10".encode(), [metadata, vector])}
        began = time.perf_counter()
        if distance:
            order = f"SELECT c.id FROM document_chunks AS c WHERE c.embedding_model = '{MODEL}' ORDER BY {distance} LIMIT 10"
            found = {row[0] for row in conn.execute(order.encode(), [vector])}
        else:
            asked = "SELECT chunk_id FROM search_by_vector(%s, %s, metadata => %s)"
            found = {row[0] for row in conn.execute(asked, [vector, MODEL, metadata])}
        times.append(time.perf_counter() - began)
        shares.append(len(found & true) / 10)
    return statistics.mean(shares), statistics.median(times) * 1000


def indexed(settings: Settings, server_pid: int, corpus: Corpus, queries: NDArray[np.float32]) -> None:
    """Build the index in several ways and print what each costs and finds."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        register_vector(conn)
        conn.execute("VACUUM ANALYZE document_chunks")
        rows = conn.execute("SELECT count(*) FROM document_chunks").fetchone()
        assert rows is not None
        dimensions = queries.shape[1]
        print(f"| index over {rows[0]:,} | s | CPU s | rows/s | MB | recall@10 | ms | 5 % of documents | 1 % of documents |\n|{'---|' * 9}")
        for name, (memory, parallel, kind) in INDEXES.items():
            conn.execute("DROP INDEX IF EXISTS built")
            conn.execute(f"SET maintenance_work_mem = '{memory}'".encode())
            conn.execute(f"SET max_parallel_maintenance_workers = {parallel}".encode())
            began, cpu = time.perf_counter(), cpu_seconds(server_pid)
            made = f"((embedding::{kind}({dimensions})) {kind}_cosine_ops) WHERE embedding_model = '{MODEL}'"
            conn.execute(f"CREATE INDEX built ON document_chunks USING hnsw {made}".encode())
            taken, used = time.perf_counter() - began, cpu_seconds(server_pid) - cpu
            size = conn.execute("SELECT pg_relation_size('built') / 1e6").fetchone()
            assert size is not None
            if kind == "vector":
                told = [recall(conn, queries, tags) for tags in (None, '{"five": true}', '{"one": true}')]
                parts = [f"{told[0][0]:.3f} | {told[0][1]:.1f}", *(f"{share:.3f}, {ms:.1f} ms" for share, ms in told[1:])]
            else:
                conn.execute("SET hnsw.ef_search = 200")
                share, ms = recall(conn, queries, None, f"c.embedding::{kind}({dimensions}) <=> %s::{kind}({dimensions})")
                parts = [f"{share:.3f} | {ms:.1f}", "", ""]
            print(f"| {name} | {taken:.0f} | {used:.0f} | {rows[0] / taken:.0f} | {size[0]:.0f} | {' | '.join(parts)} |", flush=True)
            if parallel == 2 and kind == "vector" and memory == "1GB":
                asyncio.run(incremental(settings, corpus))


async def incremental(settings: Settings, corpus: Corpus) -> None:
    async with await psycopg.AsyncConnection.connect(url_of(settings), autocommit=True) as conn:
        await register_vectors(conn)
        works = await claimed(conn, corpus, range(5), "incremental")
        began, cpu = time.perf_counter(), cpu_seconds(conn.info.backend_pid)
        await by_checkpoint("NONE")(conn, works)
        rows = sum(len(work.document.chunks or ()) for work in works)
        clock, used = time.perf_counter() - began, cpu_seconds(conn.info.backend_pid) - cpu
        print(f"into the standing index: {rows / clock:.0f} rows/s, {rows / used:.0f} by the CPU of the backend", flush=True)


async def load(settings: Settings, corpus: Corpus) -> None:
    """Have all documents complete, through checkpoints."""
    async with await psycopg.AsyncConnection.connect(url_of(settings), autocommit=True) as conn:
        await register_vectors(conn)
        await conn.execute("SET synchronous_commit = off")
        for start in range(0, len(corpus), 100):
            await by_checkpoint("NONE")(conn, await claimed(conn, corpus, range(start, min(len(corpus), start + 100)), "load"))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"vectors": 100_000, "rounds": 5, "written": 10_000, "passages": 100, "at-once": 1, "queries": 100}
    for name, usual in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--role", default="NONE")
    parser.add_argument("--only", nargs="*", choices=["written", "index"], default=["written", "index"])
    given = parser.parse_args()
    if not Path(CORPUS).exists():
        print(f"no corpus at {CORPUS}: set DOCMILL_CORPUS")
        return
    corpus = Corpus(jittered(given.vectors), given.passages)
    queries = np.load(CORPUS / "scifact_q.f16.npy").astype(np.float32)[: given.queries]
    with bench_server() as (server, folder):
        server_pid = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
        if "written" in given.only:
            shares = "of COPY, clock | of COPY, CPU | of COPY with key and trigger, clock | the same, CPU"
            print(f"| {given.passages} passages a document | rows/s | rows per CPU s | {shares} | load |\n|{'---|' * 8}")
            settings = fresh_settings(server, folder, "written")
            asyncio.run(written(settings, corpus, given.written, given.passages, given.rounds, given.at_once, given.role))
        if "index" in given.only:
            settings = fresh_settings(server, folder, "indexed")
            asyncio.run(load(settings, corpus))
            indexed(settings, server_pid, corpus, queries)


if __name__ == "__main__":
    main()
