"""What tells one content from another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

from jobs.adapters.storage.sources import BLOCK

_FIRST_BLOCK = 1 << 16
"""Most documents are no larger, and the memory for a whole block takes longer to get than they to read."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one content from another: size in bytes and lowercase hex SHA-256."""

    size: int
    sha256: str


def fingerprint(file: BinaryIO) -> Fingerprint:
    """Return size and SHA-256 of an open file, read in blocks from its beginning."""
    file.seek(0)
    digest, size, block = hashlib.sha256(), 0, file.read(_FIRST_BLOCK)
    while block:
        digest.update(block)
        size += len(block)
        block = file.read(BLOCK)
    return Fingerprint(size, digest.hexdigest())
