"""What code that has taken a sandbox's child over would try. Each returns what it got; the tests also run some where they must succeed."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jobs.adapters import sandbox_child
from jobs.adapters.sandbox_channel import ANSWER, HEAD, PART
from jobs.adapters.sandbox_child import Answer
from jobs.adapters.stored_file import StoredFile
from models.errors import ParseError, ServiceUnavailable, Turn


def attempt(function: Any, *args: Any) -> str:
    """The errno's name of what the system says, or `done`."""
    try:
        function(*args)
    except OSError as error:
        return str(os.strerror(error.errno or 0))
    return "done"


def send_tcp(port: int) -> str:
    return attempt(lambda: socket.create_connection(("127.0.0.1", port), 5).close())


def send_udp(port: int) -> str:
    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"secret", ("127.0.0.1", port))

    return attempt(send)


def connect_unix(path: str) -> str:
    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)

    return attempt(connect)


def send_unix_datagram(path: str) -> str:
    def send() -> None:
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        pair[0].sendto(b"secret", path)

    return attempt(send)


def listen() -> str:
    return attempt(lambda: socket.create_server(("127.0.0.1", 0)))


def wake_a_loop() -> str:
    return attempt(socket.socketpair)


def read(path: str) -> str:
    return attempt(lambda: Path(path).read_bytes())


def read_given(*files: StoredFile) -> list[bytes]:
    return [file.read_bytes() + file.read_bytes() for file in files]


def write_given(file: StoredFile) -> list[str]:
    assert file.fd is not None
    return [attempt(os.write, file.fd, b"changed"), attempt(lambda: os.open(f"/proc/self/fd/{file.fd}", os.O_WRONLY))]


def write(path: str) -> str:
    return attempt(lambda: Path(path).write_bytes(b"planted"))


def use_temporary_file() -> str:
    with tempfile.TemporaryFile() as file:
        return attempt(file.write, b"gone afterwards")


def leave_temporary_file() -> str:
    fd, name = tempfile.mkstemp()
    os.write(fd, b"of this document")
    return name


def list_folder(path: str) -> str:
    return attempt(os.listdir, path)


def change_mode(path: str) -> str:
    return attempt(os.chmod, path, 0o777)


def link(source: str, target: str) -> str:
    return attempt(os.symlink, source, target)


def open_fds() -> list[str]:
    found = []
    for fd in range(256):
        try:
            found.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        except OSError:
            continue
    return found


def own_environment() -> dict[str, str]:
    return dict(os.environ)


def memory_holds(first: str, second: str) -> bool:
    """Whether a word stands anywhere in this process; it is given as two halves, which never stand together here."""
    head, rest = first.encode(), second.encode()
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/mem").open("rb", 0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if not rights.startswith("rw"):
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            try:
                memory.seek(start)
                found = memory.read(end - start)
            except (OSError, OverflowError):
                continue
            at = found.find(head)
            while at >= 0:
                if found[at + len(head) : at + len(head) + len(rest)] == rest:
                    return True
                at = found.find(head, at + 1)
    return False


def run_program() -> str:
    return attempt(lambda: subprocess.run([sys.executable, "-c", ""], check=False))


def fork() -> str:
    def forked() -> None:
        if os.fork() == 0:
            os._exit(0)

    return attempt(forked)


def start_thread() -> str:
    return attempt(threading.Thread(target=time.sleep, args=(0,)).start)


def signal_process(pid: int) -> str:
    return attempt(os.kill, pid, signal.SIGTERM)


def limit_process(pid: int) -> str:
    return attempt(resource.prlimit, pid, resource.RLIMIT_NOFILE, (3, 3))


def slow_process(pid: int) -> str:
    return attempt(os.setpriority, os.PRIO_PROCESS, pid, 19)


def call_system(number: int, *args: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *args) >= 0:
        return "done"
    return os.strerror(ctypes.get_errno())


def capabilities() -> str:
    return next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))


def open_many(count: int) -> str:
    return attempt(lambda: [os.open(os.devnull, os.O_RDONLY) for _ in range(count)])


class Planted:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def forge_answer(path: str) -> None:
    _send(ANSWER, pickle.dumps(Planted(path)))


def forge_error_class() -> None:
    _send(ANSWER, b"\x80\x04\x8c\rmodels.errors\x8c$DocmillError.__init__.__globals__.get\x93.")


def forge_class() -> None:
    """Set an attribute of an enumeration, which is one and the same for everything in the worker."""
    _send(ANSWER, b"\x80\x04\x8c\x10models.documents\x8c\x08FileType\x93(N}\x8c\x07planted\x8c\x03yesstb.")


class Forged:
    """Becomes an error with an attribute of one's choice when it is unpickled."""

    def __init__(self, attribute: str, value: object) -> None:
        self.state = {attribute: value}

    def __reduce__(self) -> Any:
        return ParseError, ("bad file",), self.state


def forge_error(attribute: str) -> None:
    """Answer with an error in which something else stands than words."""
    nested: Any = 1
    for _ in range(24):
        nested = (nested, nested)
    values = {
        "args": (nested,),
        "turn": Turn("storage"),
        "error_type": "no such type",
        "__notes__": [1],
        "__cause__": Forged("args", (nested,)),
        "retry_after": float("nan"),
    }
    error: Any = ServiceUnavailable("wait", 1.0) if attribute == "a service" else Forged(attribute, values[attribute])
    _send(ANSWER, pickle.dumps(Answer(error, None, 0.0, 0.0)))


def forge_kind() -> None:
    _send(ANSWER, pickle.dumps("no Answer at all"))
    time.sleep(60)


def forge_length() -> None:
    sandbox_child._channel[0].sendall(HEAD.pack(ANSWER, 1 << 60))
    time.sleep(60)


def flood_parts() -> None:
    while True:
        _send(PART, pickle.dumps("x" * 100_000))


def keep_and_hang(parts: int) -> None:
    for number in range(parts):
        sandbox_child.keep(number)
    while True:
        time.sleep(1)


def keep_and_crash(parts: int) -> None:
    for number in range(parts):
        sandbox_child.keep(number)
    os.abort()


def _send(kind: bytes, payload: bytes) -> None:
    sandbox_child._channel[0].sendall(HEAD.pack(kind, len(payload)) + payload)


def leave_a_grandchild(path: str) -> None:
    """Only where seccomp is missing: a process in the same group that writes its number down, and a crash."""
    if os.fork() == 0:
        Path(path).write_text(str(os.getpid()))
        while True:
            time.sleep(1)
    while not (Path(path).exists() and Path(path).read_text()):
        time.sleep(0.01)
    os.abort()


def start_threads(count: int) -> int:
    """Start threads that take no room, and return how many the system allowed."""
    threading.stack_size(32 * 1024)
    wait = threading.Event()
    started = 0
    try:
        for _ in range(count):
            threading.Thread(target=wait.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    wait.set()
    return started
