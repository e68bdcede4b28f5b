"""Reading the settings at start, with errors for people."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import ValidationError

from models.errors import ConfigurationError
from models.settings.checks import Words
from models.settings.fields import Settings, allowed_values
from models.settings.secret_files import BadSecretFile, holds_secret

FAULTS = {
    "int_parsing": "is not a whole number", "int_from_float": "is not a whole number", "int_parsing_size": "has too many digits",
    "float_parsing": "is not a number", "finite_number": "is not a finite number", "bool_parsing": "is not true or false",
    "literal_error": "is not one of the allowed values", "greater_than_equal": "is too small", "less_than_equal": "is too large",
}  # fmt: skip
"""pydantic's error types in plain words."""

PASSED_ON = frozenset({"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "FORWARDED_ALLOW_IPS"})
"""Variables that are no settings of docmill, but of the libraries that it calls and listens with, which look in the environment alone."""


@functools.cache
def load_settings() -> Settings:
    """Read and check all settings, once a process (`load_settings.cache_clear()` forgets them). ConfigurationError lists every bad value.

    PG* variables in `.env` are put into the process's environment, where libpq looks for them, unless they are set there. An empty one
    counts as set where a server is named without them: it may say that this one is sent no password. Those of PASSED_ON are put there too,
    unless they have a value there already.
    """
    try:
        _refuse_unreadable_lines()
        settings = Settings()
        names_server = settings.database_conninfo is not None  # asked before anything of .env is among the variables
        for name, value in dotenv_values(".env").items():
            if not value:
                continue
            if name.startswith("PG") and (name not in os.environ if names_server else not os.environ.get(name)):
                os.environ[name] = value
            # Proxies are named in either case, and the lower one would win.
            if name.upper() in PASSED_ON and not (os.environ.get(name.upper()) or os.environ.get(name.lower())):
                os.environ[name] = value
        _refuse_way_around_nothing(settings)
    except ValidationError as error:
        problems = [_describe(detail) for detail in error.errors(include_url=False)]
    except UnicodeDecodeError:
        problems = [".env is not UTF-8 text"]
    except _Refused as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f".env cannot be read: {error.strerror}"]
    else:
        return settings
    # Raised out here so that no chained exception carries a secret into a traceback.
    raise ConfigurationError("The configuration is wrong:\n" + "\n".join(f"  {problem}" for problem in problems))


class _Refused(Exception):
    """What is wrong with `.env` or with settings beside each other."""


def _refuse_unreadable_lines() -> None:
    """Raise _Refused, by line numbers alone, where dotenv would pass over a line, and work would go on without what that line sets."""
    if not (path := Path(".env")).is_file():
        return
    with path.open(encoding="utf-8") as file:
        # What is read as one line may begin with empty ones.
        bad = [
            str(read.original.line + _empty_lines(read.original.string))
            for read in parse_stream(file)
            if read.error or (read.key is not None and read.value is None)
        ]
    if bad:
        raise _Refused(f".env has no NAME=value in line{'s' * (len(bad) > 1)} {', '.join(bad)}: is a quote missing?")


def _refuse_way_around_nothing(settings: Settings) -> None:
    """Raise _Refused where the pooler's own address is missing: work would go to an embedded server, and its migrations elsewhere."""
    if settings.database_url_direct is not None and settings.database_conninfo is None:
        raise _Refused("DATABASE_URL_DIRECT is set without DATABASE_URL, around which it leads: set both, or DATABASE_URL alone")


def _empty_lines(text: str) -> int:
    return len(text[: -len(text.lstrip()) or None].splitlines())


def _describe(detail: Mapping[str, Any]) -> str:
    """Say of one bad value which variable it is, what is wrong with it and what is allowed."""
    name, value = str(detail["loc"][0]), detail["input"]
    if isinstance(value, BadSecretFile):
        return f"{value.variable} {value.problem}"
    field = Settings.model_fields[name]
    hidden = holds_secret(field) or any(not mark.is_quoted for mark in field.metadata if isinstance(mark, Words))
    shown = "" if hidden else f"={str(value)[:100]!r}"
    fault = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else FAULTS.get(detail["type"], "is not a valid value")
    return f"{name.upper()}{shown} {fault}; allowed: {allowed_values(name)}"
