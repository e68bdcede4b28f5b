"""A warm pool of child processes for work that may crash, hang or eat memory. One file's harm stays that file's harm.

Kept by pebble's `ProcessPool`: it replaces a child that died and kills one that hangs, also inside C code. What holds inside a
child is written in `sandbox_child`.
"""

from __future__ import annotations

import asyncio
import builtins
import multiprocessing.context
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from pebble import ProcessExpired, ProcessPool

from jobs.adapters import usage
from jobs.adapters.sandbox_child import MB, Answer, Call, Crashed, Limits, answer, prepare_child
from models.errors import RetryableError, TimeoutError

P = ParamSpec("P")
R = TypeVar("R")


class _Child(multiprocessing.context.SpawnProcess):
    """A spawned process that is always stopped at once and with its group: it ignores SIGTERM, which pebble would try for 3 s."""

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            if self.pid is not None and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        super().kill()


class _SpawnContext(multiprocessing.context.SpawnContext):
    """Spawn rather than fork: a child gets none of the worker's threads, sockets and locks."""

    Process = _Child


class _Pool:
    """The pool behind one or more sandboxes: started by the first call, started again if it broke."""

    def __init__(self, children: int, calls_per_child: int, limits: Limits) -> None:
        self._children, self._calls_per_child, self._limits = children, calls_per_child, limits
        self._pool: ProcessPool | None = None
        self._under_way: set[Future[Answer]] = set()
        self._closed = False

    @property
    def started(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    def schedule(self, call: Call) -> Future[Answer]:
        if self._closed:
            raise RetryableError("The sandbox is closed: this worker is stopping.")
        if self._pool is None or not self._pool.active:
            if self._pool is not None:
                threading.Thread(target=_stop, args=(self._pool,), name="stop-broken-sandbox", daemon=True).start()
            self._pool = ProcessPool(
                max_workers=self._children,
                max_tasks=self._calls_per_child,
                initializer=prepare_child,
                initargs=(self._limits, os.getpid()),
                context=_SpawnContext(),
            )
        try:
            future: Future[Answer] = self._pool.schedule(answer, args=(call,), timeout=call.limits.timeout)
        except RuntimeError as error:  # it broke since the question above
            raise BrokenProcessPool(str(error)) from error
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def close(self) -> None:
        """Cancel what is under way and wait for the children's end, about 0.1 s."""
        self._closed = True
        for future in tuple(self._under_way):  # pebble leaves them pending for ever
            future.cancel()
        if self._pool is not None:
            _stop(self._pool)


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()


class ProcessSandbox:
    """Runs functions in child processes with limits on wall clock, CPU, memory and output."""

    def __init__(self, *, children: int = 2, calls_per_child: int = 200, limits: Limits | None = None) -> None:
        """Take the number of children, after how many calls each is replaced, and the limits. Starts nothing yet."""
        self._limits = limits or Limits()
        self._pool = _Pool(children, calls_per_child, self._limits)

    @property
    def started(self) -> bool:
        """Whether children have been started."""
        return self._pool.started

    def with_timeout(self, seconds: float) -> ProcessSandbox:
        """Return a view of the same children with another wall clock, and the CPU limit that goes with it."""
        view = object.__new__(ProcessSandbox)
        view._limits = replace(self._limits, timeout=seconds)
        view._pool = self._pool
        return view

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run an importable function in a child and return what it returns; arguments and result travel pickled.

        A crash or the memory limit is a Crashed, which is a ParseError; the output limit is a ParseError, a limit on wall clock
        or CPU a TimeoutError. Docmill's own errors come through as raised, others as ParseError naming their class. Cancelling
        the caller kills the child's call. If the pool itself breaks twice in a row the error is retryable.
        """
        try:
            return await self._run_once(function, args, kwargs)
        except BrokenProcessPool:  # an idle child was killed from outside; the call had not begun
            try:
                return await self._run_once(function, args, kwargs)
            except BrokenProcessPool as error:
                raise RetryableError("The sandbox's child processes end before they can work (killed from outside?).") from error

    async def _run_once(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        answer_fd = os.memfd_create("docmill-answer") if hasattr(os, "memfd_create") else None
        try:
            inode = os.fstat(answer_fd).st_ino if answer_fd is not None else 0
            call = Call(function, args, kwargs, self._limits, os.getpid(), answer_fd, inode)
            try:
                result = await asyncio.wrap_future(self._pool.schedule(call))
            except ProcessExpired as expired:
                raise self._crash(expired.exitcode) from expired
            except BrokenProcessPool:
                raise
            except builtins.TimeoutError as late:
                raise TimeoutError(f"Parsing was stopped at the time limit of {self._limits.timeout:g} s.") from late
            usage.add(cpu_ms=result.cpu_ms, peak_memory_mb=result.peak_memory_mb)
            if result.error is not None:
                raise result.error
            if result.size > 16 * MB:
                value: R = await asyncio.to_thread(_read_answer, result, answer_fd)
            else:
                value = _read_answer(result, answer_fd)
            return value
        finally:
            if answer_fd is not None:
                os.close(answer_fd)

    def _crash(self, exitcode: int) -> Crashed | TimeoutError:
        """Name what ended a child: a signal when the code is negative, as multiprocessing tells it."""
        if exitcode == -signal.SIGXCPU:
            return TimeoutError(f"Parsing was stopped at the CPU limit of {self._limits.cpu_limit} s.")
        how = f"exit code {exitcode}"
        if exitcode < 0:
            with suppress(ValueError):
                how = f"signal {signal.Signals(-exitcode).name}"
        hint = f"; often the memory limit of {self._limits.memory_mb} MB" if exitcode in {-signal.SIGABRT, -signal.SIGKILL} else ""
        return Crashed(f"The parser crashed ({how}{hint}).")

    async def aclose(self) -> None:
        """Stop the children at once; calls under way are cancelled. Later calls are refused."""
        await asyncio.to_thread(self._pool.close)


def _read_answer(result: Answer, answer_fd: int | None) -> Any:
    payload = result.payload
    if result.size and answer_fd is not None:
        payload = os.pread(answer_fd, result.size, 0)
        while len(payload) < result.size:  # one read returns at most 2 GB
            payload += os.pread(answer_fd, result.size - len(payload), len(payload))
    return pickle.loads(payload)  # noqa: S301 - from our own child; pebble's pipe carries pickles in any case
