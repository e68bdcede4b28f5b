"""What the last checkpoint stores of passages, as the tables' owner and where row security applies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import psycopg
import pytest

from jobs.pipeline import completing
from jobs.pipeline.checkpoint import Outcome, checkpoint
from jobs.pipeline.claims import NotClaimed, claim_document
from jobs.pipeline.work import Work
from jobs.vector_array import register_vectors
from models.chunks import Chunk
from models.documents import Document, FileType
from models.stages import Milestone, State
from tests.integration.conftest import sha
from tests.walls import MODEL, Walls

HEADINGS = ('a "quoted" word', "back\\slash", "{braces, commas}", "", "NULL", " blank ", "ümlaut\nline")
METADATA: tuple[dict[str, Any], ...] = (
    {},
    {"rows": [1, None], "of": {"Maß „für“ 量": 'a "quoted" back\\slash, {braces}\n'}},
    {"number": 2.5},
)
STORED = """SELECT id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, page_start, page_end,
    char_start, char_end, language, metadata, embedding, embedding_model, fulltext IS NOT NULL
    FROM document_chunks WHERE doc_id = ANY(%s) ORDER BY doc_id, chunk_index"""


def made(work: Work, texts: Sequence[str], language: str | None) -> Work:
    """Give a document passages that leave no column to chance."""
    chunks = [
        Chunk(uuid5(NAMESPACE_URL, f"{work.document.doc_id} {number}"), number, text, sha(text), HEADINGS if number == 0 else (),
              None if number == 1 else number + 1, None if number == 1 else number + 2, number, number + len(text),
              METADATA[number % len(METADATA)])
        for number, text in enumerate(texts)
    ]  # fmt: skip
    text = "\n".join(texts)
    work.document = replace(
        work.document, milestone=Milestone.COMPLETE, file_type=FileType.TEXT, mime_type="text/plain", markdown=text, parser="plain 1",
        markdown_sha256=sha(text), chunks=tuple(chunks), vectors=np.random.default_rng(1).standard_normal((len(texts), 8), np.float32),
        embedding_model=MODEL, raw_extraction={"language": language and {"code": language}},
    )  # fmt: skip
    return work


def expected(document: Document, language: str | None) -> list[tuple[Any, ...]]:
    assert document.chunks is not None and document.vectors is not None
    return [
        (chunk.id, document.doc_id, document.user_id, document.version, chunk.index, chunk.content, chunk.content_sha256,
         list(chunk.heading_path), chunk.page_start, chunk.page_end, chunk.char_start, chunk.char_end, language, chunk.metadata,
         vector.tolist(), MODEL, True)
        for chunk, vector in zip(document.chunks, document.vectors, strict=True)
    ]  # fmt: skip


@pytest.fixture
async def conn(walls: Walls) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of the tables' owner, of which nothing stays."""
    async with await psycopg.AsyncConnection.connect(walls.url("postgres"), autocommit=True) as conn:
        await register_vectors(conn)
        async with conn.transaction(force_rollback=True):
            yield conn


@pytest.mark.parametrize("role", ["postgres", "docmill_worker"])
@pytest.mark.parametrize("together", [False, True])
async def test_passages_are_stored_as_they_are_by_whoever_stores_them(
    conn: psycopg.AsyncConnection[Any], role: str, together: bool
) -> None:
    texts = {"a": (["Ein Maß für Maß.", "second", "x\ty\n\\N \\."] * 100, "de"), "b": (["one"], None)}
    for name in texts:
        await conn.execute("SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => %s)", [name, sha(name)])
    await conn.execute(f"SET LOCAL ROLE {role}".encode())
    works = []
    for name, (passages, language) in texts.items():
        work = await claim_document(conn, name, job_id=0, worker="test:1", lease_seconds=60, reconcile_seconds=5, serialise=True)
        assert not isinstance(work, NotClaimed)
        works.append(made(work, passages, language))
    if together:
        assert await completing.complete_free(works, conn, worker="test:1") == set(texts)
    else:
        for work in works:
            await checkpoint(conn, work, Outcome(State.COMPLETE), worker="test:1")
    found = await (await conn.execute(STORED, [list(texts)])).fetchall()
    stored = [(*row[:14], row[14].to_list(), *row[15:]) for row in found]
    assert stored == [row for work in works for row in expected(work.document, texts[work.document.doc_id][1])]
