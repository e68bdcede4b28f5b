"""Showing how far a set of documents is: a bar on a terminal, plain lines elsewhere. Always on stderr, so that results can be piped."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.cli.output import aside, say

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the files are: documents, and archives that were not unpacked."""

    total: int
    done: int
    failed: int = 0
    cancelled: int = 0
    states: Counter[str] = field(default_factory=Counter)
    """Unfinished documents by state."""
    stages: Counter[str] = field(default_factory=Counter)
    """Documents in work by the stage that their last checkpoint left due, where there has been one."""

    def words(self) -> str:
        """Say it in a few words, for example `2 working (parse 1, embed 1), 5 queued, 1 failed`."""
        stages = ", ".join(f"{stage} {count}" for stage, count in self.stages.most_common())
        working = self.states["working"]
        parts = [f"{working} working" + (f" ({stages})" if stages else "")] if working else []
        parts += [f"{self.states[state]} {state}" for state in ("queued", "retrying") if self.states[state]]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.cancelled} cancelled"] if self.cancelled else []
        return ", ".join(parts)


class Display:
    """A progress bar, or lines where stderr is no terminal. Use as a context manager."""

    def __init__(self) -> None:
        self._console = aside()
        self._bar = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.fields[what]}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[words]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, what="submitting", words="", visible=self._console.is_terminal)
        self._submitted = 0
        self._last_line = ""
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def submitted_one(self) -> None:
        """Count a file that has been looked at."""
        self._submitted += 1
        self._bar.update(self._task, completed=self._submitted)
        self._line(f"{self._submitted} files submitted")

    def unpacking(self, done: int, total: int) -> None:
        """Show how far archives have been unpacked; `total` is 0 until one has been opened."""
        self._bar.update(self._task, what="unpacking", total=total or None, completed=done, words="")
        self._line(f"{done} of {total} files unpacked" if total else "opening the archive")

    def show(self, standing: Standing) -> None:
        """Show how far the files are."""
        words = standing.words()
        self._bar.update(self._task, what="files", total=standing.total, completed=standing.done, words=words)
        self._line(f"{standing.done} of {standing.total} files done" + (f": {words}" if words else ""))

    def _line(self, text: str) -> None:
        if self._console.is_terminal or text == self._last_line or time.monotonic() < self._next_line:
            return
        self._last_line, self._next_line = text, time.monotonic() + SECONDS_BETWEEN_LINES
        say(text, console=self._console)
