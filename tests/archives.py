"""Zip archives for tests, good and bad: written field by field, because no library writes what a broken program or an attacker does."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Raw:
    """One entry; what is None is as it should be."""

    name: bytes
    data: bytes = b"text"
    method: int = 8
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    compressed: int | None = None
    mode: int = 0o100644
    extra: bytes = b""
    lies_at: int | None = None
    """Number of the entry whose local header this one points at, where it has none of its own."""


def raw_zip(entries: Iterable[Raw], *, before: bytes = b"", behind: bytes = b"") -> bytes:
    """An archive of these entries, with something before or behind it."""
    body, directory, offsets = io.BytesIO(), io.BytesIO(), list[int]()
    for entry in entries:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(entry.data) + packer.flush() if entry.method == 8 else entry.data
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        compressed = len(packed) if entry.compressed is None else entry.compressed
        common = struct.pack("<3H2H3L", 20, entry.flags, entry.method, 0, 33, crc, compressed, size)
        if entry.lies_at is None:
            offsets.append(body.tell())
            body.write(b"PK\x03\x04" + common + struct.pack("<2H", len(entry.name), 0) + entry.name + packed)
        else:
            offsets.append(offsets[entry.lies_at])
        directory.write(b"PK\x01\x02" + struct.pack("<H", (3 << 8) | 20) + common)
        directory.write(struct.pack("<5H2L", len(entry.name), len(entry.extra), 0, 0, 0, entry.mode << 16, offsets[-1]))
        directory.write(entry.name + entry.extra)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, len(offsets), len(offsets), directory.tell(), body.tell(), 0)
    return before + body.getvalue() + directory.getvalue() + end + behind


def zip_bytes(files: Mapping[str, bytes | str]) -> bytes:
    """An archive of these files as any program would write it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write such an archive."""
    path.write_bytes(zip_bytes(files))
    return path
