"""What the headers of an answer say about waiting and limits: Retry-After and the x-ratelimit-* headers of OpenAI and those like it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from models.calls import Allowance

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
    waits = [_number(headers.get("retry-after-ms")), _number(headers.get("retry-after"))]
    if waits[0] is not None:
        return min(LONGEST_WAIT, waits[0] / 1000)
    wait = waits[1] if waits[1] is not None else _until(headers.get("retry-after"), headers.get("date"))
    if wait is None:
        told = allowance(headers)
        spent = [
            reset
            for left, reset in ((told.remaining_requests, told.reset_requests), (told.remaining_tokens, told.reset_tokens))
            if left == 0 and reset is not None
        ]
        wait = max(spent, default=None)
    return None if wait is None else min(LONGEST_WAIT, wait)


def allowance(headers: Mapping[str, str]) -> Allowance:
    """Return what the headers say; a header that makes no sense counts as absent."""

    def count(name: str) -> int | None:
        number = _number(headers.get(f"x-ratelimit-{name}"))
        return None if number is None else int(number)

    def span(name: str) -> float | None:
        return _span(headers.get(f"x-ratelimit-reset-{name}"))

    return Allowance(
        limit_requests=count("limit-requests"),
        remaining_requests=count("remaining-requests"),
        reset_requests=span("requests"),
        limit_tokens=count("limit-tokens"),
        remaining_tokens=count("remaining-tokens"),
        reset_tokens=span("tokens"),
    )


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
