"""The one transaction that makes completed stages durable. Its first statement is fenced by the claim."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from psycopg.types.json import Jsonb

from jobs import faults
from jobs.pipeline.claims import Connection, one
from jobs.pipeline.work import Work
from models.documents import Document
from models.errors import ErrorType, Turn
from models.stages import State
from sql import query

_CHUNK_TYPES = [
    "uuid", "text", "text", "int4", "int4", "text", "text", "text[]",
    "int4", "int4", "int4", "int4", "text", "jsonb", "vector", "text",
]  # fmt: skip
_CHUNK_BUFFER_TYPES = ["text", "int4", "int4", "uuid", "text", "text", "text[]", "int4", "int4", "int4", "int4", "jsonb"]
VECTOR_BUFFER_TYPES = ["text", "int4", "int4", "text", "vector"]


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


class FencedOff(Exception):
    """The claim has moved on: another worker, a new version, a cancel or a delete. Nothing was written."""


class StaleVectors(Exception):
    """Another model has come to serve searches since the document was embedded. Nothing was written."""


async def checkpoint(conn: Connection, work: Work, outcome: Outcome, *, worker: str) -> None:
    """Write what is not durable yet and leave the document in the outcome's state, or raise FencedOff or StaleVectors and write nothing."""
    document = work.document
    async with conn.transaction():
        if await one(conn, "advance_document", _advance_params(work, outcome, worker)) is None:
            raise FencedOff
        await _store_results(conn, work, complete=outcome.state is State.COMPLETE)
        if outcome.state is State.DUPLICATE and work.served_version is not None:
            # What an earlier version had said is no longer so.
            await _drop_served(conn, {"doc_id": document.doc_id, "version": document.version})
        if outcome.state is State.FAILED and outcome.failure is not None:
            await conn.execute(query("bury_document"), _burial_params(document, outcome.failure))
        await faults.at(f"in_checkpoint:{document.milestone}", document.doc_id)


def _advance_params(work: Work, outcome: Outcome, worker: str) -> dict[str, Any]:
    document = work.document
    complete = outcome.state is State.COMPLETE
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
        "raw_extraction": Jsonb(document.raw_extraction) if complete else None,
        "events": json.dumps([asdict(event) for event in work.events]),
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


async def _store_results(conn: Connection, work: Work, *, complete: bool) -> None:
    document, saved = work.document, work.saved
    params = {"doc_id": document.doc_id, "version": document.version}
    if document.markdown is not None and (document.markdown is not saved.markdown or document.markdown_sha256 != saved.markdown_sha256):
        await conn.execute(
            query("store_markdown"),
            {
                **params,
                "markdown": document.markdown,
                "markdown_sha256": document.markdown_sha256,
                "page_map": Jsonb([asdict(mark) for mark in document.pages]),
                "parser": document.parser,
                "parse_metadata": Jsonb(dict(document.parse_metadata)),
            },
        )
    if complete:
        if work.served_version is not None:
            await _drop_served(conn, params)
        await copy_rows(conn, "copy_chunks", _CHUNK_TYPES, _chunk_rows(document))
        # From the copy on no other model can come to serve until this transaction has ended.
        serving = await one(conn, "serving_model", {})
        if serving is not None and serving["embedding_model"] != document.embedding_model and not work.takes_any_model:
            raise StaleVectors
        if work.buffered:
            await conn.execute(query("clear_buffers"), params)
        return
    if document.chunks is not None and document.chunks is not saved.chunks:
        await copy_rows(conn, "copy_chunk_buffer", _CHUNK_BUFFER_TYPES, _chunk_buffer_rows(document))
        work.buffered = True
    if document.vectors is not None and document.vectors is not saved.vectors:
        kept = work.kept_vectors if work.kept_model == document.embedding_model else set()
        if work.buffered:
            await conn.execute(query("drop_other_vectors"), {**params, "embedding_model": document.embedding_model, "indexes": list(kept)})
        rows = (row for row in _vector_buffer_rows(document) if row[2] not in kept)
        await copy_rows(conn, "copy_vector_buffer", VECTOR_BUFFER_TYPES, rows)
        work.buffered = True
    if document.raw_extraction is not None and document.raw_extraction is not saved.raw_extraction:
        await conn.execute(query("store_extraction"), {**params, "raw_extraction": Jsonb(document.raw_extraction)})
        work.buffered = True


async def _drop_served(conn: Connection, params: dict[str, Any]) -> None:
    await conn.execute(query("drop_served_chunks"), params)
    await conn.execute(query("drop_other_markdown"), params)


async def copy_rows(conn: Connection, name: str, types: list[str], rows: Iterable[tuple[Any, ...]]) -> None:
    """Send rows to a named COPY, binary."""
    async with conn.cursor() as cursor, cursor.copy(query(name)) as copy:
        copy.set_types(types)
        for row in rows:
            await copy.write_row(row)


def _language(document: Document) -> str | None:
    language = (document.raw_extraction or {}).get("language")
    return language.get("code") if isinstance(language, dict) else language


def _chunk_rows(document: Document) -> Iterable[tuple[Any, ...]]:
    language = _language(document)
    for chunk, vector in zip(document.chunks or (), () if document.vectors is None else document.vectors, strict=True):
        yield (
            chunk.id, document.doc_id, document.user_id, document.version, chunk.index, chunk.content, chunk.content_sha256,
            list(chunk.heading_path), chunk.page_start, chunk.page_end, chunk.char_start, chunk.char_end, language,
            Jsonb(dict(chunk.metadata)), vector, document.embedding_model,
        )  # fmt: skip


def _chunk_buffer_rows(document: Document) -> Iterable[tuple[Any, ...]]:
    for chunk in document.chunks or ():
        yield (
            document.doc_id, document.version, chunk.index, chunk.id, chunk.content, chunk.content_sha256, list(chunk.heading_path),
            chunk.page_start, chunk.page_end, chunk.char_start, chunk.char_end, Jsonb(dict(chunk.metadata)),
        )  # fmt: skip


def _vector_buffer_rows(document: Document) -> Iterable[tuple[Any, ...]]:
    for chunk, vector in zip(document.chunks or (), () if document.vectors is None else document.vectors, strict=True):
        yield document.doc_id, document.version, chunk.index, document.embedding_model, vector
