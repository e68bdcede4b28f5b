"""embed: passages become vectors of the model that serves. One that the user already has under that model keeps its vector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jobs.stages import Tools
from models.chunks import Chunk
from models.documents import Document
from models.errors import PermanentError


def missing_texts(chunks: tuple[Chunk, ...], known: dict[str, NDArray[np.float32]]) -> dict[str, str]:
    """Return what must be embedded: content_sha256 -> text, each text once, in order of first appearance."""
    return {chunk.content_sha256: chunk.content for chunk in chunks if chunk.content_sha256 not in known}


def refuse_vectors(name: str, vectors: NDArray[np.float32], count: int, dimensions: int) -> None:
    """Raise a PermanentError unless there is one finite vector of the right size a text."""
    if vectors.shape != (count, dimensions):
        raise PermanentError(f"{name}: the embedder returned shape {vectors.shape} for {count} texts of {dimensions} dimensions.")
    if not np.isfinite(vectors).all():
        raise PermanentError(f"{name}: the embedder returned a vector with NaN or infinity.")


async def run(document: Document, tools: Tools) -> Document:
    """Return the document with one vector a chunk, in order, and the model's name."""
    embedder = tools.embedder if tools.choose_embedder is None else await tools.choose_embedder()
    chunks = document.chunks or ()
    document = replace(document, embedding_model=embedder.model)
    vectors = dict(await tools.known_vectors(document))
    missing = missing_texts(chunks, vectors)
    if missing:
        made = await embedder.embed(list(missing.values()))
        refuse_vectors(document.file_name, made, len(missing), embedder.dimensions)
        vectors.update(zip(missing, made, strict=True))
    rows = [vectors[chunk.content_sha256] for chunk in chunks]
    stacked = np.stack(rows) if rows else np.empty((0, embedder.dimensions), np.float32)
    return replace(document, vectors=stacked, embedded_count=len(missing))
