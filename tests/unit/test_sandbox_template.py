"""The process that a sandbox's children are forked from: what they have of it, and what its end is to them."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Crashed, Limits
from models.errors import RetryableError, TimeoutError
from tests.running import descendants
from tests.unit import sandbox_attacks as attacks
from tests.unit import sandbox_work as work
from tests.unit.test_sandbox import TESTS, alive, until

R = TypeVar("R")


@pytest.fixture
async def sandbox() -> AsyncIterator[ProcessSandbox]:
    sandbox = ProcessSandbox(children=2, readable=TESTS)
    yield sandbox
    await sandbox.aclose()


async def both(sandbox: ProcessSandbox, function: Callable[[], R]) -> list[R]:
    """Run a function in two children."""
    return list(await asyncio.gather(*(sandbox.run(function) for _ in range(2))))


def template_of(child: int) -> int:
    return int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])


def exists(pid: int) -> bool:
    """Whether a process lives, or its end has not been seen yet."""
    return Path(f"/proc/{pid}").exists()


def threads_and_environment(pid: int) -> tuple[int, set[bytes]]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return len(list(Path(f"/proc/{pid}/task").iterdir())), {entry.partition(b"=")[0] for entry in entries}


async def test_children_draw_different_numbers_though_they_were_forked_from_one_process(sandbox: ProcessSandbox) -> None:
    first, second = await both(sandbox, work.draw)
    assert all(one != other for one, other in zip(first, second, strict=True))


async def test_a_child_holds_nothing_of_its_neighbours_or_of_what_it_was_forked_from(sandbox: ProcessSandbox) -> None:
    for files in await both(sandbox, attacks.open_fds):
        assert sum(name.startswith("socket:") for name in files) == 1
        assert all(name == "/dev/null" or name.startswith(("socket:", "/proc/")) for name in files)


async def test_the_template_has_one_thread_and_a_clean_environment(sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "quiet-harbour")
    template = template_of(await sandbox.run(work.process_id))
    threads, names = threads_and_environment(template)
    assert threads == 1
    assert b"PGPASSWORD" not in names
    assert {b"PATH", b"OPENBLAS_NUM_THREADS"} <= names


async def test_a_child_has_the_languages_model_before_its_first_call(sandbox: ProcessSandbox) -> None:
    assert await sandbox.run(work.has_loaded, "py3langid.langid")
    bare = ProcessSandbox(children=1, readable=TESTS, loaded=False)
    assert not await bare.run(work.has_loaded, "py3langid.langid")
    await bare.aclose()


async def test_the_templates_end_is_a_crash_of_what_is_under_way_and_the_next_call_works(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    child = await sandbox.run(work.process_id)
    call = asyncio.create_task(sandbox.run(work.hang))
    await asyncio.sleep(0.2)
    os.kill(template_of(child), signal.SIGKILL)
    with pytest.raises(Crashed, match="SIGKILL"):
        await call
    await until(lambda: not alive(child))
    assert await sandbox.run(work.echo, 1) == 1


async def test_a_template_that_ends_before_it_is_asked_is_made_anew(sandbox: ProcessSandbox) -> None:
    child = await sandbox.run(work.process_id)
    template = template_of(child)
    for process in (template, child):
        os.kill(process, signal.SIGKILL)
    await until(lambda: not alive(template) and not alive(child))
    assert await both(sandbox, work.process_id)
    assert template_of(await sandbox.run(work.process_id)) != template


async def test_who_gives_up_while_a_child_is_made_costs_no_other_call() -> None:
    sandbox = ProcessSandbox(children=8, readable=TESTS)
    calls = [asyncio.create_task(sandbox.run(work.echo, number)) for number in range(8)]
    await asyncio.sleep(0.05)
    for call in calls[::2]:
        call.cancel()
    assert await asyncio.gather(*calls[1::2]) == [1, 3, 5, 7]
    assert await sandbox.run(work.echo, 9) == 9
    await sandbox.aclose()


async def test_many_starts_and_kills_leave_no_process_and_no_scratch_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    others = set(descendants(os.getpid()))
    made: set[int] = set()

    async def watch() -> None:
        while True:
            made.update(set(descendants(os.getpid())) - others)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    sandbox = ProcessSandbox(children=4, calls_per_child=2, readable=TESTS)
    harm = [sandbox.run(work.crash) if number % 3 == 0 else sandbox.run(work.echo, number) for number in range(24)]
    outcomes = await asyncio.gather(*harm, return_exceptions=True)
    assert sum(isinstance(outcome, Crashed) for outcome in outcomes) == 8
    watching.cancel()
    assert len(made) > 1
    await sandbox.aclose()
    assert not any(map(exists, made))
    await until(lambda: not list(tmp_path.glob("docmill-scratch-*")))


KILLED = """
import asyncio, os, signal
from pathlib import Path
from jobs.adapters.sandbox import ProcessSandbox
from tests.unit import sandbox_work as work

async def main():
    await ProcessSandbox(children=1, readable=(Path("tests").absolute(),)).run(work.echo, 1)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def folders_in(place: Path) -> set[Path]:
    """Return the scratch folders there."""
    return set(place.glob("docmill-scratch-*"))


async def test_what_a_killed_worker_has_left_goes_at_the_next_start_and_what_others_use_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    neighbour = ProcessSandbox(children=1, readable=TESTS)
    assert await neighbour.run(work.echo, 1) == 1
    (used,) = folders_in(tmp_path)
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=TESTS[0].parent
    )
    assert await killed.wait() == -signal.SIGKILL
    (left,) = folders_in(tmp_path) - {used}
    (left / "page.png").touch()
    sandbox = ProcessSandbox(children=1, readable=TESTS)
    assert await sandbox.run(work.echo, 2) == 2
    assert not left.exists()
    assert used.exists()
    assert await neighbour.run(attacks.use_temporary_file) == "done"
    for each in (sandbox, neighbour):
        await each.aclose()


async def test_where_folders_cannot_be_locked_work_goes_on_and_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "no lock on a folder, as over NFS")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    sandbox = ProcessSandbox(children=1, readable=TESTS)
    assert await sandbox.run(attacks.use_temporary_file) == "done"
    assert os.listdir(tmp_path)  # noqa: PTH208
    await sandbox.aclose()
    await until(lambda: not list(tmp_path.iterdir()))


async def test_a_scratch_folder_that_somebody_cleared_out_costs_no_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sandbox = ProcessSandbox(children=1, readable=TESTS)
    child = await sandbox.run(work.process_id)
    (folder,) = folders_in(tmp_path)
    folder.rmdir()
    assert await sandbox.run(work.echo, 1) == 1
    assert await sandbox.run(attacks.use_temporary_file) == "done"
    await until(lambda: not exists(child))
    await sandbox.aclose()


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
async def test_closing_ends_a_call_whose_child_is_still_being_made(seconds: float) -> None:
    sandbox = ProcessSandbox(children=2, limits=Limits(timeout=60), readable=TESTS)
    calls = [asyncio.create_task(sandbox.run(work.hang)) for _ in range(2)]
    await asyncio.sleep(seconds)
    async with asyncio.timeout(20):
        await sandbox.aclose()
        await asyncio.wait(calls)
    for call in calls:
        with pytest.raises((asyncio.CancelledError, RetryableError)):
            call.result()


async def test_a_process_with_many_open_files_can_have_children() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    sandbox = ProcessSandbox(children=1, readable=TESTS)
    try:
        assert await sandbox.run(work.echo, 1) == 1
    finally:
        await sandbox.aclose()
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_template_that_stands_still_keeps_no_call_beyond_its_time() -> None:
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=1), readable=TESTS)
    template = template_of(await sandbox.run(work.process_id))
    call = asyncio.create_task(sandbox.run(work.hang))
    await asyncio.sleep(0.1)
    os.kill(template, signal.SIGSTOP)
    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError):
            await call
        await sandbox.aclose()
