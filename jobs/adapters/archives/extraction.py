"""Unpacking members of an archive into a folder, each checked while it is written. Runs in a sandbox child."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from jobs.adapters.archives.members import ArchiveLimits, Member, Unpacked
from jobs.adapters.archives.recognition import is_archive
from jobs.adapters.storage.durable import FILE_MODE
from jobs.adapters.storage.faults import storage_faults, stored_file_faults
from jobs.adapters.stored_file import StoredFile
from jobs.adapters.zip_content import entry_blocks
from models.errors import PermanentError


def unpack_members(archive: StoredFile, members: Sequence[Member], folder: str, limits: ArchiveLimits) -> list[Unpacked]:
    """Unpack members into files in the folder, named by where they lie in the archive, and return what became of each, in order.

    A member at fault is returned with its reason and leaves no file. RetryableError: the disk of the archive or of the folder fails or is
    full. PermanentError: the archive has gone.
    """
    made = []
    with stored_file_faults(archive), archive.open() as file:
        for member in members:
            target = Path(folder) / str(member.offset)
            try:
                made.append(_unpack(file, member, target, limits))
            except PermanentError as error:
                target.unlink(missing_ok=True)
                made.append(Unpacked(member.path, reason=str(error)))
    return made


def _unpack(file: BinaryIO, member: Member, target: Path, limits: ArchiveLimits) -> Unpacked:
    digest = hashlib.sha256()
    with storage_faults(target.parent, target.name), open(target, "wb", opener=_opener) as out:
        for block in entry_blocks(file, member):
            digest.update(block)
            out.write(block)
    found_archive = is_archive(target, member.path)
    if not found_archive and member.size > limits.file_bytes:
        raise PermanentError(f"unpacked it has {member.size:,} bytes, more than the {limits.file_bytes:,} that MAX_FILE_SIZE_MB allows")
    return Unpacked(member.path, target.name, member.size, digest.hexdigest(), found_archive)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags, FILE_MODE)
