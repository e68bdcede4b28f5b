"""A file that work in a sandbox may read. The worker opens it and passes the open file on: a child has no other way to any stored file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A stored file, by its path in this process or by a number in a sandbox's child. Given to `sandbox.run` it becomes the latter."""

    path: Path
    """For messages; in a child nothing can be opened by it."""
    fd: int | None = None
    base: Path | None = None
    """The base of the storage that it lies in, for those who must tell a file that is gone from a storage that is."""

    def open(self) -> BinaryIO:
        """Return it open for reading, at its beginning. In a child there is one position for all who have it open. Raises OSError."""
        if self.fd is None:
            return self.path.open("rb")
        file = os.fdopen(os.dup(self.fd), "rb")
        file.seek(0)
        return file

    def read_bytes(self) -> bytes:
        """Return all of it. Raises OSError."""
        with self.open() as file:
            return file.read()

    @property
    def size(self) -> int:
        """Its size in bytes. Raises OSError."""
        return self.path.stat().st_size if self.fd is None else os.fstat(self.fd).st_size
