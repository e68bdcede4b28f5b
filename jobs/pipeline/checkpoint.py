"""The one transaction that makes completed stages durable. Its first statement is fenced by the claim."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from psycopg.types.json import Jsonb

from jobs import faults
from jobs.pipeline.claims import Connection, one
from jobs.pipeline.work import Work
from models.chunks import Chunk
from models.documents import Document
from models.errors import ErrorType, Turn
from models.stages import State
from sql import query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
_AT_ONCE = 250
"""Most rows of one statement, whose parameters lie in memory several times on this side and once on the other, vectors of 16,000
dimensions included."""


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
                "markdown": document.markdown.encode(),
                "markdown_sha256": document.markdown_sha256,
                "page_map": Jsonb([asdict(mark) for mark in document.pages]),
                "parser": document.parser,
                "parse_metadata": Jsonb(dict(document.parse_metadata)),
            },
        )
    if complete:
        if work.served_version is not None:
            await _drop_served(conn, params)
        for passages in chunk_params(document):
            await conn.execute(query("store_chunks"), passages)
        # From then on no other model can come to serve until this transaction has ended.
        serving = await one(conn, "serving_model", {})
        if serving is not None and serving["embedding_model"] != document.embedding_model and not work.takes_any_model:
            raise StaleVectors
        if work.buffered:
            await conn.execute(query("clear_buffers"), params)
        return
    if document.chunks is not None and document.chunks is not saved.chunks:
        for part in _parts(document.chunks):
            await conn.execute(query("store_chunk_buffer"), {**params, **_columns(part)})
        work.buffered = True
    if document.vectors is not None and document.vectors is not saved.vectors:
        kept = work.kept_vectors if work.kept_model == document.embedding_model else set()
        if work.buffered:
            await conn.execute(query("drop_other_vectors"), {**params, "embedding_model": document.embedding_model, "indexes": list(kept)})
        made = zip((chunk.index for chunk in document.chunks or ()), document.vectors, strict=True)
        await store_vectors(conn, document, str(document.embedding_model), {index: vector for index, vector in made if index not in kept})
        work.buffered = True
    if document.raw_extraction is not None and document.raw_extraction is not saved.raw_extraction:
        await conn.execute(query("store_extraction"), {**params, "raw_extraction": Jsonb(document.raw_extraction)})
        work.buffered = True


async def _drop_served(conn: Connection, params: dict[str, Any]) -> None:
    await conn.execute(query("drop_served_chunks"), params)
    await conn.execute(query("drop_other_markdown"), params)


async def store_vectors(conn: Connection, document: Document, model: str, vectors: Mapping[int, NDArray[np.float32]]) -> None:
    """Add a model's vectors of passages, named by their numbers, to the buffer of the document's version."""
    params = {"doc_id": document.doc_id, "version": document.version, "embedding_model": model}
    for part in _parts(list(vectors.items())):
        columns = {"indexes": [index for index, _ in part], "embeddings": [vector for _, vector in part]}
        await conn.execute(query("store_vectors"), {**params, **columns})


def chunk_params(document: Document) -> Iterator[dict[str, Any]]:
    """Yield the parameters of `store_chunks` for the document's passages and vectors, so many at a time as one statement takes."""
    whose = {
        "doc_id": document.doc_id, "user_id": document.user_id, "version": document.version,
        "language": _language(document), "embedding_model": document.embedding_model,
    }  # fmt: skip
    made = list(zip(document.chunks or (), () if document.vectors is None else document.vectors, strict=True))
    for part in _parts(made):
        yield {**whose, **_columns([chunk for chunk, _ in part]), "embeddings": [vector for _, vector in part]}


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield so many rows at a time as one statement takes."""
    for start in range(0, len(rows), _AT_ONCE):
        yield rows[start : start + _AT_ONCE]


def _columns(chunks: Sequence[Chunk]) -> dict[str, list[Any]]:
    """Return passages as parameters, a list for each column."""
    return {
        "ids": [chunk.id for chunk in chunks],
        "indexes": [chunk.index for chunk in chunks],
        "contents": [_passing(chunk.content) for chunk in chunks],
        "hashes": [chunk.content_sha256 for chunk in chunks],
        "heading_paths": [_array_text(chunk.heading_path) for chunk in chunks],
        "page_starts": [chunk.page_start for chunk in chunks],
        "page_ends": [chunk.page_end for chunk in chunks],
        "char_starts": [chunk.char_start for chunk in chunks],
        "char_ends": [chunk.char_end for chunk in chunks],
        "metadata": [Jsonb(dict(chunk.metadata)) for chunk in chunks],
    }


def _passing(text: str) -> str:
    """Return a text to be sent and dropped: one that is sent and not ASCII keeps its UTF-8 beside it for as long as it lives."""
    return text if text.isascii() else text.encode().decode()


def _array_text(values: Sequence[str]) -> str:
    """Return texts as Postgres writes an array of them."""
    return "{" + ",".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values) + "}"


def _language(document: Document) -> str | None:
    language = (document.raw_extraction or {}).get("language")
    return language.get("code") if isinstance(language, dict) else language
