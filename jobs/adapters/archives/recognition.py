"""Telling archives, whose files are documents, from documents that are archives inside, as those of Office programs are."""

from __future__ import annotations

import stat
from pathlib import Path

from jobs.adapters.sniff import sniff
from jobs.adapters.zip_directory import has_directory
from models.documents import FileType


def is_archive(path: Path, name: str) -> bool:
    """Say whether a file, which people call `name`, is an archive by its content. OSError if it cannot be read.

    One that is damaged counts only if it is called a zip: what is called otherwise is a damaged document.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return False  # opening a pipe could make us wait for ever
    called_so = name.lower().endswith(".zip")
    with path.open("rb") as file:
        if (file.read(2) != b"PK" and not called_so) or not (called_so or has_directory(file)):
            return False
    return sniff(path, name).file_type is FileType.ZIP
