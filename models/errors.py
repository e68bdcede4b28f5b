"""The seven error types and their exception classes, and what the front door raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class ErrorType(StrEnum):
    """What kind of failure it was; decides whether and when a document is tried again."""

    RETRYABLE = "RETRYABLE"
    PERMANENT = "PERMANENT"
    TIMEOUT = "TIMEOUT"
    RATE_LIMIT = "RATE_LIMIT"
    PARSE_ERROR = "PARSE_ERROR"
    LLM_ERROR = "LLM_ERROR"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class FailedCall:
    """What is known of a call of an outside service that failed; hangs on the error as `error.call`."""

    service: str
    """Host and port that was called."""
    sent: bool
    """False where the request certainly did not reach the service, so that nothing can have been billed."""
    status: int | None = None
    """HTTP status, None where no answer came."""
    code: str | None = None
    """The service's own error code, such as `insufficient_quota`."""
    tokens_in: int | None = None
    """What it cost nevertheless, where the service says so."""
    tokens_out: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of the answer, names in lower case."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a document waits for that is to call an outside service; hangs on the error as `error.turn`."""

    service: str
    """As jobs.services names it, or `storage`."""
    revision: int | None = None
    """Of the service's breaker, when a place was given; None: it waits for the budget."""
    place: int | None = None
    """Behind those who were told to wait before; a document that asks again at the same revision keeps it."""


class DocmillError(Exception):
    """Base of all errors that docmill raises on purpose. The message is meant for people: it names the file, the rule and the limit."""

    error_type = ErrorType.UNKNOWN
    call: FailedCall | None = None
    """The call of an outside service that failed, where it was one."""
    turn: Turn | None = None
    """What is waited for, where the service's breaker or budget says so."""
    kept: Sequence[object] = ()
    """Parts of the result that a sandbox's child had handed over before a limit ended it."""


class RetryableError(DocmillError):
    """Trying again can help; counts as an attempt."""

    error_type = ErrorType.RETRYABLE


class PermanentError(DocmillError):
    """Trying again cannot help: a dead letter at once."""

    error_type = ErrorType.PERMANENT


class TimeoutError(DocmillError):
    """A stage or an outside call took longer than it may; counts as an attempt."""

    error_type = ErrorType.TIMEOUT


class StageTimeout(TimeoutError):
    """A stage took longer than STAGE_TIMEOUT_SECONDS. Does not count as an attempt where it `advanced` in that time: something was made
    durable that the next try need not pay for again."""

    def __init__(self, message: str, *, advanced: bool) -> None:
        super().__init__(message)
        self.advanced = advanced


class RateLimitError(DocmillError):
    """A service asked us to wait. `retry_after` in seconds, None when it did not say. Does not count as an attempt."""

    error_type = ErrorType.RATE_LIMIT

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ParseError(DocmillError):
    """The file's content cannot be turned into text: a dead letter once no other parser is left to try."""

    error_type = ErrorType.PARSE_ERROR


class LLMError(DocmillError):
    """Extraction by a language model failed; counts as an attempt."""

    error_type = ErrorType.LLM_ERROR


class UnknownError(DocmillError):
    """Anything unforeseen; counts as an attempt."""

    error_type = ErrorType.UNKNOWN


class ServiceUnavailable(RetryableError):
    """An outside service is known to be down. `retry_after` in seconds. Waiting for it does not count as an attempt."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WaitedTooLong(TimeoutError):
    """A document has waited for an outside service for MAX_WAIT_HOURS, without counting: it is not tried again by itself."""


class CredentialRefused(ServiceUnavailable):
    """A service refuses this installation, not the document: its key, its quota, its model or its address. Somebody has to act."""

    def __init__(
        self,
        message: str,
        reason: Literal["credential", "quota", "configuration"] = "credential",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, retry_after)
        self.reason = reason


class StorageAway(RetryableError):
    """The storage as a whole is not there, full or read-only: no document's fault, so waiting for it does not count as an attempt."""

    turn = Turn("storage")


class BadAnswer(RetryableError):
    """A service said that all went well, but what it sent cannot be used: cut off, of a wrong count or size, not a number.

    It may have been paid for: `tokens_in` and `tokens_out` where the answer still said what it cost.
    """

    def __init__(self, message: str, *, tokens_in: int | None = None, tokens_out: int | None = None) -> None:
        super().__init__(message)
        self.tokens_in = tokens_in
        self.tokens_out = tokens_out


class RequestRefused(PermanentError):
    """A service refuses the content of one request (HTTP 400, 413, 422): what it was about cannot be sent as it is.

    Of several texts one alone may be at fault: the embedder's `bisect` finds it.
    """


class NotSent(DocmillError):
    """A call is not made after all: whoever it was for may not pay for it now. Raised by what sends it, before anything goes out."""


class CostLimitReached(PermanentError):
    """A call was not made, because a document or its batch would cost more than MAX_COST_PER_DOCUMENT or MAX_COST_PER_BATCH.

    `over`: doc_id -> why, for those of the documents that would have shared the call that may not pay for it. The others may, together.
    """

    def __init__(self, over: Mapping[str, str]) -> None:
        super().__init__("\n".join(over.values()))
        self.over = over


class SubmitError(PermanentError):
    """A submission was refused; nothing was stored."""


class SubmitConflict(RetryableError):
    """Another transaction holds this document or batch. Nothing was stored, or the message says otherwise; trying again after it ends does
    the rest."""


class OperationRefused(PermanentError):
    """The document or batch is in a state that does not allow what was asked, or is not there; nothing was changed."""


class NotFound(OperationRefused):
    """There is no document or batch of that name."""


class ConfigurationError(PermanentError):
    """A setting or the environment is wrong. The message names the variable and what it may hold."""
