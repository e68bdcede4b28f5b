"""This worker's row in the registry, and the watchdog that ends a process which can no longer work.

Both run in the lease thread: they must go on while the event loop does not.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psycopg
from loguru import logger

from jobs.sessions import application_name
from models.settings import Settings
from sql import query

STUCK_EXIT_CODE = 70  # EX_SOFTWARE: a supervisor starts a new process
_GIVE_BACK_MB = 8.0  # growth since the last time from which on the allocator is asked to give back what is free
_LARGE_BLOCK = 256 * 1024  # bytes
_NEW_OBJECTS = 20_000  # after which Python looks for cycles among them; 700 by itself
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass(slots=True)
class Pulse:
    """What the worker says of itself, written by the event loop and read by the lease thread."""

    worker: str
    queues: list[str] | None
    concurrency: int
    jobs: Callable[[], list[int]]
    documents: Callable[[], list[str]]
    stopping: Callable[[], bool]
    has_worked: Callable[[], bool]
    """Whether a job has ended since the worker started."""
    leave: Callable[[], None]
    """Asks the worker, in its event loop, to finish what it has in hand and end."""
    oldest_query_at: Callable[[], float | None]
    """Since when the oldest query of the event loop waits for its answer; None when none does."""
    loop_beat_at: float = field(default_factory=time.monotonic)
    """When the event loop last ran something."""


class Registry:
    """Beats for one worker process."""

    def __init__(self, settings: Settings, pulse: Pulse, loop: asyncio.AbstractEventLoop) -> None:
        self._limit = settings.watchdog_seconds
        self._memory_limit = settings.worker_memory_limit_mb
        self._leaves = False
        keep_no_large_blocks()
        look_for_cycles_seldom()
        self._weighed = resident_mb()
        self._pulse = pulse
        self._loop = loop
        self._last_tick = time.monotonic()
        self._judge_from = self._last_tick + self._limit

    def tick(self, conn: psycopg.Connection) -> None:
        """Write the heartbeat, and end the process if its event loop or its queries are stuck although the database answers here."""
        pulse, memory = self._pulse, self._tidied_mb()
        conn.execute(
            query("beat"),
            {
                "worker": pulse.worker,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "queues": pulse.queues,
                "concurrency": pulse.concurrency,
                "stopping": pulse.stopping(),
                "active_jobs": pulse.jobs(),
                "documents": pulse.documents(),
                "memory_mb": memory,
                "cpu_seconds": time.process_time(),
                "application_name": application_name(),
                "version": version("docmill"),
            },
        )
        self._weigh(memory)
        self._watch()

    def _tidied_mb(self) -> float:
        """Return the resident memory, less what a large document has left behind free: it is given back, or it would never be."""
        memory = resident_mb()
        if memory > self._weighed + _GIVE_BACK_MB:
            give_back_memory()
            self._weighed = memory = resident_mb()
        self._weighed = min(self._weighed, memory)
        return memory

    def _weigh(self, memory: float) -> None:
        """Have the worker leave if it has grown too large; not before it has done a job, or a limit that is too low would stop all work."""
        if not self._leaves and 0 < self._memory_limit < memory and self._pulse.has_worked():
            self._leaves = True
            logger.warning(
                "This worker holds {:.0f} MB of memory, more than {} (WORKER_MEMORY_LIMIT_MB): it finishes what it has in hand and ends",
                memory,
                self._memory_limit,
            )
            self._loop.call_soon_threadsafe(self._pulse.leave)

    def _watch(self) -> None:
        now = time.monotonic()
        slept, self._last_tick = now - self._last_tick, now
        if slept > self._limit / 2:
            # The whole process was paused, or the database away: event loop and queries get their time again.
            self._judge_from = now + self._limit
        self._loop.call_soon_threadsafe(self._beat)
        if now < self._judge_from:
            return
        asked_at = self._pulse.oldest_query_at()
        if now - self._pulse.loop_beat_at > self._limit:
            self._end("its event loop has been stuck")
        if asked_at is not None and now - asked_at > self._limit:
            self._end("a query has hung although the database answers others")

    def _beat(self) -> None:
        self._pulse.loop_beat_at = time.monotonic()

    def _end(self, why: str) -> None:
        logger.critical("This worker ends itself: {} for {:.0f} s (WATCHDOG_SECONDS)", why, self._limit)
        os._exit(STUCK_EXIT_CODE)

    def sign_off(self, conn: psycopg.Connection) -> None:
        """Remove this worker's row."""
        conn.execute(query("sign_off"), {"worker": self._pulse.worker})


def resident_mb() -> float:
    """Return the resident memory of this process in MB; where /proc is missing, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_MB
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def keep_no_large_blocks() -> None:
    """Have large blocks of memory go back to the system as soon as they are freed; with glibc alone, and unless it was told otherwise.

    By itself it raises the size from which on it does so, up to 32 MB, with each such block that is freed; what is smaller then lies in
    pieces between what is in use. And each thread would have an area of its own that keeps what it once needed.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None and not any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        set_option(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        set_option(_M_ARENA_MAX, 1)


def look_for_cycles_seldom() -> None:
    """Have Python look for cycles of garbage less often, and never among what was imported for good: a twentieth of a small document's CPU.

    What documents leave behind is freed by its count; only their tasks and errors are cycles, a few KB each.
    """
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 20, 20)


def give_back_memory() -> None:
    """Return to the system what this process has freed but its allocator keeps, in pieces between what is in use; with glibc alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
