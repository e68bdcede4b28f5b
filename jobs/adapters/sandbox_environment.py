"""What a parsing child knows of its worker's environment: little, and no secret. A parser that a hostile file has taken over finds no
password, key or address there.

Imported in the child before anything else, so it stays light: the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import re

_KEPT = re.compile(
    "PATH|HOME|TZ|TMPDIR|LANG(UAGE)?|LC_.*|LD_.*|PYTHON.*|COVERAGE_.*|XDG_.*|SSL_CERT_(FILE|DIR)"
    "|.*_NUM_THREADS|OPENBLAS_.*|MALLOC_.*|RUST_.*"
)
"""What interpreters and libraries go by. A list of what may stay, because nobody knows what an operator's secrets are called."""


def forget_environment() -> None:
    """Drop every other variable, also from the memory that the kernel shows as /proc/PID/environ, which unsetting leaves as it was."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    for name in [name for name in os.environ if not _KEPT.fullmatch(name)]:
        raw = os.fsencode(name)
        address = libc.getenv(raw)
        if address:
            ctypes.memset(address, 0, len(ctypes.string_at(address)))
        del os.environ[name]
