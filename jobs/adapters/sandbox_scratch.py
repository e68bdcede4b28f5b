"""Folders in which a sandbox's children write. A worker that is killed takes none of its own away: whoever starts next does.

Pieces of documents may lie in them, so they must neither stay nor fill the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "docmill-scratch-"
"""Of a folder that is locked while its process lives."""
_NEW = "docmill-new-scratch-"
"""Of one that is not locked, or not yet."""


class Scratch:
    """An empty folder of one child, locked for as long as this process lives."""

    def __init__(self) -> None:
        """Make it. Raises OSError where the system has no room."""
        self.path = Path(tempfile.mkdtemp(prefix=_NEW))
        self._fd = -1
        try:
            self._fd = _opened(self.path)
        except OSError:
            self.remove()
            raise
        with suppress(OSError):  # a file system that locks no folders, such as NFS: it keeps the name that nobody looks for
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self.path = self.path.rename(self.path.with_name(PREFIX + self.path.name.removeprefix(_NEW)))

    @property
    def littered(self) -> bool:
        """Whether something lies in it, or it has gone: some systems clear out what is old."""
        try:
            return any(os.scandir(self.path))
        except OSError:
            return True

    def remove(self) -> None:
        """Take it away with all that lies in it. May be called again, but not at the same time."""
        shutil.rmtree(self.path, ignore_errors=True)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def remove_abandoned() -> None:
    """Remove the folders of this user whose processes have gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody's who lives, somebody else's, or gone meanwhile
            fd = _opened(path)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
