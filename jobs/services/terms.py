"""On what terms a service is called: limits and prices."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from jobs.breaker import Rules
from models.calls import CallPurpose, Reply
from models.settings import Settings

Kind = Literal["embedding", "extraction", "parse"]
_HIGHEST_PRICE = Decimal(9_999_999_999)
_PROBE_MARGIN = 10.0  # seconds that a probe may take beyond its call


@dataclass(frozen=True, slots=True)
class Prices:
    """What is paid: for a million tokens out and back, and for a page."""

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    per_page: float = 0.0

    def of(self, tokens_in: int, tokens_out: int, pages: int) -> Decimal:
        """Return the price of a call."""
        million = Decimal(1_000_000)
        paid = Decimal(str(self.input_per_million)) * tokens_in + Decimal(str(self.output_per_million)) * tokens_out
        return min(paid / million + Decimal(str(self.per_page)) * pages, _HIGHEST_PRICE).quantize(Decimal("0.00000001"))

    def of_estimate(self, purpose: CallPurpose) -> Decimal:
        """Return the price of what a call may take."""
        return self.of(max(0, purpose.tokens - purpose.tokens_out), purpose.tokens_out, purpose.pages)

    def of_reply(self, reply: Reply[object], purpose: CallPurpose) -> Decimal:
        """Return the price of an answer; where the service did not count, the estimate stands in."""
        tokens_in = max(0, purpose.tokens - purpose.tokens_out) if reply.tokens_in is None else reply.tokens_in
        tokens_out = purpose.tokens_out if reply.tokens_out is None else reply.tokens_out
        return self.of(tokens_in, tokens_out, purpose.pages if reply.pages is None else reply.pages)


@dataclass(frozen=True, slots=True)
class Terms:
    """One service: who it is, what it allows, costs and says. Times in seconds; limits of 0 are none."""

    service: str
    kind: Kind
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    total_seconds: float = 120.0
    patience_seconds: float = 5.0
    """How long a call may wait with its document in hand before that goes back to the queue."""
    prices: Prices = field(default_factory=Prices)
    rules: Rules = field(default_factory=Rules)


def terms_of(settings: Settings, kind: Kind, service: str) -> Terms:
    """Return the terms that the settings say for a kind of service."""
    seconds = {
        "embedding": settings.embedding_timeout_seconds,
        "extraction": settings.extraction_timeout_seconds,
        "parse": settings.llamaparse_timeout_seconds,
    }[kind]
    rules = Rules(
        failures=settings.breaker_failures,
        window_seconds=settings.breaker_window_seconds,
        open_seconds=settings.breaker_open_seconds,
        max_open_seconds=settings.breaker_max_open_seconds,
        probe_seconds=seconds + _PROBE_MARGIN,
    )
    requests, tokens, prices = {
        "embedding": (
            settings.embedding_requests_per_minute,
            settings.embedding_tokens_per_minute,
            Prices(input_per_million=settings.embedding_price_per_million_tokens),
        ),
        "extraction": (
            settings.extraction_requests_per_minute,
            settings.extraction_tokens_per_minute,
            Prices(settings.extraction_price_per_million_input_tokens, settings.extraction_price_per_million_output_tokens),
        ),
        "parse": (settings.parse_requests_per_minute, 0, Prices(per_page=settings.parse_price_per_page)),
    }[kind]
    return Terms(
        service=service,
        kind=kind,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        total_seconds=seconds,
        prices=prices,
        rules=rules,
    )
