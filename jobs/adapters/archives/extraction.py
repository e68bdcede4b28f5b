"""Unpacking members of an archive into a folder, each checked while it is written. Runs in a sandbox child."""

from __future__ import annotations

import bz2
import hashlib
import lzma
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from jobs.adapters.archives.listing import largest, limit_name
from jobs.adapters.archives.members import ArchiveLimits, Member, Unpacked
from jobs.adapters.archives.recognition import is_archive
from jobs.adapters.storage.durable import FILE_MODE
from jobs.adapters.storage.faults import storage_faults
from jobs.adapters.stored_file import StoredFile
from models.errors import PermanentError

BLOCK = 1 << 20
_LOCAL = struct.Struct("<4s5H3L2H")
_LZMA = struct.Struct("<2sHBL")
_DAMAGED = "it is damaged: its compressed data cannot be read"
_LARGEST_DICTIONARY = 1 << 26  # bytes that an LZMA entry may ask for


def unpack_members(archive: StoredFile, members: Sequence[Member], folder: str, limits: ArchiveLimits) -> list[Unpacked]:
    """Unpack members into files in the folder, named by where they lie in the archive, and return what became of each, in order.

    A member at fault is returned with its reason and leaves no file. RetryableError: the disk of the archive or of the folder fails or is
    full. PermanentError: the archive has gone.
    """
    made = []
    with storage_faults(archive.path.parent, archive.path.name), archive.open() as file:
        for member in members:
            target = Path(folder) / str(member.offset)
            try:
                made.append(_unpack(file, member, target, limits))
            except PermanentError as error:
                target.unlink(missing_ok=True)
                made.append(Unpacked(member.path, reason=str(error)))
    return made


def _unpack(file: BinaryIO, member: Member, target: Path, limits: ArchiveLimits) -> Unpacked:
    _go_to_data(file, member)
    digest, crc, size = hashlib.sha256(), 0, 0
    with storage_faults(target.parent, target.name), open(target, "wb", opener=_opener) as out:
        for block in _blocks(file, member):
            size += len(block)
            if size > member.size:
                raise PermanentError(f"it is larger than the {member.size:,} bytes that the archive declares")
            crc = zlib.crc32(block, crc)
            digest.update(block)
            out.write(block)
    if size < member.size:
        raise PermanentError(f"it ends after {size:,} of the {member.size:,} bytes that the archive declares")
    if crc != member.crc:
        raise PermanentError("it is damaged: its checksum (CRC-32) is wrong")
    found_archive = is_archive(target, member.path)
    if not found_archive and size > limits.file_bytes:
        raise PermanentError(f"unpacked it has {size:,} bytes, more than the {limits.file_bytes:,} that MAX_FILE_SIZE_MB allows")
    if size > largest(member.path, limits):
        raise PermanentError(f"unpacked it has {size:,} bytes, more than {limit_name(member.path)} allows")
    return Unpacked(member.path, target.name, size, digest.hexdigest(), found_archive)


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags, FILE_MODE)


def _go_to_data(file: BinaryIO, member: Member) -> None:
    file.seek(member.offset)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise PermanentError("the archive is damaged here: the entry does not begin where the directory says")
    name_length, extra_length = _LOCAL.unpack(head)[9:11]
    file.seek(name_length + extra_length, 1)


def _blocks(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """Yield the content in blocks of about 1 MiB at most, never more than that beyond what the archive declares."""
    try:
        head = file.read(_LZMA.size) if member.method == 14 else b""
        reading = _compressed_blocks(file, member.compressed - len(head))
        if member.method == 0:
            yield from reading
        elif member.method == 8:
            yield from _inflate(reading)
        elif member.method == 12:
            yield from _decompress(reading, bz2.BZ2Decompressor())
        else:
            yield from _decompress(reading, _lzma_decompressor(head))
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's fault; bz2 raises one without a number
        raise PermanentError(_DAMAGED) from error
    except (zlib.error, EOFError, lzma.LZMAError, ValueError, struct.error) as error:
        raise PermanentError(_DAMAGED) from error


def _compressed_blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    end = file.tell() + length
    while (left := end - file.tell()) > 0:
        block = file.read(min(BLOCK, left))
        if not block:
            return
        yield block


def _inflate(reading: Iterator[bytes]) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for block in reading:
        waiting = block
        while waiting and not inflater.eof:
            yield inflater.decompress(waiting, BLOCK)
            waiting = inflater.unconsumed_tail
        if inflater.eof:
            return
    while more := inflater.decompress(b"", BLOCK):  # what the limit held back after the last input
        yield more


def _decompress(reading: Iterator[bytes], decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> Iterator[bytes]:
    for block in reading:
        yield decompressor.decompress(block, BLOCK)
        while not decompressor.needs_input and not decompressor.eof:
            yield decompressor.decompress(b"", BLOCK)
        if decompressor.eof:
            return


def _lzma_decompressor(head: bytes) -> lzma.LZMADecompressor:
    """Return a decompressor for what follows an entry's LZMA header: version, length of the properties (5), lc/lp/pb in one byte, size."""
    _, length, packed, dictionary = _LZMA.unpack(head)
    if length != 5 or dictionary > _LARGEST_DICTIONARY:
        raise PermanentError(
            f"it asks for {dictionary:,} bytes to be unpacked with, more than the {_LARGEST_DICTIONARY:,} that are allowed"
        )
    rest, lc = divmod(packed, 9)
    pb, lp = divmod(rest, 5)
    return lzma.LZMADecompressor(
        lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb}]
    )
