"""What to do about a failure and when: classification, backoff, and the procrastinate retry strategy of every stage. No I/O."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg
from procrastinate import BaseRetryStrategy, RetryDecision
from procrastinate.jobs import Job

from models.errors import (
    DocmillError,
    ErrorType,
    PermanentError,
    RateLimitError,
    ServiceUnavailable,
    StageTimeout,
    StorageAway,
    WaitedTooLong,
)

_RETRYABLE_SQLSTATES = frozenset({"40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "25006", "25P03", "25P04"})
_RETRYABLE_SQLSTATE_CLASSES = frozenset({"08", "53", "58"})  # connection, resources (disk full, out of memory), system error
_PERMANENT_SQLSTATE_CLASSES = frozenset({"22", "23", "42"})  # data, integrity and syntax: the same statement fails again
_RETRYABLE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE})
_UNAVAILABLE_WAIT = 60.0
_WIDEST_SPREAD = 30.0  # seconds; who tells a long wait has spread it already, and an outage should not outlast its end by half
_HTTP_CLASSES = {
    # Of httpx, its successor and the SDKs built on them, the closest class first: a worker that needs none of them imports none.
    "TimeoutException": ErrorType.TIMEOUT,
    "APITimeoutError": ErrorType.TIMEOUT,
    "UnsupportedProtocol": ErrorType.PERMANENT,
    "InvalidURL": ErrorType.PERMANENT,
    "TransportError": ErrorType.RETRYABLE,
    "APIConnectionError": ErrorType.RETRYABLE,
}
_HTTP_MODULES = frozenset({"httpx", "httpx2", "openai"})


def _of_database_error(error: psycopg.Error) -> ErrorType:
    sqlstate = error.sqlstate
    if sqlstate is None:
        # Raised by the client: a lost connection or a full pool can pass, data that cannot be sent cannot.
        if isinstance(error, psycopg.DataError | psycopg.IntegrityError | psycopg.ProgrammingError | psycopg.NotSupportedError):
            return ErrorType.PERMANENT
        return ErrorType.RETRYABLE
    if sqlstate in _RETRYABLE_SQLSTATES or sqlstate[:2] in _RETRYABLE_SQLSTATE_CLASSES:
        return ErrorType.RETRYABLE
    return ErrorType.PERMANENT if sqlstate[:2] in _PERMANENT_SQLSTATE_CLASSES else ErrorType.UNKNOWN


def _of_os_error(error: OSError) -> ErrorType:
    if isinstance(error, ConnectionError | socket.gaierror) or error.errno in _RETRYABLE_ERRNOS:
        return ErrorType.RETRYABLE
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return ErrorType.PERMANENT
    return ErrorType.UNKNOWN


def of_http_status(status: int) -> ErrorType:
    """Classify an HTTP status of an outside service."""
    if status == 429:
        return ErrorType.RATE_LIMIT
    if status in (408, 504):
        return ErrorType.TIMEOUT
    if status >= 500 or status in (409, 423, 425):
        return ErrorType.RETRYABLE
    return ErrorType.PERMANENT if 400 <= status < 500 else ErrorType.UNKNOWN


def classify_error(error: BaseException) -> ErrorType:
    """Return the error type of any exception, by class, SQLSTATE, errno and HTTP status, never by message text."""
    if isinstance(error, DocmillError):
        return error.error_type
    if isinstance(error, TimeoutError):
        return ErrorType.TIMEOUT
    if isinstance(error, psycopg.Error):
        return _of_database_error(error)
    if isinstance(error, OSError):
        return _of_os_error(error)
    if isinstance(error, MemoryError):
        return ErrorType.RETRYABLE
    return _of_http_error(error)


def is_away(error: BaseException) -> bool:
    """Say whether a database did not answer, because the connection or the server is gone."""
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    return error.sqlstate is None or error.sqlstate[:2] == "08" or error.sqlstate in {"57P01", "57P02", "57P03", "57P05"}


def _gave_way(error: BaseException) -> bool:
    """Say whether a transaction met another and was the one to end: that says nothing of what it was for."""
    return isinstance(error, psycopg.Error) and error.sqlstate in {"40001", "40P01", "55P03"}


def _refuses_all(error: BaseException) -> bool:
    """Say whether a database answers and yet takes nothing from anybody: its disk is full, it is read-only, it can open no more files.

    Not so where memory or the room for temporary files is at an end (53200, 53400): it may be this very document that needs too much.
    """
    return isinstance(error, psycopg.Error) and error.sqlstate in {"25006", "53000", "53100", "53300"}


def _of_http_error(error: BaseException) -> ErrorType:
    # httpx and the SDKs built on it carry the answer that made them fail, or its bare status, or there was none.
    status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status_code", None))
    if isinstance(status, int):
        return of_http_status(status)
    for known in type(error).__mro__:
        if known.__name__ in _HTTP_CLASSES and known.__module__.partition(".")[0] in _HTTP_MODULES:
            return _HTTP_CLASSES[known.__name__]
    return ErrorType.UNKNOWN


def calculate_backoff(attempt: int, base: float, max_delay: float) -> float:
    """Return the seconds to wait after failure number `attempt` (from 0): `min(max_delay, d + U(0, d/2))` with `d = base * 2^attempt`."""
    delay = base * 2.0 ** min(attempt, 64)
    return min(max_delay, delay + random.uniform(0, delay / 2))  # noqa: S311  # jitter, not a secret


def should_retry(error_type: ErrorType, attempt: int, max_attempts: int) -> bool:
    """Say whether a failure may be tried again, `attempt` failures having counted before it. What does not count is always tried again."""
    if error_type in (ErrorType.PERMANENT, ErrorType.PARSE_ERROR):
        return False
    return error_type is ErrorType.RATE_LIMIT or attempt < max_attempts


def _never_counts(error: BaseException) -> bool:
    return isinstance(error, RateLimitError | ServiceUnavailable) or _is_met_by_all(error)


def _is_met_by_all(error: BaseException) -> bool:
    """Say whether the database or the storage has failed in a way that others meet too, whatever the document."""
    return isinstance(error, StorageAway) or is_away(error) or _gave_way(error) or _refuses_all(error)


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """When to try again, in seconds from now, and whether the failure counts as an attempt."""

    delay: float
    counts: bool


class StageRetry(BaseRetryStrategy):
    """The retry strategy of a stage task. The runner asks `plan`; procrastinate asks only when something escapes the runner."""

    def __init__(self, *, max_attempts: int, base: float, max_delay: float, max_wait_hours: float = 0) -> None:
        """`base` and `max_delay` in seconds. `max_wait_hours` is how long waits may last that do not count; 0 for any time."""
        self.max_attempts = max_attempts
        self.base = base
        self.max_delay = max_delay
        self.max_wait_hours = max_wait_hours

    def judge(self, error: Exception, waited: float) -> Exception:
        """Return the error that counts, where a document has waited so many seconds already: WaitedTooLong instead of one more wait."""
        if not self.max_wait_hours or waited < self.max_wait_hours * 3600 or not _never_counts(error):
            return error
        since = datetime.now(UTC) - timedelta(seconds=waited)
        ended = WaitedTooLong(f"Waited since {since:%Y-%m-%d %H:%M} UTC, longer than MAX_WAIT_HOURS={self.max_wait_hours:g}. Last: {error}")
        ended.call, ended.__cause__ = getattr(error, "call", None), error
        return ended

    def within_wait(self, plan: RetryPlan, waited: float) -> RetryPlan:
        """Return the plan with a wait that does not count ended when it may last no longer: then comes the last try."""
        if not self.max_wait_hours or plan.counts:
            return plan
        return RetryPlan(min(plan.delay, max(0.0, self.max_wait_hours * 3600 - waited)), counts=False)

    def plan(self, error: BaseException, attempt: int, waited: float = 0.0) -> RetryPlan | None:
        """Return when to try again after failure number `attempt` (from 0), or None for a dead letter.

        `waited`: for how many seconds it has waited already, which counted as no attempts.
        """
        error_type = classify_error(error)
        if isinstance(error, WaitedTooLong):
            return None
        if _is_met_by_all(error):
            # A checkpoint outlives any number of outages, and so does a stage that is met by them in the middle of a question or a file.
            # Each wait is a quarter of all before it: it may be this very document that the server dies of.
            return RetryPlan(calculate_backoff(0, max(self.base, waited / 4), self.max_delay), counts=False)
        if isinstance(error, RateLimitError | ServiceUnavailable):
            told = _UNAVAILABLE_WAIT if error.retry_after is None else error.retry_after
            # Half as much again, at most, spread out, so that those who wait do not all come back in the same second.
            return RetryPlan(told + random.uniform(0, min(told / 2, _WIDEST_SPREAD)), counts=False)  # noqa: S311
        if isinstance(error, StageTimeout) and error.advanced:
            # Each such try has less to do than the one before, so that they end.
            return RetryPlan(calculate_backoff(0, self.base, self.max_delay), counts=False)
        if not should_retry(error_type, attempt, self.max_attempts):
            return None
        return RetryPlan(calculate_backoff(attempt, self.base, self.max_delay), counts=True)

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        """Answer procrastinate. What escapes the runner says nothing about the document, so the job is tried again however often.

        A job that names no document or has the wrong arguments fails; a document that waits for it gets another from the reconciler.
        """
        if isinstance(exception, PermanentError | TypeError):
            return None
        delay = calculate_backoff(min(job.attempts, 10), self.base, self.max_delay)
        return RetryDecision(retry_at=datetime.now(UTC) + timedelta(seconds=delay))
