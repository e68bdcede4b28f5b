"""What a piece of work cost: CPU time here and in sandbox children, and the highest memory of a child.

Whoever wants to know opens `measured()` around the work; whoever spends calls `add()`. The accumulator travels in a context
variable, so tasks and threads that are started inside the block count into it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Usage:
    """Summed CPU time and the highest resident memory of one child process (0 when nothing ran in a child)."""

    cpu_ms: float = 0.0
    peak_memory_mb: float = 0.0


_current: ContextVar[Usage | None] = ContextVar("docmill_usage", default=None)
_lock = threading.Lock()
_SHORT = 20_000
"""Characters of a text that normalising or cutting takes less than a millisecond for, during which nothing else runs."""


@contextmanager
def measured() -> Iterator[Usage]:
    """Count everything that is added inside the block; an outer block gets the sum when this one ends."""
    usage = Usage()
    token = _current.set(usage)
    try:
        yield usage
    finally:
        _current.reset(token)
        add(cpu_ms=usage.cpu_ms, peak_memory_mb=usage.peak_memory_mb)


def add(*, cpu_ms: float = 0.0, peak_memory_mb: float = 0.0) -> None:
    """Add to the accumulator of this context; nothing happens outside `measured()`. Safe from any thread."""
    usage = _current.get()
    if usage is None:
        return
    with _lock:
        usage.cpu_ms += cpu_ms
        usage.peak_memory_mb = max(usage.peak_memory_mb, peak_memory_mb)


def counted(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function here and add the CPU time that this thread spent on it."""
    started = time.thread_time()
    try:
        return function(*args, **kwargs)
    finally:
        add(cpu_ms=(time.thread_time() - started) * 1000)


async def in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in a thread as `asyncio.to_thread` does, and add the CPU time that the thread spent on it."""
    return await asyncio.to_thread(counted, function, *args, **kwargs)


async def beside(text: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function over a text as `in_thread` does; at once where the text is so short that the way to a thread costs more."""
    return counted(function, *args, **kwargs) if len(text) <= _SHORT else await in_thread(function, *args, **kwargs)
