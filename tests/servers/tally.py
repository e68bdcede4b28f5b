"""What a server has seen: enough to say how many calls were made of those needed, and how hard a stampede was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """Counts of one server since its start or `reset`."""

    requests: int = 0
    answered: int = 0
    """Requests that got what they asked for, whole and right."""
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0
    texts: int = 0
    """Texts of answered embedding requests, or pages of answered uploads."""
    tokens: int = 0
    """Of answered requests, in and out."""
    tokens_seen: int = 0
    """Of all requests, also of those refused."""
    uploads: int = 0
    polls: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """Faults that were played, by name."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often each text was embedded and answered: more than once means paid twice."""
    at: list[float] = field(default_factory=list)
    """When each request came, in seconds since the server's start."""
    tokens_at: list[tuple[float, int]] = field(default_factory=list)
    """When each request came and its tokens."""

    def paid_twice(self) -> int:
        """Return how many embeddings were given for texts that had one already."""
        return sum(count - 1 for count in self.seen.values())

    def in_first_second_after(self, moment: float) -> int:
        """Return the requests in the second that begins at a moment."""
        return sum(1 for at in self.at if moment <= at < moment + 1)

    def most_in_any(self, seconds: float) -> int:
        """Return the most requests in any window of this length."""
        times, most, first = sorted(self.at), 0, 0
        for last, at in enumerate(times):
            while at - times[first] >= seconds:
                first += 1
            most = max(most, last - first + 1)
        return most

    def most_tokens_in_any(self, seconds: float) -> int:
        """Return the most tokens in any window of this length."""
        times, most, first, total = sorted(self.tokens_at), 0, 0, 0
        for at, tokens in times:
            total += tokens
            while at - times[first][0] >= seconds:
                total -= times[first][1]
                first += 1
            most = max(most, total)
        return most

    def as_json(self) -> dict[str, Any]:
        """Return the counts for /_tally."""
        return {
            **{name: getattr(self, name) for name in ("requests", "answered", "most_in_flight", "connections", "texts", "tokens")},
            **{name: getattr(self, name) for name in ("tokens_seen", "uploads", "polls", "at", "tokens_at")},
            "faults": dict(self.faults),
            "paid_twice": self.paid_twice(),
            "different_texts": len(self.seen),
        }
