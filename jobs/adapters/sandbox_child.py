"""The child's side of the sandbox: what is set up once in a child process, and what happens around each call.

Imported in the child before anything else, so it stays light: the standard library and `models.errors`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import DocmillError, ParseError, RetryableError

MB = 1024 * 1024
INLINE_BYTES = 2048
"""Longest answer sent through the pool's pipe. Larger ones would not be written in one piece, and a child killed in the
middle of a write would leave the pipe, which all children share, unreadable."""
TRIM_ABOVE_MB = 300
TRACEBACK_CHARS = 8000
PR_SET_PDEATHSIG = 1


class Crashed(ParseError):
    """The work took its process down or needed more memory than it may have; other code may manage the same file."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use."""

    timeout: float = 300.0
    """Wall clock, in seconds."""
    memory_mb: int = 4096
    """Address space of the child, not resident memory: parsers reserve far more than they touch."""
    cpu_seconds: int | None = None
    """CPU time over all threads; None for twice the wall clock."""
    max_output_mb: int = 256
    """Largest pickled result, and largest file that the child may write."""
    open_files: int = 256

    @property
    def cpu_limit(self) -> int:
        """The CPU limit in whole seconds."""
        return self.cpu_seconds if self.cpu_seconds is not None else int(self.timeout * 2) + 1


@dataclass(frozen=True, slots=True)
class Call:
    """One call on its way to a child."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    limits: Limits
    parent: int
    answer_fd: int | None
    """An open, nameless file in the parent that takes a large answer; None where the system has none, then all goes by pipe."""
    answer_inode: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call. `error` or a result; the result is pickled in `payload`, or `size` bytes lie in the parent's file."""

    error: DocmillError | None
    payload: bytes
    size: int
    cpu_ms: float
    peak_memory_mb: float


def prepare_child(limits: Limits, parent: int) -> None:
    """Set a fresh child up: it dies with its parent, hears no signals meant for it, keeps no terminal, and has its limits set.

    This is the one place for whatever else should hold in a child. It runs before any parser is imported.
    """
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the pool's closed pipe ends an idle child
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the line above took hold
    os.setsid()  # its own group: Ctrl-C in a terminal is not for parsers, and the parent can kill the whole group
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the parent decides when a parse ends
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # parsers print; hostile files could make them print terminal escapes
        os.dup2(null, stream)
    os.close(null)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_mb * MB, limits.memory_mb * MB))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.max_output_mb * MB, limits.max_output_mb * MB))
    files = min(limits.open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def answer(call: Call) -> Answer:
    """Run the call and pack what came of it. Raises nothing but what the pool itself needs."""
    _allow_cpu_seconds(call.limits)
    _reset_peak_memory()
    cpu_before = _cpu_ms()
    payload = b""
    error: DocmillError | None = None
    try:
        payload = _run(call)
        if len(payload) > call.limits.max_output_mb * MB:
            error = ParseError(f"The result is {len(payload) / MB:,.0f} MB, over the output limit of {call.limits.max_output_mb} MB.")
    except BaseException as caught:  # whatever a parser throws, Rust panics and SystemExit included, is this call's outcome
        error = _as_docmill_error(caught, call.limits)
        del caught
    spent = _cpu_ms() - cpu_before
    peak = _peak_memory_mb()
    if peak > TRIM_ABOVE_MB:
        _give_memory_back()
    if error is not None:
        return Answer(error, b"", 0, spent, peak)
    if len(payload) > INLINE_BYTES and call.answer_fd is not None and _write_to_parent(call, payload):
        return Answer(None, b"", len(payload), spent, peak)
    return Answer(None, payload, 0, spent, peak)


def _run(call: Call) -> bytes:
    return pickle.dumps(call.function(*call.args, **call.kwargs), protocol=pickle.HIGHEST_PROTOCOL)


def _as_docmill_error(caught: BaseException, limits: Limits) -> DocmillError:
    """Translate what a call raised; our own errors come through as they are. The child's traceback goes along as a note."""
    error: DocmillError
    if isinstance(caught, DocmillError):
        error = caught
    elif isinstance(caught, MemoryError):
        error = Crashed(f"Parsing needed more memory than the limit of {limits.memory_mb} MB.")
    elif isinstance(caught, RecursionError):
        error = ParseError("The content is nested deeper than the parser can follow.")
    else:
        error = ParseError(f"The parser failed with {type(caught).__name__}: {str(caught)[:1000]}")
    trace = "".join(traceback.format_exception(caught, limit=-20))[-TRACEBACK_CHARS:]
    error.add_note(f"In the sandbox:\n{trace}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, to see whether the error survives the trip
    except Exception:
        return RetryableError(f"{type(error).__name__}: {error}") if isinstance(error, RetryableError) else ParseError(str(error))
    return error


def _write_to_parent(call: Call, payload: bytes) -> bool:
    """Write the answer into the parent's nameless file. False if this system does not let a child open it."""
    try:
        with Path(f"/proc/{call.parent}/fd/{call.answer_fd}").open("r+b") as file:
            if os.fstat(file.fileno()).st_ino != call.answer_inode:
                return False  # the parent gave the call up and uses the number for something else
            file.write(payload)
    except OSError:
        return False
    return True


def _allow_cpu_seconds(limits: Limits) -> None:
    """Move the CPU limit ahead by one call's worth; the kernel counts from the start of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + max(1, limits.cpu_limit) + 1, hard))


def _give_memory_back() -> None:
    """Return what a hungry call freed to the system, so that a child does not keep it for the rest of its life. glibc only."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_ms() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1000


def _reset_peak_memory() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory_mb() -> float:
    """Highest resident memory since the last reset; where /proc is missing, since the child began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024
