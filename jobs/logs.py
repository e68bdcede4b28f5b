"""Logging with loguru: one format for docmill and for every library that uses the standard module, context bound per job, no secrets."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
from contextlib import AbstractContextManager
from datetime import UTC
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loguru import logger

from jobs.log_files import own_log_file, remove_abandoned
from jobs.redaction import redact, redact_data, register_secrets_of, render_traceback
from jobs.visible import visible
from models.settings import Settings

if TYPE_CHECKING:
    from loguru import Record

TEXT = (
    "<dim>{time:YYYY-MM-DD HH:mm:ss.SSS}</dim> <level>{level: <8}</level> {extra[_line]}<dim>{extra[_context]}</dim>"
    "<red>{extra[_traceback]}</red>\n"
)
JSON = "{extra[_json]}\n"
ROUTINE = frozenset(
    {"start_job", "job_success", "jobs_deferred", "periodic_task_deferred", "registering_periodic_task", "loading_blueprint"}
)
"""Values of `action` in what procrastinate logs at INFO for every job. docmill's own lines say it better, so these are DEBUG here."""
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Which JSON may hold as they are, but at which some readers would cut a line in two."""


def configure_logging(settings: Settings, *, role: str, worker: str | None = None) -> None:
    """Send all log records of this process to stderr and, with LOG_FILE_PATH, to a rotating file of its own. May be called again.

    `role` says what the process is (`worker`, `cli`); `worker` names it in every line. ConfigurationError if the file cannot be written.
    Handlers that others have put on the root logger, such as procrastinate's command, are taken off: no line appears twice.
    """
    if sys.stderr is None:  # it was closed by whoever started this process
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the process runs
    register_secrets_of(settings)
    as_json = settings.log_format == "json"
    # A function, because to a plain format loguru would add the traceback once more.
    shape: dict[str, Any] = {
        "level": settings.log_level,
        "format": lambda _: JSON if as_json else TEXT,
        "backtrace": False,
        "diagnose": False,
    }
    logger.remove()
    logger.configure(patcher=functools.partial(_render, as_json=as_json), extra={"worker": worker} if worker else {})
    logger.add(_write_to_stderr, colorize=sys.stderr.isatty() and "NO_COLOR" not in os.environ, **shape)
    if settings.log_file_path is not None:
        folder = settings.storage_base_path / settings.storage_logs_dir
        path = own_log_file(folder / settings.log_file_path, role)
        remove_abandoned(folder / settings.log_file_path, settings.log_retention_files)
        size, keep = int(settings.log_rotation_mb * 1_000_000), settings.log_retention_files
        # Watched and opened late: it comes back when somebody moves it away, and a command that logs nothing leaves no file.
        name = str(path).replace("{", "{{").replace("}", "}}")  # loguru fills in what stands in braces
        logger.add(name, rotation=size, retention=keep, encoding="utf-8", errors="backslashreplace", watch=True, delay=True, **shape)
    level = logger.level(settings.log_level).no
    logging.root.handlers[:] = [_Intercept()]
    logging.root.setLevel(level)
    logging.captureWarnings(True)
    if (command := sys.modules.get("procrastinate.cli")) is not None:
        setattr(command, "print_stderr", _log_printed)  # noqa: B010 - not part of its typed surface
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def bound(**context: Any) -> AbstractContextManager[None]:
    """Bind context to every line logged inside the `with` block, in this task and in those it starts. None is left out."""
    return logger.contextualize(**{name: value for name, value in context.items() if value is not None})


def _render(record: Record, *, as_json: bool) -> None:
    """Render a record once for all sinks, without secrets: message, context and traceback."""
    extra = record["extra"]
    name = extra.pop("_logger", None) or record["name"] or "?"
    message = redact(record["message"])
    context: dict[str, Any] = redact_data({key: value for key, value in extra.items() if value is not None})
    details = "" if record["exception"] is None or record["exception"].value is None else render_traceback(record["exception"].value)
    if as_json:
        when = record["time"].astimezone(UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record["level"].name, "message": message, "logger": name}
        line = context | line | ({"exception": details} if details else {})
        extra["_json"] = json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS)
    else:
        extra["_line"] = _indented(f"{name}: {message}")
        extra["_context"] = _indented("".join(f" {key}={value}" for key, value in context.items()))
        extra["_traceback"] = _indented(f"\n{details.rstrip()}") if details else ""


def _indented(text: str) -> str:
    """Return text in which no line but the first can pass for one of the log's own."""
    return visible(text).replace("\n", "\n    ")


def _write_to_stderr(line: str) -> None:
    """Look stderr up for each line: a progress display replaces it to keep lines and bars apart."""
    sys.stderr.write(line)


def _log_printed(*parts: object) -> None:
    """Log what procrastinate's command would print beside the log: what it starts, and the error that it ends with."""
    level = "INFO" if sys.exc_info()[0] is None else "CRITICAL"
    logger.bind(_logger="procrastinate.cli").log(level, "{}", " ".join(map(str, parts)))


class _Intercept(logging.Handler):
    """Hands the standard library's records on to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one record under its own logger's name and at its own level; procrastinate's routine at DEBUG."""
        level: str | int = record.levelname if logging.getLevelName(record.levelname) == record.levelno else record.levelno
        if record.levelno == logging.INFO and record.name.startswith("procrastinate") and getattr(record, "action", None) in ROUTINE:
            level = "DEBUG"
        try:
            message = record.getMessage()
        except Exception:
            self.handleError(record)
            return
        logger.opt(exception=record.exc_info).bind(_logger=record.name).log(level, message)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.opt(exception=error).critical("Ending on an exception that nothing caught")


def _log_uncaught_in_thread(hook: threading.ExceptHookArgs) -> None:
    if hook.exc_type is not SystemExit:
        logger.opt(exception=hook.exc_value).critical(
            "Thread {} ended on an exception that nothing caught", hook.thread and hook.thread.name
        )
