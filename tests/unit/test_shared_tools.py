"""Documents that are worked on together share trips to a child, and take no more of the sandbox than one place's part otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.adapters.embedders.static import Static
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Crashed, Limits
from jobs.adapters.usage import measured
from jobs.pipeline.shared_tools import shared
from jobs.pipeline.together import Together
from jobs.stages import Tools
from tests.unit import sandbox_work as work

TESTS = (Path(__file__).parents[1],)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[ProcessSandbox]:
    sandbox = ProcessSandbox(children=4, limits=Limits(timeout=30, memory_mb=2048), writable=tmp_path, readable=TESTS, loaded=False)
    yield sandbox
    await sandbox.aclose()


def of_members(sandbox: ProcessSandbox, members: int) -> list[Tools]:
    nothing, together = None, Together(members)
    tools = Tools(nothing, nothing, sandbox, nothing, nothing, nothing, nothing, nothing)  # type: ignore[arg-type]
    return [shared(tools, together) for _ in range(members)]


async def test_where_the_child_is_taken_down_each_asks_alone_and_one_after_another(sandbox: ProcessSandbox) -> None:
    first, culprit, second, third = of_members(sandbox, 4)
    crashed, *found = await asyncio.gather(
        culprit.sandbox.run(work.crash),
        first.sandbox.run(work.seconds_of_a_nap, 0.1),
        second.sandbox.run(work.seconds_of_a_nap, 0.1),
        third.sandbox.run(work.seconds_of_a_nap, 0.1),
        return_exceptions=True,
    )
    assert isinstance(crashed, Crashed)
    naps = sorted(nap for nap in found if isinstance(nap, tuple))
    assert len(naps) == 3
    assert all(end <= begin for (_, end), (begin, _) in pairwise(naps))


async def test_what_each_has_used_is_its_own(sandbox: ProcessSandbox) -> None:
    async def used(tools: Tools, seconds: float) -> float:
        with measured() as usage:
            await tools.sandbox.run(work.burn, seconds)
        return usage.cpu_ms

    short, long = await asyncio.gather(*map(used, of_members(sandbox, 2), (0.01, 0.3)))
    assert long >= 290
    assert short < 290


async def test_each_pays_its_part_of_embedding_all_at_once() -> None:
    """By the length of its texts: nobody counts token by token."""
    together, embedder = Together(2), Static()
    await embedder.embed(["loaded"])

    async def choose(*, fresh: bool = False) -> Static:
        return embedder

    async def used(texts: list[str]) -> tuple[float, NDArray[np.float32]]:
        nothing = None
        tools = shared(Tools(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, choose), together)  # type: ignore[arg-type]
        assert tools.choose_embedder is not None
        with measured() as usage:
            made = await (await tools.choose_embedder()).embed(texts)
        return usage.cpu_ms, made

    texts = [f"some words about number {number} " * 200 for number in range(20)]
    (much, made), (little, few) = await asyncio.gather(used(texts), used(["little"]))
    assert much > little > 0
    assert np.array_equal(made, await embedder.embed(texts))
    assert len(few) == 1
