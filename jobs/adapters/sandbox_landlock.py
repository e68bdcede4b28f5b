"""Landlock (Linux 5.13 and later): this process may reach the files beneath a few folders and none besides.

A process under Landlock cannot look into processes outside either: not at their memory, environment or open files. From 6.7 on it opens no
TCP connection, from 6.12 on it sends no signal to others. See landlock(7).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls, with the same numbers on every architecture."""
_GIVE_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = (1 << bit for bit in (0, 1, 2, 3, 5, 8, 14))
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many of the rights over files a version knows."""
_TCP_BIND_AND_CONNECT = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

READ = _EXECUTE | _READ_FILE | _READ_DIR
"""Executing is needed to map libraries; a program is not started by that, seccomp sees to it."""
WRITE = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE
"""Of all that can be made only regular files: no links, pipes, sockets or devices."""
_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi_version() -> int:
    """Return what the kernel offers: 0 for nothing."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GIVE_VERSION)))


def restrict(allowed: Mapping[Path, int]) -> None:
    """Take every right over files from this thread and those it will start, but for the given ones beneath the given paths.

    What is open stays open; a path that does not exist is left out. Raises OSError where the kernel cannot do it. There is no way back.
    """
    abi = abi_version()
    if abi == 0:
        raise OSError("the kernel has no Landlock, or it is switched off")
    libc = ctypes.CDLL(None, use_errno=True)
    handled = (1 << _FS_RIGHTS_BY_ABI.get(abi, 16)) - 1
    rules = _Ruleset(handled, _TCP_BIND_AND_CONNECT if abi >= 4 else 0, _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)), 0))
    try:
        for path, rights in _existing(allowed.items()):
            _allow(libc, ruleset, path, rights & handled)
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _existing(allowed: Iterable[tuple[Path, int]]) -> Iterable[tuple[Path, int]]:
    return ((path, rights if path.is_dir() else rights & _FOR_FILES) for path, rights in allowed if path.exists())


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    with suppress(FileNotFoundError):
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            beneath = _PathBeneath(rights, parent)
            _checked(libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(beneath), 0))
        finally:
            os.close(parent)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
