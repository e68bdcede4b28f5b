"""A worker's places for documents in work. One that only waits, for a service or for somebody's transaction, lends its place meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

Lend = Callable[[int, float], AbstractContextManager[None]]
"""Lends a place with so many documents in it, whose texts fill so many requests to the service that they wait for; 0 for none."""


def not_lent(documents: int, requests: float) -> AbstractContextManager[None]:
    """Lend no place."""
    return nullcontext()


class Places:
    """Counts as a semaphore does, but may be overdrawn: who comes back to a place that is taken works beside its borrower."""

    def __init__(self, count: int, *, most_documents: int, most_requests: float) -> None:
        """Places are lent while so many documents at most wait in them, whose texts fill so many requests at most; one place always is."""
        self._count, self._free = count, count
        self._most_documents, self._most_requests = most_documents, most_requests
        self._lent, self._documents, self._requests = 0, 0, 0.0
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

    async def close(self, patience: float) -> None:
        """Give nobody a place from now on, and return once all have left; who has lent theirs is waited for as well, but where nobody works
        and nobody leaves for `patience` seconds no longer: somebody's transaction may last for hours.
        """
        self._closed = True
        while self._free - self._lent < self._count:
            self._news.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                if self._free >= self._count:
                    return

    @contextmanager
    def lent(self, documents: int, requests: float) -> Iterator[None]:
        """Lend the caller's place to another for as long as the block takes, where that is still allowed.

        `documents` in it wait, for a service if their texts fill so many `requests`; a part of one counts as such.
        """
        too_many = self._documents + documents > self._most_documents or self._requests + requests > self._most_requests
        if self._lent and too_many:
            yield
            return
        self._lent, self._documents, self._requests = self._lent + 1, self._documents + documents, self._requests + requests
        self.release()
        try:
            yield
        finally:
            self._lent, self._documents, self._requests = self._lent - 1, self._documents - documents, self._requests - requests
            if not self._lent:
                self._requests = 0.0  # what rounding has left
            self._free -= 1


class SharedPlace:
    """A place that several documents are worked on in. It is lent while all that are still in it merely wait."""

    def __init__(self, documents: int, lent: Lend) -> None:
        self._documents, self._waiting, self._lent = documents, 0, lent
        self._requests = 0.0
        self._loan: ExitStack | None = None

    def leave(self) -> None:
        """Be in it no more."""
        self._documents -= 1
        self._look()

    @contextmanager
    def waiting(self, requests: float) -> Iterator[None]:
        """Merely wait for as long as the block takes, with texts that fill so much of a request."""
        self._waiting, self._requests = self._waiting + 1, self._requests + requests
        self._look()
        try:
            yield
        finally:
            self._waiting, self._requests = self._waiting - 1, self._requests - requests
            self._look()

    def _look(self) -> None:
        all_wait = 0 < self._documents <= self._waiting
        if all_wait and self._loan is None:
            self._loan = ExitStack()
            self._loan.enter_context(self._lent(self._documents, self._requests))
        elif not all_wait and self._loan is not None:
            self._loan.close()
            self._loan = None
