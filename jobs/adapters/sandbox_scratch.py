"""Folders in which a sandbox's children write. A worker that is killed takes none of its own away: whoever starts next does.

Pieces of documents may lie in them, so they must neither stay nor fill the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "docmill-scratch-"
_YOUNG_SECONDS = 60.0
"""A folder is made first and locked then; this young, it may be between the two."""


class Scratch:
    """An empty folder of one child, locked for as long as this process lives."""

    def __init__(self) -> None:
        """Make it. Raises OSError where the system has no room."""
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._fd = -1
        try:
            self._fd = _opened(self.path)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError:
            self.remove()
            raise

    @property
    def littered(self) -> bool:
        """Whether something lies in it."""
        return any(os.scandir(self.path))

    def remove(self) -> None:
        """Take it away with all that lies in it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def remove_abandoned() -> None:
    """Remove the folders of this user whose processes have gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody's who lives, somebody else's, or gone meanwhile
            fd = _opened(path)
            try:
                about = os.fstat(fd)
                if about.st_uid == os.geteuid() and time.time() - about.st_mtime > _YOUNG_SECONDS:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
