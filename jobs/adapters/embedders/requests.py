"""Which texts go into which request, and which text of a refused request is at fault. Pure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise


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
