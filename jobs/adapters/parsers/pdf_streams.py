"""What the compressed streams of a PDF would unpack to, found out before a reader unpacks them into memory. Pictures are not looked at:
no parser here unpacks them, and an honest blank scan shrinks as a bomb does.
"""

from __future__ import annotations

import re
import zlib

from models.errors import ParseError

MB = 1024 * 1024
SUSPECT_MB, SUSPECT_RATIO = 32, 150
"""A stream that unpacks to more than this and by more than this factor is a bomb; dense drawings reach about 20."""
MAX_LAYERS = 8
"""Of compression around one another; no program makes more than one."""
_STREAM = re.compile(rb"(?<!end)stream\r?\n")
_LONGEST_DICTIONARY = 2048
"""Bytes before a stream in which its own words about it are looked for."""


def refuse_bombs(data: bytes) -> None:
    """Raise a ParseError if a stream unpacks to too much. Reads each stream once, and never unpacks more than the limit of one."""
    for found in _STREAM.finditer(data):
        start = found.end()
        if not _looks_compressed(data[start : start + 2]) or b"/Image" in _dictionary(data, found.start()):
            continue
        size, packed = _unpacked(memoryview(data)[start:])
        if size > SUSPECT_MB * MB and size > SUSPECT_RATIO * packed:
            raise ParseError(
                f"a stream of {packed:,} bytes in it unpacks to more than {SUSPECT_MB} MB and {SUSPECT_RATIO} times its size, as in a bomb"
            )


def _dictionary(data: bytes, end: int) -> bytes:
    before = data[max(0, end - _LONGEST_DICTIONARY) : end]
    return before[max(0, before.rfind(b" obj")) :]


def _looks_compressed(head: bytes | memoryview) -> bool:
    """Tell a zlib header: deflate, and a check sum in its two bytes."""
    return len(head) == 2 and head[0] & 0x0F == 8 and (head[0] << 8 | head[1]) % 31 == 0


def _unpacked(packed: memoryview) -> tuple[int, int]:
    """Return how many bytes come out, a little over the limit at most, and how many went in. Layers count as one."""
    made, taken = _inflated(packed)
    for _ in range(MAX_LAYERS):
        if len(made) > SUSPECT_MB * MB or not _looks_compressed(made[:2]):
            break
        made, _ = _inflated(memoryview(made))
    return len(made), max(1, taken)


def _inflated(packed: memoryview) -> tuple[bytes, int]:
    """Return what comes out up to the limit or the first fault, and how many bytes that took."""
    inflater = zlib.decompressobj()
    made: list[bytes] = []
    size = at = 0
    step = 4096  # the inflater copies what lies behind the end, so not all at once
    while at < len(packed) and size <= SUSPECT_MB * MB and not inflater.eof:
        try:
            made.append(inflater.decompress(packed[at : at + step], SUSPECT_MB * MB + 1 - size))
        except zlib.error:
            break
        at, size, step = at + step, size + len(made[-1]), min(2 * step, MB)
    return b"".join(made), min(at, len(packed)) - len(inflater.unused_data) - len(inflater.unconsumed_tail)
