"""How long an answer asks us to wait: Retry-After, and x-ratelimit-* of OpenAI and those like it. Names of headers in lower case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 3600.0
"""Seconds; a service that asks for more is asked again after this."""

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")
_SPAN = re.compile(
    r"(?=.)(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?"
    r"(?:([0-9]{1,12})ms)?"
)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the service asks us to wait, None where it does not say, or says that there is nothing to wait for.

    A date is compared with the answer's own Date header, so that only one clock is trusted. Where there is no Retry-After, it is the
    reset of the limit of which nothing remains.
    """
    told = headers.get("retry-after")
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        if (milliseconds := _number(headers.get(name))) is not None:
            return min(LONGEST_WAIT, milliseconds / 1000) or None
    wait = _number(told)
    if wait is None:
        wait = _until(told, headers.get("date"))
    if wait is None:
        resets = (_spent(headers, kind) for kind in ("requests", "tokens"))
        wait = max((reset for reset in resets if reset is not None), default=None)
    return None if wait is None else min(LONGEST_WAIT, wait) or None


def pause_told(headers: Mapping[str, str], tokens: int) -> float:
    """Return the seconds for which a good answer says that nothing more may be sent; 0 where it does not.

    `tokens` is what a call like this one takes. The reset of the tokens is when all of them are back, so a part of them is back sooner.
    """
    pause = _spent(headers, "requests") or 0.0
    remaining, reset = _number(headers.get("x-ratelimit-remaining-tokens")), span(headers.get("x-ratelimit-reset-tokens"))
    if remaining is not None and reset is not None and remaining < tokens:
        limit = _number(headers.get("x-ratelimit-limit-tokens")) or 0.0
        part = (min(tokens, limit) - remaining) / (limit - remaining) if limit > remaining else 1.0
        pause = max(pause, reset * min(1.0, max(0.0, part)))
    return min(LONGEST_WAIT, pause)


def _spent(headers: Mapping[str, str], kind: str) -> float | None:
    """Return when a limit of which nothing remains is whole again."""
    if _number(headers.get(f"x-ratelimit-remaining-{kind}")) != 0:
        return None
    return span(headers.get(f"x-ratelimit-reset-{kind}"))


def _number(text: str | None) -> float | None:
    text = (text or "").strip()
    return float(text) if _NUMBER.fullmatch(text) else None


def _date(text: str | None) -> datetime:
    at = parsedate_to_datetime(text or "")
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _until(date: str | None, now: str | None) -> float | None:
    try:
        return max(0.0, (_date(date) - _date(now)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def span(text: str | None) -> float | None:
    """Return the seconds of `1h2m3.5s`, `20ms` or a bare number of seconds; None for anything else."""
    if (number := _number(text)) is not None:
        return number
    match = _SPAN.fullmatch((text or "").strip())
    if match is None:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return days * 86_400 + hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
