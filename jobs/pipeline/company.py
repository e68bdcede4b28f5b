"""Who may work beside whom in one worker: documents share it, a document under suspicion of crashing it has it to itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Company:
    """A lock that many share or one holds alone. Who waits to be alone goes before newcomers, so that it is not put off for ever."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be inside together with others. Leaving waits for nothing, so that no cancellation can come in between."""
        await self._until(lambda: not self._alone and not self._waiting_alone)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside without anybody else."""
        self._waiting_alone += 1
        try:
            await self._until(lambda: not self._alone and not self._inside)
            self._alone = True
        finally:
            self._waiting_alone -= 1
            self._tell()
        try:
            yield
        finally:
            self._alone = False
            self._tell()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            await self._news.wait()

    def _tell(self) -> None:
        """Have all who wait look again."""
        self._news.set()
        self._news = asyncio.Event()
