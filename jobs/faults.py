"""Faults on purpose: what the fault suite makes a real worker do at named points. Off, and free, unless DOCMILL_FAULTS is set.

One fault a line, `action[:argument]@point[;option=value...]`, for example `kill@after_checkpoint:parse_complete;doc=a;once=/tmp/mark`.
Actions: kill, stop, exit, segfault, abort, memory:MB, sleep:S, block:S, raise:WHAT (an SQLSTATE, an errno name or an exception class).
Points may hold `*`. Options: `doc`, which may hold `*`; `p`, the probability; `once`, a file that the first to come by creates, in whatever
process; `times`, how many may come by before that file counts as there; `after`, how many come by unharmed before.
"""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import errno
import os
import random
import resource
import signal
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import psycopg

from models import errors


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of DOCMILL_FAULTS."""

    action: str
    argument: str
    point: str
    doc: str = "*"
    probability: float = 1.0
    once: str | None = None
    times: int = 1
    after: int = 0

    def hits(self, point: str, doc_id: str) -> bool:
        """Say whether this fault happens now, and take its mark if it does."""
        if not fnmatchcase(point, self.point) or not fnmatchcase(doc_id, self.doc):
            return False
        if self.probability < 1 and random.random() >= self.probability:  # noqa: S311  # chance, not a secret
            return False
        if self.once is None:
            return True
        unharmed = Path(self.once).with_name(f"unharmed-{Path(self.once).name}")
        if any(_taken(f"{unharmed}.{number}") for number in range(self.after)):
            return False
        return any(_taken(f"{self.once}.{number}") for number in range(self.times))


def _taken(mark: str) -> bool:
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def parse(text: str) -> tuple[Fault, ...]:
    """Return the faults that DOCMILL_FAULTS names; a line that is none is a ValueError."""
    return tuple(_parse_line(line.strip()) for line in text.splitlines() if line.strip())


def _parse_line(line: str) -> Fault:
    what, _, rest = line.partition("@")
    action, _, argument = what.partition(":")
    point, *options = rest.split(";")
    given = dict(option.split("=", 1) for option in options)
    if action not in _ACTIONS or not point or not set(given) <= _OPTIONS or ("after" in given and "once" not in given):
        raise ValueError(f"DOCMILL_FAULTS: {line!r} is no fault")
    times, after = int(given.get("times", 1)), int(given.get("after", 0))
    return Fault(action, argument, point, given.get("doc", "*"), float(given.get("p", 1)), given.get("once"), times, after)


def _error(what: str) -> BaseException:
    if what in errno.errorcode.values():
        code = getattr(errno, what)
        return OSError(code, os.strerror(code))
    if len(what) == 5 and any(letter.isdigit() for letter in what):
        return psycopg.errors.lookup(what)(f"injected {what}")
    found = getattr(errors, what, None) or getattr(psycopg, what, None) or getattr(builtins, what)
    error: BaseException = found(f"injected {what}")
    return error


def _exhaust_memory(megabytes: int) -> None:
    """Ask for more memory than this process may have."""
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 10_000_000, before[1]))
    try:
        bytearray(megabytes * 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


async def _act(action: str, argument: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "abort":
            os.abort()
        case "exit":
            os._exit(int(argument or 1))
        case "segfault":
            ctypes.string_at(0)
        case "memory":
            _exhaust_memory(int(argument or 100))
        case "sleep":
            await asyncio.sleep(float(argument))
        case "block":
            time.sleep(float(argument))  # noqa: ASYNC251  # a blocked event loop is the fault
        case _:
            raise _error(argument)


_ACTIONS = frozenset({"kill", "stop", "abort", "exit", "segfault", "memory", "sleep", "block", "raise"})
_OPTIONS = frozenset({"doc", "p", "once", "times", "after"})
_FAULTS = parse(os.environ.get("DOCMILL_FAULTS", ""))


async def at(point: str, doc_id: str = "") -> None:
    """Do what DOCMILL_FAULTS says for this point and document; nothing if it says nothing."""
    for fault in _FAULTS:
        if fault.hits(point, doc_id):
            await _act(fault.action, fault.argument)
