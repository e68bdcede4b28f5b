"""What became of a call: for the ledger, for the breaker and for the document. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jobs import budget
from jobs.adapters.http import HttpStatusError
from jobs.redaction import describe
from jobs.retry import classify_error
from jobs.retry import of_http_status as classify_status
from jobs.services.terms import Terms
from models.errors import (
    BadAnswer,
    CredentialRefused,
    DocmillError,
    ErrorType,
    PermanentError,
    RateLimitError,
    RetryableError,
    ServiceUnavailable,
    UnknownError,
)
from models.errors import TimeoutError as CallTimeout

Word = Literal["ok", "failed", "timeout", "bad_answer", "rate_limited", "refused", "rejected", "not_sent"]
BLAMES_SERVICE: frozenset[Word] = frozenset({"failed", "timeout", "bad_answer"})
_WORDS: dict[ErrorType, Word] = {ErrorType.RETRYABLE: "failed", ErrorType.TIMEOUT: "timeout"}
"""How a failure without an answer is entered; the other kinds are not held against the service."""
_NO_FAILURES = frozenset({ErrorType.PERMANENT, ErrorType.UNKNOWN})
"""Of an HTTP status: what the service answered well, if not to our liking; 2xx are unknown there."""
_LONGEST_MESSAGE = 500


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a failed call is entered as, and what is raised for its document. `told_seconds`: what a 429 asked to wait."""

    word: Word
    error: DocmillError
    status: int | None = None
    headers: Mapping[str, str] | None = None
    told_seconds: float | None = None

    @property
    def message(self) -> str:
        """What the ledger says: text that Postgres can store, without NUL and lone surrogates."""
        return describe(self.error).replace("\x00", "").encode("utf-8", "replace").decode()[:_LONGEST_MESSAGE]


def outcome_of(error: Exception, terms: Terms) -> Outcome:
    """Judge what a call raised, by class, status and code."""
    name = terms.service.rpartition(" key:")[0]
    if isinstance(error, HttpStatusError):
        return _of_status(error, name, terms)
    if isinstance(error, DocmillError):
        return _of_judged(error)
    told = f"{type(error).__name__}: {describe(error)[:200]}"
    failure: DocmillError
    match kind := classify_error(error):
        case ErrorType.TIMEOUT:
            failure = CallTimeout(f"{name} did not answer in time ({type(error).__name__}).")
        case ErrorType.RETRYABLE:
            failure = RetryableError(f"{name} could not be reached ({told}).")
        case ErrorType.PERMANENT:
            failure = PermanentError(f"{name} cannot be called ({told}).")
        case _:
            # An adapter that does not understand what it sees; whether that is the service's fault is not known.
            failure = UnknownError(f"{name}: {told}")
    return Outcome(_WORDS.get(kind, "rejected"), failure)


def _of_judged(error: DocmillError) -> Outcome:
    """Enter what the adapter has judged by itself; it knows status and code, and has waited for nothing."""
    status = error.call.status if error.call else None
    told: float | None = getattr(error, "retry_after", None)
    if isinstance(error, CredentialRefused):
        word: Word = "refused"
    elif isinstance(error, RateLimitError):
        word = "rate_limited"
    elif isinstance(error, BadAnswer):
        word = "bad_answer"
    elif status is not None and classify_status(status) in _NO_FAILURES:
        word = "rejected"
    else:
        word = _WORDS.get(error.error_type, "rejected")
    return Outcome(word, error, status, error.call.headers if error.call else None, told)


def _of_status(error: HttpStatusError, name: str, terms: Terms) -> Outcome:
    status, headers = error.status_code, error.headers
    if status in terms.refusals or (status == 429 and error.code in terms.refusal_codes):
        # What else the answer says may quote the key.
        why = f"HTTP {status}" + (f" ({error.code})" if error.code else "")
        return Outcome("refused", ServiceUnavailable(f"{name} refuses the key, or its quota is used up: {why}."), status, headers)
    kind = classify_error(error)
    message = f"{name} answered {error}."
    match kind:
        case ErrorType.RATE_LIMIT:
            told = budget.retry_after(headers)
            return Outcome("rate_limited", RateLimitError(message, told), status, headers, told)
        case ErrorType.TIMEOUT:
            return Outcome("timeout", CallTimeout(message), status, headers)
        case ErrorType.PERMANENT:
            return Outcome("rejected", PermanentError(message), status, headers)
        case _:
            # 5xx, and statuses that no API answers on purpose, such as redirects.
            return Outcome("failed", RetryableError(message), status, headers)
