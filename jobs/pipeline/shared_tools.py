"""What stages use, for documents that are worked on together: one trip to a child, to a thread or to the database for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.adapters import usage
from jobs.adapters.sandbox_child import Answer
from jobs.pipeline.together import NotTogether, Together
from jobs.stages import Embedder, Sandbox, SandboxCall, Tools
from models.documents import Document

P = ParamSpec("P")
R = TypeVar("R")
Vectors = NDArray[np.float32]
_Outcome = tuple[Any, Exception | None, float]


def shared(tools: Tools, together: Together) -> Tools:
    """Return the tools of a document that is worked on together with others of the same user."""
    return replace(
        tools,
        sandbox=_SharedSandbox(tools.sandbox, together),
        in_thread=_SharedThread(together).run,
        known_vectors=partial(_known_vectors, tools, together),
        choose_embedder=partial(_choose_embedder, tools, together),
    )


class _SharedSandbox:
    def __init__(self, sandbox: Sandbox, together: Together) -> None:
        self._sandbox, self._together = sandbox, together

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            answer: Answer = await self._together.ask("sandbox", (function, args, kwargs), self._sandbox.run_each)
        except NotTogether:
            # They have one place, and take no more than one child at a time from the others where each must ask alone.
            async with self._together.in_turn:
                return await self._sandbox.run(function, *args, **kwargs)
        usage.add(cpu_ms=answer.cpu_ms, peak_memory_mb=answer.peak_memory_mb)
        if answer.error is not None:
            raise answer.error
        result: R = answer.result
        return result

    async def run_each(self, calls: Sequence[SandboxCall]) -> list[Answer]:
        return await self._sandbox.run_each(calls)


class _SharedThread:
    def __init__(self, together: Together) -> None:
        self._together = together

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result, error, cpu_ms = await self._together.ask("thread", partial(function, *args, **kwargs), _in_one_thread)
        except NotTogether:
            return await usage.in_thread(function, *args, **kwargs)
        usage.add(cpu_ms=cpu_ms)
        if error is not None:
            raise error
        made: R = result
        return made


async def _in_one_thread(functions: Sequence[Callable[[], Any]]) -> list[_Outcome]:
    return await asyncio.to_thread(lambda: [_outcome(function) for function in functions])


def _outcome(function: Callable[[], Any]) -> _Outcome:
    started = time.thread_time()
    try:
        result, error = function(), None
    except Exception as raised:
        result, error = None, raised
    return result, error, (time.thread_time() - started) * 1000


async def _known_vectors(tools: Tools, together: Together, *documents: Document) -> dict[str, Vectors]:
    """Ask once for the passages of all: they are of one user."""

    async def of_all(asked: list[Document]) -> list[dict[str, Vectors]]:
        return [await tools.known_vectors(*asked)] * len(asked)

    (document,) = documents
    try:
        return await together.ask(("vectors", document.embedding_model), document, of_all)
    except NotTogether:
        return await tools.known_vectors(document)


async def _choose_embedder(tools: Tools, together: Together, *, fresh: bool = False) -> Embedder:
    async def choose() -> Embedder:
        return tools.embedder if tools.choose_embedder is None else await tools.choose_embedder(fresh=fresh)

    async def for_all(asked: list[bool]) -> list[Embedder]:
        return [await choose()] * len(asked)

    try:
        chosen = await together.ask(("embedder", fresh), fresh, for_all)
    except NotTogether:
        chosen = await choose()
    return _SharedEmbedder(chosen, together) if chosen.quick else chosen


class _SharedEmbedder:
    quick = True

    def __init__(self, embedder: Embedder, together: Together) -> None:
        self._embedder, self._together = embedder, together
        self.model, self.dimensions = embedder.model, embedder.dimensions

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> Vectors:
        async def of_all(asked: list[Sequence[str]]) -> list[tuple[Vectors, float]]:
            with usage.measured() as used:
                made = await self._embedder.embed([text for texts in asked for text in texts], kind)
            sizes = [sum(map(len, texts)) for texts in asked]
            each = np.split(made, np.cumsum([len(texts) for texts in asked])[:-1])
            return [(vectors, used.cpu_ms * size / max(1, sum(sizes))) for vectors, size in zip(each, sizes, strict=True)]

        try:
            vectors, cpu_ms = await self._together.ask(("embed", self.model, kind), texts, of_all)
        except NotTogether:
            return await self._embedder.embed(texts, kind)
        usage.add(cpu_ms=cpu_ms)
        return vectors
