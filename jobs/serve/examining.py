"""The health of the installation as this server tells it: looked at anew, but never by two at once, however many ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

from jobs.health import Component, check_health
from models.settings import Settings

FRESH_SECONDS = 1.0
"""For how long an answer is given again."""
LIMIT = 6.0
"""Seconds that an examination takes at most: a scraper that waits for 8 or more is to be told something else too."""


class Doctor:
    """Examines the installation for one server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = asyncio.Lock()
        self._found: list[Component] = []
        self._found_at = -FRESH_SECONDS

    async def examine(self) -> list[Component]:
        """Return all components after LIMIT seconds at most, whatever hangs."""
        async with self._lock:
            if time.monotonic() - self._found_at >= FRESH_SECONDS:
                self._found = await check_health(self._settings, limit=LIMIT)
                self._found_at = time.monotonic()
            return self._found


def all_work(components: Sequence[Component], only: Collection[str] = ()) -> bool:
    """Say whether documents that are submitted now will be worked on: no component, or none of those named, is down or not to be told."""
    return all(found.health in ("ok", "degraded") for found in components if not only or found.name in only)
