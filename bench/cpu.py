"""CPU time and memory of processes and all below them, from /proc; on a machine that others use, CPU seconds say more than the clock."""

from __future__ import annotations

import os
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """Return a process and all its living descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


def cpu_seconds(*pids: int) -> float:
    """Return the CPU time of processes and their descendants, those that have ended and been waited for included."""
    members = {member for pid in pids for member in family(pid)}
    stats = [stat for member in members if (stat := _stat(member)) is not None]
    return sum(sum(map(int, stat[11:15])) for stat in stats) / _TICK


def memory_mb(pid: int, what: str = "Rss") -> float:
    """Return the resident (`Rss`), shared-out (`Pss`) or private (`Private_Dirty`) memory of one process, in MB of 1,000,000 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no {what} in /proc/{pid}/smaps_rollup")


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat behind the command's name; None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
