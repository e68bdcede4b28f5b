"""The child's side of the sandbox: what happens around each call. What is taken from a child is written in `sandbox_confinement`.

Imported before anything else, so it stays light: the standard library and `models.errors`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import resource
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jobs.adapters.sandbox_channel import ANSWER, PART, READY, LongText, loads_carefully, receive_blocking, send_blocking
from jobs.adapters.sandbox_confinement import MB, Limits, Setup, confine
from jobs.adapters.stored_file import StoredFile
from models.errors import DocmillError, NotSent, ParseError, RateLimitError, RetryableError, ServiceUnavailable

__all__ = ["MB", "Answer", "Call", "Crashed", "Limits", "answer", "answer_each", "holds_words_alone", "keep", "serve"]

TRIM_ABOVE_MB = 300
TRACEBACK_CHARS = 8000


class Crashed(ParseError):
    """The work took its process down or needed more memory than it may have; other code may manage the same file."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call on its way to a child."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call: `error`, or the result."""

    error: DocmillError | None
    result: Any
    cpu_ms: float
    peak_memory_mb: float


_channel: list[socket.socket] = []
"""The way to the worker; empty where code that could run in a child runs elsewhere."""
_own_files: dict[str, int] = {}
"""Files of /proc/self that are open since before the child was confined, by name."""


def serve(fd: int, parent: int) -> None:
    """Be a child: set up as the first message says, then answer one call after the other until the worker closes its end."""
    sock = socket.socket(fileno=fd)
    for name, flags in (("clear_refs", os.O_WRONLY), ("status", os.O_RDONLY)):
        with suppress(OSError):
            _own_files[name] = os.open(f"/proc/self/{name}", flags | os.O_CLOEXEC)
    try:
        words, _ = receive_blocking(sock)
        setup: Setup = pickle.loads(words)  # noqa: S301 - the worker's words
        for folder in setup.readable:
            with suppress(ImportError):  # a package is looked for in the folder above it, which is out of reach from then on
                importlib.import_module(folder.name)
        missing = confine(setup, parent)
        os.environ["TMPDIR"], tempfile.tempdir = str(setup.writable), None
        _channel.append(sock)
        send_blocking(sock, READY, pickle.dumps(missing))
        while True:
            payload, files = receive_blocking(sock)
            try:
                send_blocking(sock, ANSWER, answer(payload, files))
            finally:
                for file in files:
                    os.close(file)
    except (EOFError, OSError):
        os._exit(0)  # the worker is gone, or wants no more


def keep(part: Any) -> None:
    """Hand a part of the result over at once: the worker has it even if a limit then ends this child. See `DocmillError.kept`."""
    if _channel:
        send_blocking(_channel[0], PART, pickle.dumps(part, protocol=pickle.HIGHEST_PROTOCOL))


def answer(payload: bytes | bytearray, files: Sequence[int]) -> bytes:
    """Run a pickled call, behind which long texts may stand, and return its pickled Answer. Raises nothing."""
    _reset_peak_memory()
    cpu_before = _cpu_ms()
    packed = b""
    error: DocmillError | None = None
    limits = Limits()
    try:
        call: Call = pickle.loads(payload)  # noqa: S301 - the worker's words
        limits = call.limits
        _allow_cpu_seconds(limits)
        args = [_received(value, files, payload) for value in call.args]
        packed = _packed(None, call.function(*args, **call.kwargs), cpu_before)
        if len(packed) > limits.max_output_mb * MB:
            error = ParseError(f"The result is {len(packed) / MB:,.0f} MB, over the output limit of {limits.max_output_mb} MB.")
    except BaseException as caught:  # whatever a parser throws, Rust panics and SystemExit included, is this call's outcome
        error = _as_docmill_error(caught, limits)
        del caught
    if error is not None:
        packed = _packed(error, None, cpu_before)
    if _peak_memory_mb() > TRIM_ABOVE_MB:
        _give_memory_back()
    return packed


def answer_each(calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]], *files: StoredFile) -> tuple[Answer, ...]:
    """Run calls one after the other and return an Answer each. A StoredFile among their arguments has its place in `files` as its number.

    What was too much for this process is raised: it may have been the calls together, and nobody's own fault.
    """
    found: list[Answer] = []
    for function, args, kwargs in calls:
        before = _cpu_ms()
        error, result = None, None
        try:
            result = function(*(files[value.fd or 0] if isinstance(value, StoredFile) else value for value in args), **kwargs)
        except MemoryError:
            raise
        except BaseException as caught:  # as in `answer`
            error = _as_docmill_error(caught, Limits())
            del caught
        found.append(Answer(error, result, _cpu_ms() - before, 0.0))
    peak = _peak_memory_mb()
    return tuple(replace(one, peak_memory_mb=peak) for one in found)


def _received(value: Any, files: Sequence[int], message: bytes | bytearray) -> Any:
    if isinstance(value, StoredFile):
        return replace(value, fd=files[value.fd or 0])
    return value.text(message) if isinstance(value, LongText) else value


def _packed(error: DocmillError | None, result: Any, cpu_before: float) -> bytes:
    return pickle.dumps(Answer(error, result, _cpu_ms() - cpu_before, _peak_memory_mb()), protocol=pickle.HIGHEST_PROTOCOL)


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
    with suppress(Exception):
        if holds_words_alone(loads_carefully(pickle.dumps(error))):  # it survives the trip
            return error
    return RetryableError(f"{type(error).__name__}: {error}") if isinstance(error, RetryableError) else ParseError(str(error))


def holds_words_alone(error: Any) -> bool:
    """Tell whether an error is none, or one of docmill's with its words and nothing else, and none of a service's: what a child that was
    taken over puts into one would be believed by the worker, or grow beyond all measure when it is shown."""
    if not isinstance(error, DocmillError | None) or error is None:
        return error is None
    others = dict(vars(error))
    notes = others.pop("__notes__", [])
    linked = error.__cause__ or error.__context__ or error.__traceback__
    if others or linked or not isinstance(notes, list) or isinstance(error, RateLimitError | ServiceUnavailable | NotSent):
        return False
    return all(isinstance(word, str) for word in (*error.args, *notes))


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
        os.write(_own_files.get("clear_refs", -1), b"5")


def _peak_memory_mb() -> float:
    """Highest resident memory since the last reset; where /proc is missing, since the child began."""
    with suppress(OSError):
        for line in os.pread(_own_files.get("status", -1), 16_384, 0).splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
