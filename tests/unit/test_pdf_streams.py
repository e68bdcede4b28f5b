"""PDF streams that unpack to far too much are refused before a reader sees them; what honest programs write is not."""

from __future__ import annotations

import random
import zlib

import pytest

from jobs.adapters.parsers.pdf_streams import SUSPECT_MB, refuse_bombs
from models.errors import ParseError

MB = 1024 * 1024
ZEROS = zlib.compress(bytes((SUSPECT_MB + 1) * MB))


def file_of(*streams: bytes, about: bytes = b"/Filter /FlateDecode") -> bytes:
    objects = (b"%d 0 obj\n<< %s >>\nstream\n%s\nendstream\nendobj\n" % (n, about, stream) for n, stream in enumerate(streams, start=1))
    return b"%PDF-1.7\n" + b"".join(objects)


@pytest.mark.parametrize(
    "bomb",
    [
        file_of(ZEROS),
        file_of(zlib.compress(b"hello"), ZEROS),
        file_of(zlib.compress(zlib.compress(ZEROS))),
        file_of(ZEROS).replace(b"stream\n", b"stream\r\n"),
    ],
    ids=["plain", "second", "layers", "line ends"],
)
def test_a_stream_that_unpacks_to_far_too_much_is_refused(bomb: bytes) -> None:
    with pytest.raises(ParseError, match="as in a bomb"):
        refuse_bombs(bomb)


@pytest.mark.parametrize(
    "honest",
    [
        file_of(ZEROS, about=b"/Subtype /Image /Filter /FlateDecode"),
        file_of(zlib.compress(random.Random(1).randbytes(100_000) * 10)),
        file_of(zlib.compress(bytes(MB))),
        file_of(b"x\x9c" + b"no deflate at all"),
        file_of(b"BT (text) Tj ET", about=b""),
        b"",
    ],
    ids=["picture", "text", "small", "damaged", "plain", "nothing"],
)
def test_what_honest_programs_write_passes(honest: bytes) -> None:
    refuse_bombs(honest)
