"""Operating-system errors translated at the border, by errno. Trouble with the storage itself is no document's fault: it is retryable."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from jobs.adapters.storage.durable import is_empty
from jobs.adapters.stored_file import StoredFile
from models.errors import ConfigurationError, DocmillError, PermanentError, RetryableError, StorageAway, SubmitError

_STORAGE_FAULTS = {
    errno.ENOSPC: "is full: free some space",
    errno.EDQUOT: "has used up its disk quota: free some space",
    errno.EROFS: "is read-only: mount it writable",
    errno.ESTALE: "has lost its file server: mount it again",
    errno.EACCES: "does not let this user in: give it the right to read and write there",
    errno.EPERM: "does not let this user in: give it the right to read and write there",
    errno.EXDEV: "spans several file systems: its folders must lie on one",
}
_OF_THE_WHOLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE})
"""What holds for every file; the others may be one file's."""
_NAME_FAULTS = {
    errno.ENOENT: "does not exist",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "has a file where a folder is meant",
    errno.EEXIST: "has a file where a folder is meant",
    errno.ENXIO: "is not a regular file but a pipe, socket or device",
    errno.ENAMETOOLONG: "has too long a name",
    errno.ELOOP: "is a circle of symbolic links",
}
_NO_FOLDER = frozenset({errno.ENOTDIR, errno.EEXIST})
_SOURCE_FAULTS = {**_NAME_FAULTS, errno.EACCES: "may not be read by this user", errno.EPERM: "may not be read by this user"}


@contextmanager
def storage_faults(base: Path, name: str) -> Iterator[None]:
    """Turn an OSError about the stored file `name` into a PermanentError if the name is at fault, else into a RetryableError, which is a
    StorageAway if no file could be had or stored now."""
    try:
        yield
    except OSError as error:
        raise storage_fault(error, base, name) from error


def storage_fault(error: OSError, base: Path, name: str) -> DocmillError:
    """Return what an OSError about the stored file `name` is for us."""
    code = error.errno or 0
    ours: DocmillError
    if code in _NO_FOLDER and not base.is_dir():
        ours = StorageAway(f"STORAGE_BASE_PATH={str(base)!r} is no folder. It happened at {name!r}.")
    elif code == errno.ENOENT and _is_away(base):
        ours = StorageAway(f"The storage at {base} (STORAGE_BASE_PATH) is not there: is it mounted? It happened at {name!r}.")
    elif code in _NAME_FAULTS:
        where = ": was it submitted with another STORAGE_BASE_PATH?" if code == errno.ENOENT else "."
        ours = PermanentError(f"Stored file {name!r} in {base} {_NAME_FAULTS[code]}{where}")
    else:
        fault = _STORAGE_FAULTS.get(code, f"failed: {error.strerror or type(error).__name__}")
        kind = StorageAway if code in _OF_THE_WHOLE else RetryableError
        ours = kind(f"The storage at {base} (STORAGE_BASE_PATH) {fault}. It happened at {name!r}.")
    ours.__cause__ = error
    return ours


@contextmanager
def folder_faults(base: Path, folder: str) -> Iterator[None]:
    """Do as `storage_faults` does where a folder of ours is made; ConfigurationError where the base can hold none, as /proc."""
    try:
        yield
    except OSError as error:
        fault = storage_fault(error, base, folder)
        if error.errno == errno.ENOENT and isinstance(fault, PermanentError):
            raise ConfigurationError(f"STORAGE_BASE_PATH={str(base)!r} cannot hold a folder {folder!r}: {error.strerror}.") from error
        raise fault from error


def stored_file_faults(file: StoredFile) -> AbstractContextManager[None]:
    """Do as `storage_faults` does for a file that is handed on."""
    base = file.base or file.path.parent
    return storage_faults(base, file.path.relative_to(base).as_posix())


def _is_away(base: Path) -> bool:
    try:
        return is_empty(base)
    except OSError:
        return True


@contextmanager
def source_faults(name: str) -> Iterator[None]:
    """Turn an OSError about a submitted file into a SubmitError if the file is at fault, else (a failing disk) into a RetryableError."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code in _SOURCE_FAULTS:
            raise SubmitError(f"File {name!r} {_SOURCE_FAULTS[code]}.") from error
        raise RetryableError(f"File {name!r} cannot be read: {error.strerror or type(error).__name__}.") from error
