"""Bytes to text in whatever encoding they are, and text to what Postgres can hold. Nothing here fails on any input."""

from __future__ import annotations

import codecs
import math
import re
from contextlib import suppress
from dataclasses import dataclass

from jobs.adapters.legacy_encoding import ebcdic, legacy_encoding

SAMPLE_BYTES = 64 * 1024
"""How much of a file is looked at to name its encoding."""

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16 LE, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL_BYTES = bytes(set(range(0x20)) - set(b"\t\n\v\f\r\x1b") | {0x7F})
_CONTROL_CHARACTERS = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f]")
_ASCII_RUN = re.compile(rb"[\t\n\r\x20-\x7e]{200}")
"""Bytes that hardly any text has in a row in UTF-16: a program has written UTF-16 behind ASCII, as Windows PowerShell does."""
_LETTERS = b"abc\n"
_ISO_2022_JP = re.compile(rb"\x1b\$[@B]|\x1b\([IJ]")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_NOT_ASCII_BYTES = bytes(range(0x80, 0x100))
_WTF8 = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]|\xc0\x80")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "euc_kr": "cp949",
}  # fmt: skip
"""What a label says and what browsers read: the encoding of Windows, which has more characters and which such files are in."""
_BROWSERS_LABELS = {"x-sjis": "cp932", "x-gbk": "gb18030", "x-euc-jp": "euc_jp", "windows-874": "cp874", "windows-949": "cp949"}
"""Labels that pages have and Python does not know."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text and the Python name of the encoding it was in. `damaged` counts bytes that this encoding could not explain."""

    text: str
    encoding: str
    damaged: int = 0


def decode(data: bytes, declared: str | None = None, guessed: str | None = None) -> Decoded:
    """Return the text of any bytes, with `\\n` line ends and only storable characters.

    Order: byte order mark, UTF-16/32 patterns, valid UTF-8, the declared encoding, UTF-8 with a few foreign bytes (read as
    Windows-1252), the most plausible legacy encoding, Windows-1252. `guessed`: what `guess_encoding` has said of the same.
    """
    encoding = guessed or guess_encoding(data, declared) or "cp1252"
    mark = next((bom for bom, name in _BOMS if name == encoding and data.startswith(bom)), b"")
    body = data[len(mark) :]
    if encoding == "utf-8" and not mark:
        encoding = _behind_the_sample(body, declared)
    if encoding == "utf-8":
        text, damaged = _decode_utf8(body)
    else:
        text = body.decode(encoding, errors="replace")
        damaged = text.count("\ufffd")
    return Decoded(storable(text.lstrip("\ufeff")), encoding, damaged)


def _behind_the_sample(body: bytes, declared: str | None) -> str:
    """Name the encoding of a file that begins with nothing but ASCII by a sample around its first other bytes."""
    if len(body) <= SAMPLE_BYTES or not body[:SAMPLE_BYTES].isascii():
        return "utf-8"
    first = _NOT_ASCII.search(body, SAMPLE_BYTES)
    if first is None:
        return "utf-8"
    found = guess_encoding(body[first.start() - 100 : first.start() + SAMPLE_BYTES], declared) or "utf-8"
    return found if _LETTERS.decode(found, errors="replace") == "abc\n" else "utf-8"  # in UTF-16 the beginning would be other letters


def guess_encoding(data: bytes, declared: str | None = None) -> str | None:
    """Return the encoding of text, from a sample at its beginning; None when the bytes are no text at all."""
    for bom, name in _BOMS:
        if data.startswith(bom):
            return name
    sample = data[:SAMPLE_BYTES]
    return _wide_encoding(sample) or _byte_encoding(sample, _text_codec(declared), whole=len(sample) == len(data))


def _byte_encoding(sample: bytes, declared: str | None, whole: bool) -> str | None:
    """Choose among the encodings that are no UTF-16 or UTF-32, by how much of the sample is valid UTF-8 and how much control bytes."""
    nuls = sample.count(0)
    controls = len(sample) - len(sample.translate(None, _CONTROL_BYTES)) - nuls
    good, bad = _utf8_evidence(sample, whole)
    if nuls * 4 > len(sample) or controls * (10 if bad else 2) > len(sample):
        return ebcdic(sample)
    if bad == 0:
        found = declared if good == 0 and declared in _ASCII_LOOKALIKES else "utf-8"
        return "iso2022_jp" if _ISO_2022_JP.search(sample) and _decodes(sample, "iso2022_jp", whole) else found
    if declared not in (None, "utf-8") and _decodes(sample, declared, whole):
        return declared
    if good >= 3 * bad or _some_lines_are_utf8(sample):
        return "utf-8"
    return ebcdic(sample) or (None if (controls + nuls) * 50 > len(sample) else legacy_encoding(sample))


_ASCII_LOOKALIKES = frozenset({"iso2022_jp", "iso2022_kr", "hz", "utf-7"})
"""Encodings whose bytes are all ASCII, so that only a declaration tells them from it."""


def storable(text: str) -> str:
    """Return the text as UTF-8 and Postgres can hold it: no NUL, no lone surrogates (pairs are joined), `\\n` as the only line end."""
    if not text.isascii() and _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    if "\x00" in text:
        text = text.replace("\x00", "")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def storable_value(value: object, depth: int = 0) -> object:
    """Return JSON-safe data of the same shape: strings storable, tuples as lists, what JSON has no word for as text, depth at most 8."""
    if isinstance(value, str):
        return storable(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < 8 and isinstance(value, dict):
        return {storable(str(key)): storable_value(item, depth + 1) for key, item in value.items()}
    if depth < 8 and isinstance(value, list | tuple | set | frozenset):
        return [storable_value(item, depth + 1) for item in value]
    return storable(str(value))


def _wide_encoding(sample: bytes) -> str | None:
    """Recognise UTF-16 and UTF-32 without a mark by where their zero bytes fall."""
    length = len(sample) - len(sample) % 4
    if length < 4:
        return None
    zeros = [sample[at:length:4].count(0) * 4 / length for at in range(4)]
    if zeros[2] > 0.95 and zeros[3] > 0.95 and zeros[0] < 0.2 and _decodes(sample[:length], "utf-32-le", whole=True):
        return "utf-32-le"
    if zeros[0] > 0.95 and zeros[1] > 0.95 and zeros[3] < 0.2 and _decodes(sample[:length], "utf-32-be", whole=True):
        return "utf-32-be"
    if _ASCII_RUN.search(sample):
        return None
    even, odd = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    for encoding, low, high in (("utf-16-le", even, odd), ("utf-16-be", odd, even)):
        if high > 0.005 and low < high / 20 and _plausible_utf16(sample[:length], encoding):
            return encoding
    return None


def _plausible_utf16(sample: bytes, encoding: str) -> bool:
    """Tell UTF-16 from text with stray NULs: nearly all Latin, or spaces and line ends among letters of few other blocks."""
    text = sample.decode(encoding, errors="replace")
    if text.count("\ufffd") > 1 or len(_CONTROL_CHARACTERS.findall(text)) * 50 > len(text):
        return False
    latin = sum(character < "\u0250" for character in text)
    if latin > 0.9 * len(text) and sum(character < "\x80" for character in text) > 0.4 * len(text):
        return True
    spaces = sum(text.count(space) for space in " \n\t\u3000\u3001\u3002")
    blocks = {ord(character) >> 8 for character in text}
    return spaces * 100 >= len(text) and len(blocks) < max(6, len(text) // 8)


def _utf8_evidence(sample: bytes, whole: bool) -> tuple[int, int]:
    """Count well-formed multi-byte sequences and bytes that are none; a sequence cut by the end of the sample counts as neither."""
    if sample.isascii():
        return 0, 0
    with suppress(UnicodeDecodeError):
        return len(sample.decode("utf-8")) - len(sample.translate(None, _NOT_ASCII_BYTES)), 0
    text = _WTF8.sub(b"", sample).decode("utf-8", errors="surrogateescape")
    bad = len(_ESCAPED_BYTE.findall(text))
    good = len(_BEYOND_ASCII.findall(text)) - bad
    if bad and not whole:
        cut = len(text) - len(text.rstrip("".join(map(chr, range(0xDC80, 0xDD00)))))
        bad -= cut if cut <= 3 else 0
    return good, bad


def _some_lines_are_utf8(sample: bytes) -> bool:
    """Tell a mixed file from a legacy one: a quarter of the lines beyond ASCII is UTF-8 from end to end, which chance rarely does."""
    lines = [line for line in sample.split(b"\n")[:2000] if not line.isascii()]
    valid = sum(_decodes(line, "utf-8", whole=True) for line in lines)
    return valid >= 2 and valid * 4 >= len(lines)


def _decode_utf8(body: bytes) -> tuple[str, int]:
    """Decode UTF-8. Encoded surrogates and overlong NULs are dropped; a byte that fits nowhere is read as Windows-1252
    if it is a letter there, and becomes U+FFFD otherwise."""
    try:
        return body.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = _WTF8.sub(b"", body).decode("utf-8", errors="surrogateescape")
    table: dict[int, str] = {}
    for byte in range(0x80, 0x100):
        letter = bytes([byte]).decode("cp1252", errors="replace")
        table[0xDC00 + byte] = letter if letter.isalpha() else "\ufffd"
    damaged = len(_ESCAPED_BYTE.findall(text))
    return text.translate(table), damaged


def _text_codec(name: str | None) -> str | None:
    """Return Python's name for what a declared charset means, or None if it is unknown or no text encoding (`zlib`, `rot13`)."""
    if not name or len(name) > 40 or not name.isascii():
        return None
    label = name.strip("\"' ")
    try:
        info = codecs.lookup(_BROWSERS_LABELS.get(label.lower(), label))
        "".encode(info.name)
    except (LookupError, ValueError, UnicodeError):
        return None
    return _WIDER.get(info.name, info.name)


def _decodes(sample: bytes, encoding: str | None, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder(encoding or "ascii")().decode(sample, final=whole)
    except (UnicodeError, LookupError, ValueError):
        return False
    return True
