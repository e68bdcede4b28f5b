"""A worker's places for documents in work. One that only waits for an outside service lends its place to another meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Places:
    """Counts as a semaphore does, but may be overdrawn: who comes back to a place that is taken works beside its borrower."""

    def __init__(self, count: int, *, lendable: int) -> None:
        """`lendable`: how many places are lent at most at a time."""
        self._count, self._free, self._lendable = count, count, lendable
        self._lent = 0
        self._closed = False
        self._news = asyncio.Event()

    async def acquire(self) -> bool:
        """Take a place once one is free."""
        while self._free <= 0 or self._closed:
            self._news.clear()
            await self._news.wait()
        self._free -= 1
        return True

    def release(self) -> None:
        """Leave a place."""
        self._free += 1
        self._news.set()

    async def close(self) -> None:
        """Give nobody a place from now on, and return once all have left, those included who have lent theirs."""
        self._closed = True
        while self._free - self._lent < self._count:
            self._news.clear()
            await self._news.wait()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the caller's place to another for as long as the block takes, where that is still allowed."""
        if self._lendable <= 0:
            yield
            return
        self._lendable -= 1
        self._lent += 1
        self.release()
        try:
            yield
        finally:
            self._lendable += 1
            self._lent -= 1
            self._free -= 1
