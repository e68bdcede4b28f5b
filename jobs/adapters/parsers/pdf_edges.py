"""Running titles and page numbers at the edges of PDF pages: what each page repeats would be found on each, and says nothing there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from models.documents import ParsedPage

EDGE_LINES = 3
"""How many lines of a page count as its upper edge, and how many as its lower."""
LONGEST_LINE = 200
"""Characters of a running title; what is longer is text, however often it stands there."""
LEAST_REPEATS, SHARE_OF_REPEATS = 5, 10
"""A line is a running title if it stands on so many pages, and on one in so many."""
LEAST_NUMBERED, SHARE_OF_NUMBERED = 2, 4
"""Bare numbers are page numbers if they count with the pages on so many, and on one in so many of those that have one."""
_DASHES = r"[\s\u2013\u2014-]*"
_NUMBER = r"(\d{1,5})(?:\s*(?:of|von|di|de|sur|van|z|/)\s*\d{1,5})?"
_BARE = re.compile(_DASHES + _NUMBER + _DASHES, re.IGNORECASE)
_NAMED = re.compile(_DASHES + r"(?:page|seite|blatt|pagina|página|strona|p\.|s\.)\s*" + _NUMBER + _DASHES, re.IGNORECASE)
_WORD = re.compile(r"\w")

_Edge = list[tuple[int, str]]
"""Lines from outside inwards, each with its index in the page."""


@dataclass(slots=True)
class PageEdges:
    """Takes those lines out of the pages of one file, part by part."""

    kept: set[str] = field(default_factory=set)
    """The running titles that the text has once already, and needs no more."""

    def without_running_lines(self, pages: Sequence[ParsedPage]) -> list[ParsedPage]:
        """Return the pages of a part. The first of the same titles stays, and a page that has nothing else stays as it is."""
        edges = [_edges(page.markdown.split("\n")) for page in pages]
        titles = self.kept | _running_titles(edges)
        shifts = _common_shifts(pages, edges)
        return [self._without(page, sides, titles, shifts) for page, sides in zip(pages, edges, strict=True)]

    def _without(self, page: ParsedPage, sides: tuple[_Edge, _Edge], titles: set[str], shifts: set[int]) -> ParsedPage:
        dropped = set()
        new = set()
        for side in sides:
            for index, line in side:
                if line in titles and line not in self.kept:
                    new.add(line)
                elif line in titles or _is_page_number(line, page.number, shifts):
                    dropped.add(index)
                else:
                    break
        self.kept |= new  # not before: on a short page a line is at both edges
        markdown = _without_lines(page.markdown, dropped)
        return replace(page, markdown=markdown) if dropped and markdown.strip() else page


def _edges(lines: list[str]) -> tuple[_Edge, _Edge]:
    upper = _edge(enumerate(lines))
    return upper, _edge(zip(range(len(lines) - 1, -1, -1), reversed(lines), strict=True))


def _edge(lines: Iterable[tuple[int, str]]) -> _Edge:
    """Return the outermost lines, up to the first that belongs to a table or to code: of these nothing is ever taken."""
    found: _Edge = []
    for index, line in lines:
        if not (text := line.strip().strip("*_")):
            continue
        if len(found) == EDGE_LINES or len(text) > LONGEST_LINE or text.startswith(("|", "`", "<")) or not _WORD.search(text):
            break
        found.append((index, text))
    return found


def _running_titles(edges: Sequence[tuple[_Edge, _Edge]]) -> set[str]:
    repeats = Counter(chain.from_iterable({line for _, line in chain(*sides)} for sides in edges))
    often = max(LEAST_REPEATS, len(edges) / SHARE_OF_REPEATS)
    return {line for line, count in repeats.items() if count >= often}


def _common_shifts(pages: Sequence[ParsedPage], edges: Sequence[tuple[_Edge, _Edge]]) -> set[int]:
    """Return by how much the page numbers differ from the pages' places in the file: a number that differs otherwise is data."""
    found = [
        {int(match[1]) - page.number for _, line in chain(*sides) if (match := _BARE.fullmatch(line))}
        for page, sides in zip(pages, edges, strict=True)
    ]
    often = max(LEAST_NUMBERED, sum(map(bool, found)) / SHARE_OF_NUMBERED)
    return {shift for shift, count in Counter(chain.from_iterable(found)).items() if count >= often}


def _is_page_number(line: str, page: int, shifts: set[int]) -> bool:
    bare = _BARE.fullmatch(line)
    return int(bare[1]) - page in shifts if bare else _NAMED.fullmatch(line) is not None


def _without_lines(markdown: str, dropped: set[int]) -> str:
    """Return the text without these lines, and without the blank ones behind them."""
    kept: list[str] = []
    after_dropped = False
    for index, line in enumerate(markdown.split("\n")):
        after_dropped = index in dropped or (after_dropped and not line.strip())
        if not after_dropped:
            kept.append(line)
    return "\n".join(kept).strip("\n")
