"""Making files and folders survive a power failure. Everything here raises OSError."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

# Owner and group: submitters and workers may be different users of one group; nobody else needs to see documents.
FILE_MODE = 0o660
FOLDER_MODE = 0o770
_NO_FILES = frozenset({"logs", "lost+found"})


def regular(status: os.stat_result) -> os.stat_result:
    """Pass on the status of a regular file; OSError (EISDIR, ENXIO) for anything else, before a pipe could make a reader wait."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return status


def is_empty(base: Path) -> bool:
    """Say whether a storage's base is not there or holds nothing, as where it is not mounted: one in use has a folder of uploads.

    A folder of logs is nothing: each process makes its own, whatever it does.
    """
    return not base.exists() or all(entry.name in _NO_FILES for entry in base.iterdir())


def make_folder(path: Path, base: Path | None = None) -> None:
    """Create a folder and its missing parents, each made durable in the one that holds it; FileNotFoundError in a `base` that is empty."""
    if base in (path, path.parent) and is_empty(base):
        # Where a storage is not mounted, files would be stored in its place that nobody finds afterwards.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(base))
    try:
        path.mkdir(FOLDER_MODE)
    except FileNotFoundError:
        make_folder(path.parent, base)
        path.mkdir(FOLDER_MODE, exist_ok=True)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; their entries are as durable as the server makes them.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP} or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def holds(path: Path, size: int, sha256: str) -> bool:
    """Tell whether a file is there with this size and content."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def write_all(descriptor: int, block: bytes | memoryview) -> None:
    """Write a whole block; the system may take it in parts."""
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
