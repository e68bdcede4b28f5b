"""Documents per second: both hand-off modes beside a bare loop that does the same work without queue, state or retries.

Usage: python -m bench.throughput [--documents 300] [--rounds 3] [--corpus FOLDER] [--provider hash]
Without --corpus: small text documents. All modes of a round run one after another on the same server; the ratios are medians over the
rounds. Submitting (a durable copy, the row and the first job) is part of docmill's time, and building the HNSW index of everybody's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import psycopg
from jobs.adapters.embedders import make_embedder
from pgvector.psycopg import register_vector

from bench.running import bench_server, fresh_settings, small_documents, submit_all, wait_until_ended, workers
from jobs.adapters.extractor import extract_locally
from jobs.adapters.parsers import parse_file
from jobs.adapters.sniff import sniff
from jobs.pipeline.checkpoint import _CHUNK_TYPES, _chunk_rows
from jobs.stages.check import checked
from jobs.stages.chunk import cut
from jobs.stages.parse import join_pages
from models.documents import Document
from models.errors import DocmillError
from models.settings import Settings
from models.stages import Milestone
from sql import query


def process(path: Path, settings: Settings) -> Document:
    """Do in one process, without limits, what the stages up to `extract` do, but for the vectors."""
    found = sniff(path, path.name)
    parsed = parse_file(str(path), path.name, found.file_type, found.mime_type, settings.max_pages)
    markdown, marks = join_pages(parsed)
    document = Document(
        doc_id=path.name, version=1, user_id="bench", file_name=path.name, file_path=path.name, milestone=Milestone.UPLOADED,
        markdown=markdown, pages=marks, parser=parsed.parser,
    )  # fmt: skip
    document = checked(document)
    chunks = cut(document.markdown or "", document.pages, doc_id=path.name, size=settings.chunk_size, overlap=settings.chunk_overlap)
    return replace(document, chunks=chunks, raw_extraction=extract_locally(document.markdown or "", document.pages, path.name, {}))


def bare_loop(settings: Settings, paths: list[Path]) -> float:
    """The floor: read, parse, cut, embed, extract, COPY, commit, one file after another."""
    embedder = make_embedder(settings)
    assert settings.database_url is not None
    with psycopg.connect(settings.database_url.get_secret_value()) as conn, asyncio.Runner() as runner:
        register_vector(conn)
        conn.execute("CREATE TABLE bare (LIKE document_chunks INCLUDING DEFAULTS INCLUDING INDEXES)")
        conn.execute("CREATE TABLE bare_files (name text PRIMARY KEY, markdown text, extraction text)")
        conn.commit()
        runner.run(embedder.embed(["warm"]))
        started = time.perf_counter()
        for path in paths:
            try:
                document = process(path, settings)
            except DocmillError:
                continue
            vectors = runner.run(embedder.embed([chunk.content for chunk in document.chunks or ()]))
            document = replace(document, vectors=vectors, embedding_model=embedder.model)
            with conn.cursor() as cursor:
                extraction = json.dumps(document.raw_extraction)
                cursor.execute("INSERT INTO bare_files VALUES (%s, %s, %s)", [path.name, document.markdown, extraction])
                with cursor.copy(query("copy_chunks").replace("COPY document_chunks", "COPY bare").encode()) as copy:
                    copy.set_types(_CHUNK_TYPES)
                    for row in _chunk_rows(document):
                        copy.write_row(row)
            conn.commit()
        build_index(conn, "bare", embedder.dimensions)
        return time.perf_counter() - started


def build_index(conn: psycopg.Connection, table: str, dimensions: int) -> None:
    """Build the vector index over everything, as all systems do at the end."""
    conn.execute(f"CREATE INDEX ON {table} USING hnsw ((embedding::vector({dimensions})) vector_cosine_ops)")  # type: ignore[arg-type]
    conn.commit()


def docmill(settings: Settings, paths: list[Path], count: int) -> tuple[float, float]:
    """Submit everything to an idle worker and return the seconds until all is complete and indexed, and those of submitting."""
    assert settings.database_url is not None
    dimensions = make_embedder(settings).dimensions
    with workers(settings, count), psycopg.connect(settings.database_url.get_secret_value(), autocommit=True) as conn:
        warm = paths[0].parent / "warm-up.txt"
        warm.write_text("warm up")
        asyncio.run(submit_all(settings, [warm]))
        wait_until_ended(settings, 1, time.perf_counter(), 60)
        started = time.perf_counter()
        submitting = asyncio.run(submit_all(settings, paths))
        wait_until_ended(settings, len(paths) + 1, started)
        build_index(conn, "document_chunks", dimensions)
        warm.unlink()
        return time.perf_counter() - started, submitting


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--provider", default="hash")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with bench_server() as (server, folder):
        if given.corpus:
            paths = sorted(p for p in given.corpus.rglob("*") if p.is_file() and p.parent.name != "gt" and p.name != "MANIFEST.tsv")
        else:
            paths = small_documents(folder / "documents", given.documents)
        for _ in range(given.rounds):
            settings = fresh_settings(server, folder, "bare", embedding_provider=given.provider)
            seconds.setdefault("bare loop", []).append(bare_loop(settings, paths))
            for mode in ("inline", "queue"):
                settings = fresh_settings(server, folder, mode, embedding_provider=given.provider, handoff=mode)
                whole, submitting = docmill(settings, paths, given.workers)
                seconds.setdefault(mode, []).append(whole)
                seconds.setdefault(f"{mode}: submitting", []).append(submitting)
    floor = statistics.median(seconds["bare loop"])
    print("| what | documents/s | share of the bare loop |\n|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"| {name} | {len(paths) / median:.1f} | {floor / median:.2f} |")


if __name__ == "__main__":
    main()
