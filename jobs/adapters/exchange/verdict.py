"""Whose fault a refusal is: HTTP status and error code of an answer become an error of models/errors.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.adapters.exchange.told import retry_after
from models.errors import CredentialRefused, DocmillError, FailedCall, RateLimitError, RequestRefused, RetryableError, ServiceUnavailable
from models.errors import TimeoutError as CallTimeout

BRIEF_WAIT = 5.0
"""Seconds after which a service that could not be reached, or whose gateway could not reach it, is worth another try; a breaker that
has seen more of them knows better."""
LONGEST_EXCUSE = 300
"""Characters of a service's own words that an error repeats."""

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "quota_exceeded",
        "insufficient_credits",
        "account_deactivated",
    }
)
_GATEWAY = frozenset({502, 503, 520, 521, 522, 523, 525, 526, 527, 529, 530})
_SLOW = frozenset({408, 504, 524})
_LATER = frozenset({409, 423, 425})
_REFUSED_CONTENT = frozenset({400, 413, 414, 415, 422})
_QUOTES_KEY = frozenset({401, 403, 407})
"""Answers whose words may quote a part of the key; their code says enough."""
_CODE = re.compile(r"[\w.-]{1,64}")
_KEYLIKE = re.compile(r"\b(?:sk|pk|rk|llx|key|api)[-_][\w*.-]{4,}|\bbearer\s+\S+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Excuse:
    """What the body of a refusal says, as far as it says it in a known shape."""

    code: str | None = None
    kind: str | None = None
    words: str = ""


def read_excuse(body: bytes, secret: str) -> Excuse:
    """Return code, type and words of an error body of OpenAI's, FastAPI's or TEI's shape; empty for anything else, such as HTML.

    The words are bounded, on one line, and without the key or anything that looks like one; so are code and type.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return Excuse()
    error = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(error, str):
        error = {"message": error, "type": data.get("error_type")}
    if not isinstance(error, dict):
        return Excuse()
    words = next((told for name in ("message", "detail", "error_message") if isinstance(told := error.get(name), str)), "")
    return Excuse(code=_code(error.get("code"), secret), kind=_code(error.get("type"), secret), words=clean(words, secret))


def _code(told: object, secret: str) -> str | None:
    if not isinstance(told, str) or not _CODE.fullmatch(told) or (secret and secret in told):
        return None
    return told


def clean(words: str, secret: str) -> str:
    """Return foreign words fit for a message: one line, bounded, without the key."""
    words = words[: 10 * LONGEST_EXCUSE]
    if secret:
        words = words.replace(secret, "***")
    words = _KEYLIKE.sub("***", " ".join(words.split()))
    return "".join(letter for letter in words if letter.isprintable())[:LONGEST_EXCUSE]


def judge(name: str, host: str, *, status: int, headers: Mapping[str, str], body: bytes, secret: str) -> DocmillError:
    """Return the error for an answer that is no 2xx. `name` says in words what the service is for."""
    excuse = read_excuse(body, secret)
    said = f" ({excuse.code or excuse.kind})" if excuse.code or excuse.kind else ""
    said += f": {excuse.words}" if excuse.words and status not in _QUOTES_KEY else ""
    error = _of_status(f"{name} at {host} answered HTTP {status}{said or '.'}", status, headers, excuse)
    error.call = FailedCall(host, sent=True, status=status, code=excuse.code or excuse.kind, headers=dict(headers))
    return error


def _of_status(message: str, status: int, headers: Mapping[str, str], excuse: Excuse) -> DocmillError:
    wait = retry_after(headers)
    if status == 402 or (status in (403, 429) and {excuse.code, excuse.kind} & QUOTA_CODES):
        return CredentialRefused(f"{message} [the account's quota is used up]", "quota", wait)
    if status in (401, 403):
        return CredentialRefused(f"{message} [the key is refused]", "credential", wait)
    if status == 407:
        return CredentialRefused(f"{message} [the proxy wants other credentials]", "configuration", wait)
    if status in _GATEWAY:
        return ServiceUnavailable(message, BRIEF_WAIT if wait is None else wait)
    if status == 429:
        error: DocmillError = RateLimitError(message, wait)
    elif status in _SLOW:
        error = CallTimeout(message)
    elif status >= 500 or status in _LATER:
        error = RetryableError(message)
    elif status in _REFUSED_CONTENT:
        error = RequestRefused(message)
    else:
        # 404 and the like: there is no such model or path. A redirect is not followed, as it could carry key and documents anywhere.
        error = CredentialRefused(f"{message} [the address or the model is wrong]", "configuration", wait)
    return error
