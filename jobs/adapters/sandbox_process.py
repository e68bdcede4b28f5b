"""The processes of a sandbox as the worker sees them: how they are started, spoken to and ended."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jobs.adapters.sandbox_channel import READY, loads_carefully, pickled, read_exactly, receive, send_call, without_long_texts
from jobs.adapters.sandbox_child import MB, Answer, Call
from jobs.adapters.sandbox_confinement import Setup
from jobs.adapters.sandbox_scratch import Scratch
from jobs.adapters.sandbox_template import ENDING, FORK, PID

START_SECONDS = 60.0
_TOLD_SECONDS = 5.0
"""How long the end of a child that was killed, or of a template, is waited for. Should a child's not be told, what it used is not known."""
_BOOT = """
import sys; sys.path[:] = sys.argv[4:]
from jobs.adapters.sandbox_template import serve; serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == 'loaded')
"""
_PASSED_ON = frozenset({"LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH"})


class Template:
    """The process that children are forked from. Belongs to one event loop."""

    def __init__(self, *, loaded: bool) -> None:
        """Start it; see `sandbox_template.serve`. Raises OSError where the system has no room."""
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._ours.setblocking(False)
            paths = [str(Path(entry).absolute()) for entry in sys.path]
            told = [str(theirs.fileno()), str(os.getpid()), "loaded" if loaded else "bare"]
            # It must be started by a thread that lives as long as this process: the system takes that one's end for ours.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, and quicker than a thread could be had
                [sys.executable, "-I", "-X", "utf8", "-c", _BOOT, *told, *paths],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # parsers print; hostile files could make them print terminal escapes
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in a terminal is not for parsers
            )
        self._turn = asyncio.Lock()
        self._is_up = False
        self.usable = True
        """Whether children may be asked for."""

    async def fork(self, channel: int, ending: int) -> int:
        """Return the process id of a new child, which is given both descriptors; they are closed here. Raises OSError or EOFError."""
        # Not broken off, or the next one to ask would be told of this child.
        return await asyncio.shield(asyncio.create_task(self._fork(channel, ending)))

    async def _fork(self, channel: int, ending: int) -> int:
        try:
            async with self._turn, asyncio.timeout(START_SECONDS):
                if not self._is_up:
                    await read_exactly(self._ours, PID.size)
                    self._is_up = True
                socket.send_fds(self._ours, [FORK], [channel, ending])
                (pid,) = PID.unpack(await read_exactly(self._ours, PID.size))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(channel)
            os.close(ending)
            if not self.usable:
                self._ours.close()
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return int(pid)

    def close(self) -> None:
        """End it, and all its children with it. Returns without waiting."""
        if self.usable:
            self.usable = False
            with suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)  # it sees its children's ends before its own, so that none is left to the system
            if not self._turn.locked():  # who waits for an answer sees the way shut, and would never see it closed
                self._ours.close()
            if not self._is_up:  # it loads, and has no children
                self._process.kill()
            threading.Thread(target=self.wait, name="sandbox-template-ends", daemon=True).start()

    def wait(self) -> None:
        """Wait for its end, after `close`; should it not end by itself, it is killed."""
        try:
            self._process.wait(_TOLD_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Ended(NamedTuple):
    code: int
    cpu_ms: float
    memory_kb: int


class Child:
    """A child process and the way to it."""

    def __init__(self, setup: Setup) -> None:
        """Prepare one. Raises OSError where the system has no room."""
        self.calls = 0
        self.cpu_ms = 0.0
        self._scratch = None if setup.writable else Scratch()
        self._setup = setup if self._scratch is None else replace(setup, writable=self._scratch.path)
        self._ours: socket.socket | None = None
        self._ending = self._handle = -1
        self._ended: _Ended | None = None
        self._closing = threading.Lock()
        self._waiting = threading.Lock()

    async def begin(self, template: Template) -> object:
        """Start it and wait until it is confined; return what this kernel could not do, in words. OSError, EOFError or TimeoutError."""
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._ending, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        pid = await template.fork(theirs.detach(), told)
        with self._closing:
            self._handle = os.pidfd_open(pid)  # it waits to be set up, so this is nobody else's number yet
        async with asyncio.timeout(START_SECONDS):
            await send_call(self._ours, [pickle.dumps(self._setup)], ())
            kind, missing = await receive(self._ours, MB)
        if kind != READY:
            raise EOFError(f"it began with {kind!r}")
        return loads_carefully(missing)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._end(0) is None

    @property
    def littered(self) -> bool:
        """Whether it has left something in its scratch folder, which is not for the next call to find."""
        return self._scratch is not None and self._scratch.littered

    async def send(self, call: Call, files: Sequence[int]) -> None:
        """Send a call. Raises OSError if the child has gone."""
        assert self._ours is not None
        args, texts = without_long_texts(call.args)
        await send_call(self._ours, pickled(replace(call, args=args)), files, texts)

    async def receive(self, most: int) -> tuple[bytes, bytearray]:
        """Return what it sends next."""
        assert self._ours is not None
        return await receive(self._ours, most)

    def end(self, patience: float) -> tuple[int, Answer]:
        """Wait for its end, kill it if it lives on for `patience` seconds, and return how it ended and what it used.

        A signal is a negative number. The memory is the most that it took in its life.
        """
        ended = self._end(patience)
        if ended is None:
            self.kill()
            ended = self._end(_TOLD_SECONDS) or _Ended(-signal.SIGKILL, self.cpu_ms, 0)
        return ended.code, Answer(None, None, max(0.0, ended.cpu_ms - self.cpu_ms), ended.memory_kb / 1024)

    def _end(self, seconds: float | None) -> _Ended | None:
        """Return how it has ended, if it does so within some seconds; None for however long. The template tells, or is gone with it."""
        if self._ended is None and self._ending >= 0:
            poll = select.poll()
            poll.register(self._ending, select.POLLIN)
            if poll.poll(None if seconds is None else seconds * 1000):
                with self._closing:
                    if self._ended is None:
                        told = os.read(self._ending, ENDING.size)
                        self._ended = _Ended(*ENDING.unpack(told)) if told else _Ended(-signal.SIGKILL, self.cpu_ms, 0)
        return self._ended

    def kill(self) -> None:
        """End it at once; whoever waits for its answer sees it gone. Returns without waiting."""
        with self._closing:
            if self._handle >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def close(self) -> None:
        """Kill it when nobody waits for its answer any more."""
        if self._ours is not None:
            self._ours.close()
        self.kill()
        threading.Thread(target=self.wait, name="sandbox-child-ends", daemon=True).start()

    def wait(self) -> None:
        """Wait for its end and take its scratch folder away."""
        with self._waiting:  # one after the other, or one polls what the other has closed
            self._end(None)
            self._close_descriptors()
            if self._scratch is not None:
                self._scratch.remove()

    def _close_descriptors(self) -> None:
        with self._closing:
            self._ended = self._ended or _Ended(-signal.SIGKILL, 0.0, 0)  # it had not begun
            for fd in {self._ending, self._handle} - {-1}:
                os.close(fd)
            self._ending = self._handle = -1


def _environment() -> dict[str, str]:
    """Return the whole environment of these processes: nothing of the worker's that could be secret, and how many threads libraries may
    start: by themselves none for matrices, as those would wait busily on cores that others need, and only one thread can fork."""
    passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.endswith("_NUM_THREADS")}
    return {"PATH": os.defpath, "HOME": "/", "TMPDIR": tempfile.gettempdir(), **passed, "OPENBLAS_NUM_THREADS": "1"}
