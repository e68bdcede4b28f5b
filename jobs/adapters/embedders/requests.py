"""Which texts go into which request, and which text of a refused request is at fault. Pure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Protocol


def plan_requests(tokens: Sequence[int], *, max_texts: int, max_tokens: int, pieces: Sequence[int] | None = None) -> list[slice]:
    """Return slices of the texts, in order, that each make one request of at most `max_texts` texts and `max_tokens` tokens.

    `tokens` is the estimate for each text, `pieces` into how many it is split (1 where not given). A text over a limit stands alone.
    """
    slices: list[slice] = []
    start = texts = total = 0
    for index, size in enumerate(tokens):
        count = 1 if pieces is None else pieces[index]
        if index > start and (texts + count > max_texts or total + size > max_tokens):
            slices.append(slice(start, index))
            start, texts, total = index, 0, 0
        texts += count
        total += size
    if start < len(tokens):
        slices.append(slice(start, len(tokens)))
    return slices


class Weight(Protocol):
    """What a text takes up of a request."""

    @property
    def pieces(self) -> Sequence[object]:
        """The pieces that it is sent in."""
        ...

    @property
    def tokens(self) -> int:
        """Its estimated tokens."""
        ...


class _Room:
    """What is left of a request while it is made up."""

    def __init__(self, texts: int, tokens: int) -> None:
        self.texts, self.tokens = texts, tokens

    def longest(self, texts: Sequence[Weight], start: int = 0) -> int:
        """Return how many of the texts from `start` on still fit, in order."""
        pieces, tokens, end = self.texts, self.tokens, start
        while end < len(texts):
            pieces, tokens = pieces - len(texts[end].pieces), tokens - texts[end].tokens
            if pieces < 0 or tokens < 0:
                break
            end += 1
        return end - start

    def take(self, texts: Sequence[Weight]) -> None:
        self.texts -= sum(len(text.pieces) for text in texts)
        self.tokens -= sum(text.tokens for text in texts)


def fill_request(waiting: Sequence[Sequence[Weight]], *, max_texts: int, max_tokens: int, cut: bool) -> list[int]:
    """Return how many texts of each waiting document go into the next request, always its first ones.

    The first document, which has waited longest, gets at least one text in; if that is longer than a request may be, it goes alone. Then
    everybody whose texts all fit into an even share goes whole, so that nobody small waits behind somebody large, and then the others in
    their order as far as there is room. One that does not go whole is left for the next request, unless it is the first, or `cut` says
    that there will be none for a while.
    """
    room, taken = _Room(max_texts, max_tokens), [0] * len(waiting)
    share = _Room(max_texts // len(waiting), max_tokens // len(waiting))

    def take(index: int, count: int) -> None:
        room.take(waiting[index][taken[index] : taken[index] + count])
        taken[index] += count

    take(0, room.longest(waiting[0][:1]))
    if not taken[0]:
        return [1, *taken[1:]]
    for index in sorted(range(len(waiting)), key=lambda index: share.longest(waiting[index]) < len(waiting[index])):
        left = len(waiting[index]) - taken[index]
        fits = room.longest(waiting[index], taken[index])
        if fits == left or index == 0 or cut:
            take(index, fits)
    return taken


def bisect(part: slice) -> Generator[slice, bool, list[int]]:
    """Find the texts that a service refuses, given that it refused `part` as a whole.

    Yields slices to try; send True if the service refused the slice, False if it took it. Returns the indexes of the texts at fault,
    in order. For k of n texts about 2 k log2 n requests, and every text that is not at fault is embedded exactly once on the way.
    """
    guilty: list[int] = []
    suspects = [part]
    while suspects:
        suspect = suspects.pop()
        if suspect.stop - suspect.start <= 1:
            guilty.extend(range(suspect.start, suspect.stop))
            continue
        middle = (suspect.start + suspect.stop) // 2
        refused = []
        for low, high in pairwise((suspect.start, middle, suspect.stop)):
            half = slice(low, high)
            if (yield half):
                refused.append(half)
        suspects.extend(reversed(refused))
    return guilty
