"""Work for the sandbox's children to do: they import it by name."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from jobs.adapters import sandbox_child
from jobs.adapters.stored_file import StoredFile
from models.errors import LLMError, StorageAway


def echo(value: Any) -> Any:
    return value


def second_of(*values: Any) -> Any:
    return values[1]


def process_id() -> int:
    return os.getpid()


def content_of(file: StoredFile) -> str:
    return file.read_bytes().decode()


def text_of(length: int) -> str:
    return "x" * length


def seconds_of_a_nap(length: float) -> tuple[float, float]:
    """Return from when to when it lasted, by a clock that all processes share."""
    began = time.monotonic()
    time.sleep(length)
    return began, time.monotonic()


def lie_about_memory() -> None:
    setattr(sandbox_child, "_peak_memory_mb", lambda: float("nan"))  # noqa: B010 - as code that has taken the child over would


def hang() -> None:
    while True:
        pass


def hang_after(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


def crash() -> None:
    ctypes.string_at(0)


def leave(code: int) -> None:
    os._exit(code)


def exhaust_memory() -> int:
    return len(bytearray(64 << 30))


def recurse(depth: int = 0) -> int:
    return recurse(depth + 1)


def raise_storage_away() -> None:
    raise StorageAway("The storage is not there.")


def raise_llm_error() -> None:
    raise LLMError("no answer")


def raise_foreign() -> None:
    raise LookupError("no such thing")


class Unpicklable(LLMError):
    """Cannot be built again from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def raise_unpicklable() -> None:
    raise Unpicklable("one", "two")


def leave_by_sys_exit() -> None:
    sys.exit("enough")


def return_unpicklable() -> Any:
    return lambda: None


def print_and_read() -> str:
    print("noise")
    print("noise", file=sys.stderr)
    os.write(1, b"noise")
    return sys.stdin.read()


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def allocate(megabytes: int) -> int:
    return sum(bytearray(b"\x01" * (megabytes << 20))[::4096])


def write_file(path: str, megabytes: int) -> None:
    Path(path).write_bytes(b"\0" * (megabytes << 20))


def limits() -> dict[str, Any]:
    return {
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "memory": resource.getrlimit(resource.RLIMIT_AS)[0],
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "group": os.getpgid(0) == os.getpid(),
        "ignored": [signal.getsignal(name) == signal.SIG_IGN for name in (signal.SIGINT, signal.SIGTERM)],
    }


def signal_itself() -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    return "alive"


def draw() -> tuple[float, str, float, str]:
    """Return what should be nobody else's: random numbers, an id and the name of a temporary file."""
    import numpy as np

    with tempfile.NamedTemporaryFile() as file:
        return random.random(), str(uuid.uuid4()), float(np.random.random()), Path(file.name).name


def has_loaded(module: str) -> bool:
    return module in sys.modules
