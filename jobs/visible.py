"""Text of others where people read it: what would move a terminal, hide letters or turn their order is shown instead of done."""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Control characters but tab and newline, blanks without width, line separators, bidirectional controls, byte order mark, lone surrogates,
invisible tags."""


def visible(text: str) -> str:
    """Return the text with such characters written as escapes, for example `\\x1b`; tabs and newlines stay."""
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
