"""Making the vectors of texts that a re-embedding lacks, a request at a time where each is paid for, past texts that cannot be embedded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jobs.adapters.embedders import HostedEmbedder, SizedText, bisect
from jobs.adapters.usage import in_thread
from jobs.outages import drop_late
from jobs.pipeline.company import Company
from jobs.stages import Embedder
from jobs.stages.embed import refuse_vectors
from models.calls import CallShare
from models.errors import CostLimitReached, PermanentError, RequestRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_REFUSED = 8
"""Texts refused, and none taken, before it is not taken for the texts' fault: no more requests are made then."""

Row = dict[str, Any]
Text = tuple[str, str]
"""A user and the content_sha256 of a text of theirs."""
Vectors = dict[Text, "NDArray[np.float32]"]


class Making:
    """The texts of one batch on their way to an embedder."""

    def __init__(self, embedder: Embedder, passages: Iterable[Row], texts: dict[Text, str], *, seconds: float, company: Company) -> None:
        """`passages` name the documents of the texts for the ledger; `seconds` is what one call may take. A document that must be alone in
        this worker (`company`) waits for what is computed here, but for nothing that waits for others' transactions."""
        self._embedder, self._passages, self._texts, self._seconds, self._company = embedder, passages, texts, seconds, company
        self._keys: list[Text] = []
        self._sized: list[SizedText] = []
        self._took_any = False
        self._most_refused = MOST_REFUSED
        self.refused: dict[Text, PermanentError] = {}
        """Texts that cannot be embedded, and why."""

    async def run(self) -> AsyncIterator[Vectors]:
        """Yield vectors of all texts but those that are refused, unless all are. Raises what else the embedder raises."""
        self._keys = list(self._texts)
        if isinstance(self._embedder, HostedEmbedder):
            async with self._company.shared():
                await self._size(self._embedder)
        for part in self._plan():
            if self._is_hopeless():
                return
            made = await self._try(part)
            if isinstance(made, PermanentError):
                async for found in self._narrow(part, made):
                    yield found
            else:
                yield made

    async def _narrow(self, part: slice, refused: PermanentError) -> AsyncIterator[Vectors]:
        """Embed in halves what was refused as a whole, and note the texts that are refused alone."""
        if part.stop - part.start == 1:
            self.refused[self._keys[part.start]] = refused
            return
        search = bisect(part)
        half = next(search)
        with suppress(StopIteration):
            while not self._is_hopeless():
                made = await self._try(half)
                if not isinstance(made, PermanentError):
                    yield made
                elif half.stop - half.start == 1:
                    self.refused[self._keys[half.start]] = made
                half = search.send(isinstance(made, PermanentError))

    def _is_hopeless(self) -> bool:
        return len(self.refused) >= self._most_refused and not self._took_any

    async def _size(self, embedder: HostedEmbedder) -> None:
        """Note which texts may not be sent at all, and bring the others into the form in which they are."""
        try:
            self._sized = await in_thread(embedder.size, list(self._texts.values()))
        except RequestRefused:
            for key, text in self._texts.items():
                try:
                    self._sized += await in_thread(embedder.size, [text])
                except RequestRefused as refused:
                    self.refused[key] = refused
            self._keys = [key for key in self._texts if key not in self.refused]
            self._most_refused += len(self.refused)

    def _plan(self) -> list[slice]:
        if isinstance(self._embedder, HostedEmbedder):
            return self._embedder.plan(self._sized)
        return [slice(0, len(self._keys))] if self._keys else []

    async def _try(self, part: slice) -> Vectors | PermanentError:
        """Return what one call brings for a part of the texts, or why it cannot be had for all of them together."""
        try:
            return await self._ask(part)
        except CostLimitReached:
            raise  # is about documents
        except PermanentError as refused:
            return refused

    async def _ask(self, part: slice) -> Vectors:
        embedder, keys = self._embedder, self._keys[part]
        async with self._company.shared(), asyncio.timeout(self._seconds) as deadline:
            if isinstance(embedder, HostedEmbedder):
                made = (await embedder.embed_sized(self._sized[part], shares=_shares(self._passages, set(keys)))).value
            else:
                made = await embedder.embed([self._texts[key] for key in keys])
        await drop_late(deadline)
        refuse_vectors(f"Re-embedding with {embedder.model}", made, len(keys), embedder.dimensions)
        self._took_any = True
        return dict(zip(keys, made, strict=True))


def text_of(row: Row) -> Text:
    """Return which text a passage has."""
    return row["user_id"], row["content_sha256"]


def _shares(passages: Iterable[Row], texts: Collection[Text]) -> tuple[CallShare, ...]:
    """Return whom the ledger names for a request with these texts, by length; a text that several documents have is the first one's.

    A re-embedding is no cost of the batch that a document once came with, so none is named.
    """
    left, lengths, users = set(texts), dict[str, int](), dict[str, str]()
    for row in passages:
        if text_of(row) in left:
            left.remove(text_of(row))
            lengths[row["doc_id"]] = lengths.get(row["doc_id"], 0) + len(row["content"])
            users[row["doc_id"]] = row["user_id"]
    total = sum(lengths.values())
    return tuple(CallShare(name, users[name], share=length / total) for name, length in lengths.items())
