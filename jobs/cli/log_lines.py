"""What the log files in reach say of one document. Reads files of both formats, also while they are written and rotated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.log_files import log_files
from models.settings import Settings

_TIME = "%Y-%m-%d %H:%M:%S.%f"
_TIME_LENGTH = len("2026-01-31 08:15:00.000")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One entry of a log file: when, in which file, and its text, which may have several lines."""

    at: datetime
    file: str
    text: str


@dataclass
class LogSearch:
    """Finds a document's lines in the log files, each line once however often it is asked.

    A line is the document's if it names it, or names no document and carries one of its correlation ids, as the lines of its submission do.
    """

    settings: Settings
    doc_id: str
    correlation_ids: set[str] = field(default_factory=set)
    _read: dict[tuple[int, int], int] = field(default_factory=dict)
    """How much of each file has been read, in bytes, by device and inode: a rotated file has another name and is the same."""

    def path(self) -> Path | None:
        """Return what LOG_FILE_PATH stands for; None where it is not set."""
        name, settings = self.settings.log_file_path, self.settings
        return None if name is None else settings.storage_base_path / settings.storage_logs_dir / name

    def find(self) -> list[LogLine]:
        """Return the lines that have been written since the last call, the oldest first."""
        path = self.path()
        found = [line for file in log_files(path) for line in self._lines_of(file)] if path is not None else []
        return sorted(found, key=lambda line: line.at)

    def _lines_of(self, path: Path) -> Iterator[LogLine]:
        try:
            with path.open("rb") as file:
                facts = path.stat()
                key = (facts.st_dev, facts.st_ino)
                start = self._read.get(key, 0)
                file.seek(start if start <= facts.st_size else 0)
                whole = file.read(max(0, facts.st_size - file.tell()))
        except OSError:  # rotated away, removed, or another user's
            return
        end = whole.rfind(b"\n") + 1  # a line that is being written is read next time
        self._read[key] = (start if start <= facts.st_size else 0) + end
        entry: list[str] = []
        for line in whole[:end].decode("utf-8", "replace").splitlines():
            if line.startswith("    ") and entry:
                entry.append(line)
                continue
            yield from self._entry(path, entry)
            entry = [line] if self._may_match(line) else []
        yield from self._entry(path, entry)

    def _may_match(self, line: str) -> bool:
        """Say quickly whether a line can be the document's: most are not."""
        return (
            self.doc_id in line or json.dumps(self.doc_id, ensure_ascii=False)[1:-1] in line or any(c in line for c in self.correlation_ids)
        )

    def _entry(self, path: Path, lines: list[str]) -> Iterator[LogLine]:
        if not lines:
            return
        made = _of_json(lines[0]) if lines[0].startswith("{") else None
        if made is not None:
            at, named, correlation, text = made
            if named == self.doc_id or (named is None and correlation in self.correlation_ids):
                yield LogLine(at, path.name, text)
            return
        at_or_none = _time_of(lines[0])
        padded = f"{lines[0]} "
        ours = f" doc_id={self.doc_id} " in padded
        ours = ours or (" doc_id=" not in padded and any(f" correlation_id={c} " in padded for c in self.correlation_ids))
        if ours and at_or_none is not None:
            yield LogLine(at_or_none, path.name, "\n".join([lines[0][_TIME_LENGTH:].strip(), *lines[1:]]))


def _time_of(line: str) -> datetime | None:
    """Return the time that a text line begins with: local, of the host that wrote it."""
    try:
        return datetime.strptime(line[:_TIME_LENGTH], _TIME).astimezone()
    except ValueError:
        return None


def _of_json(line: str) -> tuple[datetime, str | None, str | None, str] | None:
    """Return a JSON line's time, document, correlation id and text; None for what is no line of ours."""
    try:
        entry: dict[str, Any] = json.loads(line)
        at = datetime.fromisoformat(entry["time"])
        text = f"{entry['level']:<8} {entry['logger']}: {entry['message']}"
    except (ValueError, KeyError, TypeError):
        return None
    more = {
        key: value
        for key, value in entry.items()
        if key not in ("time", "level", "logger", "message", "exception", "doc_id", "correlation_id")
    }
    text += "".join(f" {key}={value}" for key, value in more.items())
    return at, entry.get("doc_id"), entry.get("correlation_id"), text + (f"\n{entry['exception']}" if entry.get("exception") else "")
