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
"""Of one that is not locked yet."""


class Scratch:
    """An empty folder of one child, locked for as long as this process lives."""

    def __init__(self) -> None:
        """Make it. Raises OSError where the system has no room."""
        new = Path(tempfile.mkdtemp(prefix=_NEW))
        self.path = new
        self._fd = -1
        try:
            self._fd = _opened(new)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self.path = new.rename(new.with_name(PREFIX + new.name.removeprefix(_NEW)))
        except OSError:
            self.remove()
            raise

    @property
    def littered(self) -> bool:
        """Whether something lies in it."""
        return any(os.scandir(self.path))

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
