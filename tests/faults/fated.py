"""Local servers that answer each request as is said beforehand, or once it is said, and remember which call it was."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.servers import LocalServer, Request, Response
from tests.servers.faults import NAMED, Fault, rate_limited

FATES: dict[str, Fault | None] = {"right": None, "429_later": rate_limited("20"), **NAMED}


@dataclass(eq=False)
class Seen:
    """A request that a service got."""

    call: str
    body: Any
    path: str
    at: float
    fate: str
    held: bool
    """Whether its answer was long in coming, as the schedule has it."""
    contents: dict[str, str]
    """What each document was then."""
    done: bool = False


class Fated(LocalServer):
    """Answers each request as is said beforehand or, where that is `hold`, once it is said."""

    now: Callable[[], float]
    """The time as the workers have it."""
    fates: deque[str]
    seen: list[Seen]
    noted: dict[Any, Seen]
    """The request that a connection is busy with."""
    contents: dict[str, str]

    async def _answer(self, request: Request) -> tuple[Response, Fault | None]:
        body = request.json() if request.headers.get("content-type") == "application/json" else request.body
        fate = self.fates.popleft() if self.fates else "right"
        note = Seen(request.headers.get("x-call", ""), body, request.path, self.now(), fate, fate == "hold", dict(self.contents))
        self.seen.append(note)
        self.noted[asyncio.current_task()] = note
        while note.fate == "hold":  # noqa: ASYNC110 - it is told from another thread
            await asyncio.sleep(0.001)
        self._script = lambda number, seconds: FATES[note.fate]
        return await super()._answer(request)

    async def _write(self, *given: Any) -> bool:
        try:
            return await super()._write(*given)
        finally:
            self.noted[asyncio.current_task()].done = True

    def busy(self) -> bool:
        return any(not note.done and note.fate != "hold" for note in self.seen[-30:])

    @property
    def held(self) -> list[Seen]:
        return [note for note in self.seen if note.fate == "hold"]
