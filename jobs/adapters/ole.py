"""The root directory of an OLE2 compound file (.doc, .xls, .ppt, .msg, encrypted .docx), read with bounds and without trust.

Only what type detection needs: the names at the root and the first bytes of a stream. Layout: [MS-CFB] sections 2.2 to 2.6.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
MAX_SECTORS = 512
"""Directory sectors read at most: 2,048 names of the usual size, far more than a root needs."""
_ENTRY_BYTES = 128
_NONE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Stream:
    """An entry of the root directory: its name and, where it lies in ordinary sectors, its first bytes (up to one sector)."""

    name: str
    head: bytes


def read_root(file: BinaryIO) -> list[Stream]:
    """Return the entries of the root storage; an empty list for a broken file. Reads at most a few hundred kilobytes."""
    try:
        return _read_root(file)
    except (struct.error, IndexError, ValueError, OSError):
        return []


def _read_root(file: BinaryIO) -> list[Stream]:
    header = _read_at(file, 0, 512)
    shift = struct.unpack_from("<H", header, 30)[0]
    if header[:8] != MAGIC or shift not in (9, 12):
        return []
    size = 1 << shift
    mini_cutoff = struct.unpack_from("<I", header, 56)[0]
    entries: list[bytes] = []
    sector = struct.unpack_from("<I", header, 48)[0]
    seen: set[int] = set()
    while sector < 0xFFFFFFFA and sector not in seen and len(seen) < MAX_SECTORS:
        seen.add(sector)
        data = _read_at(file, (sector + 1) * size, size)
        entries += [data[at : at + _ENTRY_BYTES] for at in range(0, len(data) - _ENTRY_BYTES + 1, _ENTRY_BYTES)]
        sector = _next_sector(file, header, sector, size)
    streams = []
    for entry in _root_children(entries):
        length = min(struct.unpack_from("<H", entry, 64)[0], 64)
        name = entry[: max(0, length - 2)].decode("utf-16-le", errors="replace")
        start, stream_size = struct.unpack_from("<IQ", entry, 116)
        in_sectors = entry[66] == 2 and stream_size >= mini_cutoff and start < 0xFFFFFFFA
        streams.append(Stream(name, _read_at(file, (start + 1) * size, size) if in_sectors else b""))
    return streams


def _root_children(entries: list[bytes]) -> list[bytes]:
    """Walk the tree of siblings below the root entry (child at 76, left at 68, right at 72), each entry once."""
    found, seen = [], set()
    waiting = [struct.unpack_from("<I", entries[0], 76)[0]]
    while waiting:
        at = waiting.pop()
        if at >= len(entries) or at in seen:
            continue
        seen.add(at)
        found.append(entries[at])
        waiting += struct.unpack_from("<II", entries[at], 68)
    return found


def _next_sector(file: BinaryIO, header: bytes, sector: int, size: int) -> int:
    """Look a sector's successor up in the allocation table, through the 109 table sectors that the header names (7 MB of file)."""
    per_sector = size // 4
    table = sector // per_sector
    if table >= 109:
        return _NONE
    table_sector = struct.unpack_from("<I", header, 76 + 4 * table)[0]
    if table_sector >= 0xFFFFFFFA:
        return _NONE
    entry = _read_at(file, (table_sector + 1) * size + 4 * (sector % per_sector), 4)
    return int(struct.unpack("<I", entry)[0])


def _read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset, os.SEEK_SET)
    return file.read(count)
