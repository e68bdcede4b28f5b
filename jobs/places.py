"""A worker's places for documents in work. One that only waits for an outside service lends its place to another meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Places:
    """Counts as a semaphore does, but may be overdrawn: who comes back to a place that is taken works beside its borrower."""

    def __init__(self, count: int, *, lendable: int) -> None:
        """`lendable`: how many places are lent at most at a time."""
        self._free, self._lendable = count, lendable
        self._news = asyncio.Event()

    async def acquire(self) -> bool:
        """Take a place once one is free."""
        while self._free <= 0:
            self._news.clear()
            await self._news.wait()
        self._free -= 1
        return True

    def release(self) -> None:
        """Leave a place."""
        self._free += 1
        self._news.set()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend the caller's place to another for as long as the block takes, where that is still allowed."""
        if self._lendable <= 0:
            yield
            return
        self._lendable -= 1
        self.release()
        try:
            yield
        finally:
            self._lendable += 1
            self._free -= 1
