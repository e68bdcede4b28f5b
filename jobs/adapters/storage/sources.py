"""Reading what a caller submits: a path, bytes or an open file, in blocks and without ever waiting for a pipe or a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jobs.adapters.storage.faults import source_faults
from models.errors import RetryableError, SubmitError

BLOCK = 1 << 20


def read_blocks(
    source: Path | bytes | BinaryIO, name: str, max_bytes: int, limit_name: str = "MAX_FILE_SIZE_MB"
) -> Iterator[bytes | memoryview]:
    """Yield the content in blocks of at most 1 MiB, each valid until the next one is asked for. `limit_name`: what sets `max_bytes`.

    An empty file is no error here: validate fails it, so that it stands in the tables with a reason like any other bad file.
    SubmitError: missing, not a regular file, not readable, or larger than `max_bytes`.
    RetryableError: changed while it was being read, or a failing disk.
    """
    total = 0
    for block in _blocks(source, name, max_bytes, limit_name):
        total += len(block)
        _refuse_too_large(name, total, max_bytes, limit_name)
        yield block


def _refuse_too_large(name: str, size: int, max_bytes: int, limit_name: str) -> None:
    if size > max_bytes:
        raise SubmitError(f"File {name!r} is larger than the {max_bytes:,} bytes that {limit_name} allows.")


def _blocks(source: Path | bytes | BinaryIO, name: str, max_bytes: int, limit_name: str) -> Iterator[bytes | memoryview]:
    if isinstance(source, bytes):
        view = memoryview(source)
        yield from (view[start : start + BLOCK] for start in range(0, len(view), BLOCK))
    elif isinstance(source, Path):
        yield from _file_blocks(source, name, max_bytes, limit_name)
    else:
        yield from _stream_blocks(source, name)


def _stream_blocks(source: BinaryIO, name: str) -> Iterator[bytes]:
    """Read an open file from where it stands."""
    while True:
        with source_faults(name):
            block = source.read(BLOCK)
        if not isinstance(block, bytes):
            raise TypeError(f"{name!r} must be open for reading in binary mode, but its read() returned {type(block).__name__}")
        if not block:
            return
        yield block


def _file_blocks(path: Path, name: str, max_bytes: int, limit_name: str) -> Iterator[memoryview]:
    """Read a regular file and make sure that it stayed the same meanwhile."""
    with source_faults(name):
        # Looked at before it is opened, because opening can have effects (a tape rewinds), and after, because it may have been swapped.
        _refuse_irregular(name, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - Path.open takes no descriptor
        before = os.fstat(descriptor)
        _refuse_irregular(name, before.st_mode)
        _refuse_too_large(name, before.st_size, max_bytes, limit_name)
        buffer = memoryview(bytearray(min(BLOCK, before.st_size + 1)))
        total = 0
        while total <= before.st_size:  # no further: a file that is being appended to might have no end
            with source_faults(name):
                count = file.readinto(buffer)
            if not count:
                break
            total += count
            yield buffer[:count]
        after = os.fstat(descriptor)
    if (total, after.st_size, after.st_mtime_ns) != (before.st_size, before.st_size, before.st_mtime_ns):
        raise RetryableError(f"File {name!r} changed while it was being copied: submit it again once nobody is writing to it.")


def _refuse_irregular(name: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise SubmitError(f"File {name!r} is a folder, not a file.")
    if not stat.S_ISREG(mode):
        raise SubmitError(f"File {name!r} is not a regular file but a pipe, socket or device.")
