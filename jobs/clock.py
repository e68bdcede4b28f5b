"""The clock that leases, waits and pauses are measured with."""

from __future__ import annotations

import time


def seconds() -> float:
    """Return seconds that never jump back and go on while the machine sleeps, as the database's clock does elsewhere."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
