"""Finding stored files that nothing refers to: their process died between storing and submitting, or in the middle of writing.

Here they are only noted; `jobs.leftovers` removes what is noted, as it does for deleted documents, once no open transaction can refer to
it. A folder of uploads belongs to one document or batch. While anything refers to one of its files all of them stay: those are earlier
versions.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg

from jobs.adapters.storage import LocalStorage
from models.settings import Settings
from sql import query

PARTS = 23
"""A look at one part is a look at every so-many-th folder. One fewer than a day has hours: a look an hour goes through all of them in less
than a day, and where workers run for some hours of the day only, each day's look at the same hour is one at another part."""
AT_A_TIME = 200  # folders that one statement asks for
TEMPORARY_DAYS = 7
"""How old half-written files must be where ORPHAN_FILE_DAYS says nothing."""
FEW = 10
SUSPICIOUS_SHARE = 0.2
"""More orphans than this share of the folders, and more than FEW in all, are no orphans: these files belong to another database."""
_DIGEST = re.compile("[0-9a-f]{64}")
_TEMPORARY = re.compile("[0-9a-f]{32}[.]part")


@dataclass(slots=True)
class Orphans:
    """What a look has found."""

    folders: int = 0
    """Folders of uploads that were looked at."""
    noted: int = 0
    """Files that nothing refers to and that will be removed."""
    suspicious: int = 0
    """Files that nothing refers to, but so many that they were left alone; of the whole storage where one part has few."""
    temporary: int = 0
    """Files and folders of dead processes that were removed."""


def find_orphans(
    settings: Settings,
    conn: psycopg.Connection[Any],
    *,
    part: int | None = None,
    believe: bool = False,
    dry_run: bool = False,
    stop: Callable[[], bool] = lambda: False,
    now: float | None = None,
) -> Orphans:
    """Note the orphans among the uploads for removal, remove temporary files of the dead, and return what was found.

    `part`: look at one of PARTS only. `believe`: also where suspiciously many are orphans. `conn` commits each statement.
    Nothing younger than ORPHAN_FILE_DAYS is touched; with 0 no upload is, and no half-written file younger than TEMPORARY_DAYS.
    `now`: for tests, in seconds since the epoch.
    """
    found = Orphans()
    storage = LocalStorage.from_settings(settings)
    before = (time.time() if now is None else now) - (settings.orphan_file_days or TEMPORARY_DAYS) * 86_400
    found.temporary = _remove_temporary(storage, before, dry_run=dry_run)
    if settings.orphan_file_days == 0:
        return found
    found.folders, orphans = _look(storage, conn, part, before, stop)
    folders, number = found.folders, len(orphans)
    if part is not None and SUSPICIOUS_SHARE * folders < number <= FEW and not believe:
        # Few say nothing of one part: where the storage is small, all of its files could go so, a few an hour.
        folders, everywhere = _look(storage, conn, None, before, stop)
        number = len(everywhere)
    if stop():
        return found
    if number > max(FEW, SUSPICIOUS_SHARE * folders) and not believe:
        found.suspicious = number
        return found
    found.noted = len(orphans)
    if not dry_run:
        for path in orphans:
            conn.execute(query("note_unneeded_file"), {"path": path, "doc_id": None})
    return found


def part_of(timestamp: int) -> int:
    """Return which of PARTS is to be looked at in an hour; seconds since the epoch."""
    return timestamp // 3600 % PARTS


def _look(
    storage: LocalStorage, conn: psycopg.Connection[Any], part: int | None, before: float, stop: Callable[[], bool]
) -> tuple[int, list[str]]:
    """Return how many folders of a part, or of all, were looked at, and which files in them nothing refers to; less once `stop` says so."""
    number = 0
    orphans: list[str] = []
    names = _folders(storage, part)
    while (folders := list(islice(names, AT_A_TIME))) and not stop():
        files = {folder: _files(storage, folder, before) for folder in folders}
        number += len(folders)
        rows = conn.execute(query("find_referenced_files"), {"paths": [path for paths in files.values() for path in paths]})
        known = {os.path.dirname(row[0]) for row in rows.fetchall()}  # noqa: PTH120 - names, not paths of this machine
        orphans += [path for folder, paths in files.items() if folder not in known for path in paths]
    return number, orphans


def _folders(storage: LocalStorage, part: int | None) -> Iterator[str]:
    """Yield the folders of documents and batches, relative to the base."""
    with suppress(FileNotFoundError), os.scandir(storage.base / storage.uploads_dir) as entries:
        for entry in entries:
            if _DIGEST.fullmatch(entry.name) and (part is None or int(entry.name[:8], 16) % PARTS == part):
                yield f"{storage.uploads_dir}/{entry.name}"


def _files(storage: LocalStorage, folder: str, before: float) -> list[str]:
    """Return the files of a folder; none if any of them, or the folder, is not old, or if it is not of our making."""
    path = storage.base / folder
    try:
        if path.is_symlink() or _changed_at(path) >= before:
            return []
        files = [(f"{folder}/{name}", _changed_at(path / name)) for name in _names(path) if _DIGEST.fullmatch(name)]
    except OSError:  # it has just gone, or is no folder
        return []
    return [] if any(at >= before for _, at in files) else [name for name, _ in files]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _changed_at(path: Path) -> float:
    """Return when a file was last written, touched or moved."""
    facts = path.lstat()
    return max(facts.st_mtime, facts.st_ctime)


def _remove_temporary(storage: LocalStorage, before: float, *, dry_run: bool) -> int:
    from jobs.adapters.archives import remove_leftovers  # noqa: PLC0415 - whoever only deletes needs no archives

    removed = 0 if dry_run else remove_leftovers(storage)
    folder = storage.base / storage.temp_dir
    with suppress(FileNotFoundError):
        for name in _names(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    if _changed_at(folder / name) < before:
                        if not dry_run:
                            (folder / name).unlink()
                        removed += 1
    return removed
