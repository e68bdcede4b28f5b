"""What a worker process says of its own memory."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from jobs.registry import give_back_memory, resident_mb
from jobs.sessions import process_name


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps memory so, and gives it back when asked")
def test_what_a_large_document_has_left_free_is_given_back() -> None:
    held = [bytes(100_000) for _ in range(1500)]  # too small for mappings of their own, which would go back by themselves
    before = resident_mb()
    kept = held[::150]  # what lives on between the pieces keeps the heap from shrinking
    del held
    assert resident_mb() > before - 50
    give_back_memory()
    assert resident_mb() < before - 100
    assert len(kept) == 10


WEIGH = """
import sys
from jobs.registry import keep_no_large_blocks, resident_mb

if sys.argv[1] == "told":
    keep_no_large_blocks()
bytes(30_000_000)  # freed at once: by itself the allocator now takes for small what is smaller than that
held = [bytes(b"x" * 1_000_000) for _ in range(100)]
kept = [held[0], held[-1]]
full = resident_mb()
del held
print(full - resident_mb())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc keeps memory so, and can be told not to")
def test_large_blocks_go_back_at_once() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}

    def given_back(how: str) -> float:
        command = [sys.executable, "-c", WEIGH, how]
        return float(subprocess.run(command, env=plain, cwd=Path(__file__).parents[2], capture_output=True, check=True).stdout)

    assert given_back("told") > 90
    assert given_back("not told") < 50


def test_containers_with_one_host_name_have_workers_of_different_names() -> None:
    ask = "from jobs.sessions import application_name, process_name; print(process_name(), len(application_name()), flush=True); input()"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", ask]
    if os.getuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    running = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)]
    told = [process.stdout.readline().split() for process in running if process.stdout is not None]
    left = [process.communicate("\n") for process in running]
    if not all(told):
        pytest.skip(f"no namespaces here: {left[0][1].strip()[-200:]}")
    names = [name for name, _ in told]
    assert [name.split(":")[:2] for name in names] == [[socket.gethostname(), "1"]] * 2
    assert names[0] != names[1]
    assert all(int(length) <= 63 for _, length in told)
    assert process_name() == f"{socket.gethostname()}:{os.getpid()}" or "/docker" in Path("/proc/self/mountinfo").read_text()
