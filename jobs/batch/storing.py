"""The files of a batch before the database hears of them: looked at, and copied into storage, several at a time. Runs in a thread."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.adapters.archives import is_archive
from jobs.adapters.storage.sources import read_blocks
from jobs.batch.submission import Entry, Whole
from jobs.submit import File, Options, Place, prepare_together
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings
from models.stages import State

TOGETHER_BYTES = 64_000_000
"""Of files that are copied together, or one larger file: the first of them shall not wait long for the last."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a file turned out to be, and its size if it is to be copied."""

    kind: Literal["archive", "unchanged", "to store"]
    size: int = 0


def is_zip(path: Path) -> bool:
    """Say whether a file is a zip archive by its content, and no document as those of Office programs are; False if it cannot be read."""
    try:
        return is_archive(path, path.name)
    except OSError:
        return False


def look(
    settings: Settings, entries: Sequence[Entry], known: Mapping[str, Mapping[str, Any]], *, resume: bool
) -> list[Seen | DocmillError]:
    """Return what each file is; an error for one that cannot be read. `known`: rows of `find_known_documents` by doc_id.

    `resume`: a cancelled document is stored anew although its content is the same.
    """
    seen: list[Seen | DocmillError] = []
    for entry in entries:
        try:
            seen.append(_look(settings, entry, known.get(entry.doc_id), resume=resume))
        except ConfigurationError:
            raise
        except DocmillError as error:
            seen.append(error)
    return seen


def _look(settings: Settings, entry: Entry, known: Mapping[str, Any] | None, *, resume: bool) -> Seen:
    if is_zip(entry.path):
        return Seen("archive")
    if known is not None and not (resume and known["state"] == State.CANCELLED):
        most = settings.max_file_size_mb * 1_000_000
        if digest_of(entry.path, most, "MAX_FILE_SIZE_MB") == known["content_sha256"]:
            return Seen("unchanged")
    size = 0
    with suppress(OSError):  # what is wrong shows when it is copied
        size = entry.path.stat().st_size
    return Seen("to store", size)


def digest_of(path: Path, max_bytes: int, limit_name: str) -> str:
    """Return the SHA-256 of a file; errors as those of `read_blocks`."""
    made = hashlib.sha256()
    for block in read_blocks(path, str(path), max_bytes, limit_name):
        made.update(block)
    return made.hexdigest()


def in_groups(entries: Sequence[tuple[Entry, int]]) -> Iterator[list[Entry]]:
    """Yield entries, given with their sizes, in groups that are copied together."""
    group: list[Entry] = []
    total = 0
    for entry, size in entries:
        if group and total + size > TOGETHER_BYTES:
            yield group
            group, total = [], 0
        group.append(entry)
        total += size
    if group:
        yield group


def store(settings: Settings, whole: Whole, entries: Sequence[Entry]) -> list[dict[str, Any] | DocmillError]:
    """Copy files into storage; return for each the parameters of the statement that accepts it, or why it cannot be."""
    files: list[tuple[File, Options]] = [
        (
            entry.path,
            {
                "place": Place(whole.user_id, whole.batch_id, None, entry.source_path),
                "doc_id": entry.doc_id,
                "priority": whole.priority,
                "correlation_id": whole.correlation_id,
            },
        )
        for entry in entries
    ]
    return prepare_together(settings, files)
