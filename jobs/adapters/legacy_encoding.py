"""Names the encoding of text that is neither UTF-8 nor declared: one of the one-byte or East Asian ones of before."""

from __future__ import annotations

_HALF_WIDTH = "\uff61"
_GUESSED_BYTES = 16 * 1024
_WITHIN_A_CHARACTER = bytes(range(0x30, 0x100))
"""What a character of several bytes is made of in the East Asian encodings."""
_LIKELY = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "iso8859_2", "iso8859_5", "iso8859_7",
    "iso8859_8", "iso8859_9", "koi8_r", "koi8_u", "cp866", "cp932", "shift_jis", "euc_jp", "euc_kr", "cp949", "big5", "gb18030",
    "tis_620",
]  # fmt: skip


def legacy_encoding(sample: bytes) -> str:
    """Name the most plausible one-byte or East Asian encoding; among equals Windows-1252, which most such files are in."""
    from charset_normalizer import from_bytes  # noqa: PLC0415 - 20 ms that plain UTF-8 need not pay

    sample = part_to_guess_by(sample)
    matches = from_bytes(sample, cp_isolation=_LIKELY, threshold=0.3)
    best = matches.best()
    if best is None or _reads_as_western(sample, best.encoding):
        return "cp1252"
    equals = (match for match in matches if match.chaos <= best.chaos and match.coherence >= best.coherence)
    if not any("cp1252" in match.could_be_from_charset for match in equals):
        return str(best.encoding)
    rivals = (str(match.encoding) for match in matches if match.chaos <= best.chaos)
    return next((rival for rival in rivals if _reads_as_western(sample, rival) is False), "cp1252")


def part_to_guess_by(text: bytes) -> bytes:
    """Return the beginning of a text in an unknown encoding, cut where no character goes on: half of one rules its own out."""
    if len(text) <= _GUESSED_BYTES:
        return text
    part = text[:_GUESSED_BYTES]
    whole = part.rstrip(_WITHIN_A_CHARACTER)
    return whole if len(whole) > _GUESSED_BYTES // 2 else part


def _reads_as_western(sample: bytes, encoding: str) -> bool | None:
    """Tell by where those signs of Windows-1252 stand that another encoding reads differently: True if all stand alone, as in `£950`,
    False if many stand within words, as in `ma³a`, where the other one has letters; None where they do not tell."""
    ours, other = sample.decode("cp1252", errors="replace"), sample.decode(encoding, errors="replace")
    if len(ours) != len(other):
        return None
    differing = {at for at, (one, two) in enumerate(zip(ours, other, strict=True)) if one != two}
    touching = [sum(map(_is_letter, ours[max(0, at - 1) : at + 2])) for at in differing]
    if differing and not any(touching) and not any(at + 1 in differing for at in differing):
        return True
    # Half-width katakana are what signs such as those of `m²K` and `20°C` look like in cp932.
    seen = [_is_letter(other[at]) and other[at] < _HALF_WIDTH and not _is_letter(ours[at]) for at in differing]
    within = sum(is_letter and letters == 2 for is_letter, letters in zip(seen, touching, strict=True))
    return False if within * 5 >= len(differing) > 0 else None


def _is_letter(character: str) -> bool:
    return character.isalpha() or character == "\ufffd"


def ebcdic(sample: bytes) -> str | None:
    """Return cp500 if the bytes read as EBCDIC: letters and digits, with 0x40 as the commonest byte or nearly."""
    if not sample or sample.count(0x40) * 20 < len(sample):
        return None
    text = sample.decode("cp500")
    wordlike = sum(character.isalnum() or character in " .,;:-'\"()\n\r\t\x85" for character in text)
    return "cp500" if wordlike * 10 >= 9 * len(text) else None
