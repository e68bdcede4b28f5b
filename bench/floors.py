"""Two loops without queue, state or retries, as floors to measure docmill against. Both end with rows in a table and a ready HNSW index."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import replace
from pathlib import Path

import psycopg
from pgvector.psycopg import register_vector

from bench.copying import COPY, TYPES, rows_of
from jobs.adapters.embedders import HashedText, make_embedder
from jobs.adapters.extractor import extract_locally
from jobs.adapters.parsers import parse_file
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from jobs.stages.check import checked
from jobs.stages.chunk import cut
from jobs.stages.parse import join_pages
from models.documents import Document
from models.errors import DocmillError
from models.settings import Settings
from models.stages import Milestone

SIZE, OVERLAP, DIMENSIONS = 1000, 100, 384


def simplest_loop(url: str, paths: list[Path]) -> float:
    """Return the seconds of the least that a program for text files can do: cut at fixed lengths, hash into vectors, COPY, index."""
    embedder = HashedText(DIMENSIONS)
    with psycopg.connect(url) as conn, asyncio.Runner() as runner:
        register_vector(conn)
        conn.execute("CREATE TABLE simplest (id uuid PRIMARY KEY, doc text, seq int, content text, embedding vector(384))")
        conn.commit()
        started = time.perf_counter()
        for path in paths:
            text = path.read_text()
            texts = [text[at : at + SIZE] for at in range(0, max(1, len(text) - OVERLAP), SIZE - OVERLAP)]
            vectors = runner.run(embedder.embed(texts))
            with conn.cursor() as cursor, cursor.copy("COPY simplest FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types(["uuid", "text", "int4", "text", "vector"])
                for i, (part, vector) in enumerate(zip(texts, vectors, strict=True)):
                    copy.write_row((uuid.uuid5(uuid.NAMESPACE_URL, f"{path.name}:{i}:{part}"), path.name, i, part, vector))
            conn.commit()
        build_index(conn, "simplest", DIMENSIONS)
        return time.perf_counter() - started


def bare_loop(settings: Settings, url: str, paths: list[Path]) -> float:
    """Return the seconds of docmill's own work in one process: sniff, parse, cut, embed, extract, COPY, commit, file after file; index."""
    embedder = make_embedder(settings)
    with psycopg.connect(url) as conn, asyncio.Runner() as runner:
        register_vector(conn)
        conn.execute("CREATE TABLE bare (LIKE document_chunks INCLUDING DEFAULTS INCLUDING INDEXES)")
        conn.execute("CREATE TABLE bare_files (name text PRIMARY KEY, markdown text, extraction text)")
        conn.commit()
        runner.run(embedder.embed(["warm"]))
        started = time.perf_counter()
        for path in paths:
            try:
                document = _worked_up(path, settings)
            except DocmillError:
                continue
            vectors = runner.run(embedder.embed([chunk.content for chunk in document.chunks or ()]))
            _store(conn, replace(document, vectors=vectors, embedding_model=embedder.model))
        build_index(conn, "bare", embedder.dimensions)
        return time.perf_counter() - started


def build_index(conn: psycopg.Connection, table: str, dimensions: int) -> None:
    """Build the vector index over everything, as all systems do at the end."""
    conn.execute(f"CREATE INDEX ON {table} USING hnsw ((embedding::vector({dimensions})) vector_cosine_ops)")
    conn.commit()


def _worked_up(path: Path, settings: Settings) -> Document:
    """Do in this process, without limits, what the stages up to `extract` do, but for the vectors."""
    found = sniff(path, path.name)
    parsed = parse_file(StoredFile(path), path.name, found.file_type, found.mime_type, settings.max_pages)
    markdown, marks = join_pages(parsed)
    document = Document(
        doc_id=str(path), version=1, user_id="bench", file_name=path.name, file_path=path.name, milestone=Milestone.UPLOADED,
        markdown=markdown, pages=marks, parser=parsed.parser,
    )  # fmt: skip
    document = checked(document)
    chunks = cut(document.markdown or "", document.pages, doc_id=str(path), size=settings.chunk_size, overlap=settings.chunk_overlap)
    return replace(document, chunks=chunks, raw_extraction=extract_locally(document.markdown or "", document.pages, path.name, {}))


def _store(conn: psycopg.Connection, document: Document) -> None:
    with conn.cursor() as cursor:
        cursor.execute(
            "INSERT INTO bare_files VALUES (%s, %s, %s)", [document.doc_id, document.markdown, json.dumps(document.raw_extraction)]
        )
        with cursor.copy(COPY % b"bare") as copy:
            copy.set_types(TYPES)
            for row in rows_of(document):
                copy.write_row(row)
    conn.commit()
