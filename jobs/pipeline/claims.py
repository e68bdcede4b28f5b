"""Claiming a document and taking it in hand as far as it has come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from loguru import logger
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from jobs import clock
from jobs.outages import end_if_cancelled
from jobs.pipeline.work import Work
from jobs.redaction import describe
from models.chunks import Chunk
from models.documents import Document, FileType, PageMark
from models.stages import Milestone, State
from sql import query

Connection = psycopg.AsyncConnection[Any]


# Seconds between two looks whether an equal document has ended. Its end wakes those that wait, and the reconciler those that it missed.
_LONGEST_WAIT = 900.0
_LONGEST_LOOK = 120.0  # seconds between two looks at a document that another transaction holds
_LOOKS = 3  # at a document that could be claimed but was not: it changed between claim and look, or its row is locked


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """Why a claim was refused. `state` is None for a document that is not there; `wait_seconds` is when to look again, if at all."""

    state: State | None
    wait_seconds: float | None = None
    waits_for: str | None = None
    """doc_id of the equal document that is being processed."""
    deleted: bool = False


async def one(conn: Connection, name: str, params: dict[str, Any]) -> DictRow | None:
    """Run a named query and return its first row."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query(name), params)
        return await cursor.fetchone()


async def rows(conn: Connection, name: str, params: dict[str, Any]) -> list[DictRow]:
    """Run a named query and return all its rows."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query(name), params)
        return await cursor.fetchall()


async def settle_batch(pool: AsyncConnectionPool[Connection], batch_id: str) -> None:
    """End a batch if nothing of it is left to do. Where the database will not, a reconciler does: the document's own work is done."""
    try:
        async with pool.connection() as conn:
            await conn.execute(query("settle_batch"), {"batch_id": batch_id})
    except psycopg.Error as error:
        end_if_cancelled(error)
        logger.warning("Nobody looked whether this ends the batch; a reconciler will: {}", describe(error))


async def claim_document(
    conn: Connection, doc_id: str, *, job_id: int, worker: str, lease_seconds: float, reconcile_seconds: float, serialise: bool
) -> Work | NotClaimed:
    """Claim a document, without what its stages need, or say why it cannot be claimed.

    `serialise`: while an equal document of the same user is being processed, this one waits before parse.
    """
    refused, unchanged_for = NotClaimed(None), 0.0
    params = {"doc_id": doc_id, "job_id": job_id, "worker": worker, "lease_seconds": lease_seconds, "serialise": serialise}
    for _ in range(_LOOKS):
        # Two equals that would become the owner of their content at once: the other one has.
        with contextlib.suppress(psycopg.errors.UniqueViolation):
            row = await one(conn, "claim_document", params)
            if row is not None:
                return _work(row, job_id)
        seen = await one(conn, "look_at_document", {"doc_id": doc_id})
        if seen is None:
            deleted = await one(conn, "was_deleted", {"doc_id": doc_id})
            return NotClaimed(None, deleted=deleted is not None and deleted["deleted"])
        refused = _refusal(seen, reconcile_seconds)
        if refused.state not in (State.QUEUED, State.RETRYING) or (refused.wait_seconds or 0) > 1:
            return refused
        if serialise and (owner := await one(conn, "look_at_owner", {"doc_id": doc_id})) is not None:
            # Looks again at ever longer intervals, and not before the other one goes on: there may be thousands that do.
            wait = max(1.0, owner["waited_seconds"] or 0.0, owner["wait_seconds_left"] or 0.0)
            return replace(refused, wait_seconds=min(_LONGEST_WAIT, wait), waits_for=owner["doc_id"])
        unchanged_for = seen["unchanged_seconds"]
    # Free by its state and yet not claimed: somebody's transaction holds it, perhaps with a whole backlog, and may be in no hurry.
    return replace(refused, wait_seconds=max(refused.wait_seconds or 0.0, min(_LONGEST_LOOK, unchanged_for / 4)))


async def take_along(
    conn: Connection, work: Work, *, worker: str, lease_seconds: float, serialise: bool, at_most: int, max_kb: int, max_documents: int
) -> list[Work]:
    """Fetch and claim small documents that wait for the same stage behind one that has just been claimed: see its SQL function.

    An empty list where the database refuses: two workers may have wished for equal documents at once.
    """
    params = {
        "job_id": work.job_id,
        "worker": worker,
        "lease_seconds": lease_seconds,
        "serialise": serialise,
        "at_most": at_most,
        "max_bytes": max_kb * 1000,
        "max_documents": max_documents,
    }
    try:
        return [_work(row, row["claim_job_id"]) for row in await rows(conn, "take_along", params)]
    except psycopg.Error as error:
        logger.debug("No documents are taken along: {}", describe(error))
        return []


def _refusal(seen: DictRow, reconcile_seconds: float) -> NotClaimed:
    state = State(seen["state"])
    if state is State.WORKING:
        # Once the lease has expired, the reconciler judges; this job comes back after it has.
        return NotClaimed(state, max(0.0, seen["lease_seconds_left"] or 0.0) + reconcile_seconds)
    if state in (State.QUEUED, State.RETRYING):
        return NotClaimed(state, max(1.0, seen["wait_seconds_left"] or 0.0))
    return NotClaimed(state)


def _work(row: DictRow, job_id: int) -> Work:
    document = Document(
        doc_id=row["doc_id"],
        version=row["version"],
        user_id=row["user_id"],
        file_name=row["file_name"],
        file_path=row["file_path"],
        milestone=Milestone(row["milestone"]),
        batch_id=row["batch_id"],
        correlation_id=row["correlation_id"],
        metadata=row["metadata"],
        file_size=row["file_size"],
        content_sha256=row["content_sha256"],
        file_type=FileType(row["file_type"]) if row["file_type"] else None,
        mime_type=row["mime_type"],
        duplicate_of=row["duplicate_of"],
    )
    return Work(
        document=document,
        saved=document,
        claim=row["claim"],
        job_id=job_id,
        priority=row["priority"],
        served_version=row["served_version"],
        retry_count=row["retry_count"],
        waiting_since=None if row["waited_seconds"] is None else clock.seconds() - row["waited_seconds"],
        suspect=row["crash_count"] > 0,
        may_parse=row["may_parse"],
        is_sole=row["is_sole"],
    )


def has_stored(document: Document) -> bool:
    """Say whether `load_document` would find anything: nothing is stored before a document is parsed."""
    return _reached(document.milestone) >= _reached(Milestone.PARSE_COMPLETE)


def _reached(milestone: Milestone) -> int:
    return list(Milestone).index(milestone)


async def load_document(conn: Connection, document: Document, *, with_text: bool = True) -> Document:
    """Return the document with what earlier checkpoints stored, as far as the stages still to come need it; of its text the digest alone
    where they do without.

    Vectors of two models stay out: those of one were being replaced.
    """
    reached = _reached(document.milestone)
    params = {"doc_id": document.doc_id, "version": document.version}
    if has_stored(document) and not with_text:
        digest = await one(conn, "load_digest", params)
        document = replace(document, markdown_sha256=digest["markdown_sha256"] if digest else None)
    elif has_stored(document) and (row := await one(conn, "load_markdown", params)):
        document = replace(
            document,
            markdown=row["markdown"],
            markdown_sha256=row["markdown_sha256"],
            pages=page_marks(row["page_map"]),
            parser=row["parser"],
            parse_metadata=row["parse_metadata"],
        )
    if reached >= _reached(Milestone.CHUNKS_STORED):
        document = replace(document, chunks=tuple(_chunk(row) for row in await rows(conn, "load_chunks", params)))
    if reached >= _reached(Milestone.EMBEDDINGS_STORED):
        import numpy as np  # noqa: PLC0415 - an idle worker does without

        stored = await rows(conn, "load_vectors", params)
        models = {row["embedding_model"] for row in stored}
        if len(models) < 2:
            found = [row["embedding"].to_numpy() for row in stored]
            vectors = np.stack(found).astype(np.float32) if found else np.empty((0, 0), np.float32)
            document = replace(document, vectors=vectors, embedding_model=next(iter(models), None))
    if reached >= _reached(Milestone.EXTRACTED) and (row := await one(conn, "load_extraction", params)):
        document = replace(document, raw_extraction=row["raw_extraction"])
    return document


def page_marks(page_map: Iterable[Mapping[str, Any]]) -> tuple[PageMark, ...]:
    """Return the page marks of a stored page map."""
    return tuple(PageMark(mark["number"], mark["start"], mark.get("label")) for mark in page_map)


def _chunk(row: DictRow) -> Chunk:
    return Chunk(
        id=row["id"],
        index=row["chunk_index"],
        content=row["content"],
        content_sha256=row["content_sha256"],
        heading_path=tuple(row["heading_path"]),
        page_start=row["page_start"],
        page_end=row["page_end"],
        char_start=row["char_start"],
        char_end=row["char_end"],
        metadata=row["metadata"],
    )
