"""A folder to unpack into, below the storage's temp folder. It is removed in the end, by its owner or by whoever comes after a crash."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from jobs.adapters.storage import LocalStorage
from jobs.adapters.storage.faults import storage_faults

_PREFIX = "unpack-"
_ABANDONED_SECONDS = 86_400.0  # where the file system cannot say whether an owner lives


@contextmanager
def workspace(storage: LocalStorage) -> Iterator[Path]:
    """Yield an empty folder of one's own and remove it afterwards with all that is in it. RetryableError: the storage is full or failing.

    A lock, which the system takes back from a process that dies but not from one that is paused, says that it is in use.
    """
    temp = storage.ensure_directory(storage.temp_dir)
    with storage_faults(storage.base, storage.temp_dir):
        folder, lock = _make(temp)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_leftovers(storage: LocalStorage) -> int:
    """Remove the folders of those who died before they could, and return how many."""
    removed = 0
    for folder in Path(storage.base, storage.temp_dir).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _is_abandoned(lock):
                    shutil.rmtree(folder, ignore_errors=True)
                    removed += 1
            finally:
                os.close(lock)
    return removed


def _make(temp: Path) -> tuple[Path, int]:
    while True:
        folder = temp / f"{_PREFIX}{uuid4().hex}"
        folder.mkdir(0o770)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # somebody who cleans up came before it was opened
        with suppress(OSError):  # a network file system without locks: its age protects it
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # or before it was locked


def _is_abandoned(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(lock).st_mtime > _ABANDONED_SECONDS
    return True
