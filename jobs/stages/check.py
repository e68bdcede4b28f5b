"""check: the parsed text is normalised, hashed, found to be non-empty and sound, and compared with known content."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from jobs.adapters.usage import beside
from jobs.stages import Tools
from models.documents import Document, PageMark
from models.errors import ParseError, PermanentError

MAX_UNDECODABLE_SHARE = 0.3
_PIECE = 200_000  # characters
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufeff]")
_LINE_END = re.compile(r"\r\n?")
_BREAKS = "\x0b\x0c\x85\u2028\u2029"
"""What parts lines or pages besides `\\n`. To drop it would join the words beside it."""
_TO_LINE_END, _TO_BLANK = dict.fromkeys(map(ord, _BREAKS), "\n"), dict.fromkeys(map(ord, _BREAKS), " ")
_TRAILING_SPACE = re.compile(r"(?<![ \t])[ \t]++(?=\n|\Z)")  # looked at once from its beginning, not again from each blank
_BLANK_LINES = re.compile(r"\n{3,}")
_VISIBLE = re.compile(r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
"""What is no space, control, direction mark, zero-width character or tag."""
_LONG_RUN = re.compile(r"[^\w\s\x00-\u02ff]{32,}+")
"""More combining marks than any language puts on a letter, or a run of symbols, which are what they are."""


def normalise(text: str) -> str:
    """Return text in NFC with `\\n` line ends, without control characters, trailing blanks and runs of blank lines."""
    text = _composed(_CONTROLS.sub("", _broken(_LINE_END.sub("\n", text))))
    # Most texts have no trailing blanks and single blank lines, and a look for these takes a fiftieth of the time.
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = _TRAILING_SPACE.sub("", text)
    return (_BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text).strip("\n")


def _broken(text: str) -> str:
    """Return the text with a line end for each of `_BREAKS`; inside a row of a table, which a line end would cut in two, a blank."""
    if not any(mark in text for mark in _BREAKS):
        return text
    return "\n".join(line.translate(_TO_BLANK if _is_row(line) else _TO_LINE_END) for line in text.split("\n"))


def _is_row(line: str) -> bool:
    line = line.strip()
    return len(line) > 1 and line[0] == line[-1] == "|"


def _composed(text: str) -> str:
    """Return NFC of all but runs that no language has: putting marks in order takes time by the square of their number."""
    if text.isascii():
        return text
    parts: list[str] = []
    at = 0
    for run in _LONG_RUN.finditer(text):
        parts += (unicodedata.normalize("NFC", text[at : run.start()]), run[0])
        at = run.end()
    return "".join([*parts, unicodedata.normalize("NFC", text[at:])])


def normalise_pages(markdown: str, marks: Sequence[PageMark]) -> tuple[str, tuple[PageMark, ...]]:
    """Normalise page by page, so that the marks stay true; a text without pages is one page without a mark.

    A text that is as it should be is returned itself: an equal one beside it would have to be kept, and stored, once more.
    """
    starts = [mark.start for mark in marks] or [0]
    made: bytearray | None = None  # in UTF-8, that pages and text are not in memory at once; None while all is as it was
    begins: list[int] = []
    at = 0
    for start, end in zip(starts, [*starts[1:], len(markdown)], strict=True):
        part = ("\n\n" if begins else "") + normalise(markdown[start:end])
        begins.append(at + 2 if begins else 0)
        if made is None and not markdown.startswith(part, at):
            made = bytearray(markdown[:at].encode())
        if made is not None:
            made += part.encode()
        at += len(part)
    moved = (mark if mark.start == begin else replace(mark, start=begin) for mark, begin in zip(marks, begins, strict=False))
    return markdown[:at] if made is None else made.decode(), tuple(moved)


def refuse_page_map(name: str, markdown: str, marks: Sequence[PageMark]) -> None:
    """Raise a PermanentError unless the pages begin in order and cover the whole text: what lies between them would be lost."""
    ordered = all(a.start <= b.start for a, b in itertools.pairwise(marks))
    if marks and not (ordered and marks[0].start == 0 and marks[-1].start <= len(markdown)):
        raise PermanentError(f"{name}: the page map is not in order.")


def refuse_text(name: str, markdown: str) -> None:
    """Raise a ParseError when there is no text, or what there is cannot be read."""
    if _VISIBLE.search(markdown) is None:
        raise ParseError(f"{name}: the file holds no text.")
    lost = markdown.count("\ufffd", 0, 100_000)
    if lost == 0:
        return
    visible = sum(1 for character in markdown[:100_000] if not character.isspace())
    if lost > MAX_UNDECODABLE_SHARE * max(1, visible):
        raise ParseError(f"{name}: {lost} of the first {visible} characters could not be decoded (at most {MAX_UNDECODABLE_SHARE:.0%}).")


def checked(document: Document) -> Document:
    """Return the document with normalised markdown and its SHA-256."""
    refuse_page_map(document.file_name, document.markdown or "", document.pages)
    markdown, marks = normalise_pages(document.markdown or "", document.pages)
    refuse_text(document.file_name, markdown)
    return replace(document, markdown=markdown, pages=marks, markdown_sha256=_sha256(markdown))


def _sha256(text: str) -> str:
    """Return the digest of a text's UTF-8, of which only a piece is in memory at a time."""
    digest = hashlib.sha256()
    for start in range(0, len(text), _PIECE):
        digest.update(text[start : start + _PIECE].encode())
    return digest.hexdigest()


async def run(document: Document, tools: Tools) -> Document:
    """Return the document with checked markdown, its SHA-256, and the doc_id of an equal document if the user has one."""
    document = await beside(document.markdown or "", checked, document)
    return document if document.duplicate_of else replace(document, duplicate_of=await tools.find_original(document))
