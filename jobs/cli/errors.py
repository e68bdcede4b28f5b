"""Errors as people see them: one clear message on stderr, and an exit code that scripts can use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import IntEnum

import psycopg

from jobs.cli.output import complain
from jobs.redaction import redact, render_traceback
from models.errors import ConfigurationError, DocmillError
from models.settings import load_settings


class ExitCode(IntEnum):
    """What the command's exit codes mean; `docmill --help` says the same."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DATABASE = 3
    INTERRUPTED = 130


_ABSENCE = ("08", "57P", "53300")
"""SQLSTATE classes and codes of a server that is not there, goes away or takes no more connections."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def is_database_absent(error: BaseException) -> bool:
    """Say whether an error means that the database cannot be reached, rather than that it refused something."""
    return any(
        isinstance(cause, psycopg.OperationalError) and (cause.sqlstate is None or cause.sqlstate.startswith(_ABSENCE))
        for cause in _chain(error)
    )


def _wants_details() -> bool:
    try:
        return load_settings().log_level in {"TRACE", "DEBUG"}
    except ConfigurationError:
        return os.environ.get("LOG_LEVEL", "").strip().upper() in {"TRACE", "DEBUG"}


def report(error: Exception) -> ExitCode:
    """Print an error for people and return the exit code. The traceback is shown with LOG_LEVEL=DEBUG only."""
    details = _wants_details()
    message = redact(str(error).strip() or type(error).__name__)
    if is_database_absent(error):
        code = ExitCode.NO_DATABASE
        if not isinstance(error, DocmillError):
            message = f"DATABASE_URL: no connection to the database: {message}"
    elif isinstance(error, DocmillError):
        code = ExitCode.USAGE if isinstance(error, ConfigurationError) else ExitCode.FAILED
    elif (refused := next((cause for cause in _chain(error) if isinstance(cause, psycopg.errors.InsufficientPrivilege)), None)) is not None:
        code = ExitCode.FAILED
        message = (
            f"The role of DATABASE_URL may not do this: {redact(str(refused.diag.message_primary))}. docs/row-security.md says who may."
        )
    else:
        from procrastinate.exceptions import ConnectorException  # noqa: PLC0415 - most commands need nothing else of it

        code = ExitCode.FAILED
        kind = "The database refused" if isinstance(error, psycopg.Error | ConnectorException) else "Something unforeseen happened"
        hint = "" if details else " LOG_LEVEL=DEBUG shows where."
        message = f"{kind}: {type(error).__name__}: {message}{hint}"
    complain(message)
    if details:
        complain(render_traceback(error), prefix="")
    return code
