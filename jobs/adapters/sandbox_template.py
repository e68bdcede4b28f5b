"""The process that a sandbox's children are forked from. It has loaded what most of them need and sees no document, no call and no answer.

A new child costs a few milliseconds then instead of half a second. It sets itself up as `sandbox_confinement` says before it takes its
first call. The template has one thread for all of its life, so that what is forked is whole; it ends with its worker, and children with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import struct

from jobs.adapters import sandbox_child
from jobs.adapters.sandbox_confinement import die_with, let_others_look

FORK = b"F"
"""Asks for a child; with it come the child's end of its channel and the descriptor on which its end is to be told."""
PID = struct.Struct("<q")
"""The answer: the child's process id, or a negative errno."""
ENDING = struct.Struct("<qdq")
"""How a child has ended: its exit code (a signal is negative), CPU milliseconds, and the most memory that it took, in KB."""


def serve(fd: int, worker: int, loaded: bool) -> None:
    """Be a template until the worker closes its end. `loaded`: have loaded what reads plain files and extracts from their text."""
    die_with(worker)
    let_others_look(False)  # where Landlock is missing a child that was taken over could change here what its successors are made of
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the worker decides when work ends
    if loaded:
        with contextlib.suppress(Exception):  # what cannot be had here fails in the call that needs it, where it is told
            _load()
    gc.collect()
    gc.freeze()  # so that looking for cycles in a child writes to no page that all share
    control = socket.socket(fileno=fd)
    woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    endings: dict[int, int] = {}
    _tell(control, os.getpid())
    poll = select.poll()  # select() takes no descriptor above 1,023, and the worker may have that many
    for each in (control.fileno(), woken):
        poll.register(each, select.POLLIN)
    while True:
        readable = {each for each, _ in poll.poll()}
        if woken in readable:
            os.read(woken, 4096)
            _tell_ends(endings)
        if control.fileno() in readable:
            asked, files, _, _ = socket.recv_fds(control, 1, 2)
            if not asked:
                _end_all(endings)
                os._exit(0)
            channel, ending = files
            pid = _fork(channel, (control.fileno(), woken, wakes, ending, *endings.values()))
            os.close(channel)
            if pid > 0:
                endings[pid] = ending
            else:
                os.close(ending)
            _tell(control, pid)


def _tell(control: socket.socket, pid: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the worker has just closed its end, which is what comes next
        control.sendall(PID.pack(pid))


def _load() -> None:
    for name in ("parsers", "sniff", "extractor"):
        importlib.import_module(f"jobs.adapters.{name}")
    extract = importlib.import_module("jobs.adapters.extractor").extract_locally
    extract("The first day of the year is a day on which few people work. " * 40, (), "", {})  # loads the languages' model


def _fork(channel: int, foreign: tuple[int, ...]) -> int:
    """Return the process id of a new child, or a negative errno. In the child, which closes `foreign`, it never returns."""
    template = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return -(error.errno or 1)
    if pid:
        return pid
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in foreign:
            os.close(fd)
        os.setsid()  # its group can be killed
        let_others_look(True)  # or it cannot ask for its own memory's peak
        sandbox_child.serve(channel, template)
    finally:
        os._exit(1)


def _end_all(endings: dict[int, int]) -> None:
    """Kill all children and see their ends, or they would outlive this process for a moment."""
    for pid in endings:
        os.kill(pid, signal.SIGKILL)
    while endings:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        _tell_ends(endings)


def _tell_ends(endings: dict[int, int]) -> None:
    while endings and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(ended.si_pid, signal.SIGKILL)  # what it has left behind, where the kernel could not keep it from starting any
        pid, status, used = os.wait4(ended.si_pid, 0)
        told = ENDING.pack(os.waitstatus_to_exitcode(status), (used.ru_utime + used.ru_stime) * 1000, used.ru_maxrss)
        fd = endings.pop(pid)
        with contextlib.suppress(OSError):  # the worker does not want to know
            os.write(fd, told)
        os.close(fd)
