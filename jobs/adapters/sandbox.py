"""A warm pool of child processes for work that may crash, hang, eat memory or be taken over. One file's harm stays that file's harm.

Each child has a channel of its own and is given open files, never paths. What it cannot do is written in `sandbox_confinement`; why no
library is used is in docs/decisions/0013-own-sandbox.md.
"""

from __future__ import annotations

import asyncio
import builtins
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from loguru import logger

from jobs.adapters import usage
from jobs.adapters.sandbox_channel import ANSWER, MOST_FILES, PART, loads_carefully
from jobs.adapters.sandbox_child import MB, Answer, Call, Crashed, Limits, answer_each, holds_words_alone
from jobs.adapters.sandbox_confinement import Setup, let_others_look
from jobs.adapters.sandbox_files import open_all
from jobs.adapters.sandbox_process import Child, Template
from jobs.adapters.sandbox_scratch import remove_abandoned
from jobs.adapters.stored_file import StoredFile
from models.errors import DocmillError, ParseError, RetryableError, TimeoutError

P = ParamSpec("P")
R = TypeVar("R")

CALLS_PER_CHILD = 500
"""So that what a library leaks, or a file has left behind, does not stay. A new child costs some milliseconds, and what it has to load that
the template has not: what reads Word, PDF and the like, up to a tenth of a second."""
CALLS_AT_ONCE = MOST_FILES
"""Of those that share a child's turn: so many that the way there hardly costs, so few that several children have some."""
COMPUTING = 0.9
"""The share of the time limit, in CPU time, from which on a call that ran into it has computed rather than waited, and would again."""

_told: set[str] = set()
"""What has been said of this kernel in this process."""


class Exhausted(ParseError):
    """The work computed until its time was up; other code may manage the same file."""


class ProcessSandbox:
    """Runs functions in child processes with limits on wall clock, CPU, memory and output."""

    def __init__(
        self,
        *,
        children: int = 2,
        calls_per_child: int = CALLS_PER_CHILD,
        limits: Limits | None = None,
        writable: Path | None = None,
        readable: tuple[Path, ...] = (),
        loaded: bool = True,
    ) -> None:
        """Take the number of children, after how many calls each is replaced, the limits, and the one folder that they may write to.

        Without `writable` each child has a scratch folder of its own. `readable` are folders with code beside docmill's own. `loaded`:
        children have what reads plain files and extracts from texts from their first call on. Starts nothing yet.
        """
        self._limits = limits or Limits()
        self._calls_per_child = calls_per_child
        self._setup = Setup(self._limits, writable, readable)
        self._loaded = loaded
        self._template: Template | None = None
        self._slots = asyncio.Semaphore(children)
        self._idle: list[Child] = []
        self._all: set[Child] = set()
        self._closed = False

    @property
    def started(self) -> bool:
        """Whether there are children."""
        return bool(self._all)

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run an importable function in a child and return what it returns, plain values and docmill's own data.

        Each StoredFile among `args` is opened here; what the storage raises comes through. A crash or the memory limit is a Crashed, a
        limit on time that was spent computing an Exhausted, both ParseErrors, as the output limit is; a limit on time that was spent
        waiting is a TimeoutError. What the function handed over by `sandbox_child.keep` before is in the error's `kept`. Docmill's own
        errors come through as raised, others as ParseError naming their class. Cancelling the caller kills the child. If children cannot
        be started the error is retryable.
        """
        return await self._call(1, function, args, kwargs)

    async def _call(self, worth: int, function: Callable[..., R], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> R:
        """`worth`: for how many calls it counts."""
        if self._closed:
            raise RetryableError("The sandbox is closed: this worker is stopping.")
        async with self._slots:
            with ExitStack() as opened:
                named = [value for value in args if isinstance(value, StoredFile)]
                files = await open_all(named, opened) if named else []
                numbers = iter(range(len(files)))
                sent = tuple(replace(value, fd=next(numbers)) if isinstance(value, StoredFile) else value for value in args)
                child = await self._begin(Call(function, sent, kwargs, self._limits), files)
            try:
                answer = await self._answer(child)
            except BaseException:
                self._discard(child)
                raise
            child.calls += worth
            if child.calls < self._calls_per_child and not child.littered and not self._closed:
                self._idle.append(child)
            else:
                self._discard(child)
        child.cpu_ms += _number(answer.cpu_ms)
        usage.add(cpu_ms=_number(answer.cpu_ms), peak_memory_mb=_number(answer.peak_memory_mb))
        if answer.error is not None:
            raise answer.error
        value: R = answer.result
        return value

    async def run_each(self, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]]) -> list[Answer]:
        """Run short calls, each a function, its arguments and its named arguments, and return an Answer each, in order.

        Some of them share a child's turn, with its limits, so what `run` raises when a child crashes or meets a limit is raised for all.
        """
        parts = [calls[start : start + CALLS_AT_ONCE] for start in range(0, len(calls), CALLS_AT_ONCE)]
        return [answer for answers in await asyncio.gather(*map(self._run_part, parts)) for answer in answers]

    async def _run_part(self, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]]) -> Sequence[Answer]:
        files: list[StoredFile] = []
        sent = []
        for function, args, kwargs in calls:
            first = len(files)
            files += [value for value in args if isinstance(value, StoredFile)]
            numbers = iter(range(first, len(files)))
            sent.append((function, tuple(replace(v, fd=next(numbers)) if isinstance(v, StoredFile) else v for v in args), kwargs))
        answers = await self._call(len(calls), answer_each, (sent, *files), {})
        if len(answers) != len(calls) or not all(isinstance(one, Answer) and holds_words_alone(one.error) for one in answers):
            raise ParseError("The parser's answers cannot be read.")
        return [replace(one, cpu_ms=_number(one.cpu_ms), peak_memory_mb=_number(one.peak_memory_mb)) for one in answers]

    async def _begin(self, call: Call, files: Sequence[int]) -> Child:
        """Return a child that has been given the call: a warm one, else a new one."""
        for _ in range(2 + len(self._idle)):
            child = None
            try:
                child = self._idle.pop() if self._idle else await self._start()
                if child.alive:
                    async with asyncio.timeout(self._limits.timeout):  # one that has been stopped takes nothing in
                        await child.send(call, files)
                    return child
            except (OSError, EOFError, builtins.TimeoutError):  # killed from outside, or no room for a process
                pass
            except BaseException:
                self._discard(child)
                raise
            self._discard(child)
        raise RetryableError("The sandbox's child processes end before they can work (killed from outside?).")

    async def _start(self) -> Child:
        if self._closed:
            raise asyncio.CancelledError
        if self._template is None or not self._template.usable:
            self._template = Template(loaded=self._loaded)
            await asyncio.to_thread(remove_abandoned)  # while it loads
        child = Child(self._setup)
        self._all.add(child)
        try:
            _tell(await child.begin(self._template))
            if self._closed:  # while it began, when there was nothing yet to kill
                raise asyncio.CancelledError
        except BaseException:
            self._discard(child)
            raise
        return child

    async def _answer(self, child: Child) -> Answer:
        """Wait for a child's answer within the limits; whatever else comes is an error after which the child is of no use."""
        parts: list[bytearray] = []  # as they came: hardly ever they are needed, because the answer has it all once more
        most = room = self._limits.max_output_mb * MB + MB  # a good child judges its answer itself, in words
        try:
            async with asyncio.timeout(self._limits.timeout):
                while True:
                    kind, content = await child.receive(most)
                    if kind == ANSWER:
                        break
                    room -= len(content) + 1024
                    if kind != PART or room < 0:
                        raise ValueError(f"no answer, or parts of more than {most:,} bytes")
                    parts.append(content)
                parts.clear()
                value = await asyncio.to_thread(loads_carefully, content) if len(content) > 16 * MB else loads_carefully(content)
                if not isinstance(value, Answer) or not holds_words_alone(value.error):
                    raise ValueError("no answer")
                return value
        except builtins.TimeoutError:
            _, cpu_seconds = await asyncio.to_thread(self._ended, child, 0.0)
            # What waited (for a disk, or for its turn on a busy machine) may do better the next time.
            kind_of_end = Exhausted if cpu_seconds >= COMPUTING * self._limits.timeout else TimeoutError
            late = kind_of_end(f"Parsing was stopped at the time limit of {self._limits.timeout:g} s.")
            late.kept = await asyncio.to_thread(_loaded, parts)
            raise late from None
        except (EOFError, OSError) as gone:
            if self._closed:
                raise asyncio.CancelledError from gone
            code, _ = await asyncio.to_thread(self._ended, child, 1.0)
            error = self._crash(code)
            error.kept = await asyncio.to_thread(_loaded, parts)
            raise error from None
        except Exception as strange:
            raise _unreadable(strange) from None

    def _ended(self, child: Child, patience: float) -> tuple[int, float]:
        """See a child's end; return how it came and the CPU seconds that the call took."""
        code, spent = child.end(patience)
        usage.add(cpu_ms=spent.cpu_ms, peak_memory_mb=spent.peak_memory_mb)
        return code, spent.cpu_ms / 1000

    def _discard(self, child: Child | None) -> None:
        if child is not None:
            self._all.discard(child)
            child.close()

    def _crash(self, exitcode: int) -> DocmillError:
        """Name what ended a child: a signal when the code is negative."""
        if exitcode == -signal.SIGXCPU:
            return Exhausted(f"Parsing was stopped at the CPU limit of {self._limits.cpu_limit} s.")
        how = f"exit code {exitcode}"
        if exitcode < 0:
            with suppress(ValueError):
                how = f"signal {signal.Signals(-exitcode).name}"
        hint = f"; often the memory limit of {self._limits.memory_mb} MB" if exitcode in {-signal.SIGABRT, -signal.SIGKILL} else ""
        return Crashed(f"The parser crashed ({how}{hint}).")

    async def aclose(self) -> None:
        """Stop the children at once; calls under way are cancelled. Later calls are refused."""
        self._closed = True
        children = tuple(self._all)
        for child in children:
            if child in self._idle:
                self._discard(child)
            else:
                child.kill()
        self._idle.clear()
        if self._template is not None:
            self._template.close()  # and with it whatever child could not be killed yet
            await asyncio.to_thread(self._template.wait)
        for child in children:
            await asyncio.to_thread(child.wait)


def _loaded(parts: Sequence[bytearray]) -> list[Any]:
    """Return what a child handed over; ParseError where it cannot be read."""
    try:
        return [loads_carefully(part) for part in parts]
    except Exception as strange:
        raise _unreadable(strange) from None


def _unreadable(error: Exception) -> ParseError:
    return ParseError(f"The parser's answer cannot be read ({type(error).__name__}: {str(error)[:200]}).")


def _tell(missing: Any) -> None:
    """Log, once in this process, what the kernel could not do; then at least hide this process from others of the same user."""
    for words in missing if isinstance(missing, tuple) else ():
        if isinstance(words, str) and words not in _told:
            _told.add(words)
            logger.warning("The parsers' sandbox is weaker here: {}", words)
            let_others_look(False)


def _number(value: Any) -> float:
    """Return what a child says that it used, if that can be."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
