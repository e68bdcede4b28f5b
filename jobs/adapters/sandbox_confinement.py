"""What is taken from a sandbox's child before any parser is imported: resources, files, network, other processes.

Two layers of the kernel, because each stops what the other does not see: Landlock files and other processes' secrets, seccomp every kind of
socket, new processes and what else no parser needs. Both work without privileges, in containers too. Where one is missing the child works
without it and says so.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import models
from jobs.adapters import sandbox_landlock, sandbox_seccomp

MB = 1024 * 1024
SPARE_TASKS = 1024
"""How many more threads and processes of this user may begin before a child may start no further thread; other processes count too."""
_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _NO_NEW_PRIVS, _CAP_AMBIENT, _CLEAR_ALL = 1, 4, 24, 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522

SYSTEM_FILES = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/zero",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu",
)
"""What libraries read: programs' and libraries' files, time zones, the number of processors. Of /proc only the child's own part."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use."""

    timeout: float = 300.0
    """Wall clock, in seconds."""
    memory_mb: int = 4096
    """Address space of the child, not resident memory: parsers reserve far more than they touch."""
    cpu_seconds: int | None = None
    """CPU time over all threads; None for twice the wall clock."""
    max_output_mb: int = 256
    """Largest pickled result, and largest file that the child may write."""
    open_files: int = 256

    @property
    def cpu_limit(self) -> int:
        """The CPU limit in whole seconds."""
        return self.cpu_seconds if self.cpu_seconds is not None else int(self.timeout * 2) + 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What a child is told when it begins."""

    limits: Limits
    writable: Path | None = None
    """The folder that it may write to."""
    readable: tuple[Path, ...] = ()
    """Folders that it may read beside Python's and the system's libraries."""


def confine(setup: Setup, parent: int) -> tuple[str, ...]:
    """Set this process up as a child, and return what the kernel could not do, in words. It dies with its parent and hears no signals."""
    die_with(parent)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the worker decides when a parse ends
    with suppress(OSError):  # where memory runs out it is the parser that goes, not the worker
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _limit(setup.limits)
    _give_up_privileges()
    layers: tuple[tuple[str, Callable[[], None]], ...] = (
        ("Landlock is missing ({}): docmill's files are not hidden from parsers", partial(sandbox_landlock.restrict, _allowed(setup))),
        ("seccomp is missing ({}): parsers can reach the network and start programs", sandbox_seccomp.restrict),
    )
    missing = []
    for words, restrict in layers:
        try:
            restrict()
        except (OSError, AttributeError) as error:
            missing.append(words.format(error))
    return tuple(missing)


def die_with(parent: int) -> None:
    """Have this process end when the one that made it does."""
    ctypes.CDLL(None, use_errno=True).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the line above took hold


def let_others_look(allowed: bool) -> None:
    """Say whether processes of the same user may look into this one's memory and open files; root's always may."""
    ctypes.CDLL(None, use_errno=True).prctl(_DUMPABLE, int(allowed), 0, 0, 0)


def _limit(limits: Limits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_mb * MB, limits.memory_mb * MB))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.max_output_mb * MB, limits.max_output_mb * MB))
    files = min(limits.open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    tasks = _tasks_of_this_user() + SPARE_TASKS  # root is never refused one
    tasks = tasks if hard == resource.RLIM_INFINITY else min(tasks, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))


def _tasks_of_this_user() -> int:
    """Count threads, as the limit does; 0 where there is no /proc."""
    count = 0
    with suppress(OSError):
        for entry in os.scandir("/proc"):
            with suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid == os.getuid():
                    count += sum(1 for _ in os.scandir(f"/proc/{entry.name}/task"))
    return count


def _give_up_privileges() -> None:
    """Drop what root may do beyond its own files, and the way back to it through setuid programs."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
        for capability in range(64):
            libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
        libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())


def _allowed(setup: Setup) -> dict[Path, int]:
    allowed = dict.fromkeys((*map(Path, SYSTEM_FILES), *_python_folders(), *setup.readable), sandbox_landlock.READ)
    allowed[Path(os.devnull)] = sandbox_landlock.WRITE
    if setup.writable is not None:
        allowed[setup.writable] = sandbox_landlock.WRITE
    return allowed


def _python_folders() -> Iterator[Path]:
    """Yield where Python, its packages and docmill lie. Not the folder that docmill was started in: settings and storage may be there."""
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}:
        yield from (Path(prefix, name) for name in ("lib", "lib64", "bin"))
    yield from (Path(path) for name, path in sysconfig.get_paths().items() if name.endswith("lib") or name == "stdlib")
    yield from (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    yield Path(__file__).parents[1]
    yield from map(Path, models.__path__)
