"""Counters for /metrics out of the audit trail. Each event is counted once, by this process, however late its transaction commits.

Ids are given out in order but become visible out of order, so the ids that have been counted are remembered back to the last one below
which no transaction can be running any more. Counters begin at 0 with the process, as Prometheus expects of any restart.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from jobs.serve.reading import Look, Row

STAGE_BOUNDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
DOCUMENT_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Upper bounds of the histograms' buckets in seconds; one more takes the rest."""


@dataclass(slots=True)
class Durations:
    """A histogram: how many in each bucket, and their sum in seconds."""

    counts: list[int]
    seconds: float = 0.0

    def add(self, bucket: int, times: int, seconds: float) -> None:
        """Add to the bucket that `width_bucket` named: 0 for up to the first bound."""
        self.counts[bucket] += times
        self.seconds += seconds

    def cumulative(self, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
        """Return Prometheus' buckets: the number up to each bound."""
        total, found = 0, []
        for bound, count in zip([*map(str, bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@dataclass(slots=True)
class Tally:
    """What has happened since this process began to look."""

    events: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    """Times by event and stage; the stage is empty where there is none."""
    stages: dict[str, Durations] = field(default_factory=dict)
    stage_cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """CPU time in seconds."""
    documents: Durations = field(default_factory=lambda: Durations([0] * (len(DOCUMENT_BOUNDS) + 1)))
    missed: int = 0
    """Times that it had to begin anew, because a question took too long or the database was set back."""
    _low: int | None = None
    """All ids up to this one are counted or lie before the beginning; None before the first look."""
    _counted: str = "{}"
    """Those above it that are counted, as an int8multirange."""
    _marks: list[tuple[int, int]] = field(default_factory=list)
    """For looks whose transactions may still run: the first transaction id after them, and the highest id that they saw."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """To be held from before a look begins: an older one that came second would be taken for a database that was set back."""

    async def catch_up(self, look: Look) -> None:
        """Count what has become visible since the last look. All questions of `look` must see the same."""
        horizon = await look.row("tally_horizon")
        assert horizon is not None
        last = horizon["last_id"]
        if self._marks and last < self._marks[-1][1]:
            self.forget()
        self._marks.append((horizon["next_transaction"], last))
        if self._low is None:
            start = await look.row("tally_start") or {}
            self._low, self._counted = start["low"], start["counted"]
            return
        found = await look.rows(
            "tally_events",
            low=self._low,
            counted=self._counted,
            stage_bounds=list(STAGE_BOUNDS),
            document_bounds=list(DOCUMENT_BOUNDS),
        )
        settled = [mark for mark in self._marks if mark[0] <= horizon["oldest_transaction"]]
        low = max([self._low, *(highest for _, highest in settled)])
        counted = await look.row("tally_counted", low=self._low, new_low=low, counted=self._counted) or {}
        self._low, self._counted = low, counted["counted"]
        self._marks = [mark for mark in self._marks if mark not in settled] or self._marks[-1:]
        for row in found:
            self._add(row)

    def forget(self) -> None:
        """Begin anew with the next look; what has happened in between is not counted."""
        self._low, self._counted = None, "{}"
        self._marks.clear()
        self.missed += 1

    def _add(self, row: Row) -> None:
        event, stage, times = row["event"], row["stage"], row["times"]
        self.events[event, stage] += times
        self.stage_cpu[stage] += row["cpu_seconds"]
        if row["stage_bucket"] is not None:
            known = self.stages.setdefault(stage, Durations([0] * (len(STAGE_BOUNDS) + 1)))
            known.add(row["stage_bucket"], times, row["seconds"])
        if row["document_bucket"] is not None:
            self.documents.add(row["document_bucket"], times, row["document_seconds"])
