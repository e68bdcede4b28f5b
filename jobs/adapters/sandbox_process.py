"""One child process of a sandbox, as the worker sees it: how it is started, spoken to and ended."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jobs.adapters.sandbox_channel import READY, loads_carefully, pickled, receive, send_call, without_long_texts
from jobs.adapters.sandbox_child import MB, Answer, Call
from jobs.adapters.sandbox_confinement import Setup

START_SECONDS = 60.0
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from jobs.adapters.sandbox_child import serve; serve(int(sys.argv[1]))"
_PASSED_ON = frozenset({"LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH"})


class Child:
    """A child process and the way to it."""

    def __init__(self, setup: Setup) -> None:
        """Start it, some milliseconds. Raises OSError where the system has no room."""
        self.calls = 0
        self.cpu_ms = 0.0
        self._scratch = None if setup.writable else Path(tempfile.mkdtemp(prefix="docmill-sandbox-"))
        setup = replace(setup, writable=setup.writable or self._scratch)
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._ours.setblocking(False)
            paths = [str(Path(entry).absolute()) for entry in sys.path]
            # It must be started by a thread that lives as long as this process: the system takes that one's end for ours.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, and quicker than a thread could be had
                [sys.executable, "-I", "-X", "utf8", "-c", _BOOT, str(theirs.fileno()), *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # parsers print; hostile files could make them print terminal escapes
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(setup.writable),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is not for parsers, and the whole group can be killed
            )
        self._setup = setup

    @property
    def alive(self) -> bool:
        """Whether it runs; one that has ended keeps its number until `wait`, so that its group can still be killed."""
        if sys.platform == "darwin":
            return self._process.poll() is None
        peek = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return self._process.returncode is None and os.waitid(os.P_PID, self._process.pid, peek) is None
        except ChildProcessError:  # somebody else has taken its end in
            return False

    @property
    def littered(self) -> bool:
        """Whether it has left something in its scratch folder, which is not for the next call to find."""
        return self._scratch is not None and any(os.scandir(self._scratch))

    async def ready(self) -> object:
        """Wait until it is confined, and return what this kernel could not do, by its words. OSError, EOFError or TimeoutError."""
        async with asyncio.timeout(START_SECONDS):
            await send_call(self._ours, [pickle.dumps(self._setup)], ())
            kind, missing = await receive(self._ours, MB)
        if kind != READY:
            raise EOFError(f"it began with {kind!r}")
        return loads_carefully(missing)

    async def send(self, call: Call, files: Sequence[int]) -> None:
        """Send a call. Raises OSError if the child has gone."""
        args, texts = without_long_texts(call.args)
        await send_call(self._ours, pickled(replace(call, args=args)), files, texts)

    async def receive(self, most: int) -> tuple[bytes, bytearray]:
        """Return what it sends next."""
        return await receive(self._ours, most)

    def end(self, patience: float) -> tuple[int, Answer]:
        """Wait for its end, kill it if it lives on for `patience` seconds, and return how it ended and what it used.

        A signal is a negative number. The memory is the most that it took in its life.
        """
        until = time.monotonic() + patience
        while self.alive and time.monotonic() < until:
            time.sleep(0.005)
        self.kill()
        try:
            _, status, used = os.wait4(self._process.pid, 0)
        except ChildProcessError:  # somebody else has taken its end in
            return self._process.wait(), Answer(None, None, 0, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        spent = (used.ru_utime + used.ru_stime) * 1000 - self.cpu_ms
        return self._process.returncode, Answer(None, None, max(0.0, spent), used.ru_maxrss / 1024)

    def kill(self) -> None:
        """End it at once with its whole group; whoever waits for its answer sees it gone. Returns without waiting."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it when nobody waits for its answer any more."""
        self._ours.close()
        self.kill()
        threading.Thread(target=self.wait, name="sandbox-child-ends", daemon=True).start()

    def wait(self) -> None:
        """Wait for its end and take its scratch folder away."""
        self._process.wait()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _environment(writable: Path | None) -> dict[str, str]:
    """Return a child's whole environment: nothing of the worker's that could be secret, and how many threads libraries may start."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.endswith("_NUM_THREADS")}
    # Threads of a library that multiplies matrices would wait busily, on cores that other children need.
    return {
        "PATH": os.defpath,
        "HOME": "/",
        "OPENBLAS_NUM_THREADS": "1",
        **passed,
        **({"TMPDIR": str(writable)} if writable is not None else {}),
    }
