"""Who may work beside whom in one worker: documents share it, a document under suspicion of crashing it has it to itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress


class Company:
    """A lock that many share or one holds alone. Who waits to be alone goes before newcomers, so that it is not put off for ever."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[Entry]:
        """Be inside together with others. Leaving waits for nothing, so that no cancellation can come in between."""
        await self.open()
        entry = Entry(self)
        try:
            yield entry
        finally:
            entry.leave()

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

    async def open(self) -> None:
        """Return when one more may be inside together with others."""
        await self._until(lambda: not self._alone and not self._waiting_alone)

    async def opens(self, seconds: float) -> bool:
        """Say whether it has opened within so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.open()
                return True
        return False

    def count(self, entries: int) -> None:
        """Note that so many more are inside, or fewer."""
        self._inside += entries
        self._tell()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            await self._news.wait()

    def _tell(self) -> None:
        """Have all who wait look again."""
        self._news.set()
        self._news = asyncio.Event()


class Entry:
    """One who is inside together with others. Whoever is may let more in at once: nobody is alone meanwhile."""

    def __init__(self, company: Company) -> None:
        self._company = company
        self._inside = False
        self._go(inside=True)

    def leave(self) -> None:
        """Be inside no longer, if it still was."""
        self._go(inside=False)

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Be outside for as long as the block takes, which crashes nothing, and come back as a newcomer does."""
        self._go(inside=False)
        try:
            yield
            await self._company.open()
        finally:
            self._go(inside=True)

    def _go(self, *, inside: bool) -> None:
        if inside is not self._inside:
            self._inside = inside
            self._company.count(1 if inside else -1)
