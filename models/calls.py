"""Calls to outside services: what they are for and what they bring back. Adapters speak these; jobs.services keeps the books by them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CallShare:
    """A document that a call is for. `share` is its part of the call; the shares of one call add up to 1."""

    doc_id: str
    user_id: str = "default"
    batch_id: str | None = None
    correlation_id: str | None = None
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class CallPurpose:
    """What a call is for and what it may take at most."""

    stage: str
    shares: tuple[CallShare, ...]
    model: str | None = None
    tokens: int = 0
    """Estimate, of what goes out and comes back together: the budget is asked for as many."""
    tokens_out: int = 0
    """The part of the estimate that comes back, for the price."""
    pages: int = 0
    """Estimate of the pages to be paid for."""
    recorded: bool = True
    """False for calls that cost nothing, such as asking how a job stands: they are in the ledger only where they failed, and for the
    breaker's window after that."""


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """What an adapter made of a good answer. Counts are the service's own; None where it did not say."""

    value: T
    tokens_in: int | None = None
    tokens_out: int | None = None
    pages: int | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the answer, names in lower case."""
    request_id: str | None = None
    settles: str | None = None
    """`request_id` of an earlier call for the same document: `pages` is what was to be paid for that one."""


class Caller(Protocol):
    """The way to an outside service that adapters are given."""

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Run `send`, when the service may be called, and keep the books. `send` may be run again after a 429; it may raise NotSent.

        Raises RateLimitError, ServiceUnavailable, TimeoutError, RetryableError or PermanentError; CostLimitReached, which says for which of
        the documents, where the call would cost more than may be spent: it is not made.
        """
        ...

    def __hash__(self) -> int:
        """Callers are told apart by identity, so that adapters can be kept one a caller."""
        ...
