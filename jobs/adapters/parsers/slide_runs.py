"""Words on slides in one piece: PowerPoint splits them into runs wherever it likes, and xberg puts a space between any two runs."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from contextlib import suppress

from jobs.adapters.parsers.ooxml import MB, read_paragraphs
from jobs.adapters.parsers.source import Source

MAX_SLIDE_BYTES = 32 * MB
"""Of XML in a slide, or in its notes, that is read a second time for this."""
_SLIDE = re.compile(r"ppt/(?:slides/slide|notesSlides/notesSlide)\d+\.xml")
_CELLS = re.compile(r"((?<!\\)\|)")
_LEAD = re.compile(r"\s*(?:(?:#{1,6}|[-+]|\d+\.)\s+)?")
"""What a line or cell begins with: blanks and the mark of a heading or of a list."""
_MARKS = "*~\\"
_INSIDE_WORD = re.compile(r"\w[*~\\]+\w")


def run_joiner(source: Source) -> Callable[[str], str]:
    """Return what puts the exact text into a slide's markdown, line by line and cell by cell; what it does not know stays."""
    exact = _exact_texts(source) if source.is_ooxml else {}

    def joined(text: str) -> str:
        before = _LEAD.match(text)[0]  # type: ignore[index]  # it matches any text
        rest = text[len(before) :]
        body = rest.rstrip()  # a pattern that leaves the blanks at the end to another would try each blank inside as one of those
        return f"{before}{_without_gaps(body, exact.get(_key(body), ''))}{rest[len(body) :]}"

    def line(text: str) -> str:
        return "".join(map(joined, _CELLS.split(text))) if text.startswith("|") else joined(text)

    return lambda markdown: "\n".join(map(line, markdown.split("\n")))


def _exact_texts(source: Source) -> dict[str, str]:
    """Return the paragraphs of all slides by their keys; of two that differ in blanks alone, neither."""
    found: dict[str, str] = {}
    with suppress(OSError, zipfile.BadZipFile), source.file.open() as file, zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if _SLIDE.fullmatch(part.filename) and part.file_size <= MAX_SLIDE_BYTES:
                for text in _paragraphs(archive, part.filename):
                    key = _key(text)
                    found[key] = text if found.get(key, text) == text else ""
    return found


def _paragraphs(archive: zipfile.ZipFile, name: str) -> list[str]:
    try:
        return read_paragraphs(archive, name)
    except MemoryError:
        raise
    except Exception:  # zip, its decompressors and expat have no common class, and the slide's text is there already
        return []


def _key(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def _without_gaps(text: str, exact: str) -> str:
    """Return the text without the blanks that are not in the exact one; the same text where it differs in more than blanks and markup.

    Where markup would begin or end within a word all of it goes, as it keeps search from the word.
    """
    kept: list[str] = []
    place = 0
    for character in text:
        if exact.startswith(character, place):
            place += 1
        elif character == " ":
            continue
        elif character not in _MARKS:
            return text
        kept.append(character)
    if not exact or place < len(exact):
        return text
    joined = "".join(kept)
    if "****" not in exact:
        joined = joined.replace("****", "")  # two bold runs that are one
    return exact if _INSIDE_WORD.search(joined) else joined
