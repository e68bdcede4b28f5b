"""embed: passages become vectors of the model that serves. One that the user already has under that model keeps its vector."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from jobs.adapters.embedders import HostedEmbedder, SizedText, bisect
from jobs.stages import Embedded, Embedder, Tools
from models.chunks import Chunk
from models.documents import Document
from models.errors import PermanentError, RequestRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

AT_ONCE = 1024
"""Texts that a local embedder is given with one call."""


def missing_texts(chunks: tuple[Chunk, ...], known: Mapping[str, Vectors]) -> dict[str, str]:
    """Return what must be embedded: content_sha256 -> text, each text once, in order of first appearance."""
    return {chunk.content_sha256: chunk.content for chunk in chunks if chunk.content_sha256 not in known}


def refuse_vectors(name: str, vectors: Vectors, count: int, dimensions: int) -> None:
    """Raise a PermanentError unless there is one finite vector of the right size a text."""
    import numpy as np  # noqa: PLC0415 - an idle worker does without

    if vectors.shape != (count, dimensions):
        raise PermanentError(f"{name}: the embedder returned shape {vectors.shape} for {count} texts of {dimensions} dimensions.")
    if not np.isfinite(vectors).all():
        raise PermanentError(f"{name}: the embedder returned a vector with NaN or infinity.")


async def run(document: Document, tools: Tools) -> Document:
    """Return the document with one vector a chunk, in order, and the model's name. What a service is paid for is kept on the way.

    PermanentError: the service refuses a passage, which the message names. Otherwise what the embedder raises.
    """
    embedder = tools.embedder if tools.choose_embedder is None else await tools.choose_embedder()
    chunks = document.chunks or ()
    document = replace(document, embedding_model=embedder.model)
    known = dict(await tools.known_vectors(document))
    if isinstance(embedder, HostedEmbedder) and tools.paid is not None:
        kept = await tools.paid.kept_vectors(embedder.model)
        known.update((chunks[index].content_sha256, vector) for index, vector in kept.items())
    missing = missing_texts(chunks, known)
    vectors = _in_order(chunks, known, embedder.dimensions)
    known.clear()
    places = _places(chunks, missing)
    async for made in _embed(document, embedder, missing, tools):
        for sha256 in made:
            vectors[places[sha256]] = made[sha256]
        made.clear()  # the next ones need its room
    for row, chunk in enumerate(chunks):
        if (first := places.get(chunk.content_sha256, row)) != row:
            vectors[row] = vectors[first]
    return replace(document, vectors=vectors, embedded_count=len(missing))


def _in_order(chunks: tuple[Chunk, ...], known: Mapping[str, Vectors], dimensions: int) -> Vectors:
    """Return one row a chunk, those of unknown texts still to be filled in: all vectors are too large to lie in memory twice."""
    import numpy as np  # noqa: PLC0415 - an idle worker does without

    rows = np.zeros((len(chunks), dimensions), np.float32)
    for row, chunk in zip(rows, chunks, strict=True):
        if chunk.content_sha256 in known:
            row[:] = known[chunk.content_sha256]
    return rows


def _places(chunks: tuple[Chunk, ...], missing: Collection[str]) -> dict[str, int]:
    """Return where each missing text stands first: content_sha256 -> row."""
    places: dict[str, int] = {}
    for row, chunk in enumerate(chunks):
        if chunk.content_sha256 in missing:
            places.setdefault(chunk.content_sha256, row)
    return places


async def _embed(document: Document, embedder: Embedder, missing: Mapping[str, str], tools: Tools) -> AsyncIterator[dict[str, Vectors]]:
    """Yield vectors by content_sha256 until there is one a missing text."""
    if not missing:
        return
    if not isinstance(embedder, HostedEmbedder):
        texts = iter(missing.items())
        while part := dict(islice(texts, AT_ONCE)):
            made = await embedder.embed(list(part.values()))
            refuse_vectors(document.file_name, made, len(part), embedder.dimensions)
            found = dict(zip(part, made, strict=True))
            del made  # lives in what is found
            yield found
        return
    async for found in _Hosted(document, embedder, missing, tools).run():
        yield found


class _Hosted:
    """The texts of one document on their way to a service."""

    def __init__(self, document: Document, embedder: HostedEmbedder, missing: Mapping[str, str], tools: Tools) -> None:
        self._document, self._embedder, self._paid, self._in_thread = document, embedder, tools.paid, tools.in_thread
        self._hashes, self._texts = list(missing), list(missing.values())
        self._sized: list[SizedText] = []
        self._places: dict[str, list[int]] = {}
        for chunk in document.chunks or ():
            self._places.setdefault(chunk.content_sha256, []).append(chunk.index)

    async def run(self) -> AsyncIterator[dict[str, Vectors]]:
        """Yield what each request brings, once it is kept; PermanentError for a text that cannot be embedded."""
        self._sized = await self._size()
        start, end = 0, len(self._sized)
        while start < end:
            made = await self._embed(slice(start, end))
            part = slice(start, start + made.count)
            if made.refused is None:
                yield await self._kept(part, made)
            else:
                async for found in self._narrow(part, made.refused):
                    yield found
            start = part.stop

    async def _size(self) -> list[SizedText]:
        """Return the texts as they are sent; PermanentError for one that cannot be sent."""
        try:
            return await self._in_thread(self._embedder.size, self._texts)
        except RequestRefused:
            for index, text in enumerate(self._texts):
                try:
                    await self._in_thread(self._embedder.size, [text])
                except RequestRefused as refused:
                    raise self._refused(index, refused) from None
            raise

    async def _embed(self, part: slice, *, alone: bool = False) -> Embedded:
        """Embed the first texts of a part with one request."""
        texts = self._sized[part]
        if self._paid is not None:
            return await self._paid.embed(self._embedder, texts, alone=alone)
        first = self._embedder.plan(texts)[0]
        try:
            return Embedded(first.stop, (await self._embedder.embed_sized(texts[first])).value)
        except RequestRefused as refused:
            return Embedded(first.stop, None, refused)

    async def _kept(self, part: slice, made: Embedded) -> dict[str, Vectors]:
        """Keep the vectors of a part and return them by content_sha256."""
        assert made.vectors is not None
        refuse_vectors(self._document.file_name, made.vectors, made.count, self._embedder.dimensions)
        found = dict(zip(self._hashes[part], made.vectors, strict=True))
        if self._paid is not None:
            places = {index: vector for sha256, vector in found.items() for index in self._places[sha256]}
            await self._paid.keep_vectors(self._embedder.model, places)
        return found

    async def _narrow(self, part: slice, refused: RequestRefused) -> AsyncIterator[dict[str, Vectors]]:
        """Embed in halves a part that was refused as a whole, and raise a PermanentError for the first text that is refused alone."""
        if part.stop - part.start == 1:
            raise self._refused(part.start, refused)
        search = bisect(part)
        half = next(search)
        with suppress(StopIteration):  # no half is refused any more: together they were too much
            while True:
                made = await self._embed(half, alone=True)
                if made.refused is None:
                    yield await self._kept(half, made)
                elif half.stop - half.start == 1:
                    raise self._refused(half.start, made.refused)
                half = search.send(made.refused is not None)

    def _refused(self, index: int, refused: RequestRefused) -> PermanentError:
        chunk = (self._document.chunks or ())[self._places[self._hashes[index]][0]]
        page = "" if chunk.page_start is None else f" on page {chunk.page_start}"
        error = PermanentError(f"{self._document.file_name}: passage {chunk.index}{page} cannot be embedded: {refused}")
        error.call = refused.call
        return error
