"""Which failures are tried again, and when."""

from __future__ import annotations

import errno
import socket

import httpx2
import openai
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from procrastinate.jobs import Job
from psycopg_pool import PoolTimeout

from jobs.retry import StageRetry, calculate_backoff, classify_error, is_away, should_retry
from models.errors import (
    DocmillError,
    ErrorType,
    LLMError,
    ParseError,
    PermanentError,
    RateLimitError,
    RetryableError,
    ServiceUnavailable,
    StorageAway,
    UnknownError,
)
from models.errors import TimeoutError as OutOfTime

REQUEST = httpx2.Request("POST", "http://service.test/v1/embeddings")


def openai_error(status: int) -> Exception:
    """The class that the SDK raises for an answer with this status."""
    error: Exception = openai.OpenAI(api_key="x", base_url="http://service.test")._make_status_error_from_response(
        httpx2.Response(status, request=REQUEST)
    )
    return error


def http_error(status: int) -> Exception:
    error = Exception("any text, even RATE LIMIT")
    error.status_code = status  # type: ignore[attr-defined]  # as httpx and the SDKs built on it have it
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RetryableError("x"), "RETRYABLE"),
        (PermanentError("x"), "PERMANENT"),
        (OutOfTime("x"), "TIMEOUT"),
        (RateLimitError("x"), "RATE_LIMIT"),
        (ParseError("x"), "PARSE_ERROR"),
        (LLMError("x"), "LLM_ERROR"),
        (UnknownError("x"), "UNKNOWN"),
        (ServiceUnavailable("x"), "RETRYABLE"),
        (StorageAway("x"), "RETRYABLE"),
        (DocmillError("x"), "UNKNOWN"),
        (TimeoutError(), "TIMEOUT"),
        (psycopg.errors.DeadlockDetected(), "RETRYABLE"),
        (psycopg.errors.SerializationFailure(), "RETRYABLE"),
        (psycopg.errors.LockNotAvailable(), "RETRYABLE"),
        (psycopg.errors.QueryCanceled(), "RETRYABLE"),
        (psycopg.errors.AdminShutdown(), "RETRYABLE"),
        (psycopg.errors.DiskFull(), "RETRYABLE"),
        (psycopg.errors.UniqueViolation(), "PERMANENT"),
        (psycopg.errors.UndefinedTable(), "PERMANENT"),
        (psycopg.errors.UntranslatableCharacter(), "PERMANENT"),
        (psycopg.errors.RaiseException(), "UNKNOWN"),
        (psycopg.OperationalError("server closed the connection"), "RETRYABLE"),
        (psycopg.InterfaceError("closed"), "RETRYABLE"),
        (psycopg.DataError("NUL"), "PERMANENT"),
        (OSError(errno.ENOSPC, "full"), "RETRYABLE"),
        (FileNotFoundError(errno.ENOENT, "gone"), "PERMANENT"),
        (PermissionError(errno.EACCES, "no"), "PERMANENT"),
        (ConnectionResetError(), "RETRYABLE"),
        (socket.gaierror(socket.EAI_NONAME, "no such host"), "RETRYABLE"),
        (OSError(errno.EXDEV, "x"), "UNKNOWN"),
        (MemoryError(), "RETRYABLE"),
        (http_error(429), "RATE_LIMIT"),
        (http_error(408), "TIMEOUT"),
        (http_error(504), "TIMEOUT"),
        (http_error(503), "RETRYABLE"),
        (http_error(400), "PERMANENT"),
        (http_error(200), "UNKNOWN"),
        (httpx2.ReadTimeout("x"), "TIMEOUT"),
        (httpx2.PoolTimeout("x"), "TIMEOUT"),
        (httpx2.ConnectError("x"), "RETRYABLE"),
        (httpx2.RemoteProtocolError("x"), "RETRYABLE"),
        (httpx2.UnsupportedProtocol("x"), "PERMANENT"),
        (httpx2.InvalidURL("x"), "PERMANENT"),
        (httpx2.HTTPStatusError("x", request=REQUEST, response=httpx2.Response(502)), "RETRYABLE"),
        (openai.APITimeoutError(REQUEST), "TIMEOUT"),
        (openai.APIConnectionError(request=REQUEST), "RETRYABLE"),
        (openai_error(429), "RATE_LIMIT"),
        (openai_error(500), "RETRYABLE"),
        (openai_error(422), "PERMANENT"),
        (RuntimeError("timeout, connection reset, rate limit, permanent"), "UNKNOWN"),
    ],
)
def test_errors_are_classified_by_class_and_code_never_by_text(error: BaseException, expected: str) -> None:
    assert classify_error(error) == expected


@given(st.integers(0, 2000), st.floats(0, 3600), st.floats(0, 86_400))
def test_backoff_doubles_with_jitter_and_never_exceeds_its_cap(attempt: int, base: float, cap: float) -> None:
    delay = calculate_backoff(attempt, base, cap)
    full = base * 2.0 ** min(attempt, 64)
    assert min(cap, full) <= delay <= min(cap, 1.5 * full)


def test_only_what_can_be_helped_is_tried_again_and_only_so_often() -> None:
    for kind in ErrorType:
        hopeless = kind in (ErrorType.PERMANENT, ErrorType.PARSE_ERROR)
        assert should_retry(kind, 0, 3) is not hopeless
        assert should_retry(kind, 3, 3) is (kind is ErrorType.RATE_LIMIT)


@pytest.mark.parametrize(
    "error",
    [
        PoolTimeout("no connection"),
        psycopg.OperationalError("the connection is closed"),
        psycopg.errors.AdminShutdown("stopped"),
        psycopg.errors.DeadlockDetected("x"),
        psycopg.errors.SerializationFailure("x"),
        psycopg.errors.DiskFull("x"),
        psycopg.errors.InsufficientResources("no more files"),
        psycopg.errors.TooManyConnections("x"),
        psycopg.errors.ReadOnlySqlTransaction("x"),
        StorageAway("full"),
    ],
)
def test_a_database_or_storage_that_is_away_or_full_or_has_others_go_first_never_counts(error: Exception) -> None:
    plan = StageRetry(max_attempts=3, base=2, max_delay=300).plan(error, 7)
    assert plan is not None
    assert (plan.counts, 2 <= plan.delay <= 3) == (False, True)


@pytest.mark.parametrize(
    "away", [psycopg.OperationalError("server closed the connection"), psycopg.errors.DiskFull("full"), StorageAway("full")]
)
def test_waiting_for_a_database_or_a_storage_becomes_rarer_and_ends(away: Exception) -> None:
    strategy = StageRetry(max_attempts=3, base=2, max_delay=300, max_wait_hours=72)
    plan = strategy.plan(away, 0, 400)
    assert plan is not None
    assert 100 <= plan.delay <= 150
    assert strategy.judge(away, 3600) is away
    ended = strategy.judge(away, 73 * 3600)
    assert "MAX_WAIT_HOURS" in str(ended)
    assert strategy.plan(ended, 0, 73 * 3600) is None


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.QueryCanceled("x"),
        psycopg.errors.OutOfMemory("x"),
        psycopg.errors.ConfigurationLimitExceeded("temporary files"),
        psycopg.DataError("NUL"),
    ],
)
def test_what_a_database_answers_that_may_be_the_documents_doing_counts(error: Exception) -> None:
    plan = StageRetry(max_attempts=3, base=2, max_delay=300).plan(error, 0)
    assert plan is None or plan.counts
    assert not is_away(error)


def test_waiting_for_a_service_never_counts_and_is_spread_out() -> None:
    strategy = StageRetry(max_attempts=0, base=2, max_delay=300)
    for error in (RateLimitError("x", retry_after=10), ServiceUnavailable("x", retry_after=10)):
        plan = strategy.plan(error, 99)
        assert plan is not None
        assert not plan.counts
        assert 10 <= plan.delay <= 15


def test_what_escapes_the_runner_is_tried_again_unless_the_job_itself_is_wrong() -> None:
    job = Job(id=1, queue="cpu", lock=None, queueing_lock=None, task_name="parse", attempts=500)
    strategy = StageRetry(max_attempts=0, base=2, max_delay=300)
    decision = strategy.get_retry_decision(exception=psycopg.OperationalError("away"), job=job)
    assert decision is not None
    assert decision.retry_at is not None
    for error in (PermanentError("no such document"), TypeError("unexpected keyword argument")):
        assert strategy.get_retry_decision(exception=error, job=job) is None
