"""What became of a call: for the ledger, for the breaker and for the document. Nothing here writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jobs.redaction import describe
from jobs.retry import classify_error
from jobs.retry import of_http_status as classify_status
from jobs.services.terms import Terms
from models.errors import (
    BadAnswer,
    CredentialRefused,
    DocmillError,
    ErrorType,
    FailedCall,
    PermanentError,
    RateLimitError,
    RetryableError,
    UnknownError,
)
from models.errors import TimeoutError as CallTimeout

Word = Literal["ok", "failed", "timeout", "bad_answer", "rate_limited", "refused", "rejected"]
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


def message_of(error: DocmillError) -> str:
    """Return what the ledger says: text that Postgres can store, without NUL and lone surrogates."""
    return describe(error).replace("\x00", "").encode("utf-8", "replace").decode()[:_LONGEST_MESSAGE]


def outcome_of(error: Exception, terms: Terms) -> Outcome:
    """Judge what a call raised, by class, status and code."""
    name = terms.service.rpartition(" key:")[0]
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
    failure.call = FailedCall(name, sent=True)  # it may have been
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
