"""How long an answer asks us to wait: Retry-After, and the x-ratelimit-* headers of OpenAI and those like it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 86_400.0
"""Seconds; a service that asks for more is asked again after this."""

_NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")
_SPAN = re.compile(
    r"(?=.)(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?"
    r"(?:([0-9]{1,12})ms)?"
)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the service asks us to wait, None where it does not say.

    A date is compared with the answer's own Date header, so that only one clock is trusted. Where there is no Retry-After, it is the
    reset of the limit of which nothing remains.
    """
    milliseconds, told = _number(headers.get("retry-after-ms")), headers.get("retry-after")
    if milliseconds is not None:
        wait: float | None = milliseconds / 1000
    else:
        wait = _number(told)
        if wait is None:
            wait = _until(told, headers.get("date"))
        if wait is None:
            resets = (_spent(headers, kind) for kind in ("requests", "tokens"))
            wait = max((reset for reset in resets if reset is not None), default=None)
    return None if wait is None else min(LONGEST_WAIT, wait)


def _spent(headers: Mapping[str, str], kind: str) -> float | None:
    """Return when a limit of which nothing remains is whole again."""
    if _number(headers.get(f"x-ratelimit-remaining-{kind}")) != 0:
        return None
    return _span(headers.get(f"x-ratelimit-reset-{kind}"))


def _number(text: str | None) -> float | None:
    return float(text) if text and _NUMBER.fullmatch(text) else None


def _until(date: str | None, now: str | None) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(date or "") - parsedate_to_datetime(now or "")).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _span(text: str | None) -> float | None:
    """Read `1h2m3.5s`, `20ms` or a bare number of seconds."""
    if (number := _number(text)) is not None:
        return number
    match = _SPAN.fullmatch(text or "")
    if match is None:
        return None
    days, hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return days * 86_400 + hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
