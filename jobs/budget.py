"""What an answer's headers say about the rate limit, as pure functions. The budget itself is kept by the SQL function take_budget.

Understood are Retry-After (seconds, or a date compared with the answer's own Date), retry-after-ms, and the x-ratelimit headers of OpenAI
and those who copy them. Header names are in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_PAUSE = 3600.0
"""Seconds; a service that asks for more is asked again then."""
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)", re.ASCII)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), LONGEST_PAUSE)


def _number(text: str | None) -> float | None:
    if text is None or len(text) > 20:
        return None
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text.strip(), re.ASCII) else None


def _date(text: str) -> datetime | None:
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds an answer asks to wait, at most an hour; None where it does not say."""
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (milliseconds := _number(headers.get(name))) is not None:
            return _bounded(milliseconds / 1000)
    told = headers.get("retry-after")
    if told is None:
        return None
    if (seconds := _number(told)) is not None:
        return _bounded(seconds)
    until, sent = _date(told), _date(headers.get("date", ""))
    return None if until is None or sent is None else _bounded((until - sent).total_seconds())


def span(text: str | None) -> float | None:
    """Return the seconds of a time span such as `1s`, `6m0s`, `120ms` or `0.5`; None for anything else."""
    text = (text or "").strip().lower()[:41]
    parts = _PART.findall(text)
    if not parts or len(text) > 40 or "".join(number + unit for number, unit in parts) != text:
        return _number(text)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def pause_told(headers: Mapping[str, str], tokens: int) -> float:
    """Return the seconds for which a good answer says that nothing more may be sent; 0 where it does not.

    `tokens` is what a call like this one takes. The reset of the tokens is when all of them are back, so a part of them is back sooner.
    """
    pause = 0.0
    if _number(headers.get("x-ratelimit-remaining-requests")) == 0:
        pause = span(headers.get("x-ratelimit-reset-requests")) or 0.0
    remaining, reset = _number(headers.get("x-ratelimit-remaining-tokens")), span(headers.get("x-ratelimit-reset-tokens"))
    if remaining is not None and reset is not None and remaining < tokens:
        limit = _number(headers.get("x-ratelimit-limit-tokens")) or 0.0
        part = (min(tokens, limit) - remaining) / (limit - remaining) if limit > remaining else 1.0
        pause = max(pause, reset * min(1.0, max(0.0, part)))
    return _bounded(pause)
