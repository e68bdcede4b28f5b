"""One request to the embedding service for the texts of several documents that one worker has in hand.

A document asks for its texts and is told about the first of them; what comes next it asks for once that is kept, so it never has more than
one request under way. Why requests are made up as they are: docs/decisions/0011-shared-requests.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

from jobs.adapters.embedders import HostedEmbedder, SizedText, fill_request
from jobs.outages import cancel_later
from jobs.stages import Embedded
from models.calls import Caller, CallPurpose, CallShare, Reply
from models.errors import CostLimitReached, NotSent, RateLimitError, RequestRefused, ServiceUnavailable

T = TypeVar("T")


class Guarded:
    """A way to a service on which a call that may not be made at the moment of sending raises NotSent."""

    def __init__(self, caller: Caller, may_call: Callable[[], bool]) -> None:
        self._caller, self._may_call = caller, may_call

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Make a call if it may still be made when its time has come: the wait for the service's budget can be long."""

        async def guarded() -> Reply[T]:
            if not self._may_call():
                raise NotSent("The call was not made: a document that it was for is no longer this worker's to pay for.")
            return await send()

        return await self._caller.call(guarded, purpose)


@dataclass(eq=False, slots=True)
class _Ask:
    """What a document asks for."""

    embedder: HostedEmbedder
    texts: Sequence[SizedText]
    share: CallShare
    may_call: Callable[[], bool]
    alone: bool
    """It is sent without others."""
    at: float
    """When, by the event loop's clock in seconds."""
    answer: asyncio.Future[Embedded | None]
    late: Embedded | None = None
    """What its request brought although it had left."""

    def may_be_sent(self) -> bool:
        return not self.answer.done() and self.may_call()


_Part = tuple[_Ask, int]
"""What is asked for, and how many of its texts a request holds."""


class Sharing:
    """The requests of one worker to the embedding service. Belongs to one event loop."""

    def __init__(self, *, gather_seconds: float, most_requests: int) -> None:
        """`gather_seconds`: what a request that is not full waits for others; 0 for no sharing. `most_requests`: under way at a time."""
        self._gather_seconds, self._most_requests = gather_seconds, most_requests
        self._line: list[_Ask] = []
        self._flights: dict[asyncio.Task[None], list[_Part]] = {}
        self._coming: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, job_id: int, coming: bool) -> None:
        """Say whether a job's document, which is in this worker's hands, may still ask; where none may, no request waits."""
        (self._coming.add if coming else self._coming.discard)(job_id)
        if self._line and not coming:
            self._send_what_is_due()

    async def embed(
        self,
        embedder: HostedEmbedder,
        texts: Sequence[SizedText],
        *,
        share: CallShare,
        may_call: Callable[[], bool],
        alone: bool = False,
    ) -> Embedded | None:
        """Return what a request has brought for the first of a document's texts; `alone`: for all that fit into one.

        None: the document was left out, because `may_call` said so. Raises what the embedder raises about a request that held this
        document alone, and what makes all documents wait. A cancelled document leaves; the request goes on for the others.
        """
        loop = asyncio.get_running_loop()
        ask = _Ask(embedder, texts, share, may_call, alone or not self._gather_seconds, loop.time(), loop.create_future())
        self._line.append(ask)
        self._send_what_is_due()
        try:
            return await ask.answer
        except asyncio.CancelledError:
            await self._leave(ask)
            answered = ask.answer.done() and not ask.answer.cancelled() and ask.answer.exception() is None
            late = ask.answer.result() if answered else ask.late
            if late is None:
                raise
            cancel_later()  # what is paid for can be kept first
            return late

    async def _leave(self, ask: _Ask) -> None:
        """End the request that nobody waits for any more."""
        if ask.answer.done() and not ask.answer.cancelled():
            ask.answer.exception()  # an answer that came too late is nobody's
        self._line = [other for other in self._line if other is not ask]
        for task, parts in list(self._flights.items()):
            if any(one is ask for one, _ in parts) and all(one.answer.done() for one, _ in parts):
                task.cancel()
                await asyncio.wait([task])

    def _send_what_is_due(self) -> None:
        """Send requests while there are texts and places for them. A request that is not full waits for others who may come."""
        while (free := self._most_requests - len(self._flights)) > 0:
            for ask in self._line:
                if not ask.answer.done() and not ask.may_call():
                    ask.answer.set_result(None)
            self._line = [ask for ask in self._line if not ask.answer.done()]
            if not self._line:
                return
            parts, full = self._make_up(cut=free == 1)
            if not full and (seconds := self._worth_waiting(parts)) > 0:
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = asyncio.get_running_loop().call_later(seconds, self._send_what_is_due)
                return
            sent = {id(ask) for ask, _ in parts}
            self._line = [ask for ask in self._line if id(ask) not in sent]
            # A context of its own: what one document logs and measures is not about the others.
            task = asyncio.get_running_loop().create_task(self._fly(parts), context=Context())
            self._flights[task] = parts
            task.add_done_callback(self._landed)

    def _make_up(self, *, cut: bool) -> tuple[list[_Part], bool]:
        """Return the next request, and whether it can gain nothing by waiting."""
        first = self._line[0]
        limits = first.embedder.limits
        waiting = [first] if first.alone else [ask for ask in self._line if ask.embedder is first.embedder and not ask.alone]
        taken = fill_request([ask.texts for ask in waiting], max_texts=limits.max_texts, max_tokens=limits.max_tokens, cut=cut)
        parts = [(ask, count) for ask, count in zip(waiting, taken, strict=True) if count]
        pieces = sum(len(text.pieces) for ask, count in parts for text in ask.texts[:count])
        left_out = any(count < len(ask.texts) for ask, count in zip(waiting, taken, strict=True))
        return parts, first.alone or left_out or pieces >= limits.max_texts

    def _worth_waiting(self, parts: Sequence[_Part]) -> float:
        """Return for how many seconds more others may join this request; nobody can who waits already or is in another request."""
        here = len(self._line) + sum(not ask.answer.done() for sent in self._flights.values() for ask, _ in sent)
        if len(self._coming) <= here:
            return 0.0
        return min(ask.at for ask, _ in parts) + self._gather_seconds - asyncio.get_running_loop().time()

    def _landed(self, task: asyncio.Task[None]) -> None:
        parts = self._flights.pop(task)
        if task.cancelled():  # nobody waits, or the event loop is being closed
            for ask, _ in parts:
                ask.answer.cancel()
        elif error := task.exception():
            for ask, _ in parts:
                _fail(ask, error)
        self._send_what_is_due()

    async def _fly(self, parts: Sequence[_Part]) -> None:
        """Send one request and tell everybody in it what has become of their texts."""
        parts = [(ask, count) for ask, count in parts if not ask.answer.done()]
        if not parts:
            return
        embedder = parts[0][0].embedder
        caller = Guarded(embedder.caller, lambda: all(ask.may_be_sent() for ask, _ in parts))
        texts = [text for ask, count in parts for text in ask.texts[:count]]
        try:
            vectors = (await embedder.embed_sized(texts, shares=_shares(parts), caller=caller)).value
        except NotSent:
            self._put_back(parts)
        except RequestRefused as refused:
            if len(parts) == 1:
                _tell(parts[0][0], Embedded(parts[0][1], None, refused))
                return
            middle = len(parts) // 2
            await self._fly(parts[:middle])
            await self._fly(parts[middle:])
        except Exception as error:
            self._failed(parts, error)
        else:
            start = 0
            for ask, count in parts:
                _tell(ask, Embedded(count, vectors[start : start + count]))
                start += count

    def _failed(self, parts: Sequence[_Part], error: Exception) -> None:
        """Tell those whose failure it is, and let the others go again."""
        if len(parts) == 1:
            _fail(parts[0][0], error)
        elif isinstance(error, RateLimitError | ServiceUnavailable):
            for ask, _ in parts:
                _fail(ask, _copied(error))
        elif isinstance(error, CostLimitReached) and any(ask.share.doc_id in error.over for ask, _ in parts):
            for ask, _ in parts:
                if (why := error.over.get(ask.share.doc_id)) is not None:
                    _fail(ask, CostLimitReached({ask.share.doc_id: why}))
            self._put_back([(ask, count) for ask, count in parts if not ask.answer.done()])
        else:
            # It may be the text of one of them that makes the service fail, and that shall cost no other an attempt.
            for ask, _ in parts:
                ask.alone = True
            self._put_back(parts)

    def _put_back(self, parts: Sequence[_Part]) -> None:
        """Let documents go with one of the next requests, before others."""
        self._line = [*(ask for ask, _ in parts), *self._line]
        self._send_what_is_due()


def _shares(parts: Sequence[_Part]) -> tuple[CallShare, ...]:
    """Return what each document pays, by the tokens of its texts."""
    tokens = [sum(text.tokens for text in ask.texts[:count]) for ask, count in parts]
    total = sum(tokens) or 1
    return tuple(replace(ask.share, share=own / total) for (ask, _), own in zip(parts, tokens, strict=True))


def _tell(ask: _Ask, told: Embedded) -> None:
    if not ask.answer.done():
        ask.answer.set_result(told)
    else:
        ask.late = told


def _fail(ask: _Ask, error: BaseException) -> None:
    if not ask.answer.done():
        ask.answer.set_exception(error)


def _copied(error: Exception) -> Exception:
    """Return an error for one document: what is raised in several tasks would gather the tracebacks of all."""
    own = copy(error)
    own.__cause__ = error
    return own
