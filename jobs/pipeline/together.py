"""Where several documents meet that one worker took up at once, so that what each of them needs is asked for once.

Each goes through its stages as it would alone. At a meeting whoever comes waits until all who are there have come, to whatever meeting,
and not for long; then what is asked at each is answered together. Where that fails each asks alone, and learns what is its own fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loguru import logger

from jobs.redaction import describe

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE = 1.0
"""Seconds for which those who have come wait for the others, should one wait for something else without leaving."""


class NotTogether(Exception):
    """It could not be had for several at once. Ask alone."""

    def __init__(self, *, tried: bool = False) -> None:
        super().__init__()
        self.tried = tried
        """Whether it was asked for, and failed: nobody may know how far it came."""


@dataclass(slots=True)
class _Meeting:
    answer_all: Callable[[list[Any]], Awaitable[Sequence[Any]]]
    asks: list[tuple[Any, asyncio.Future[Any]]] = field(default_factory=list)


class Together:
    """Belongs to one event loop. Every member leaves exactly once."""

    def __init__(self, members: int) -> None:
        self.members = members
        """Those who have not left."""
        self._away = 0
        self._waiting = 0
        self._meetings: dict[Hashable, _Meeting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self.in_turn = asyncio.Lock()
        """For what must be asked for alone, and is too dear for all of them to have at once."""

    async def ask(
        self, what: Hashable, item: T, answer_all: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], *, at_once: bool = False
    ) -> R:
        """Return the answer to an item, or raise the exception that is its answer. `answer_all` gets all items of this meeting and
        returns one answer each; where it raises, or there is but one item, everybody gets NotTogether. `at_once`: only those are waited
        for who come within the same turn of the event loop, as they do who have just been told something together."""
        if self.members < 2:
            raise NotTogether
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        if what not in self._meetings:
            self._meetings[what] = _Meeting(answer_all)
            if at_once:
                loop.call_soon(self._begin_one, what)
        self._meetings[what].asks.append((item, answer))
        if at_once:
            return await answer
        self._waiting += 1
        if self._timer is None:
            self._timer = loop.call_later(_PATIENCE, self._begin)
        self._look_around()
        return await answer

    @contextmanager
    def away(self) -> Iterator[None]:
        """Be waited for by nobody for as long as the block takes: for an answer from outside that may be long in coming."""
        self._away += 1
        self._look_around()
        try:
            yield
        finally:
            self._away -= 1

    def leave(self) -> None:
        """Come to no meeting any more."""
        self.members -= 1
        self._look_around()

    def _look_around(self) -> None:
        """Begin once all who are there wait. Those who have just been told the same from outside come back within this turn of the loop."""
        if self._waiting and self._waiting >= self.members - self._away:
            asyncio.get_running_loop().call_soon(self._begin_if_all_wait)

    def _begin_if_all_wait(self) -> None:
        if self._waiting and self._waiting >= self.members - self._away:
            self._begin()

    def _begin_one(self, what: Hashable) -> None:
        if (meeting := self._meetings.pop(what, None)) is not None:
            self._answer(what, meeting)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        meetings, self._meetings, self._waiting = self._meetings, {}, 0
        for what, meeting in meetings.items():
            self._answer(what, meeting)

    def _answer(self, what: Hashable, meeting: _Meeting) -> None:
        # Nothing of the one who came last, such as what its log lines are about, goes along.
        task = asyncio.get_running_loop().create_task(_answer(what, meeting), context=Context())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)


async def _answer(what: Hashable, meeting: _Meeting) -> None:
    asks = [(item, answer) for item, answer in meeting.asks if not answer.done()]
    try:
        if len(asks) < 2:
            raise NotTogether
        answers = await meeting.answer_all([item for item, _ in asks])
        if len(answers) != len(asks):
            raise ValueError(f"{len(answers)} answers to {len(asks)} items")
    except BaseException as error:
        if not isinstance(error, NotTogether):
            logger.debug("{} small documents could not share {}, so each asks alone: {}", len(asks), what, describe(error))
        _tell(asks, [NotTogether(tried=not isinstance(error, NotTogether)) for _ in asks])
        if not isinstance(error, Exception):
            raise
    else:
        _tell(asks, answers)


def _tell(asks: Sequence[tuple[Any, asyncio.Future[Any]]], answers: Sequence[Any]) -> None:
    for (_, future), answer in zip(asks, answers, strict=True):
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
