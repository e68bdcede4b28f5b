"""Schedules that come of a number each: played one after the other, and made shorter where one goes wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Step = tuple[str, dict[str, Any]]
"""What is done, and how."""
Play = Callable[[int, list[Step]], Exception | None]
"""Play the steps of the schedule with this number; return what went wrong."""


class Draws:
    """What is drawn for one schedule."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, among: Any) -> Any:
        return self.random.choice(among)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def weighted(self, steps: Mapping[str, tuple[int, T]]) -> tuple[str, T]:
        """Return one of these by its weight."""
        (name,) = self.random.choices(list(steps), [weight for weight, _ in steps.values()])
        return name, steps[name][1]


def play_all(seeds: Iterable[int], draw: Callable[[int], Iterable[Step]], play: Play) -> None:
    """Fail with the shortest part that can be found of the first schedule that goes wrong."""
    for seed in seeds:
        steps = list(draw(seed))
        if (first := play(seed, steps)) is not None:
            steps = shorten(play, seed, steps)
            lines = "\n".join(f"    {name} {how}" for name, how in steps)
            # Whatever goes wrong only now and then may do no more: then the first error is the one to read.
            last = play(seed, steps) or first
            raise AssertionError(f"Schedule {seed} goes wrong ({first!r}), and so does this part of it:\n{lines}") from last


def shorten(play: Play, seed: int, steps: list[Step], seconds: float = 120) -> list[Step]:
    """Return a part of the steps that goes wrong too, as short as can be found in the time."""
    end, size = time.monotonic() + seconds, len(steps) // 2
    while size:
        start, before = len(steps) - size, len(steps)
        while start > 0 and time.monotonic() < end:
            fewer = steps[:start] + steps[start + size :]
            if play(seed, fewer) is not None:
                steps = fewer
            start -= size
        size = size if size == 1 and len(steps) < before and time.monotonic() < end else size // 2
    return steps
