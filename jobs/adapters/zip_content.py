"""The content of one entry of a zip archive, unpacked in blocks and never further than the archive declares."""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from models.errors import PermanentError

BLOCK = 1 << 20
METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA"}
"""The compression methods that can be undone, by their number in the format."""
_LOCAL = struct.Struct("<4s5H3L2H")
_LZMA = struct.Struct("<2sHBL")
_LARGEST_DICTIONARY = 1 << 26  # bytes that an LZMA entry may ask for
_FURTHEST = 1 << 62  # no file is longer, and systems take no larger offset


class Damaged(PermanentError):
    """An entry cannot be read, or not to its end; what was read of it before is within its limits."""


class Entry(Protocol):
    """What is needed of an entry: where its local header begins, how it is packed, and its sizes in bytes and CRC-32 as declared."""

    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def method(self) -> int: ...  # noqa: D102
    @property
    def compressed(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def crc(self) -> int: ...  # noqa: D102


def entry_blocks(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """Yield the content in blocks of about 1 MiB at most, checked while it is read.

    PermanentError: it is larger than declared (noticed before the block that goes beyond is yielded) or asks for too much memory.
    Damaged: it cannot be read, is shorter than declared, or its checksum is wrong.
    """
    _go_to_data(file, entry)
    size = crc = 0
    for block in _blocks(file, entry):
        size += len(block)
        if size > entry.size:
            raise PermanentError(f"it is larger than the {entry.size:,} bytes that the archive declares")
        crc = zlib.crc32(block, crc)
        yield block
    if size < entry.size:
        raise Damaged(f"it ends after {size:,} of the {entry.size:,} bytes that the archive declares")
    if crc != entry.crc:
        raise Damaged("it is damaged: its checksum (CRC-32) is wrong")


def _go_to_data(file: BinaryIO, entry: Entry) -> None:
    head = b""
    if 0 <= entry.offset < _FURTHEST:
        file.seek(entry.offset)
        head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise Damaged("the archive is damaged here: the entry does not begin where the directory says")
    name_length, extra_length = _LOCAL.unpack(head)[9:11]
    file.seek(name_length + extra_length, 1)


def _blocks(file: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """Yield the content in blocks, never more than one beyond what the archive declares."""
    try:
        head = file.read(_LZMA.size) if entry.method == 14 else b""
        reading = _compressed_blocks(file, entry.compressed - len(head))
        if entry.method == 0:
            yield from reading
        elif entry.method == 8:
            yield from _inflate(reading)
        elif entry.method == 12:
            yield from _decompress(reading, bz2.BZ2Decompressor())
        elif entry.method == 14:
            yield from _decompress(reading, _lzma_decompressor(head))
        else:
            raise Damaged(f"it is compressed by method {entry.method}, which is not supported")
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's fault; bz2 raises one without a number
        raise Damaged("it is damaged: its compressed data cannot be read") from error
    except (zlib.error, EOFError, lzma.LZMAError, ValueError, struct.error) as error:
        raise Damaged("it is damaged: its compressed data cannot be read") from error


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
