"""Who may work beside whom in one worker: documents share it, a document under suspicion of crashing it has it to itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Company:
    """A lock that many share or one holds alone. Who waits to be alone goes before newcomers, so that it is not put off for ever."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._alone = False
        self._waiting_alone = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be inside together with others."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone and not self._waiting_alone)
            self._inside += 1
        try:
            yield
        finally:
            await self._leave()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be inside without anybody else."""
        async with self._changed:
            self._waiting_alone += 1
            try:
                await self._changed.wait_for(lambda: not self._alone and not self._inside)
                self._alone = True
            finally:
                self._waiting_alone -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            await self._leave()

    async def _leave(self) -> None:
        # Not interrupted by a cancellation: somebody else waits for this.
        await asyncio.shield(self._count_out())

    async def _count_out(self) -> None:
        async with self._changed:
            if self._alone:
                self._alone = False
            else:
                self._inside -= 1
            self._changed.notify_all()
