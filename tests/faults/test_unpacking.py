"""Archives whose unpacking is cut off, paused, doubled, superseded, or submitted inside of somebody's long transaction."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from jobs import cancel_batch, submit_batch
from jobs.arguments import derive_doc_id
from jobs.batch.archive import GROUP_ENTRIES
from tests.archives import zip_bytes
from tests.faults.harness import Arena, documents, text_document

POINTS = ["begun", "listed", "unpacked", "stored", "inner_added", "accepted", "done", "ended"]
SCENARIO = "12 archives"


def texts(count: int, start: int = 0, variant: int = 0) -> dict[str, bytes | str]:
    return {f"r{number % 3}/{number:04}.md": text_document(number, variant, paragraphs=1) for number in range(start, start + count)}


def unnoted(arena: Arena, files: dict[str, bytes | str], name: str) -> Path:
    path = arena.folder / name
    path.write_bytes(zip_bytes(files))
    return path


def write(arena: Arena, outer: dict[str, bytes | str], inner: dict[str, bytes | str], name: str = "batch.zip") -> Path:
    """A zip with another one inside; what becomes of both is noted as accepted."""
    path = unnoted(arena, {**outer, "inner.zip": zip_bytes(inner)} if inner else outer, name)
    wanted = {**outer, **{f"inner.zip/{name}": content for name, content in inner.items()}}
    arena.accepted(
        {derive_doc_id("default", f"b\n{name}"): bytes(content) for name, content in wanted.items() if isinstance(content, bytes)}
    )
    return path


def settle(arena: Arena, timeout: float = 120) -> None:
    """Wait until the batch has ended, its archives unpacked before, and hold its numbers against each other."""
    ended = "SELECT count(*) FROM processing_jobs WHERE status IN ('pending', 'processing')"
    arena.wait(lambda: arena.one(ended) == 0, "the batch to end", timeout)
    arena.settle()
    unfinished = "SELECT count(*) FROM batch_archives a WHERE a.state IN ('waiting', 'unpacking')"
    assert arena.one(unfinished + " AND a.run_id IN (SELECT b.run_id FROM processing_jobs b)") == 0
    arena.wait(lambda: arena.one(unfinished) == 0, "archives of former runs to be given up")
    live = "SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'unpack' AND status IN ('todo', 'doing')"
    arena.wait(lambda: arena.one(live) == 0, "every unpack job to end")
    # One that was paused while another took over may have them for some moments after.
    arena.wait(lambda: not list((arena.folder / "storage" / "temp").glob("unpack-*")), "unpacked files to be removed", 30)


def assert_whole(arena: Arena, files: int, status: str = "completed") -> None:
    numbers = """SELECT status, total_files, (
        SELECT count(*) FROM file_extractions d WHERE d.run_id = b.run_id AND d.state = 'complete') FROM processing_jobs b"""
    assert arena.one(numbers) == (status, files, files)


def test_a_kill_at_any_point_of_unpacking_leaves_the_batch_of_an_uninterrupted_run(arena: Arena) -> None:
    outer, inner = texts(GROUP_ENTRIES + 20), texts(10, start=500)
    batch = write(arena, outer, inner)
    faults = [f"kill@unpack_{point};doc=b;once={arena.mark(point)}" for point in POINTS]
    arena.reconciler()
    workers = [arena.worker(faults=faults, restart=True) for _ in range(2)]
    submit_batch(batch, batch_id="b")
    settle(arena, 200)
    arena.wait(lambda: sum(len(worker.exits) for worker in workers) == len(POINTS) == len(arena.marks()), "all fault points", 20)
    assert_whole(arena, len(outer) + len(inner))
    doubled = "SELECT count(*) FROM (SELECT doc_id FROM document_events WHERE event = 'submitted' GROUP BY 1 HAVING count(*) > 1) x"
    assert arena.one(doubled) == 0
    arena.judge(SCENARIO, f"kill -9 at {len(POINTS)} points of unpacking {len(outer) + len(inner)} files, 10 of them in a zip inside")


@pytest.mark.parametrize("point", ["unpacked", "stored", "accepted", "listed"])
def test_an_unpacker_paused_until_another_has_taken_over_changes_nothing_when_it_wakes_up(arena: Arena, point: str) -> None:
    outer = texts(GROUP_ENTRIES + 20)
    batch = write(arena, outer, {})
    sleeper = arena.worker(faults=[f"stop@unpack_{point};doc=b;once={arena.mark(point)}"])
    submit_batch(batch, batch_id="b")
    arena.wait(lambda: len(arena.marks()) == 1, "the pause")
    arena.worker()
    arena.wait(lambda: arena.one("SELECT state FROM batch_archives") == "unpacked", "another to take over")
    sleeper.signal(signal.SIGCONT)
    settle(arena)
    time.sleep(1)
    assert sleeper.alive()
    assert_whole(arena, len(outer))
    arena.judge(SCENARIO, f"a worker stopped in mid-unpack ({point}) until another had finished, then continued")


def test_a_new_zip_in_mid_unpack_wins_and_its_run_holds_what_it_holds(arena: Arena) -> None:
    old, new = texts(GROUP_ENTRIES + 20), texts(GROUP_ENTRIES // 2, variant=1)
    write(arena, dict(list(old.items())[:GROUP_ENTRIES]), {}, "noted.zip")  # what will have been accepted
    first = unnoted(arena, old, "old.zip")
    arena.worker(faults=[f"sleep:3@unpack_accepted;doc=b;once={arena.mark('accepted')}"])
    submit_batch(first, batch_id="b")
    arena.wait(lambda: len(arena.marks()) == 1, "the first group to be accepted")
    arena.worker()  # not before, or it could be the one that unpacks
    second = submit_batch(write(arena, new, {}, "new.zip"), batch_id="b")
    assert second.outcome == "new_run"
    arena.fault()
    settle(arena)
    assert_whole(arena, len(new))
    assert arena.one("SELECT count(*) FROM file_extractions WHERE run_id <> %s", second.run_id) == GROUP_ENTRIES - len(new)
    assert arena.all("SELECT state FROM batch_archives ORDER BY id") == [("cancelled",), ("unpacked",)]
    arena.judge(SCENARIO, f"a new zip of {len(new)} files submitted while {len(old)} were being unpacked")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_batch_in_a_callers_long_transaction_gets_in_nobodys_way(arena: Arena, ending: str) -> None:
    old, new = texts(GROUP_ENTRIES + 20), texts(GROUP_ENTRIES + 20, variant=1)
    submit_batch(write(arena, old, {}, "old.zip"), batch_id="b")
    worker = arena.worker(faults=[f"sleep:2@unpack_accepted;doc=b;once={arena.mark('accepted')}"])
    arena.wait(lambda: len(arena.marks()) == 1, "the first group to be accepted")
    with arena.connect() as conn:
        conn.execute("BEGIN")
        submit_batch(
            write(arena, new, {}, "new.zip") if ending == "commit" else unnoted(arena, new, "never.zip"), batch_id="b", connection=conn
        )
        arena.fault()
        arena.submit({"other": text_document(900)})
        arena.wait(lambda: arena.one("SELECT state FROM file_extractions WHERE doc_id = 'other'") == "complete", "another document", 30)
        accepted = "SELECT count(*) FROM file_extractions WHERE batch_id = 'b' AND state = 'complete'"
        arena.wait(lambda: arena.one(accepted) >= GROUP_ENTRIES, "documents of the old run to complete", 60)
        time.sleep(3)
        conn.execute(ending)
    settle(arena)
    assert worker.alive()
    assert_whole(arena, len(old))
    rescued = arena.all("SELECT DISTINCT doc_id FROM document_events WHERE event = 'rescued'")
    assert rescued == [], "documents lost their lease because of the open transaction"
    arena.judge(SCENARIO, f"a new zip of a batch in mid-unpack submitted in a transaction that is left open, then {ending}")


def test_a_stopped_worker_leaves_the_rest_of_an_archive_to_the_next_without_a_count(arena: Arena) -> None:
    outer = texts(3 * GROUP_ENTRIES)
    batch = write(arena, outer, {})
    worker = arena.worker(faults=[f"sleep:1@unpack_accepted;doc=b;once={arena.mark('accepted')}"])
    submit_batch(batch, batch_id="b")
    arena.wait(lambda: len(arena.marks()) == 1, "the first group to be accepted")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert arena.one("SELECT state, attempts FROM batch_archives") == ("unpacking", 0)
    assert arena.one("SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'") == 1
    arena.worker()
    settle(arena)
    assert_whole(arena, len(outer))
    arena.judge(SCENARIO, f"SIGTERM in mid-unpack of {len(outer)} files")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_batches_cancelled_in_a_callers_long_transaction_stop_no_worker(arena: Arena, ending: str) -> None:
    for number in range(4):
        files = texts(3, start=10 * number)
        submit_batch(unnoted(arena, files, f"{number}.zip"), batch_id=f"b{number}")
        if ending == "rollback":
            arena.accepted(
                {derive_doc_id("default", f"b{number}\n{name}"): bytes(text) for name, text in files.items() if not isinstance(text, str)}
            )
    with arena.connect() as caller:
        caller.execute("BEGIN")
        for number in range(4):
            cancel_batch(f"b{number}", connection=caller)
        worker = arena.worker(WORKER_CONCURRENCY="4")
        deferred = "SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'unpack' AND scheduled_at IS NOT NULL"
        arena.wait(lambda: arena.one(deferred) >= 4, "every archive to be put off", 30)
        arena.fault()
        arena.submit(documents(5))
        complete = "SELECT count(*) FROM file_extractions WHERE state = 'complete'"
        arena.wait(lambda: arena.one(complete) == 5, "the documents that nobody holds", 30)
        caller.execute(ending)
    settle(arena)
    assert worker.alive()
    state = "unpacked" if ending == "rollback" else "cancelled"
    assert arena.all("SELECT DISTINCT state, attempts, retry_count, requeue_count FROM batch_archives") == [(state, 0, 0, 0)]
    arena.judge(SCENARIO, f"4 batches cancelled in a transaction that is left open, then {ending}")


def test_a_worker_that_stops_waits_for_no_transaction_that_holds_its_archive(arena: Arena) -> None:
    files = texts(3)
    batch = write(arena, files, {})
    # Longer than its grace, so that the archive is broken off while it is held.
    worker = arena.worker(faults=[f"sleep:60@unpack_listed;doc=b;once={arena.mark('listed')}"], SHUTDOWN_GRACE_SECONDS="1")
    submit_batch(batch, batch_id="b")
    arena.wait(lambda: len(arena.marks()) == 1, "the archive to be listed")
    with arena.connect() as caller:
        caller.execute("BEGIN")
        cancel_batch("b", connection=caller)
        arena.fault()
        worker.signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert arena.one("SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'") == 1
        caller.execute("ROLLBACK")
    arena.worker()
    settle(arena)
    assert_whole(arena, len(files))
    assert arena.one("SELECT requeue_count, retry_count FROM batch_archives") == (0, 0)
    arena.judge(SCENARIO, "SIGTERM while a transaction that is left open holds the archive in hand")
