"""Failures of a service, and when they happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BAD_GATEWAY = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body><center><h1>502 Bad Gateway</h1></center></body></html>\r\n"

Kind = Literal[
    "status",  # an error answer
    "hang_in_handshake",  # the connection stands, but TLS never begins; on a server without TLS as hang_in_headers
    "hang_in_headers",  # the request is read, nothing is answered
    "hang_in_body",  # headers and half of the body, then silence
    "drip",  # the right answer, a few bytes at a time, forever slow
    "truncated",  # JSON cut in half, under a correct length
    "cut_off",  # the connection is closed before the promised length
    "reset",  # RST instead of an answer
    "reset_in_body",  # RST after half of the body
    "garbage",  # no HTTP at all
    "oversized",  # a body without end
    "redirect",
    "mangle",  # a well-formed answer with wrong content
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure."""

    kind: Kind
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""
    mangle: str = ""
    """For embeddings permuted (another order with right indexes, so not wrong), wrong_count, bad_index, same_index, wrong_dimension,
    nan, infinity, zeros, not_base64; for chats refusal, length, empty, prose, wrong_shape, unlisted."""

    @property
    def name(self) -> str:
        """A short name for counting."""
        return self.mangle or (f"status_{self.status}" if self.kind == "status" else self.kind)


def openai_error(code: str | None, message: str, kind: str = "invalid_request_error") -> str:
    """Return an error body of OpenAI's shape."""
    import json

    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def status(code: int, body: str = "", **headers: str) -> Fault:
    """An error answer; header names are given with `_` for `-`."""
    return Fault("status", code, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def rate_limited(retry_after: str | None = None) -> Fault:
    """429, with or without Retry-After."""
    headers = {"retry-after": retry_after} if retry_after is not None else {}
    return Fault("status", 429, headers, openai_error("rate_limit_exceeded", "Rate limit reached for requests", "requests"))


NAMED: dict[str, Fault] = {
    "429": rate_limited(),
    "429_retry_after": rate_limited("2"),
    "quota": Fault("status", 429, {}, openai_error("insufficient_quota", "You exceeded your current quota", "insufficient_quota")),
    "500": status(500, openai_error(None, "The server had an error", "server_error")),
    "502_html": Fault("status", 502, {"content-type": "text/html"}, BAD_GATEWAY),
    "503": status(503, openai_error(None, "Overloaded", "server_error")),
    "503_retry_after": status(503, "", retry_after="3"),
    "504": status(504),
    "401": status(401, openai_error("invalid_api_key", "Incorrect API key provided")),
    "403": status(403, openai_error("insufficient_quota", "Quota", "insufficient_quota")),
    "404": status(404, openai_error("model_not_found", "The model does not exist")),
    "400": status(400, openai_error(None, "Invalid input")),
    **{kind: Fault(kind) for kind in ("hang_in_handshake", "hang_in_headers", "hang_in_body", "drip", "truncated", "cut_off")},
    **{kind: Fault(kind) for kind in ("reset", "reset_in_body", "garbage", "oversized")},
    "redirect": Fault("redirect", 307),
    **{
        name: Fault("mangle", mangle=name)
        for name in ("wrong_count", "permuted", "bad_index", "same_index", "wrong_dimension", "nan", "infinity", "zeros", "not_base64")
    },
    **{name: Fault("mangle", mangle=name) for name in ("refusal", "length", "empty", "prose", "wrong_shape", "unlisted")},
}  # fmt: skip
"""Every failure that needs no parameters, for the command line and /_script."""

Script = Callable[[int, float], Fault | None]
"""Says what happens to request number n (from 1) at t seconds since the script began; None: it is answered."""


def never(number: int, seconds: float) -> Fault | None:
    """No failures."""
    return None


def always(fault: Fault) -> Script:
    """Every request fails."""
    return lambda number, seconds: fault


def first(count: int, fault: Fault) -> Script:
    """The first requests fail."""
    return lambda number, seconds: fault if number <= count else None


def only_every(nth: int, fault: Fault) -> Script:
    """Only every nth request is answered."""
    return lambda number, seconds: None if number % nth == 0 else fault


def every(nth: int, fault: Fault) -> Script:
    """Every nth request fails."""
    return lambda number, seconds: fault if number % nth == 0 else None


def outage(start: float, end: float, fault: Fault) -> Script:
    """All requests between two moments, in seconds since the script began, fail."""
    return lambda number, seconds: fault if start <= seconds < end else None


def flapping(period: float, fault: Fault) -> Script:
    """Up for a period of seconds, then down for one, and so on."""
    return lambda number, seconds: fault if int(seconds / period) % 2 else None


def sequence(*faults: Fault | None) -> Script:
    """One after the other, then no failures."""
    return lambda number, seconds: faults[number - 1] if number <= len(faults) else None


def from_json(told: Mapping[str, Any]) -> Script:
    """Return the script that `{"when": "outage", "fault": "502_html", "start": 5, "end": 60}` describes."""
    if told.get("when", "never") == "never":
        return never
    fault = NAMED[told["fault"]]
    match told["when"]:
        case "always":
            return always(fault)
        case "first":
            return first(told["count"], fault)
        case "only_every":
            return only_every(told["nth"], fault)
        case "every":
            return every(told["nth"], fault)
        case "outage":
            return outage(told["start"], told["end"], fault)
        case "flapping":
            return flapping(told["period"], fault)
    raise ValueError(told["when"])
