"""Real worker processes for tests, and waiting for what they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


def docmill(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in the environment of the test."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )  # fmt: skip


@contextmanager
def database_shell() -> Iterator[subprocess.Popen[str]]:
    """Yield a running `make db` that waits for statements; the environment is taken to be made already."""
    process = subprocess.Popen(
        ["make", "-C", str(REPOSITORY), "-o", ".venv/.installed", "db"], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def descendants(pid: int) -> list[int]:
    """Return a process and all that it has started, directly or not, as far as they live."""
    found = [pid]
    for known in found:
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, task.read_text(encoding="ascii").split())
    return found


def process_list(pid: int) -> str:
    """Return what `ps` shows to everybody of a process and all that it has started: their command lines."""
    shown = []
    for each in descendants(pid):
        with suppress(OSError):
            shown.append(Path(f"/proc/{each}/cmdline").read_text(encoding="utf-8", errors="replace"))
    return "\n".join(shown)


@contextmanager
def served(log: Path, **environment: str) -> Iterator[str]:
    """Yield the address of a running `docmill serve` in the environment of the test, on a free port."""
    command = [sys.executable, "-m", "jobs.cli", "serve"]
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SERVE_PORT": "0", "LOG_FORMAT": "text", "LOG_LEVEL": "INFO", **environment}
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=given, stdout=file, stderr=file, start_new_session=True)
    try:
        found: list[str] = []

        def listens() -> bool:
            with log.open(encoding="utf-8", errors="replace") as lines:
                lines.seek(start)
                found[:] = re.findall(r"Serving on (http://\S+?)/(?:\s|$)", lines.read())
            return bool(found)

        wait_for(listens, f"docmill serve to listen; see {log}", process=process)
        yield found[0]
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
