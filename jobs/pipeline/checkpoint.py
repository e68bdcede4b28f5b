"""The one transaction that makes completed stages durable. Its first statement is fenced by the claim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from jobs import faults
from jobs.pipeline.claims import Connection, rows
from jobs.pipeline.completing import FencedOff, StaleVectors, complete, drop_served, hold_free, store_texts
from jobs.pipeline.rows import buffer_params, made_params, vector_params
from jobs.pipeline.work import Work
from models.documents import Document
from models.errors import ErrorType, Turn
from models.stages import State
from sql import query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Failure", "FencedOff", "Outcome", "StaleVectors", "advance_free", "checkpoint", "store_vectors"]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a checkpoint records about a failed stage."""

    stage: str
    error_type: ErrorType
    message: str
    traceback: str
    context: dict[str, Any]
    turn: Turn | None = None
    """What it waits for, where a service's breaker or budget says so."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a checkpoint leaves the document. `next_stage` is deferred in the same transaction, `next_delay` seconds from now."""

    state: State
    next_stage: str | None = None
    next_delay: float = 0.0
    retry_count: int = 0
    failure: Failure | None = None
    waits: bool = False
    """Whether the document waits for an outside service, which counts as no attempt."""


async def checkpoint(conn: Connection, work: Work, outcome: Outcome, *, worker: str) -> None:
    """Write what is not durable yet and leave the document in the outcome's state, or raise FencedOff or StaleVectors and write nothing."""
    document = work.document
    if outcome.state is State.COMPLETE:
        await complete(work, conn, worker=worker)
        return
    async with conn.transaction():
        if not await _advance(conn, [work], outcome, worker):
            raise FencedOff
        if outcome.state is State.DUPLICATE and work.served_version is not None:
            # What an earlier version had said is no longer so.
            await drop_served(conn, work)
        if outcome.state is State.FAILED and outcome.failure is not None:
            await conn.execute(query("bury_document"), _burial_params(document, outcome.failure))
        await faults.at(f"in_checkpoint:{document.milestone}", document.doc_id)


async def advance_free(works: Sequence[Work], conn: Connection, *, worker: str, outcome: Outcome) -> set[str]:
    """Write in one transaction what is not durable yet of those of several documents at one milestone that are ours still and that nobody
    else has locked, and leave them in the outcome's state. Return their doc_ids. Whatever is raised: nothing was written of any.
    """
    async with conn.transaction():
        ours = await _advance(conn, await hold_free(conn, works), outcome, worker)
        for work in ours:
            await faults.at(f"in_checkpoint:{work.document.milestone}", work.document.doc_id)
        return {work.document.doc_id for work in ours}


async def _advance(conn: Connection, works: Sequence[Work], outcome: Outcome, worker: str) -> list[Work]:
    """Leave documents at one milestone in the outcome's state, store what has been made of them, and return those that are ours still."""
    found = {row["doc_id"] for row in await rows(conn, "advance_documents", _advance_params(works, outcome, worker))} if works else set()
    ours = [work for work in works if work.document.doc_id in found]
    if ours:
        await _store_results(conn, ours)
    return ours


def _advance_params(works: Sequence[Work], outcome: Outcome, worker: str) -> dict[str, Any]:
    documents = [work.document for work in works]
    turn = outcome.failure.turn if outcome.failure and outcome.state is State.RETRYING else None
    return {
        "worker": worker,
        "milestone": documents[0].milestone,
        "state": outcome.state,
        "retry_count": outcome.retry_count,
        "waits": outcome.waits,
        "error_type": outcome.failure.error_type if outcome.failure else None,
        "error_message": outcome.failure.message if outcome.failure else None,
        "waiting_for": turn and turn.service,
        "waiting_revision": turn and turn.revision,
        "waiting_place": turn and turn.place,
        "next_stage": outcome.next_stage,
        "next_delay": outcome.next_delay,
        "gained": [work.gained for work in works],
        **made_params(works),
    }


def _burial_params(document: Document, failure: Failure) -> dict[str, Any]:
    return {
        "doc_id": document.doc_id,
        "version": document.version,
        "batch_id": document.batch_id,
        "user_id": document.user_id,
        "correlation_id": document.correlation_id,
        "stage": failure.stage,
        "error_type": failure.error_type,
        "error_message": failure.message,
        "traceback": failure.traceback,
        "context": Jsonb(failure.context),
    }


async def _store_results(conn: Connection, works: Sequence[Work]) -> None:
    await store_texts(conn, works)
    cut = [work for work in works if work.document.chunks is not None and work.document.chunks is not work.saved.chunks]
    for passages in buffer_params(*(work.document for work in cut)):
        await conn.execute(query("store_chunk_buffer"), passages)
    for work in cut:
        work.buffered = True
    await _store_made_vectors(conn, works)
    for work in works:
        document = work.document
        if document.raw_extraction is not None and document.raw_extraction is not work.saved.raw_extraction:
            params = {"doc_id": document.doc_id, "version": document.version, "raw_extraction": Jsonb(document.raw_extraction)}
            await conn.execute(query("store_extraction"), params)
            work.buffered = True


async def _store_made_vectors(conn: Connection, works: Sequence[Work]) -> None:
    """Store the vectors that are not durable yet, of all documents of one model together."""
    by_model: dict[str, list[tuple[Document, Iterable[tuple[int, NDArray[np.float32]]]]]] = {}
    for work in works:
        if work.document.vectors is not None and work.document.vectors is not work.saved.vectors:
            by_model.setdefault(str(work.document.embedding_model), []).append((work.document, _not_kept(work)))
            work.buffered = True
    for model, made in by_model.items():
        await store_vectors(conn, model, made)


def _not_kept(work: Work) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the numbers and vectors of passages whose vectors are not durable."""
    document, vectors = work.document, work.document.vectors
    kept = work.kept_vectors if work.kept_model == document.embedding_model else set()
    for chunk, vector in zip(document.chunks or (), () if vectors is None else vectors, strict=True):
        if chunk.index not in kept:
            yield chunk.index, vector


async def store_vectors(
    conn: Connection, model: str, vectors: Sequence[tuple[Document, Iterable[tuple[int, NDArray[np.float32]]]]]
) -> None:
    """Put a model's vectors of passages, each after its passage's number, into the buffer of the version of each document."""
    for made in vector_params(vectors):
        await conn.execute(query("store_vectors"), {**made, "embedding_model": model})
