"""What has been made of documents, as parameters of the statements that store it: for each column a list, an array's text or an array."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from jobs.pipeline.work import StageEvent, Work
from jobs.vector_array import VectorArray
from models.chunks import Chunk
from models.documents import Document

T = TypeVar("T")
_AT_ONCE = 256
"""Most rows of one statement, whose parameters lie in memory several times on this side and once on the other, vectors of 16,000
dimensions included."""


def made_params(works: Sequence[Work]) -> dict[str, list[Any]]:
    """Return what the first statement of a checkpoint is told of documents: by what they are ours, and what has become known of them."""
    documents = [work.document for work in works]
    return {
        "doc_ids": [document.doc_id for document in documents],
        "claims": [work.claim for work in works],
        "job_ids": [work.job_id for work in works],
        "file_sizes": [document.file_size for document in documents],
        "hashes": [document.content_sha256 for document in documents],
        "file_types": [document.file_type for document in documents],
        "mime_types": [document.mime_type for document in documents],
        "page_counts": [len(document.pages) or None for document in documents],
        "chunk_counts": [None if document.chunks is None else len(document.chunks) for document in documents],
        "duplicates_of": [document.duplicate_of for document in documents],
        "events": [_told(work) for work in works],
    }


def _told(work: Work) -> str:
    """Return what the audit trail is told of a document, as JSON."""
    return json.dumps([{name: getattr(event, name) for name in StageEvent.__slots__} for event in work.events])


def has_new_text(work: Work) -> bool:
    """Say whether the markdown, or what is stored beside it, is not durable yet."""
    return work.document.markdown is not None and _text_row(work.document) != _text_row(work.saved)


def has_new_digest(work: Work) -> bool:
    """Say whether the markdown is durable, and its digest is not."""
    return work.document.markdown_sha256 != work.saved.markdown_sha256 and not has_new_text(work)


def _text_row(document: Document) -> tuple[int, object, object, object]:
    """What is stored with a text, its digest left out; a text of a stage's own making counts as new, equal or not."""
    return id(document.markdown), document.pages, document.parser, document.parse_metadata


def digest_params(document: Document) -> dict[str, Any]:
    """Return the parameters of `store_digest`."""
    return {"doc_id": document.doc_id, "version": document.version, "markdown_sha256": document.markdown_sha256}


def markdown_params(document: Document) -> dict[str, Any]:
    """Return the parameters of `store_markdown`."""
    return {
        "doc_id": document.doc_id,
        "version": document.version,
        "markdown": (document.markdown or "").encode(),
        "markdown_sha256": document.markdown_sha256,
        "page_map": Jsonb([asdict(mark) for mark in document.pages]),
        "parser": document.parser,
        "parse_metadata": Jsonb(dict(document.parse_metadata)),
    }


def small_markdown_params(documents: Sequence[Document]) -> dict[str, list[Any]]:
    """Return the parameters of `store_small_markdowns`."""
    return {
        "doc_ids": [document.doc_id for document in documents],
        "versions": [document.version for document in documents],
        "markdowns": [document.markdown for document in documents],
        "hashes": [document.markdown_sha256 for document in documents],
        "page_maps": [Jsonb([asdict(mark) for mark in document.pages]) for document in documents],
        "parsers": [document.parser for document in documents],
        "parse_metadata": [Jsonb(dict(document.parse_metadata)) for document in documents],
    }


def chunk_params(*documents: Document) -> Iterator[dict[str, Any]]:
    """Yield the parameters of `store_chunks` for passages and vectors of documents, so many at a time as one statement takes."""
    whose = {
        "doc_ids": [document.doc_id for document in documents],
        "user_ids": [document.user_id for document in documents],
        "versions": [document.version for document in documents],
        "languages": [_language(document) for document in documents],
        "embedding_models": [document.embedding_model for document in documents],
    }
    for part in parts(_passages(documents)):
        passages = columns([chunk for _, _, chunk in part])
        yield {**whose, **passages, "embeddings": VectorArray(_blocks(documents, part)), "whose": _integers(place for place, _, _ in part)}


def buffer_params(*documents: Document) -> Iterator[dict[str, Any]]:
    """Yield the parameters of `store_chunk_buffer` for passages of documents, so many at a time as one statement takes."""
    whose = {"doc_ids": [document.doc_id for document in documents], "versions": [document.version for document in documents]}
    for part in parts((place, chunk) for place, document in enumerate(documents, 1) for chunk in document.chunks or ()):
        yield {**whose, **columns([chunk for _, chunk in part]), "whose": _integers(place for place, _ in part)}


def vector_params(vectors: Sequence[tuple[Document, Iterable[tuple[int, NDArray[np.float32]]]]]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of `store_vectors` but the model for documents, each with the numbers of passages and their vectors."""
    documents = [document for document, _ in vectors]
    whose = {"doc_ids": [document.doc_id for document in documents], "versions": [document.version for document in documents]}
    for part in parts((place, index, vector) for place, (_, own) in enumerate(vectors, 1) for index, vector in own):
        made = {"indexes": _integers(index for _, index, _ in part), "embeddings": VectorArray.of(vector for _, _, vector in part)}
        yield {**whose, **made, "whose": _integers(place for place, _, _ in part)}


def _passages(documents: Sequence[Document]) -> Iterator[tuple[int, int, Chunk]]:
    """Yield passages with the place of their document, from 1, and their own in it, from 0."""
    for place, document in enumerate(documents, 1):
        chunks = document.chunks or ()
        vectors = 0 if document.vectors is None else len(document.vectors)
        if len(chunks) != vectors:
            raise ValueError(f"{document.doc_id} has {len(chunks)} passages, and {vectors} vectors")
        for number, chunk in enumerate(chunks):
            yield place, number, chunk


def _blocks(documents: Sequence[Document], passages: Sequence[tuple[int, int, Chunk]]) -> list[NDArray[np.float32]]:
    """Return the vectors of passages as a slice for each document: a large one has no room for an object for each vector."""
    found = []
    for place, own in groupby(passages, key=itemgetter(0)):
        numbers, vectors = [number for _, number, _ in own], documents[place - 1].vectors
        assert vectors is not None  # as many as passages
        found.append(vectors[numbers[0] : numbers[-1] + 1])
    return found


def parts(rows: Iterable[T]) -> Iterator[list[T]]:
    """Yield so many rows at a time as one statement takes."""
    left = iter(rows)
    while part := list(islice(left, _AT_ONCE)):
        yield part


def columns(chunks: Sequence[Chunk]) -> dict[str, list[Any] | str]:
    """Return passages as parameters, a list or the text of an array for each column."""
    return {
        "ids": [chunk.id for chunk in chunks],
        "indexes": _integers(chunk.index for chunk in chunks),
        "contents": [_passing(chunk.content) for chunk in chunks],
        "hashes": [chunk.content_sha256 for chunk in chunks],
        "heading_paths": [_array_text(chunk.heading_path) for chunk in chunks],
        "page_starts": _integers(chunk.page_start for chunk in chunks),
        "page_ends": _integers(chunk.page_end for chunk in chunks),
        "char_starts": _integers(chunk.char_start for chunk in chunks),
        "char_ends": _integers(chunk.char_end for chunk in chunks),
        "metadata": [_json_text(chunk.metadata) for chunk in chunks],
    }


def _passing(text: str) -> str:
    """Return a text to be sent and dropped: one that is sent and not ASCII keeps its UTF-8 beside it for as long as it lives."""
    return text if text.isascii() else text.encode().decode()


def _integers(values: Iterable[int | None]) -> str:
    """Return integers as the text of a Postgres array. For a list psycopg chooses the type by the greatest number, and the server would
    parse and plan the statement anew for each combination of types."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"


def _json_text(values: Mapping[str, Any]) -> str:
    """Return an object as JSON; most passages have an empty one, which is not worth an encoder each."""
    return json.dumps(dict(values)) if values else "{}"


def _array_text(values: Sequence[str]) -> str:
    """Return texts as Postgres writes an array of them."""
    return "{" + ",".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values) + "}"


def _language(document: Document) -> str | None:
    language = (document.raw_extraction or {}).get("language")
    return language.get("code") if isinstance(language, dict) else language
