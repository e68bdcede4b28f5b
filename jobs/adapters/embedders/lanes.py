"""Runs a CPU-bound function over many texts on a few threads, in turn with whoever else is embedding in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from jobs.adapters.usage import in_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Lanes:
    """At most `width` calls at a time. Concurrent callers take turns call by call, so a short document does not wait for a long one."""

    def __init__(self, width: int) -> None:
        self._width = width
        # A semaphore belongs to the event loop that first waits on it, and an embedder may outlive a loop.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def fill(self, function: Callable[[str], NDArray[np.float32]], texts: Sequence[str], rows: NDArray[np.float32]) -> None:
        """Set `rows[i] = function(texts[i])` for all texts. After an error or a cancellation no further text is begun."""
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._width))
        numbered = enumerate(texts)

        async def lane() -> None:
            for index, text in numbered:
                async with slots:
                    rows[index] = await in_thread(function, text)

        lanes = [asyncio.ensure_future(lane()) for _ in range(min(self._width, len(texts)))]
        try:
            await asyncio.gather(*lanes)
        finally:
            for each in lanes:
                each.cancel()
