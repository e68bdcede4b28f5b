"""What tells this process from all others on its host, also where containers count their processes for themselves."""

from __future__ import annotations

import os
from contextlib import suppress

_HOSTS_PIDS = 0xEFFFFFFC  # what Linux calls the namespace of process numbers that no container has made (PROC_PID_INIT_INO)


def process_id(separator: str) -> str:
    """Return this process's number, in a container with that of its namespace behind a separator.

    Containers that share the host's network have its name, and each of them has a process with the number 1.
    """
    pid = str(os.getpid())
    with suppress(OSError):  # no /proc, no containers
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - Path.stat says the same with more words
        return pid if namespace == _HOSTS_PIDS else f"{pid}{separator}{namespace}"
    return pid
