"""Real worker processes for tests, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


@contextmanager
def worker(log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a running `procrastinate worker` in the environment of the test; whatever is left of it afterwards is killed."""
    command = [sys.executable, "-m", "procrastinate", "--app=procrastinate_app.app", "worker", *arguments]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 60, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a condition holds; fail with what was waited for, at once if the process that is to bring it about has ended."""
    end = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the worker ended with exit code {process.returncode} while the test waited for {what}")
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout} s in vain for {what}")
        time.sleep(0.05)
