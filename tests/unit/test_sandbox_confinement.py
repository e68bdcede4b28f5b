"""What a taken-over child tries is refused by the kernel; the same attempts succeed in this process, so that each test can fail."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobs.adapters import sandbox_landlock, sandbox_seccomp
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Limits
from jobs.adapters.sandbox_confinement import SPARE_TASKS
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType
from models.errors import ParseError, PermanentError, TimeoutError
from tests.unit import sandbox_attacks as attacks
from tests.unit import sandbox_work as work

ROOT = Path(__file__).parents[2]
REFUSED = ("Operation not permitted", "Permission denied")

pytestmark = pytest.mark.skipif(sandbox_landlock.abi_version() < 3, reason="this kernel has no Landlock of version 3")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """The folder that children may write to; what lies beside it they may not even read."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
async def sandbox(scratch: Path) -> AsyncIterator[ProcessSandbox]:
    limits = Limits(timeout=60, max_output_mb=4, open_files=64)
    sandbox = ProcessSandbox(children=1, limits=limits, writable=scratch, readable=(ROOT / "tests",))
    yield sandbox
    await sandbox.aclose()


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket, str]]:
    """Sockets that somebody listens at: TCP, UDP, and of the file system for streams (as Postgres has) and for datagrams."""
    path = str(tmp_path / "s")  # short enough for the address of a socket
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
    ):
        udp.bind(("127.0.0.1", 0))
        stream.bind(path)
        stream.listen()
        datagram.bind(f"{path}.d")
        for sock in (tcp, udp, stream, datagram):
            sock.setblocking(False)
        yield tcp, udp, stream, datagram, path


async def test_no_packet_and_no_connection_leaves_a_child(
    sandbox: ProcessSandbox, doors: tuple[socket.socket, socket.socket, socket.socket, socket.socket, str]
) -> None:
    tcp, udp, stream, datagram, path = doors
    attempts = (
        (attacks.send_tcp, tcp.getsockname()[1]),
        (attacks.send_udp, udp.getsockname()[1]),
        (attacks.connect_unix, path),
        (attacks.send_unix_datagram, f"{path}.d"),
    )
    for function, address in attempts:
        assert await sandbox.run(function, address) in REFUSED  # type: ignore[arg-type]
    for door in (tcp, stream):
        with pytest.raises(BlockingIOError):
            door.accept()
    for door in (udp, datagram):
        with pytest.raises(BlockingIOError):
            door.recv(100)
    for function, address in attempts:
        assert function(address) == "done"  # type: ignore[arg-type]
    assert await sandbox.run(attacks.listen) in REFUSED
    assert await sandbox.run(attacks.wake_a_loop) == "done"  # asyncio needs it


async def test_a_child_reads_the_files_that_it_is_given_and_no_others(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    given, second, other = tmp_path / "given", tmp_path / "second", tmp_path / "other"
    for file in (given, second, other):
        file.write_bytes(file.name.encode())
    assert await sandbox.run(attacks.read_given, StoredFile(given), StoredFile(second)) == [b"givengiven", b"secondsecond"]
    for path in (given, other, Path("/etc/passwd"), ROOT / "pyproject.toml"):
        assert await sandbox.run(attacks.read, str(path)) in REFUSED
    assert await sandbox.run(attacks.list_folder, str(tmp_path)) in REFUSED
    assert await sandbox.run(attacks.write_given, StoredFile(given)) == ["Bad file descriptor", "Permission denied"]
    assert given.read_bytes() == b"given"
    for name in ("missing", "scratch"):
        with pytest.raises((PermanentError, ParseError)):
            await sandbox.run(attacks.read_given, StoredFile(tmp_path / name))


async def test_a_child_writes_beneath_its_folder_only_and_only_plain_files(sandbox: ProcessSandbox, scratch: Path, tmp_path: Path) -> None:
    assert await sandbox.run(attacks.write, str(scratch / "mine")) == "done"
    for path in (tmp_path / "out", scratch / ".." / "out", Path("/tmp/docmill-canary"), Path("/dev/shm/docmill-canary"), ROOT / "canary"):
        assert await sandbox.run(attacks.write, str(path)) in REFUSED
        assert not path.exists()
    assert await sandbox.run(attacks.link, "/etc/passwd", str(scratch / "link")) in REFUSED
    assert await sandbox.run(attacks.change_mode, str(scratch / "mine")) in REFUSED
    assert os.listdir(scratch) == ["mine"]  # noqa: PTH208


async def test_what_a_child_leaves_in_its_own_scratch_folder_goes_with_it(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(children=1, readable=(ROOT / "tests",))
    for path in (tmp_path / "x", Path("/tmp/docmill-canary"), Path("/var/tmp/docmill-canary")):
        assert await sandbox.run(attacks.write, str(path)) in REFUSED
    child = await sandbox.run(work.process_id)
    assert await sandbox.run(attacks.use_temporary_file) == "done"
    assert await sandbox.run(work.process_id) == child
    left = Path(await sandbox.run(attacks.leave_temporary_file))
    assert await sandbox.run(work.process_id) != child
    await sandbox.aclose()
    while left.parent.exists():  # noqa: ASYNC110 - it is about another process
        await asyncio.sleep(0.02)


async def test_a_child_knows_no_secret_of_the_worker(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = ("quiet-harbour-", "violin-4711")
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:{''.join(halves)}@h/d")
    monkeypatch.setenv("PGPASSWORD", "".join(halves))
    assert attacks.memory_holds(*halves)
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(server.fileno(), True)
        sandbox = ProcessSandbox(children=1, writable=scratch, readable=(ROOT / "tests",))
        assert not await sandbox.run(attacks.memory_holds, *halves)
        known = {"PATH", "HOME", "TMPDIR", "OPENBLAS_NUM_THREADS", "LANG", "LC_ALL", "LC_CTYPE", "TZ"}
        assert set(await sandbox.run(attacks.own_environment)) <= known
        files = await sandbox.run(attacks.open_fds)
    assert sum(name.startswith("socket:") for name in files) == 1
    assert all(name == "/dev/null" or name.startswith(("socket:", "/proc/")) for name in files)
    await sandbox.aclose()


async def test_a_child_cannot_look_into_the_worker_or_at_other_children(sandbox: ProcessSandbox) -> None:
    for name in ("environ", "mem", "maps", "cmdline", "fd/0"):
        for pid in (os.getpid(), await sandbox.run(os.getppid)):
            assert await sandbox.run(attacks.read, f"/proc/{pid}/{name}") in REFUSED
    assert await sandbox.run(attacks.list_folder, f"/proc/{os.getpid()}/fd") in REFUSED
    assert await sandbox.run(attacks.capabilities) == "0" * 16


async def test_a_child_starts_no_process_and_touches_none(sandbox: ProcessSandbox) -> None:
    for function in (attacks.run_program, attacks.fork):
        assert await sandbox.run(function) in REFUSED
    template = await sandbox.run(os.getppid)
    for attack in (attacks.signal_process, attacks.limit_process, attacks.slow_process):
        for pid in (os.getpid(), template):
            assert await sandbox.run(attack, pid) in REFUSED
    assert await sandbox.run(attacks.start_thread) == "done"
    assert await sandbox.run(attacks.open_many, 100) == "Too many open files"


@pytest.mark.skipif(os.getuid() == 0, reason="root is never refused a thread")
async def test_a_child_starts_so_many_threads_and_no_more(sandbox: ProcessSandbox) -> None:
    assert 0 < await sandbox.run(attacks.start_threads, 5 * SPARE_TASKS) <= SPARE_TASKS


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are of x86_64")
async def test_system_calls_that_no_parser_needs_are_refused(sandbox: ProcessSandbox) -> None:
    column = sandbox_seccomp.ARCHITECTURES["x86_64"][1]
    for name, numbers in sandbox_seccomp._REFUSED.items():
        number = numbers[column]
        assert number is not None
        assert await sandbox.run(attacks.call_system, number) == "Operation not permitted", name
    assert await sandbox.run(attacks.call_system, 435) == "Function not implemented"  # clone3: libraries then ask for clone
    assert await sandbox.run(attacks.call_system, 157, 1, 0) == "Operation not permitted"  # prctl, to outlive its parent
    assert await sandbox.run(attacks.call_system, 157, 3) == "done"  # prctl, to ask whether others may look
    assert await sandbox.run(attacks.call_system, 39 | 0x40000000) == "Operation not permitted"  # getpid by its other number


async def test_a_forged_answer_is_refused_and_runs_nothing(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for function, args in (
        (attacks.forge_answer, (str(canary),)),
        (attacks.forge_error_class, ()),
        (attacks.forge_length, ()),
        (attacks.forge_kind, ()),
    ):
        with pytest.raises(ParseError, match="answer cannot be read"):
            await sandbox.run(function, *args)
    with pytest.raises(ParseError, match="answer cannot be read"):
        await sandbox.run(attacks.flood_parts)
    assert not canary.exists()
    assert await sandbox.run(work.echo, {"still": ("works", None)}) == {"still": ("works", None)}


async def test_a_forged_answer_changes_nothing_that_others_share(sandbox: ProcessSandbox) -> None:
    with pytest.raises(ParseError, match="answer cannot be read"):
        await sandbox.run(attacks.forge_class)
    assert not hasattr(FileType, "planted")


@pytest.mark.parametrize("attribute", ["args", "turn", "error_type", "__notes__", "__cause__", "retry_after", "a service"])
async def test_an_error_that_holds_more_than_words_is_refused(sandbox: ProcessSandbox, attribute: str) -> None:
    with pytest.raises(ParseError, match="answer cannot be read"):
        await sandbox.run(attacks.forge_error, attribute)


async def test_what_was_handed_over_before_a_limit_struck_is_kept(scratch: Path, sandbox: ProcessSandbox) -> None:
    with pytest.raises(ParseError, match="SIGABRT") as crashed:
        await sandbox.run(attacks.keep_and_crash, 3)
    assert crashed.value.kept == [0, 1, 2]
    short = ProcessSandbox(children=1, limits=Limits(timeout=3), readable=(ROOT / "tests",))
    with pytest.raises(TimeoutError) as late:
        await short.run(attacks.keep_and_hang, 2)
    assert late.value.kept == [0, 1]
    await short.aclose()


OLD_KERNEL = """
import asyncio, ctypes, errno, json, os, struct, sys, time
from pathlib import Path
from loguru import logger
from jobs.adapters import sandbox_seccomp as s
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Crashed, Limits
from tests.unit import sandbox_attacks as attacks, sandbox_work as work

def forget_how():
    '''Make this process and its children live on a kernel that knows neither Landlock nor filters.'''
    missing = s._op(s._RETURN, s._REFUSE | errno.ENOSYS)
    program = s._op(s._LOAD, s._NUMBER)
    for call in (444, 445, 446):
        program += s._op(s._EQUAL, call, 0, 1) + missing
    prctl = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
    program += s._when(prctl, s._argument(0) + s._op(s._EQUAL, s._PR_SET_SECCOMP, 0, 1) + missing + s._op(s._RETURN, s._ALLOW))
    program += s._op(s._RETURN, s._ALLOW)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    code = ctypes.create_string_buffer(program, len(program))
    assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 0, 0) == 0

async def main(folder):
    lines = []
    logger.remove()
    logger.add(lambda line: lines.append(line), format="{message}")
    sandbox = ProcessSandbox(children=2, readable=(Path("tests").absolute(),))
    found = {"echo": await asyncio.gather(*(sandbox.run(work.echo, n) for n in range(4)))}
    found["read"] = await sandbox.run(attacks.read, "/etc/passwd")
    await sandbox.aclose()
    short = ProcessSandbox(children=1, limits=Limits(timeout=10), readable=(Path("tests").absolute(),))
    try:
        await short.run(attacks.leave_a_grandchild, str(folder / "pid"))
    except Crashed as error:  # though the grandchild holds the channel open
        found["end"] = str(error)
    await short.aclose()
    found["lines"] = lines
    print(json.dumps(found))

forget_how()
asyncio.run(main(Path(sys.argv[1])))
"""


def test_without_landlock_and_seccomp_the_work_goes_on_and_each_is_noted_once(tmp_path: Path) -> None:
    if os.uname().machine not in sandbox_seccomp.ARCHITECTURES:
        pytest.skip("no filter for this machine")
    script = tmp_path / "worker.py"
    script.write_text(OLD_KERNEL)
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    found = json.loads(ran.stdout)
    assert found["echo"] == [0, 1, 2, 3]
    assert found["read"] == "done"  # so nothing was confined
    assert "SIGABRT" in found["end"]
    assert [line.split(" (")[0].split(": ")[1] for line in found["lines"]] == ["Landlock is missing", "seccomp is missing"]
    grandchild = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"  # killed with its group
