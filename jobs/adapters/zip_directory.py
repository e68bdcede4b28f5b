"""The central directory of a zip archive, entry by entry.

The standard library's `zipfile` would read it too, but it refuses a whole archive for one entry's broken name or extra field, reads a
directory of any size before its length can be judged, and does not see entries that lie upon one another. Here an entry's fault stays
with that entry, and reading stops at the limit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

from models.errors import PermanentError

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LONGEST_COMMENT = 65_535
_BEHIND_THE_END = 65_536  # bytes of something else that may follow the archive


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """What the central directory says of one entry. Sizes and offset in bytes."""

    name: bytes
    utf8: bool
    """Whether the archive says that the name is UTF-8."""
    unicode_name: str | None
    """The name by the Unicode path extra field (0x7075), where it belongs to this name."""
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    offset: int
    """Where its local header begins in the file."""
    unix_mode: int
    """Type and permissions, 0 where the archive was not made on a Unix system."""
    dos_folder: bool = False
    """Whether its DOS attributes, which most programs write on any system, say that it is a folder."""
    fault: str | None = None
    """What is wrong with the directory's own words about it."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the central directory lies."""

    start: int
    end: int
    shift: int
    """By how much all offsets are off, because something stands before the archive."""


def read_directory(file: BinaryIO, most: int) -> tuple[Directory, list[DirectoryEntry]]:
    """Return the entries of an archive in the directory's order. PermanentError if there is none, or more than `most` entries."""
    directory = _find_directory(file)
    entries: list[DirectoryEntry] = []
    for entry in _entries(file, directory):
        if len(entries) == most:
            raise PermanentError(f"it has more than the {most:,} entries that MAX_ARCHIVE_ENTRIES allows")
        entries.append(entry)
    return directory, entries


def first_entries(file: BinaryIO, most: int) -> Iterator[DirectoryEntry]:
    """Yield the first entries of an archive, one in memory at a time. PermanentError if there is none, or where it is damaged."""
    return islice(_entries(file, _find_directory(file)), most)


def has_directory(file: BinaryIO) -> bool:
    """Say whether a file ends as an archive does."""
    try:
        _find_directory(file)
    except PermanentError:
        return False
    return True


def _find_directory(file: BinaryIO) -> Directory:
    length = file.seek(0, 2)
    tail_start = max(0, length - _END.size - _LONGEST_COMMENT - _BEHIND_THE_END)
    file.seek(tail_start)
    tail = file.read()
    at = _end_record(tail)
    if at is None:
        raise PermanentError("it is no zip archive, or its end is missing (no end of central directory)")
    end = tail_start + at
    _, disk, start_disk, _, _, size, offset, _ = _END.unpack_from(tail, at)
    large = _end_record64(file, end)
    if large is not None:
        end, disk, start_disk, size, offset = large
    if disk not in (0, 0xFFFF) or start_disk not in (0, 0xFFFF):
        raise PermanentError("it is one part of an archive that is split over several files")
    start = end - size
    if start < 0 or start - offset < 0:
        raise PermanentError("its central directory is damaged (it would begin before the file does)")
    return Directory(start, end, start - offset)


def _end_record(tail: bytes) -> int | None:
    """Return where the end record begins: the last one whose comment reaches the end of the file exactly, else the last that fits."""
    fits = None
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if at + _END.size <= len(tail):
            room = len(tail) - at - _END.size - _END.unpack_from(tail, at)[-1]
            if room == 0:
                return at
            fits = at if fits is None and room > 0 else fits
        at = tail.rfind(b"PK\x05\x06", 0, at + 3) if at else -1
    return fits


def _end_record64(file: BinaryIO, end: int) -> tuple[int, int, int, int, int] | None:
    """Return position, disks, size and offset of the zip64 end record that stands before the ordinary one, if there is one."""
    at = end - _LOCATOR64.size
    if at < _END64.size:
        return None
    file.seek(at)
    signature, _, offset, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
    if signature != b"PK\x06\x07":
        return None
    # Something may stand before the archive, so the place that the locator names is only the first guess.
    for place in (offset, at - _END64.size):
        if place > at - _END64.size:
            continue
        file.seek(place)
        record = _END64.unpack(file.read(_END64.size))
        if record[0] == b"PK\x06\x06":
            return place, record[4], record[5], record[8], record[9]
    return None


def _entries(file: BinaryIO, directory: Directory) -> Iterator[DirectoryEntry]:
    file.seek(directory.start)
    left = directory.end - directory.start
    while left > 0:
        head = file.read(_ENTRY.size)
        if head[:4] == b"PK\x05\x05":  # a signature over the directory, which stands behind its last entry
            return
        if len(head) < _ENTRY.size or left < _ENTRY.size or head[:4] != b"PK\x01\x02":
            raise PermanentError("its central directory is damaged or cut off")
        values = _ENTRY.unpack(head)
        name_length, extra_length, comment_length = values[10:13]
        rest = file.read(name_length + extra_length + comment_length)
        left -= _ENTRY.size + len(rest)
        if left < 0 or len(rest) < name_length + extra_length + comment_length:
            raise PermanentError("its central directory is damaged or cut off")
        yield _entry(values, rest[:name_length], rest[name_length : name_length + extra_length], directory.shift)


def _entry(values: tuple[int, ...], name: bytes, extra: bytes, shift: int) -> DirectoryEntry:
    made_by, flags, method, crc, compressed, size = values[1], values[3], values[4], values[7], values[8], values[9]
    attributes, offset = values[15], values[16]
    fields = dict(_extra_fields(extra))
    fault = None
    large = fields.get(1, b"")
    wide = []
    for narrow in (size, compressed, offset):
        if narrow == 0xFFFFFFFF and 1 in fields:
            if len(large) < 8:
                fault = "the archive's directory does not say how large it is or where it begins"
                break
            wide.append(int.from_bytes(large[:8], "little"))
            large = large[8:]
        else:
            wide.append(narrow)
    if fault is None:
        size, compressed, offset = wide
    return DirectoryEntry(
        name=name,
        utf8=bool(flags & 0x800),
        unicode_name=_unicode_name(name, fields.get(0x7075, b"")),
        flags=flags,
        method=method,
        crc=crc,
        compressed=compressed,
        size=size,
        offset=offset + shift,
        unix_mode=attributes >> 16 if made_by >> 8 in (3, 19) else 0,  # Unix, macOS
        dos_folder=bool(attributes & 0x10),
        fault=fault,
    )


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        yield kind, extra[at + 4 : at + 4 + length]
        at += 4 + length


def _unicode_name(name: bytes, field: bytes) -> str | None:
    if len(field) < 6 or field[0] != 1 or int.from_bytes(field[1:5], "little") != zlib.crc32(name):
        return None
    try:
        return field[5:].decode("utf-8")
    except UnicodeDecodeError:
        return None
