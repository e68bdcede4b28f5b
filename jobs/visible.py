"""Text of others where people read it: what would move a terminal, hide letters or turn their order is shown instead of done."""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters but tab and newline, blanks without width, line separators, bidirectional controls, byte order mark, annotations, lone
surrogates, invisible tags."""
_INK = re.compile("[^\\s\xad\u115f\u1160\u200c\u200d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def visible(text: str) -> str:
    """Return the text with such characters written as escapes, for example `\\x1b`; tabs and newlines stay."""
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def has_ink(text: str) -> bool:
    """Say whether anything of a text is to be seen, once it is made visible: not of one of blanks, fillers and joiners alone."""
    return _INK.search(text) is not None
