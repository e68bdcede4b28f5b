"""How uploads come to their places and stay there: several at a time, beside others who store the same content or remove it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jobs.adapters.storage.durable import FOLDER_MODE, holds, make_folder, sync

_TRIES = 3  # to put an upload into its folder
_WAITING = 8  # threads that wait for the disk: it writes several files at once as quickly as one


@dataclass(frozen=True, slots=True)
class Upload:
    """A submitted file on its way in; see `LocalStorage.store_upload`."""

    doc_id: str
    source: Path | bytes | BinaryIO
    max_bytes: int
    name: str = ""
    limit_name: str = "MAX_FILE_SIZE_MB"


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """A submitted file as it was stored."""

    file_path: str
    """Relative to the storage base path."""
    size: int
    """In bytes."""
    sha256: str
    """Lowercase hex of the content."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A finished file on its way to the folder of its document, where its name is its SHA-256."""

    base: Path
    """The storage's, which must be there."""
    temporary: Path
    target: Path
    size: int


def place_uploads(copies: Sequence[Copy]) -> list[OSError | None]:
    """Move finished files to their places, durably, unless the same content is there already; return what went wrong with each."""
    faults = _place(copies)
    for number, copy in enumerate(copies):
        for _ in range(_TRIES - 1):
            if not isinstance(faults[number], FileNotFoundError) or copy.target.parent.exists():
                break
            faults[number] = _place([copy])[0]  # somebody has removed the empty folder in between
    return faults


def _place(copies: Sequence[Copy]) -> list[OSError | None]:
    """Do so once: contents first, so that no name ever stands for half of one, then names, then the folders that hold those."""
    faults: list[OSError | None] = [None] * len(copies)
    new = [number for number, copy in enumerate(copies) if not _is_there(copy)]
    lost = _at_once(sync, (copies[number].temporary for number in new))
    for number in new:
        faults[number] = lost.get(copies[number].temporary) or _fault(_move, copies[number])
    # Also of what was there: the one who put it there may not have come to this point yet.
    placed = [copy for copy, fault in zip(copies, faults, strict=True) if fault is None]
    lost = _at_once(sync, (folder for copy in placed for folder in (copy.target.parent, copy.target.parent.parent)))
    return [
        fault or lost.get(copy.target.parent) or lost.get(copy.target.parent.parent) for copy, fault in zip(copies, faults, strict=True)
    ]


def _is_there(copy: Copy) -> bool:
    try:
        os.utime(copy.target)  # so that nobody removes it as one that is no longer needed
        return holds(copy.target, copy.size, copy.target.name)
    except OSError:
        return False  # what is wrong shows when the copy is moved there


def _move(copy: Copy) -> None:
    make_folder(copy.target.parent.parent, copy.base)
    with suppress(FileExistsError):
        copy.target.parent.mkdir(FOLDER_MODE)
    copy.temporary.replace(copy.target)


def _at_once(action: Callable[[Path], None], paths: Iterable[Path]) -> dict[Path, OSError]:
    """Do what waits for the disk with different paths at once; return what went wrong with which."""
    different = list(dict.fromkeys(paths))
    if len(different) < 3:  # threads are not worth it
        faults = [_fault(action, path) for path in different]
    else:
        with ThreadPoolExecutor(min(_WAITING, len(different))) as threads:
            faults = list(threads.map(lambda path: _fault(action, path), different))
    return {path: fault for path, fault in zip(different, faults, strict=True) if fault is not None}


def _fault(action: Callable[[Any], None], subject: object) -> OSError | None:
    try:
        action(subject)
    except OSError as error:
        return error
    return None
