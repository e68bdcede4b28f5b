"""Stored files that a sandbox's child is to read, opened here: a child has no way to any file of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack

from jobs.adapters.storage.faults import stored_file_faults
from jobs.adapters.stored_file import StoredFile


async def open_all(files: Sequence[StoredFile], opened: ExitStack) -> list[int]:
    """Open files in a thread. Cancelled meanwhile, what it still opens, which on a slow share may be much later, is closed then."""
    own = ExitStack()
    opening = asyncio.ensure_future(asyncio.to_thread(lambda: [_open(file, own) for file in files]))
    try:
        made = await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda _: own.close())
        raise
    except BaseException:
        own.close()
        raise
    opened.enter_context(own)
    return made


def _open(file: StoredFile, opened: ExitStack) -> int:
    with stored_file_faults(file):
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    opened.callback(os.close, fd)
    return fd
