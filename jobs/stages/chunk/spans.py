"""Where a markdown text is cut: contiguous spans that cover it all. Pure, and linear in the length of the text.

The splitter decides by meaning (headings, blocks, sentences, words), but its time grows with the square of what it is given, and
it leaves headings alone at the end of a piece. So it gets segments of bounded length, tables that do not fit in one piece are cut
by rows here, and cuts that part a heading or a table's header from what follows are moved.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator

from jobs.adapters.markdown import Heading, Structure, Table, table_at

Span = tuple[int, int]

SEGMENT_CHARACTERS = 8_192
"""How much the splitter sees at once. Prose keeps its full speed up to 16 KB; text without spaces or punctuation already suffers at 8."""
_SENTENCE_ENDS = (". ", "! ", "? ", ".\t", "。", "！", "？", "। ", "؟ ")
_WORD_ENDS = (" ", "\t", "、", "，", "|")
_LONGEST_CLUSTER = 32
"""How far back from a cut a whole character cluster is looked for; longer ones exist only in attacks."""
_LONGEST_FLAG_RUN = 1_024


def spans(markdown: str, structure: Structure, size: int, overlap: int) -> list[Span]:
    """Return where to cut: spans in order, of at most `size` characters, none of white space alone, with nothing else between them."""
    from semantic_text_splitter import MarkdownSplitter  # noqa: PLC0415  # a compiled library that only this function needs

    capacity = size - overlap
    splitter = MarkdownSplitter(capacity, trim=False)
    raw: deque[Span] = deque()
    for start, end, table in _segments(markdown, structure, capacity):
        if table is not None:
            raw.extend(_rows(markdown, table, size, capacity))
        else:
            raw.extend((start + offset, start + offset + len(text)) for offset, text in splitter.chunk_indices(markdown[start:end]))
    return _merge_tiny(markdown, structure, _settle(markdown, structure, raw, size), size)


def overlap_start(markdown: str, structure: Structure, earliest: int, start: int, room: int) -> int:
    """Return where a passage that begins at `start` may begin instead, to repeat at most `room` characters of the text before it.

    The repetition begins with a sentence, else a word; in a table with a row. It never reaches before `earliest` or over a heading.
    """
    lowest = max(earliest, start - room)
    index = bisect_right(structure.headings, start, key=_start) - 1
    if index >= 0:
        heading = structure.headings[index]
        if heading.end > start:
            return start
        lowest = max(lowest, heading.end)
    if lowest >= start:
        return start
    if table := table_at(structure, lowest):
        row = bisect_left(table.lines, lowest)
        lowest = table.lines[row] if row < len(table.lines) else table.end
        return min(lowest, start)
    if lowest == earliest or markdown[lowest - 1] == "\n":
        return lowest
    for ends in (("\n", *_SENTENCE_ENDS), _WORD_ENDS):
        found = [at + len(mark) for mark in ends if (at := markdown.find(mark, lowest, start)) >= 0 and at + len(mark) < start]
        if found:
            return min(found)
    return min(start, next((at for at in range(lowest, start) if is_cluster_break(markdown, at)), start))


def break_before(markdown: str, lowest: int, limit: int) -> int:
    """Return the best place to cut in (lowest, limit]: after a blank line, a line, a sentence, a word, at worst a whole character."""
    for marks in (("\n\n",), ("\n",), (" | ",), _SENTENCE_ENDS, _WORD_ENDS):
        best = max((at + len(mark) for mark in marks if (at := markdown.rfind(mark, lowest, limit)) >= 0), default=0)
        if best > lowest:
            return best
    for at in range(limit, max(lowest, limit - _LONGEST_CLUSTER), -1):
        if is_cluster_break(markdown, at):
            return at
    return limit


def is_cluster_break(markdown: str, at: int) -> bool:
    """Say whether a cut at `at` leaves what people see as one character whole: combining marks, joined emoji, flags."""
    if at <= 0 or at >= len(markdown):
        return True
    before, after = markdown[at - 1], markdown[at]
    if after < "\u0300":
        return not (before == "\r" and after == "\n")
    if (
        unicodedata.category(after) in ("Mn", "Mc", "Me")
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or "\U000e0020" <= after <= "\U000e007f"
    ):
        return False
    if _is_flag_half(before) and _is_flag_half(after):
        run = 1
        while run < _LONGEST_FLAG_RUN and at - run > 0 and _is_flag_half(markdown[at - run - 1]):
            run += 1
        return run % 2 == 0
    return True


def _is_flag_half(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _segments(markdown: str, structure: Structure, capacity: int) -> Iterator[tuple[int, int, Table | None]]:
    """Cut the text into tables that do not fit into one passage, and the rest into lengths that the splitter is quick on."""
    longest = max(SEGMENT_CHARACTERS, 4 * capacity)
    start = 0
    for table in [table for table in structure.tables if table.end - table.start > capacity]:
        yield from _short_segments(markdown, structure, start, table.start, longest)
        yield table.start, table.end, table
        start = table.end
    yield from _short_segments(markdown, structure, start, len(markdown), longest)


def _short_segments(markdown: str, structure: Structure, start: int, end: int, longest: int) -> Iterator[tuple[int, int, None]]:
    while end - start > longest:
        middle, limit = start + longest // 2, start + longest
        first, last = (bisect_right(structure.headings, edge, key=_start) for edge in (middle, limit))
        block = structure.blocks[at] if (at := bisect_right(structure.blocks, limit) - 1) >= 0 else 0
        if first < last:
            cut = min(reversed(structure.headings[first:last]), key=lambda heading: heading.level).start
        else:
            cut = block if block > middle else break_before(markdown, middle, limit)
        yield start, cut, None
        start = cut
    if end > start:
        yield start, end, None


def _rows(markdown: str, table: Table, size: int, capacity: int) -> Iterator[Span]:
    """Pack whole rows; header and delimiter stay with the first. Only a row longer than `size` is cut, between cells if possible."""
    start = table.start
    edges = (*table.lines[3:], table.end) if len(table.lines) > 2 else (table.end,)
    previous = start
    for edge in edges:
        if edge - start > capacity and previous > start:
            yield start, previous
            start = previous
        while edge - start > size:
            cut = break_before(markdown, start + size // 2, start + size)
            yield start, cut
            start = cut
        previous = edge
    if table.end > start:
        yield start, table.end


def _settle(markdown: str, structure: Structure, raw: deque[Span], size: int) -> list[Span]:
    """Move each cut that parts a heading, a table's header or a row's beginning from what follows it."""
    settled: list[Span] = []
    while raw:
        start, end = raw.popleft()
        cut = _kept_together(markdown, structure, start, end, size) if raw else end
        if cut > start:
            settled.append((start, cut))
        if cut == end:
            continue
        _, following_end = raw.popleft()
        if following_end - cut <= size:
            raw.appendleft((cut, following_end))
            continue
        split = _split_at(markdown, structure, cut, end, size)
        settled.append((cut, split))
        if split < following_end:
            raw.appendleft((split, following_end))
    return settled


def _kept_together(markdown: str, structure: Structure, start: int, end: int, size: int) -> int:
    """Return the place at or before `end` where a cut does no harm, at most half a passage back; `end` if there is none."""
    lowest = max(start, end - size // 2)
    cut = end
    table = table_at(structure, end)
    if table is not None and end > table.start:
        row = bisect_right(table.lines, end) - 1
        better = table.lines[row] if row > 2 else table.start
        cut = better if better >= lowest else end
    at = bisect_left(structure.headings, cut, key=_start) - 1
    while at >= 0 and structure.headings[at].start >= lowest and not markdown[structure.headings[at].end : cut].strip():
        cut = structure.headings[at].start
        at -= 1
    return cut


def _split_at(markdown: str, structure: Structure, start: int, moved_from: int, size: int) -> int:
    """Return where to end a passage that begins with what was moved to `start`; `moved_from` if nothing more fits."""
    limit = start + size
    body = body_start(markdown, structure, start, limit)
    if max(body, moved_from) >= limit:
        return moved_from
    table = table_at(structure, limit)
    if table is not None:
        row = bisect_right(table.lines, limit) - 1
        if row > 2 and table.lines[row] > moved_from:
            return table.lines[row]
        if row <= 2 and table.start > body:
            return table.start
        row_end = table.lines[row + 1] if row + 1 < len(table.lines) else table.end
        if row_end - table.lines[row] <= size:
            return moved_from
    split = break_before(markdown, max(body, moved_from, start + size // 2), limit)
    better = _kept_together(markdown, structure, start, split, size)
    return better if better > max(body, moved_from) else split


def _merge_tiny(markdown: str, structure: Structure, settled: list[Span], size: int) -> list[Span]:
    """Join spans under a tenth of `size` to the one before, or the one after if a heading opens them; drop those of white space."""
    tiny = size // 10
    merged: list[Span] = []
    for start, end in settled:
        if not markdown[start:end].strip():
            continue
        if merged and end - merged[-1][0] <= size:
            before = merged[-1]
            opened = body_start(markdown, structure, start, end) > _first_visible(markdown, start, end)
            if (end - start < tiny and not opened) or before[1] - before[0] < tiny:
                merged[-1] = (before[0], end)
                continue
        merged.append((start, end))
    return merged


def body_start(markdown: str, structure: Structure, start: int, end: int) -> int:
    """Return the offset of the first visible character in [start, end) that belongs to no heading; `end` if there is none."""
    at = _first_visible(markdown, start, end)
    index = bisect_right(structure.headings, at, key=_start) - 1
    while at < end and 0 <= index < len(structure.headings) and structure.headings[index].start <= at < structure.headings[index].end:
        at = _first_visible(markdown, structure.headings[index].end, end)
        index += 1
    return min(at, end)


def _first_visible(markdown: str, start: int, end: int) -> int:
    while start < end and markdown[start].isspace():
        start += 1
    return start


def _start(block: Heading | Table) -> int:
    return block.start
