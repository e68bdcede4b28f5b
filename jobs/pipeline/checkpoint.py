"""The one transaction that makes completed stages durable. Its first statement is fenced by the claim."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

from jobs import faults
from jobs.pipeline.claims import Connection, one
from jobs.pipeline.completing import FencedOff, StaleVectors, complete, drop_served
from jobs.pipeline.rows import columns, digest_params, has_new_digest, has_new_text, markdown_params, parts, told
from jobs.pipeline.work import Work
from models.documents import Document
from models.errors import ErrorType, Turn
from models.stages import State
from sql import query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Failure", "FencedOff", "Outcome", "StaleVectors", "checkpoint", "store_vectors"]


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
        if await one(conn, "advance_document", _advance_params(work, outcome, worker)) is None:
            raise FencedOff
        await _store_results(conn, work)
        if outcome.state is State.DUPLICATE and work.served_version is not None:
            # What an earlier version had said is no longer so.
            await drop_served(conn, work)
        if outcome.state is State.FAILED and outcome.failure is not None:
            await conn.execute(query("bury_document"), _burial_params(document, outcome.failure))
        await faults.at(f"in_checkpoint:{document.milestone}", document.doc_id)


def _advance_params(work: Work, outcome: Outcome, worker: str) -> dict[str, Any]:
    document = work.document
    turn = outcome.failure.turn if outcome.failure and outcome.state is State.RETRYING else None
    return {
        "doc_id": document.doc_id,
        "claim": work.claim,
        "worker": worker,
        "milestone": document.milestone,
        "state": outcome.state,
        "retry_count": outcome.retry_count,
        "waits": outcome.waits,
        "gained": work.gained,
        "error_type": outcome.failure.error_type if outcome.failure else None,
        "error_message": outcome.failure.message if outcome.failure else None,
        "waiting_for": turn and turn.service,
        "waiting_revision": turn and turn.revision,
        "waiting_place": turn and turn.place,
        "file_size": document.file_size,
        "content_sha256": document.content_sha256,
        "file_type": document.file_type,
        "mime_type": document.mime_type,
        "page_count": len(document.pages) or None,
        "chunk_count": None if document.chunks is None else len(document.chunks),
        "duplicate_of": document.duplicate_of,
        "events": told(work),
        "finished_job_id": None if outcome.state is State.WORKING else work.job_id,
        "next_stage": outcome.next_stage,
        "next_delay": outcome.next_delay,
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


async def _store_results(conn: Connection, work: Work) -> None:
    document, saved = work.document, work.saved
    params = {"doc_id": document.doc_id, "version": document.version}
    if has_new_text(work):
        await conn.execute(query("store_markdown"), markdown_params(document))
    elif has_new_digest(work):
        await conn.execute(query("store_digest"), digest_params(document))
    if document.chunks is not None and document.chunks is not saved.chunks:
        for part in parts(document.chunks):
            await conn.execute(query("store_chunk_buffer"), {**params, **columns(part)})
        work.buffered = True
    if document.vectors is not None and document.vectors is not saved.vectors:
        kept = work.kept_vectors if work.kept_model == document.embedding_model else set()
        if work.buffered:
            await conn.execute(query("drop_other_vectors"), {**params, "embedding_model": document.embedding_model, "indexes": list(kept)})
        made = zip((chunk.index for chunk in document.chunks or ()), document.vectors, strict=True)
        await store_vectors(conn, document, str(document.embedding_model), (pair for pair in made if pair[0] not in kept))
        work.buffered = True
    if document.raw_extraction is not None and document.raw_extraction is not saved.raw_extraction:
        await conn.execute(query("store_extraction"), {**params, "raw_extraction": Jsonb(document.raw_extraction)})
        work.buffered = True


async def store_vectors(conn: Connection, document: Document, model: str, vectors: Iterable[tuple[int, NDArray[np.float32]]]) -> None:
    """Add a model's vectors of passages, each after its passage's number, to the buffer of the document's version."""
    params = {"doc_id": document.doc_id, "version": document.version, "embedding_model": model}
    for part in parts(vectors):
        made = {"indexes": [index for index, _ in part], "embeddings": [vector for _, vector in part]}
        await conn.execute(query("store_vectors"), {**params, **made})
