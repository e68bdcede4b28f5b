"""What one call of an outside service says beside its result: what it used, and what the service still allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a service says that a call used; its bill is made of these."""

    tokens_in: int = 0
    tokens_out: int = 0
    pages: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum of both."""
        return Usage(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out, self.pages + other.pages)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What the rate-limit headers of an answer say; None where they say nothing. Resets are seconds from now."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """The result of a call that succeeded."""

    value: T
    usage: Usage = field(default_factory=Usage)
    allowance: Allowance = field(default_factory=Allowance)


@dataclass(frozen=True, slots=True)
class FailedCall:
    """What is known of a call that failed; hangs on the error as `error.call`."""

    service: str
    """Host and port that was called."""
    sent: bool
    """False where the request certainly did not reach the service, so that nothing can have been billed."""
    status: int | None = None
    """HTTP status, None where no answer came."""
    code: str | None = None
    """The service's own error code, such as `insufficient_quota`."""
    allowance: Allowance = field(default_factory=Allowance)
    usage: Usage = field(default_factory=Usage)
    """What it used nevertheless, where the service says so."""
