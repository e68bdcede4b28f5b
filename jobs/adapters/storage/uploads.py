"""How a stored upload comes to its place and goes from it: two who store the same content, and one who removes it, meet there."""

from __future__ import annotations

import os
from pathlib import Path

from jobs.adapters.storage.durable import holds, make_folder, sync

_TRIES = 3  # to put an upload into its folder


def place_upload(temporary: Path, target: Path, size: int) -> None:
    """Move a finished file into the folder of its document, durably, unless the same content is there already."""
    for attempt in range(_TRIES):
        make_folder(target.parent)
        try:
            _move(temporary, target, size)
            return
        except FileNotFoundError:
            # Somebody has removed the empty folder in between.
            if attempt + 1 == _TRIES or target.parent.exists():
                raise


def _move(temporary: Path, target: Path, size: int) -> None:
    """Give a finished copy its name, its SHA-256, unless the same content is there already."""
    try:
        os.utime(target)  # so that nobody removes it as one that is no longer needed
        kept = holds(target, size, target.name)
    except (FileNotFoundError, PermissionError):
        kept = False
    if not kept:
        sync(temporary)
        temporary.replace(target)
    # Also when it was there: the one who put it there may not have come to this point yet.
    sync(target.parent)
    sync(target.parent.parent)
