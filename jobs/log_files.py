"""One log file a process: its name, and what becomes of the files of processes that have ended."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from jobs.process_ids import process_id
from models.errors import ConfigurationError

ABANDONED_SECONDS = 86_400
"""A process none of whose log files was written to for so long has ended; should it not have, it opens a new one."""
_PARTS = {"{role}": "[a-z_]+", "{host}": r"[\w.-]+", "{pid}": r"\d+(?:-\d+)?"}
_ROTATED = r"(?:\.\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}(?:\.\d+)?)?"
"""What loguru puts before the suffix of a rotated file."""


def own_log_file(path: Path, role: str) -> Path:
    """Return this process's log file for a LOG_FILE_PATH, its folder made. ConfigurationError if it cannot be written."""
    name = _template(path)
    for part, value in {"{role}": role, "{host}": socket.gethostname(), "{pid}": process_id("-")}.items():
        name = name.replace(part, value)
    own = path.with_name(name)
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"LOG_FILE_PATH={str(own)!r} cannot be written: {error.strerror}.") from error
    if own.is_dir() or not os.access(own if own.exists() else own.parent, os.W_OK):
        raise ConfigurationError(f"LOG_FILE_PATH={str(own)!r} cannot be written: it is a folder, or this user may not write there.")
    return own


def log_files(path: Path) -> list[Path]:
    """Return the log files of all processes of docmill for a LOG_FILE_PATH, rotated ones too, in no order; none if there is no folder."""
    template = Path(_template(path))
    shape = re.escape(template.stem)
    for part, pattern in _PARTS.items():
        shape = shape.replace(re.escape(part), pattern)
    ours = re.compile(f"{shape}{_ROTATED}{re.escape(template.suffix)}")
    return [file for file in path.parent.iterdir() if ours.fullmatch(file.name)] if path.parent.is_dir() else []


def remove_abandoned(path: Path, keep: int) -> None:
    """Delete the log files that ended processes left for a LOG_FILE_PATH, but for the newest `keep`.

    One that has written to any of its files lately lives, and removes its rotated files itself."""
    stamp = re.compile(_ROTATED + re.escape(path.suffix) + "$")
    by_process: dict[str, list[tuple[float, Path]]] = {}
    for file in log_files(path):
        with suppress(FileNotFoundError):  # another process is doing the same
            by_process.setdefault(stamp.sub("", file.name), []).append((file.stat().st_mtime, file))
    before = time.time() - ABANDONED_SECONDS
    ended = [each for files in by_process.values() if max(files)[0] < before for each in files]
    for _, file in sorted(ended, reverse=True)[keep:]:
        file.unlink(missing_ok=True)


def _template(path: Path) -> str:
    """Add to a file name whichever of role, host and process id it does not place itself."""
    missing = [part for part in _PARTS if part not in path.name]
    return f"{path.stem}.{'-'.join(missing)}{path.suffix}" if missing else path.name
