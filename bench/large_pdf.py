"""Writes large PDF files out of real sentences: a page has a heading, paragraphs and, to reach a size, a picture. No library needed."""

from __future__ import annotations

import math
import random
import re
import textwrap
from pathlib import Path

_PROSE = {"onboarding-guide.md": "utf-8", "besprechungsprotokoll.txt": "cp1252"}
_FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica%s /Encoding /WinAnsiEncoding >>"
_LINES = 48


def sentences() -> list[str]:
    """Return the sentences of the prose among the samples, in two languages."""
    samples = Path(__file__).parents[1] / "samples"
    text = " ".join(" ".join((samples / name).read_text(encoding).split()) for name, encoding in _PROSE.items())
    return [part for part in re.split(r"(?<=[.!?]) ", re.sub(r"[#*|`\\()]", "", text)) if len(part) > 30]


def write_pdf(path: Path, *, pages: int, megabytes: float = 0) -> int:
    """Write a PDF of so many pages of uncompressed text, filled up with one picture a page, and return its size in bytes."""
    rng = random.Random(pages)
    prose = sentences()
    texts = [_page(rng, prose, number) for number in range(1, pages + 1)]
    room = max(0, int(megabytes * 1_000_000) - sum(map(len, texts)) - 500 * pages)
    side = math.ceil((room / pages / 3) ** 0.5)
    kids = b" ".join(b"%d 0 R" % (5 + 3 * i) for i in range(pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%s] >>" % (pages, kids),
        _FONT % b"",
        _FONT % b"-Bold",
    ]
    for i, text in enumerate(texts):
        objects += _page_objects(5 + 3 * i, text, rng.randbytes(side * side * 3), side)
    return path.write_bytes(_file(objects))


def _page(rng: random.Random, prose: list[str], number: int) -> bytes:
    """Return the drawing instructions of one page: a bold heading and lines of text."""
    lines: list[str] = []
    while len(lines) < _LINES:
        paragraph = " ".join(rng.sample(prose, 4)) + f" Reference {number}-{rng.randrange(10**6)}."
        lines += [*textwrap.wrap(paragraph, 95), ""]
    shown = b"".join(b"(%s) Tj T*\n" % line.encode("cp1252", "replace") for line in lines[:_LINES])
    heading = " ".join(rng.choice(prose).split()[:5]).encode("cp1252", "replace")
    return b"BT /B 16 Tf 50 790 Td (%s) Tj ET\nBT /F 10 Tf 13 TL 50 760 Td\n%sET\n" % (heading, shown)


def _page_objects(first: int, text: bytes, picture: bytes, side: int) -> list[bytes]:
    drawing = text + (b"q 60 0 0 60 480 40 cm /P Do Q\n" if side else b"")
    image = b"/XObject << /P %d 0 R >>" % (first + 2) if side else b""
    return [
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R"
        b" /Resources << /Font << /F 3 0 R /B 4 0 R >> %s >> >>" % (first + 1, image),
        b"<< /Length %d >>\nstream\n%sendstream" % (len(drawing), drawing),
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceRGB /BitsPerComponent 8 /Length %d >>\nstream\n"
        b"%s\nendstream" % (max(1, side), max(1, side), len(picture) or 3, picture or b"\x00\x00\x00"),
    ]


def _file(objects: list[bytes]) -> bytes:
    """Return the file: header, numbered objects, the table of where they are, and the trailer."""
    body, at, places = [b"%PDF-1.4\n"], 9, []
    for number, content in enumerate(objects, 1):
        places.append(at)
        body.append(b"%d 0 obj\n%s\nendobj\n" % (number, content))
        at += len(body[-1])
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    body.append(
        b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (count, table, count, at)
    )
    return b"".join(body)
