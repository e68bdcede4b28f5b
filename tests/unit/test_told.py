"""What the headers of an answer say about the rate limit, in every form that services use."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

from jobs.adapters.exchange.told import LONGEST_WAIT, pause_told, retry_after, span

DATE = "Fri, 31 Jan 2025 08:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"x-ms-retry-after-ms": "40"}, 0.04),
        ({"retry-after": "Fri, 31 Jan 2025 08:00:30 GMT", "date": DATE}, 30),
        ({"retry-after": "Fri, 31 Jan 2025 07:00:00 GMT", "date": DATE}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after-ms": "0"}, None),
        ({"retry-after": "Fri, 31 Jan 2025 08:00:30 GMT"}, None),
        ({"retry-after": "99999999"}, LONGEST_WAIT),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "nan"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1h2m3.5s"}, LONGEST_WAIT),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "later"}, None),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "9s"}, None),
    ],
)
def test_retry_after_is_understood_or_left_alone(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("17", 17), ("", None), (None, None), ("1s!", None), ("m1", None)],
)
def test_time_spans_are_understood_or_left_alone(text: str | None, seconds: float | None) -> None:
    assert span(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("headers", "tokens", "seconds"),
    [
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "60s"}, 10, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60s"}, 10, 60),
        ({"x-ratelimit-remaining-requests": "0"}, 10, 0),
        ({"x-ratelimit-remaining-tokens": "10", "x-ratelimit-reset-tokens": "60s"}, 10, 0),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "60s"}, 10, 60),
        # 100 of the 1,000 tokens that come back in 60 s are missing.
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m", "x-ratelimit-limit-tokens": "1000"}, 100, 6),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m", "x-ratelimit-limit-tokens": "1000"}, 5000, 60),
    ],
)
def test_a_budget_that_is_used_up_is_waited_for_as_long_as_it_takes(headers: dict[str, str], tokens: int, seconds: float) -> None:
    assert pause_told(headers, tokens) == pytest.approx(seconds)


names = ["retry-after", "retry-after-ms", "date"]
names += [f"x-ratelimit-{word}-{what}" for word in ("remaining", "reset", "limit") for what in ("requests", "tokens")]
texts = st.text(max_size=60) | st.text("0123456789.smhd", max_size=60) | st.integers().map(str) | st.floats().map(str)


@given(st.dictionaries(st.sampled_from(names), texts), st.integers(0, 10**9))
@rules(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_header_breaks_anything_or_stops_us_for_longer_than_an_hour(headers: dict[str, str], tokens: int) -> None:
    assert 0 <= pause_told(headers, tokens) <= LONGEST_WAIT
    assert 0 <= (retry_after(headers) or 0) <= LONGEST_WAIT
