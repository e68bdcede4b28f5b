"""The sandbox: whatever a call does to its child is the outcome of that call and of nothing else."""

from __future__ import annotations

import asyncio
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.adapters import sandbox as sandbox_module
from jobs.adapters import sandbox_files, usage
from jobs.adapters.sandbox import Exhausted, ProcessSandbox
from jobs.adapters.sandbox_child import Crashed, Limits
from jobs.adapters.stored_file import StoredFile
from models.errors import LLMError, ParseError, RetryableError, StorageAway, TimeoutError
from tests.unit import sandbox_work as work

ROOT = Path(__file__).parents[2]
TESTS = (ROOT / "tests",)


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[ProcessSandbox]:
    sandbox = ProcessSandbox(
        children=1, limits=Limits(timeout=30, memory_mb=2048, max_output_mb=4), writable=tmp_path, readable=TESTS, loaded=False
    )
    yield sandbox
    await sandbox.aclose()


def alive(pid: int) -> bool:
    """Tell whether a process runs; a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition that nothing announces is true."""
    while not condition():  # noqa: ASYNC110 - it is about other processes
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("length", [0, 10, 5_000, 3_000_000])
async def test_results_of_any_size_come_back_whole(sandbox: ProcessSandbox, length: int) -> None:
    assert await sandbox.run(work.text_of, length) == "x" * length


async def test_a_long_text_arrives_whole_and_leaves_nothing_beside_it(sandbox: ProcessSandbox) -> None:
    text = "„Maß für Maß“ \ud800\0" * 20_000
    before = sys.getsizeof(text)
    assert await sandbox.run(work.echo, text) == text
    assert sys.getsizeof(text) == before
    readable = text.replace("\ud800", "")
    before = sys.getsizeof(readable)
    assert await sandbox.run(work.echo, readable) == readable
    assert sys.getsizeof(readable) == before


async def test_several_long_texts_keep_their_places(sandbox: ProcessSandbox) -> None:
    first, second = "„ß“" * 400_000, "b" * 150_000
    assert await sandbox.run(operator.concat, first, second) == first + second
    assert await sandbox.run(work.second_of, "short", second, first, {"a": 1}) == second


async def test_calls_run_elsewhere_and_share_a_warm_child(sandbox: ProcessSandbox) -> None:
    first = await sandbox.run(work.process_id)
    assert first != os.getpid()
    assert await sandbox.run(work.process_id) == first


async def test_nothing_is_started_before_the_first_call() -> None:
    sandbox = ProcessSandbox()
    assert not sandbox.started
    await sandbox.aclose()


async def test_a_crash_is_a_parse_error_that_names_the_signal_and_the_next_call_works(sandbox: ProcessSandbox) -> None:
    with pytest.raises(Crashed, match="SIGSEGV"):
        await sandbox.run(work.crash)
    assert await sandbox.run(work.echo, 1) == 1


async def test_an_exit_is_a_parse_error_that_names_the_code(sandbox: ProcessSandbox) -> None:
    with pytest.raises(Crashed, match="exit code 3"):
        await sandbox.run(work.leave, 3)


async def test_a_wait_is_our_timeout_error_that_names_the_limit(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=5.5), readable=TESTS, writable=tmp_path, loaded=False)
    with pytest.raises(TimeoutError, match=r"time limit of 5\.5 s"):
        await sandbox.run(work.hang_after, str(tmp_path / "mark"))
    await sandbox.aclose()


async def test_a_loop_until_the_time_is_up_is_no_timeout_because_it_would_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "COMPUTING", 0.01)  # a busy machine gives it next to nothing
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=5.5), readable=TESTS, loaded=False)
    with pytest.raises(Exhausted, match=r"time limit of 5\.5 s"):
        await sandbox.run(work.hang)
    await sandbox.aclose()


async def test_cpu_time_beyond_the_limit_is_no_timeout_either() -> None:
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=60, cpu_seconds=1), readable=TESTS, loaded=False)
    with pytest.raises(Exhausted, match="CPU limit of 1 s"):
        await sandbox.run(work.hang)
    await sandbox.aclose()


async def test_memory_beyond_the_limit_is_a_parse_error_that_names_the_limit(sandbox: ProcessSandbox) -> None:
    with pytest.raises(Crashed, match="2048 MB"):
        await sandbox.run(work.exhaust_memory)
    assert await sandbox.run(work.echo, 1) == 1


async def test_a_result_beyond_the_output_limit_is_a_parse_error(sandbox: ProcessSandbox) -> None:
    with pytest.raises(ParseError, match="output limit of 4 MB"):
        await sandbox.run(work.text_of, 5_000_000)


async def test_a_child_cannot_fill_the_disk(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    with pytest.raises(ParseError, match="File too large"):
        await sandbox.run(work.write_file, str(tmp_path / "big"), 6)


async def test_our_own_errors_come_through_unchanged(sandbox: ProcessSandbox) -> None:
    with pytest.raises(StorageAway, match="not there") as caught:
        await sandbox.run(work.raise_storage_away)
    assert "raise_storage_away" in "".join(caught.value.__notes__)
    with pytest.raises(LLMError, match="no answer"):
        await sandbox.run(work.raise_llm_error)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (work.raise_foreign, "LookupError: no such thing"),
        (work.raise_unpicklable, "one two"),
        (work.leave_by_sys_exit, "SystemExit: enough"),
        (work.return_unpicklable, "pickle"),
        (work.recurse, "nested deeper"),
    ],
)
async def test_foreign_errors_are_parse_errors_that_name_them(sandbox: ProcessSandbox, function: Callable[[], object], said: str) -> None:
    with pytest.raises(ParseError, match=said):
        await sandbox.run(function)


async def test_cancelling_the_caller_kills_the_call(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    task = asyncio.create_task(sandbox.run(work.hang_after, str(mark)))
    await until(lambda: mark.exists() and mark.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(int(mark.read_text())))
    assert await sandbox.run(work.echo, 1) == 1


async def test_closing_stops_calls_and_children_and_refuses_more(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(children=1, writable=tmp_path, readable=TESTS, loaded=False)
    mark = tmp_path / "pid"
    task = asyncio.create_task(sandbox.run(work.hang_after, str(mark)))
    await until(lambda: mark.exists() and mark.read_text())
    await sandbox.aclose()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(int(mark.read_text())))
    with pytest.raises(RetryableError, match="closed"):
        await sandbox.run(work.echo, 1)


async def test_an_idle_child_killed_from_outside_is_replaced(sandbox: ProcessSandbox) -> None:
    victim = await sandbox.run(work.process_id)
    os.kill(victim, signal.SIGKILL)
    await until(lambda: not alive(victim))
    assert await sandbox.run(work.process_id) != victim


async def test_an_idle_child_that_takes_nothing_in_keeps_no_call_beyond_the_time_limit() -> None:
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=2), readable=TESTS, loaded=False)
    stopped = await sandbox.run(work.process_id)
    os.kill(stopped, signal.SIGSTOP)
    async with asyncio.timeout(30):
        assert len(await sandbox.run(work.echo, "x" * 3_000_000)) == 3_000_000
        await until(lambda: not alive(stopped))
        await sandbox.aclose()


async def test_children_are_replaced_after_their_share_of_calls() -> None:
    sandbox = ProcessSandbox(children=1, calls_per_child=2, readable=TESTS, loaded=False)
    assert len({await sandbox.run(work.process_id) for _ in range(4)}) == 2
    await sandbox.aclose()


async def test_a_child_has_its_limits_its_own_group_and_no_ear_for_signals(sandbox: ProcessSandbox) -> None:
    assert await sandbox.run(work.limits) == {
        "core": (0, 0),
        "memory": 2048 * 1024 * 1024,
        "files": 256,
        "group": True,
        "ignored": [True, True],
    }
    assert await sandbox.run(work.signal_itself) == "alive"


async def test_a_child_neither_prints_nor_reads(sandbox: ProcessSandbox, capfd: pytest.CaptureFixture[str]) -> None:
    assert await sandbox.run(work.print_and_read) == ""
    assert capfd.readouterr() == ("", "")


async def test_usage_of_children_and_threads_adds_up(sandbox: ProcessSandbox) -> None:
    await sandbox.run(work.echo, 1)
    with usage.measured() as outer:
        with usage.measured() as inner:
            await asyncio.gather(sandbox.run(work.burn, 0.1), sandbox.run(work.allocate, 100))
            await usage.in_thread(work.echo, 1)
        assert inner.cpu_ms >= 100
        assert inner.peak_memory_mb >= 100
        await usage.in_thread(sum, range(100_000))
    assert outer.cpu_ms > inner.cpu_ms
    assert outer.peak_memory_mb == inner.peak_memory_mb


async def test_peak_memory_is_that_of_the_call_not_of_the_child(sandbox: ProcessSandbox) -> None:
    with usage.measured() as big:
        await sandbox.run(work.allocate, 200)
    with usage.measured() as small:
        await sandbox.run(work.echo, 1)
    assert small.peak_memory_mb < big.peak_memory_mb - 100


async def test_a_failed_call_has_its_usage_counted(sandbox: ProcessSandbox) -> None:
    for function, error in ((work.raise_llm_error, LLMError), (work.crash, Crashed)):
        with usage.measured() as used, pytest.raises(error):
            await sandbox.run(function)
        assert used.peak_memory_mb > 0
        assert used.cpu_ms >= 0


WORKER = """
import asyncio, sys
from pathlib import Path
from jobs.adapters.sandbox import ProcessSandbox
from tests.unit import sandbox_work as work

async def main():
    sandbox = ProcessSandbox(children=2, writable=Path(sys.argv[1]).parent, readable=(Path("tests").absolute(),))
    print(await sandbox.run(work.process_id), flush=True)
    await asyncio.gather(*(sandbox.run(work.hang_after, path) for path in sys.argv[1:]))

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_killed_worker_leaves_no_child_behind(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    marks = [tmp_path / "one", tmp_path / "two"]
    worker = subprocess.Popen(
        [sys.executable, str(script), *map(str, marks)], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert worker.poll() is None
            time.sleep(0.02)
        children = [int(mark.read_text()) for mark in marks]
        assert all(map(alive, children))
    finally:
        worker.kill()
        worker.communicate()
    while any(map(alive, children)):
        time.sleep(0.02)


async def test_calls_that_share_a_turn_have_an_answer_each_in_their_order(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    files = [StoredFile(tmp_path / f"{number}.txt") for number in range(20)]
    for number, file in enumerate(files):
        file.path.write_text(f"file {number}")
    calls: list[tuple[Callable[..., object], tuple[object, ...], dict[str, object]]] = [(work.content_of, (file,), {}) for file in files]
    calls[7] = (work.raise_foreign, (), {})
    answers = await sandbox.run_each(calls)
    assert [answer.result for answer in answers] == [None if number == 7 else f"file {number}" for number in range(20)]
    assert isinstance(answers[7].error, ParseError)
    assert all(answer.error is None for number, answer in enumerate(answers) if number != 7)
    assert max(answer.peak_memory_mb for answer in answers) > 5


@pytest.mark.parametrize("harm", [work.crash, work.exhaust_memory])
async def test_what_takes_a_child_down_is_nobodys_answer_who_shared_its_turn(sandbox: ProcessSandbox, harm: Callable[[], object]) -> None:
    with pytest.raises(ParseError):
        await sandbox.run_each([(work.text_of, (3,), {}), (harm, (), {}), (work.text_of, (4,), {})])
    assert [answer.result for answer in await sandbox.run_each([(work.text_of, (3,), {}), (work.text_of, (4,), {})])] == ["xxx", "xxxx"]


async def test_a_child_that_lies_about_what_it_used_is_not_believed_by_who_shared_its_turn(sandbox: ProcessSandbox) -> None:
    answers = await sandbox.run_each([(work.lie_about_memory, (), {}), (work.text_of, (3,), {})])
    assert [answer.peak_memory_mb for answer in answers] == [0, 0]


async def test_a_file_that_opens_only_after_nobody_waits_for_it_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("text")
    goes_on, real = threading.Event(), sandbox_files._open

    def slow(file: StoredFile, opened: ExitStack) -> int:
        goes_on.wait(20)  # as a share may that has much to do
        return real(file, opened)

    def is_open() -> bool:
        return any(link.resolve() == tmp_path / "file" for link in Path("/proc/self/fd").iterdir())

    monkeypatch.setattr(sandbox_files, "_open", slow)
    with ExitStack() as opened:
        opening = asyncio.create_task(sandbox_files.open_all([StoredFile(tmp_path / "file")] * 3, opened))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    running = [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]
    goes_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert running
    await until(lambda: not is_open())
