"""The last checkpoint: finished versions are swapped in for readers, of one document or of several in the same transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from jobs import faults
from jobs.pipeline.claims import Connection, one, rows
from jobs.pipeline.rows import (
    chunk_params,
    digest_params,
    has_new_digest,
    has_new_text,
    made_params,
    markdown_params,
    parts,
    small_markdown_params,
)
from jobs.pipeline.work import Work
from models.documents import Document
from sql import query


class FencedOff(Exception):
    """The claim has moved on: another worker, a new version, a cancel or a delete. Nothing was written."""


class StaleVectors(Exception):
    """Another model has come to serve searches since the document was embedded. Nothing was written."""


async def complete(work: Work, conn: Connection, *, worker: str) -> None:
    """Complete a document in a transaction. FencedOff, StaleVectors, and whatever else is raised: nothing was written."""
    async with conn.transaction():
        if not await _complete([work], conn, worker):
            raise FencedOff


async def complete_free(works: Sequence[Work], conn: Connection, *, worker: str) -> set[str]:
    """Complete in one transaction those of several documents that are ours still and that nobody else has locked. Return their doc_ids.

    StaleVectors, and whatever else is raised: nothing was written of any.
    """
    async with conn.transaction():
        return await _complete(await hold_free(conn, works), conn, worker)


async def hold_free(conn: Connection, works: Sequence[Work]) -> list[Work]:
    """Lock those of several documents that are ours still and that nobody else has locked, and return them."""
    given = {"doc_ids": [work.document.doc_id for work in works], "claims": [work.claim for work in works]}
    free = {row["doc_id"] for row in await rows(conn, "hold_documents", given)}
    return [work for work in works if work.document.doc_id in free]


async def store_texts(conn: Connection, works: Sequence[Work]) -> None:
    """Store the markdown of documents, or what has changed beside it, where it is not durable yet."""
    texts = [work.document for work in works if has_new_text(work)]
    if len(texts) == 1:
        await conn.execute(query("store_markdown"), markdown_params(texts[0]))
    elif texts:
        await conn.execute(query("store_small_markdowns"), small_markdown_params(texts))
    for work in works:
        if has_new_digest(work):
            await conn.execute(query("store_digest"), digest_params(work.document))


async def _complete(works: Sequence[Work], conn: Connection, worker: str) -> set[str]:
    extractions = [Jsonb(work.document.raw_extraction) for work in works]
    params = {"worker": worker, "extractions": extractions, **made_params(works)}
    found = {row["doc_id"] for row in await rows(conn, "complete_documents", params)} if works else set()
    ours = [work for work in works if work.document.doc_id in found]
    if ours:
        await _store(conn, ours)
    for work in ours:
        await faults.at(f"in_checkpoint:{work.document.milestone}", work.document.doc_id)
    return found


async def _store(conn: Connection, works: Sequence[Work]) -> None:
    await store_texts(conn, works)
    replaced = [work for work in works if work.served_version is not None]
    aside = await _aside(conn, [work.document for work in replaced])
    for work in replaced:
        await drop_served(conn, work)
    for passages in chunk_params(*(work.document for work in works)):
        await conn.execute(query("store_chunks"), passages)
    for document, model, vectors in aside:
        await _keep_aside(conn, document, model, vectors)
    # From then on no other model can come to serve until this transaction has ended. To be asked in a statement of its own: the one that
    # stored the passages may have waited for a switch, and sees what was committed before it began.
    serving = await one(conn, "serving_model", {})
    for work in works:
        if serving is not None and serving["embedding_model"] != work.document.embedding_model and not work.takes_any_model:
            raise StaleVectors
        if work.buffered:
            await conn.execute(query("clear_buffers"), {"doc_id": work.document.doc_id, "version": work.document.version})


async def _aside(conn: Connection, documents: Sequence[Document]) -> list[tuple[Document, str, dict[str, Any]]]:
    """Return what a re-embedding, if there is one, has made for passages of versions in service that the new ones have too: each document
    with the model and content_sha256 -> vector."""
    going_over = await one(conn, "going_over_to", {}) if documents else None
    if going_over is None:
        return []
    found: list[tuple[Document, str, dict[str, Any]]] = []
    for document in documents:
        vectors: dict[str, Any] = {}
        for part in parts(dict.fromkeys(chunk.content_sha256 for chunk in document.chunks or ())):
            async with conn.cursor(row_factory=tuple_row, binary=True) as cursor:
                await cursor.execute(query("find_vectors_aside"), {**going_over, "doc_id": document.doc_id, "hashes": part})
                vectors.update(await cursor.fetchall())
        found.append((document, going_over["embedding_model"], vectors))
    return found


async def _keep_aside(conn: Connection, document: Document, model: str, vectors: dict[str, Any]) -> None:
    """Give them to the new version's passages: they may have been paid for."""
    for part in parts((chunk.id, vectors[chunk.content_sha256]) for chunk in document.chunks or () if chunk.content_sha256 in vectors):
        made = {"chunk_ids": [chunk_id for chunk_id, _ in part], "embeddings": [vector for _, vector in part]}
        await conn.execute(query("store_embeddings"), {"embedding_model": model, "doc_ids": [document.doc_id], **made})


async def drop_served(conn: Connection, work: Work) -> None:
    """Take away what readers see of earlier versions, and note whose texts were among it."""
    params = {"doc_id": work.document.doc_id, "version": work.document.version}
    await conn.execute(query("drop_served_chunks"), params)
    work.dropped_texts |= {row["markdown_sha256"] for row in await rows(conn, "drop_other_markdown", params)} - {None}
