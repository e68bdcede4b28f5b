"""Keeping secrets and document content out of whatever is logged or stored as an error: by pattern, and by the values of known secrets."""

from __future__ import annotations

import math
import os
import re
import traceback
from typing import Any
from urllib.parse import quote

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from pydantic import SecretStr

from models.settings import Settings

MASK = "***"
SHORTEST_SECRET = 4
"""Shorter values are masked by pattern only: masked everywhere they would make lines unreadable."""
LONGEST_ERROR = 2000
"""Characters kept of one exception's message."""

_NAMES = re.compile("password|passwd|pwd|api[_-]?key|authorization", re.IGNORECASE)
_PATTERNS = (
    re.compile(r"(?P<keep>://[^\s:/@]*:)[^\s/]*(?=@)"),
    re.compile(
        r"(?P<keep>(?:password|passwd|pwd|api[_-]?key|authorization)[\"']?\s*[=:]\s*(?:bearer\s+|basic\s+)?)"
        r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,;&'\"]+)",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<keep>\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
)
_SCRAM_KEYS = frozenset({"scram_client_key", "scram_server_key"})
"""As good as the password; libpq lists them as for debugging."""
_secrets: set[str] = set()
_known: list[re.Pattern[str]] = []


def register_secret(secret: SecretStr | str) -> None:
    """Have a value masked wherever it appears from now on, also percent-encoded."""
    value = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    if len(value) < SHORTEST_SECRET:
        return
    _secrets.update({value, quote(value, safe="")})
    longest_first = sorted(_secrets, key=len, reverse=True)
    _known[:] = [re.compile("|".join(re.escape(known) for known in longest_first))]


def secret_parts() -> frozenset[str]:
    """Return which parts of a connection string no interface may show, by libpq's own list: password, sslpassword and so on."""
    return frozenset(part.keyword.decode() for part in Conninfo.get_defaults() if part.dispchar == b"*") | _SCRAM_KEYS


def register_secrets_of(settings: Settings) -> None:
    """Register every secret setting, what libpq keeps secret inside of connection strings, and PGPASSWORD."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    for secret in (value.get_secret_value() for value in values if isinstance(value, SecretStr)):
        register_secret(secret)
        try:
            parts = conninfo_to_dict(secret)
        except ProgrammingError:
            continue
        for password in (str(parts.get(name) or "") for name in secret_parts()):
            # A password that is also the user or the database name protects nothing, and to mask that word would blind many lines.
            if password not in {parts.get("user"), parts.get("dbname")}:
                register_secret(password)
    register_secret(os.environ.get("PGPASSWORD", ""))


def redact(text: str) -> str:
    """Return the text with passwords, keys and registered secrets masked."""
    for known in _known:
        text = known.sub(MASK, text)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<keep>{MASK}", text)
    return text


def redact_data(data: Any) -> Any:
    """Return JSON-safe data with every text in it redacted and the values of keys that name a secret masked. Other objects become text."""
    if isinstance(data, dict):
        return {str(key): MASK if _NAMES.search(str(key)) else redact_data(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [redact_data(value) for value in data]
    if data is None or isinstance(data, bool | int) or (isinstance(data, float) and math.isfinite(data)):
        return data
    return redact(str(data))


def describe(error: BaseException) -> str:
    """Return an exception's message without secrets, and without the rows that Postgres quotes in the details of its errors."""
    diagnosis = getattr(error, "diag", None)
    message = getattr(diagnosis, "message_primary", None) or str(error)
    message = redact(message)  # before it is cut: half a secret is none that could be known
    return message if len(message) <= LONGEST_ERROR else message[:LONGEST_ERROR] + "..."


def render_traceback(error: BaseException) -> str:
    """Return a traceback with its chain of causes and its grouped exceptions, each described by `describe`."""
    return redact("\n".join(_lines(error, set()))) + "\n"


def _lines(error: BaseException, seen: set[int]) -> list[str]:
    seen.add(id(error))
    lines: list[str] = []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        link = "This caused the next exception:" if error.__cause__ else "While it was being handled, another one happened:"
        lines += [*_lines(before, seen), "", link, ""]
    lines += ["Traceback (most recent call last):"]
    lines += [line.rstrip("\n") for line in traceback.format_tb(error.__traceback__)]
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    lines += [f"{name}: {describe(error)}", *getattr(error, "__notes__", [])]
    if isinstance(error, BaseExceptionGroup):
        for number, inner in enumerate(error.exceptions, start=1):
            lines += [f"  {number}. of {len(error.exceptions)}:", *("    " + line for line in _lines(inner, seen))]
    return lines
