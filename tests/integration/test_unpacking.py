"""Unpacking an archive: whatever interrupts it, and whoever does it besides, each entry is one document of the batch's run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import psycopg
import pytest
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import cancel_batch, cancel_document, delete_batch, delete_document, faults, submit_batch
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.storage import LocalStorage
from jobs.adapters.stored_file import StoredFile
from jobs.arguments import derive_doc_id
from jobs.batch import archive as archive_module
from jobs.batch import unpacking
from jobs.batch.unpacking import CRASHES, Unpacker
from jobs.database import make_pool
from jobs.front import close_sync
from jobs.leftovers import remove_noted_files
from jobs.pipeline.claims import Connection
from jobs.reconcile import Reconciler
from models.errors import DocmillError, ParseError, RetryableError, TimeoutError
from models.settings import Settings, load_settings
from tests.archives import Raw, raw_zip, write_zip, zip_bytes
from tests.running import wait_for

P = ParamSpec("P")
R = TypeVar("R")


class Interrupted(BaseException):
    """Ends an unpacker as a crash does: nothing of it runs any more."""


@dataclass
class Bench:
    """Unpackers over the test's database, and what their sandbox should do besides."""

    conn: psycopg.Connection
    pool: AsyncConnectionPool[Connection]
    settings: Settings
    folder: Path
    stopping: bool = False
    before_call: Callable[[str], None] = lambda _: None
    after_call: Callable[[str], None] = lambda _: None
    calls: list[str] = field(default_factory=list)

    def unpacker(self, **changes: Any) -> Unpacker:
        settings = self.settings.model_copy(update=changes)
        return Unpacker(settings=settings, pool=self.pool, sandbox=lambda folder: Noted(self, folder), stopping=lambda: self.stopping)

    def zip(self, files: Mapping[str, bytes | str] | bytes, name: str = "batch.zip") -> Path:
        path = self.folder / name
        path.write_bytes(files if isinstance(files, bytes) else zip_bytes(files))
        return path

    def jobs(self) -> list[int]:
        """Archives that wait for a worker."""
        waiting = "SELECT (args->>'archive_id')::int FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo' ORDER BY id"
        return [row[0] for row in self.all(waiting)]

    async def unpack(self, **changes: Any) -> None:
        """Run all waiting unpack jobs, also those that come of it."""
        while found := self.one_or_none(
            """UPDATE procrastinate_jobs SET status = 'doing' WHERE id = (SELECT min(id) FROM procrastinate_jobs
                WHERE task_name = 'unpack' AND status = 'todo') RETURNING id, (args->>'archive_id')::int"""
        ):
            await self.unpacker(**changes).run(found[1])
            self.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0]])

    def finish(self) -> None:
        """End every document well, as the pipeline would."""
        self.conn.execute(
            """UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'
                WHERE state = 'queued'"""
        )
        self.conn.execute(
            """UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = version
                WHERE state = 'working'"""
        )

    def settle(self, batch: str) -> str:
        return str(self.one("SELECT settle_batch(%s)", batch)[0])

    def documents(self) -> dict[str, str]:
        return dict(self.all("SELECT source_path, state::text FROM file_extractions ORDER BY source_path"))

    def one_or_none(self, statement: str, *args: object) -> tuple[Any, ...] | None:
        return self.conn.execute(statement, args).fetchone()

    def one(self, statement: str, *args: object) -> tuple[Any, ...]:
        row = self.one_or_none(statement, *args)
        assert row is not None
        return row

    def all(self, statement: str, *args: object) -> list[tuple[Any, ...]]:
        return self.conn.execute(statement, args).fetchall()

    def snapshot(self) -> list[Any]:
        """Everything that is written, with the transaction that wrote it."""
        tables = ("processing_jobs", "batch_archives", "file_extractions", "document_events", "dead_letters", "procrastinate_jobs")
        return [self.all(f"SELECT t.xmin::text, t.ctid::text, t.* FROM {table} t ORDER BY 1, 2") for table in tables]


class Noted(ProcessSandbox):
    """A sandbox whose calls are noted, and can be disturbed."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        super().__init__(children=1, writable=folder)
        self.bench = bench

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.bench.calls.append(function.__name__)
        self.bench.before_call(function.__name__)
        made = await super().run(function, *args, **kwargs)
        self.bench.after_call(function.__name__)
        return made


@pytest.fixture
async def bench(settings: Settings, database: str, conn: psycopg.Connection, tmp_path: Path) -> AsyncIterator[Bench]:
    load_settings.cache_clear()
    pool = make_pool(settings, database)
    await pool.open()
    yield Bench(conn, pool, settings, tmp_path)
    await pool.close()
    close_sync()
    load_settings.cache_clear()


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "GROUP_ENTRIES", 3)


FILES: dict[str, bytes | str] = {f"d{number % 3}/f{number:02}.txt": f"text of file {number}" for number in range(10)}


async def test_a_zip_becomes_a_batch_of_its_files_and_ends_with_them(bench: Bench) -> None:
    batch = submit_batch(bench.zip({**FILES, "__MACOSX/._x": "x"}), batch_id="b", user_id="ann", metadata={"year": 2026}, priority=4)
    assert (batch, batch.outcome, batch.archives) == ("b", "accepted", 1)
    assert bench.one("SELECT status, sealed_at IS NOT NULL, total_files FROM processing_jobs") == ("pending", True, 0)
    assert bench.settle(batch) == "None"
    await bench.unpack()
    assert bench.one("SELECT status, total_files, run_id, metadata FROM processing_jobs") == (
        "processing",
        10,
        batch.run_id,
        {"year": 2026},
    )
    assert bench.documents() == dict.fromkeys(FILES, "queued")
    row = bench.one("SELECT doc_id, file_name, user_id, priority, run_id FROM file_extractions WHERE source_path = 'd1/f04.txt'")
    assert row == (derive_doc_id("ann", "b\nd1/f04.txt"), "f04.txt", "ann", 4, batch.run_id)
    assert bench.one("SELECT state, entry_count, unpacked_count, skipped_count, attempts FROM batch_archives") == ("unpacked", 10, 10, 1, 0)
    assert bench.one("SELECT archives, archives_open, archive_files, unpacked_files FROM batch_status") == (1, 0, 10, 10)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'validate'") == (10,)
    storage = LocalStorage.from_settings(bench.settings)
    for path, sha256 in bench.all("SELECT file_path, content_sha256 FROM file_extractions"):
        assert storage.fingerprint(path).sha256 == sha256
    assert list((storage.base / "temp").iterdir()) == []
    bench.finish()
    assert bench.settle(batch) == "completed"


async def test_entries_are_called_as_the_same_files_in_a_folder_are(bench: Bench) -> None:
    folder = bench.folder / "in"
    folder.mkdir()
    names = [
        "議事録\u30002024.txt", "Screenshot at 3.45.12\u202fPM.txt", "Facture\u00a0: 7.txt", "می\u200cخواهم.txt", "👨\u200d👩.txt",
        "tab\tand\x1b.txt", "plain.txt",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_text("text")
    submit_batch(folder, batch_id="folder")
    submit_batch(bench.zip(raw_zip(Raw(f"d/{name}".encode(), crc=1 if name == names[0] else None) for name in names)), batch_id="zip")
    await bench.unpack()
    called = "SELECT file_name FROM file_extractions WHERE batch_id = %s ORDER BY file_name"
    assert bench.all(called, "zip") == bench.all(called, "folder")
    assert (names[0],) in bench.all(called, "zip")


async def test_the_same_zip_again_writes_nothing(bench: Bench) -> None:
    path = bench.zip(FILES)
    first = submit_batch(path)
    assert submit_batch(path).outcome == "unchanged"
    await bench.unpack()
    bench.finish()
    bench.settle(first)
    before = bench.snapshot()
    again = submit_batch(path)
    assert (again, again.outcome, again.run_id) == (first, "unchanged", first.run_id)
    assert bench.snapshot() == before


async def test_a_changed_zip_makes_a_run_that_touches_what_changed_and_holds_what_is_in_it(bench: Bench) -> None:
    first = submit_batch(bench.zip(FILES), batch_id="b")
    await bench.unpack()
    bench.finish()
    others = """SELECT doc_id, version, claim, updated_at FROM file_extractions
        WHERE source_path NOT IN ('d1/f01.txt', 'd0/f00.txt', 'new.txt') ORDER BY 1"""
    untouched = bench.all(others)
    changed = {name: content for name, content in FILES.items() if name != "d0/f00.txt"} | {"d1/f01.txt": "other text", "new.txt": "new"}
    second = submit_batch(bench.zip(changed), batch_id="b")
    assert (second.outcome, second.run_id == first.run_id) == ("new_run", False)
    await bench.unpack()
    assert bench.all("SELECT source_path, version FROM file_extractions WHERE state = 'queued' ORDER BY 1") == [
        ("d1/f01.txt", 2),
        ("new.txt", 1),
    ]
    assert bench.one("SELECT count(*) FILTER (WHERE run_id = %s), count(*) FROM file_extractions", second.run_id) == (10, 11)
    assert bench.all(others) == untouched
    bench.finish()
    assert bench.settle("b") == "completed"


async def test_an_unpacker_that_dies_is_followed_by_one_that_does_the_rest(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")

    def die(_: str) -> None:
        if len(bench.calls) == 4:  # the listing and two groups have been done
            raise Interrupted

    bench.before_call = die
    with pytest.raises(Interrupted):
        await bench.unpack()
    assert bench.one("SELECT count(*) FROM file_extractions") == (6,)
    assert bench.one("SELECT state, entry_count, unpacked_count FROM batch_archives") == ("unpacking", 10, 6)
    assert bench.settle("b") == "None"
    before = bench.all("SELECT xmin::text FROM file_extractions ORDER BY id")
    bench.calls.clear()
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'aborted' WHERE status = 'doing'")
    done = await Reconciler(bench.settings, bench.pool).pass_once()
    assert done == {"requeued": 1}
    await bench.unpack()
    assert bench.calls == ["list_archive", "unpack_members", "unpack_members"]
    assert bench.all("SELECT xmin::text FROM file_extractions ORDER BY id")[:6] == before
    assert bench.one("SELECT count(*), count(DISTINCT doc_id) FROM document_events WHERE event = 'submitted'") == (10, 10)


async def test_two_unpackers_of_one_archive_at_once_make_each_document_once(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]
    await asyncio.gather(*(bench.unpacker().run(archive) for _ in range(3)))
    await bench.unpack()  # on a busy machine each may have found the others in its way
    assert bench.one("SELECT count(*), max(version) FROM file_extractions") == (10, 1)
    assert bench.one("SELECT count(*) FROM document_events") == (10,)
    assert bench.one("SELECT state, unpacked_count FROM batch_archives") == ("unpacked", 10)
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'validate'") == (10,)


async def test_an_archive_that_breaks_its_worker_again_and_again_is_failed(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]

    def die(_: str) -> None:
        raise Interrupted

    bench.before_call = die
    for _ in range(CRASHES):
        with pytest.raises(Interrupted):
            await bench.unpacker(max_crashes=1).run(archive)
    await bench.unpacker(max_crashes=1).run(archive)
    state, message = bench.one("SELECT state, error_message FROM batch_archives")
    assert state == "failed"
    assert "MAX_CRASHES" in message
    assert bench.one("SELECT status, error_message FROM processing_jobs") == ("failed", message)


async def test_a_worker_that_stops_hands_the_rest_on_at_once_and_without_a_count(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")

    def stop(call: str) -> None:
        bench.stopping = len(bench.calls) == 2

    bench.before_call = stop
    await bench.unpacker().run(archive)
    assert bench.one("SELECT count(*) FROM file_extractions") == (3,)
    assert bench.one("SELECT attempts, state FROM batch_archives") == (0, "unpacking")
    assert bench.one("SELECT scheduled_at <= now() FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'") == (True,)
    bench.stopping, bench.before_call = False, lambda _: None
    await bench.unpack()
    assert bench.one("SELECT count(*) FROM file_extractions") == (10,)


@pytest.mark.parametrize("how", ["cancelled", "newer run", "deleted"])
async def test_an_unpacker_whose_run_is_over_stops_quietly(how: str, bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]

    def end(_: str) -> None:
        if len(bench.calls) == 3:
            match how:
                case "cancelled":
                    bench.conn.execute("UPDATE processing_jobs SET status = 'cancelled', completed_at = now()")
                case "newer run":
                    submit_batch(bench.zip({"one.txt": "one"}), batch_id="b")
                case _:
                    bench.conn.execute("UPDATE file_extractions SET batch_id = NULL")
                    bench.conn.execute("DELETE FROM processing_jobs")

    bench.before_call = end
    await bench.unpacker().run(archive)
    assert bench.one("SELECT count(*) FROM file_extractions") == (3,)
    found = bench.one_or_none("SELECT state FROM batch_archives WHERE id = %s", archive)
    assert found == (None if how == "deleted" else ("cancelled",))
    assert list((bench.settings.storage_base_path / "temp").iterdir()) == []
    bench.before_call = lambda _: None
    await bench.unpack()
    if how == "newer run":
        assert bench.one("SELECT total_files, count(*) FROM processing_jobs JOIN file_extractions USING (run_id) GROUP BY 1") == (1, 1)


async def test_archives_inside_are_unpacked_two_deep_and_below_that_fail_alone(bench: Bench) -> None:
    third = zip_bytes({"deep.txt": "deep"})
    second = zip_bytes({"in.txt": "in", "third.zip": third})
    batch = submit_batch(bench.zip({"a.txt": "a", "sub/second.zip": second, "bad.zip": zip_bytes({})}), batch_id="b")
    await bench.unpack()
    assert bench.documents() == {"a.txt": "queued", "sub/second.zip/in.txt": "queued", "sub/second.zip/third.zip": "failed"}
    assert bench.all("SELECT entry_path, depth, state FROM batch_archives ORDER BY 1") == [
        ("", 1, "unpacked"), ("bad.zip/", 2, "failed"), ("sub/second.zip/", 2, "unpacked"),
    ]  # fmt: skip
    assert "2 deep" in bench.one("SELECT error_message FROM dead_letters")[0]
    assert bench.one("SELECT total_files FROM processing_jobs") == (3,)
    bench.finish()
    assert bench.settle(batch) == "completed_with_errors"
    assert bench.one("SELECT archives, archives_failed FROM batch_status") == (3, 1)


async def test_archives_inside_of_one_share_its_limits(bench: Bench) -> None:
    inner = {f"{n}.zip": zip_bytes({f"{n}-{i}.txt": "x" for i in range(4)}) for n in range(3)}
    submit_batch(bench.zip(inner), batch_id="b")
    await bench.unpack(max_archive_entries=12)
    states = [row[0] for row in bench.all("SELECT state FROM batch_archives ORDER BY id")]
    assert states == ["unpacked", "unpacked", "unpacked", "failed"]
    assert "MAX_ARCHIVE_ENTRIES" in bench.one("SELECT error_message FROM batch_archives WHERE state = 'failed'")[0]


async def test_bad_entries_are_failed_documents_with_dead_letters_and_a_repaired_zip_makes_them_good(bench: Bench) -> None:
    bad = [Raw(b"good.txt"), Raw(b"locked.txt", flags=1), Raw(b"crc.txt", crc=1), Raw(b"../up.txt")]
    batch = submit_batch(bench.zip(raw_zip(bad)), batch_id="b")
    await bench.unpack()
    assert bench.documents() == {"good.txt": "queued", "locked.txt": "failed", "crc.txt": "failed", "../up.txt": "failed"}
    letters = {
        row[0]: row
        for row in bench.all(
            "SELECT d.source_path, l.error_type::text, l.error_message, l.stage FROM dead_letters l JOIN file_extractions d USING (doc_id)"
        )
    }
    assert letters["locked.txt"] == (
        "locked.txt", "PERMANENT", "batch.zip, entry locked.txt: it is encrypted; pack it again without a password.", "validate",
    )  # fmt: skip
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (1,)
    bench.finish()
    assert bench.settle(batch) == "completed_with_errors"
    before = bench.snapshot()[2:5]
    submit_batch(bench.zip(raw_zip([*bad, Raw(b"more.txt")])), batch_id="b")
    await bench.unpack()
    after = bench.snapshot()[2:5]
    assert (len(after[0]), after[2]) == (len(before[0]) + 1, before[2]), "an entry that is as bad as before was failed once more"
    submit_batch(bench.zip(raw_zip([Raw(b"good.txt"), Raw(b"locked.txt"), Raw(b"crc.txt")])), batch_id="b")
    await bench.unpack()
    assert bench.all("SELECT source_path, version, state::text FROM file_extractions WHERE version = 2 ORDER BY 1") == [
        ("crc.txt", 2, "queued"), ("locked.txt", 2, "queued"),
    ]  # fmt: skip
    bench.finish()
    assert bench.settle("b") == "completed"


async def test_a_good_entry_that_turns_bad_fails_as_a_new_version_and_the_old_one_is_still_served(bench: Bench) -> None:
    submit_batch(bench.zip(raw_zip([Raw(b"a.txt")])), batch_id="b")
    await bench.unpack()
    bench.finish()
    submit_batch(bench.zip(raw_zip([Raw(b"a.txt", crc=1)])), batch_id="b")
    await bench.unpack()
    assert bench.one("SELECT version, served_version, state::text FROM file_extractions") == (2, 1, "failed")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 no directory", zip_bytes({}), zip_bytes({"__MACOSX/._a": "x"})], ids=["broken", "empty", "nothing left"]
)
async def test_a_zip_that_is_bad_as_a_whole_fails_its_batch_with_the_reason_and_can_be_submitted_again(
    content: bytes, bench: Bench
) -> None:
    batch = submit_batch(bench.zip(content), batch_id="b")
    await bench.unpack()
    status, message = bench.one("SELECT status, error_message FROM processing_jobs")
    assert status == "failed"
    assert message.startswith("batch.zip: ")
    assert bench.documents() == {}
    assert bench.one("SELECT kind FROM alerts") == ("archive_failed",)
    again = submit_batch(bench.zip(FILES), batch_id="b")
    assert again.outcome == "new_run"
    await bench.unpack()
    assert len(bench.documents()) == 10
    assert batch == again


async def test_a_document_that_somebody_holds_keeps_no_other_from_being_accepted(bench: Bench, database: str) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    await bench.unpack()
    bench.finish()
    changed = {name: f"new {content!r}" for name, content in FILES.items()}
    submit_batch(bench.zip(changed), batch_id="b")
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE task_name = 'unpack' AND status = 'todo'")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE source_path = 'd1/f04.txt' FOR UPDATE")
        await bench.unpacker().run(archive)
        holder.rollback()
    assert bench.one("SELECT count(*) FROM file_extractions WHERE version = 2") == (9,)
    assert bench.one("SELECT state, attempts FROM batch_archives WHERE id = %s", archive) == ("unpacking", 0)
    assert bench.one("SELECT scheduled_at > now() FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'") == (True,)
    await bench.unpack()
    assert bench.one("SELECT count(*) FROM file_extractions WHERE version = 2") == (10,)


async def test_a_failing_storage_is_waited_for_and_then_given_up(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]

    def full(call: str) -> None:
        if call == "unpack_members":
            raise RetryableError("The storage is full.")

    bench.before_call = full
    for _ in range(4):
        assert bench.one("SELECT state FROM batch_archives") != ("failed",)
        await bench.unpacker().run(archive)
    assert bench.one("SELECT state, error_message FROM batch_archives") == ("failed", "batch.zip: The storage is full.")


def waiting_on(bench: Bench, monkeypatch: pytest.MonkeyPatch, *slow: str) -> list[int]:
    """Have the disk keep these entries waiting until the time is up; return the sizes of the groups that it did so with."""
    met: list[int] = []
    run = Noted.run

    async def wait(self: Noted, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        group = args[1] if function.__name__ == "unpack_members" else ()
        if any(member.path in slow for member in group):  # type: ignore[attr-defined]
            met.append(len(group))  # type: ignore[arg-type]
            raise TimeoutError("Parsing was stopped at the time limit of 300 s.")
        return await run(self, function, *args, **kwargs)

    monkeypatch.setattr(Noted, "run", wait)
    return met


async def test_a_wait_for_the_disk_is_no_fault_of_the_entries(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    with monkeypatch.context() as patched:
        met = waiting_on(bench, patched, *FILES)
        await bench.unpacker().run(archive)
    assert met == [3]
    assert bench.documents() == {}
    state, retries, message = bench.one("SELECT state, retry_count, error_message FROM batch_archives")
    assert (state, retries) == ("unpacking", 1)
    assert message == "batch.zip: Parsing was stopped at the time limit of 300 s."
    assert bench.one("SELECT scheduled_at > now() FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'") == (True,)
    await bench.unpack()
    assert bench.documents() == dict.fromkeys(FILES, "queued")


async def test_an_entry_that_waits_each_time_is_failed_alone_in_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    met = waiting_on(bench, monkeypatch, "d1/f04.txt")
    await bench.unpack()
    retries = bench.settings.max_retry_attempts
    assert met == [3] * (retries + 1) + [1]
    assert bench.documents() == {**dict.fromkeys(FILES, "queued"), "d1/f04.txt": "failed"}
    assert "time limit of 300 s" in bench.one("SELECT error_message FROM dead_letters")[0]
    assert bench.one("SELECT state FROM batch_archives") == ("unpacked",)


async def test_an_archive_is_failed_and_not_its_entries_where_all_wait_until_the_last_try(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.zip(FILES)
    submit_batch(path, batch_id="b")
    with monkeypatch.context() as patched:
        met = waiting_on(bench, patched, *FILES)
        await bench.unpack()
    assert len(met) <= bench.settings.max_retry_attempts + 1 + 3
    assert bench.documents() == {}
    assert bench.one("SELECT state, error_message FROM batch_archives") == (
        "failed", "batch.zip: Parsing was stopped at the time limit of 300 s.",
    )  # fmt: skip
    assert submit_batch(path, batch_id="b").outcome == "new_run"
    await bench.unpack()
    assert bench.documents() == dict.fromkeys(FILES, "queued")


@pytest.mark.parametrize(
    ("content", "fault", "changes"),
    [
        (b"PK\x03\x04 no directory", None, {}),
        (FILES, None, {"max_archive_entries": 3}),
        (FILES, ParseError("The parser crashed (signal SIGSEGV)."), {}),
        (FILES, RetryableError("The storage is full."), {"max_retry_attempts": 1}),
    ],
    ids=["bad", "limit", "crash", "storage"],
)
async def test_what_is_said_of_an_archive_names_it_once(
    content: bytes | dict[str, str], fault: DocmillError | None, changes: dict[str, int], bench: Bench
) -> None:
    said: list[str] = []
    sink = logger.add(lambda line: said.append(str(line)), format="{message}", level="WARNING")
    submit_batch(bench.zip(content), batch_id="b")

    def fail(_: str) -> None:
        if fault is not None:
            raise fault

    bench.before_call = fail
    archive = bench.jobs()[0]
    for _ in range(2):
        await bench.unpacker(**changes).run(archive)
    logger.remove(sink)
    assert [line.count("batch.zip") for line in said] == [1] * len(said)
    assert said
    message = bench.one("SELECT error_message FROM batch_archives WHERE state = 'failed'")[0]
    assert (message.count("batch.zip"), message.startswith("batch.zip: ")) == (1, True)
    assert bench.one("SELECT error_message FROM processing_jobs") == (message,)


async def test_zips_in_a_folder_are_unpacked_as_part_of_its_batch_and_change_nothing_the_second_time(bench: Bench) -> None:
    folder = bench.folder / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    write_zip(folder / "more.zip", FILES)
    made = submit_batch(folder)
    assert (made.outcome, made.archives) == ("accepted", 1)
    await bench.unpack()
    assert set(bench.documents()) == {str(folder / "a.txt"), *(f"{folder}/more.zip/{name}" for name in FILES)}
    assert bench.one("SELECT total_files, direct_files FROM processing_jobs") == (11, 1)
    bench.finish()
    assert bench.settle(made) == "completed"
    before = bench.snapshot()
    assert submit_batch(folder).outcome == "unchanged"
    assert bench.snapshot() == before
    write_zip(folder / "more.zip", {**FILES, "extra.txt": "extra"})
    assert submit_batch(folder).outcome == "new_run"
    await bench.unpack()
    assert bench.one("SELECT count(*) FROM file_extractions WHERE state = 'queued'") == (1,)
    assert bench.one("SELECT total_files, (SELECT count(*) FROM file_extractions d WHERE d.run_id = b.run_id) FROM processing_jobs b") == (
        12,
        12,
    )


async def test_an_archive_whose_job_is_lost_gets_another_and_in_the_end_is_failed_visibly(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    settings = bench.settings.model_copy(update={"max_requeues": 2})
    assert await Reconciler(settings, bench.pool).pass_once() == {}
    for _ in range(2):
        bench.conn.execute("UPDATE procrastinate_jobs SET status = 'failed'")
        assert await Reconciler(settings, bench.pool).pass_once() == {"requeued": 1}
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'failed' WHERE status = 'todo'")
    assert (await Reconciler(settings, bench.pool).pass_once())["failed"] >= 1
    assert "lost 2 times" in bench.one("SELECT error_message FROM batch_archives")[0]
    await Reconciler(settings, bench.pool).pass_once()
    assert bench.one("SELECT status FROM processing_jobs") == ("failed",)


async def test_a_job_left_by_a_dead_worker_is_deferred_again(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    settings = bench.settings.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 60.0})
    assert await Reconciler(settings, bench.pool).pass_once() == {"requeue_side_job": 1}
    assert len(bench.jobs()) == 1


def test_a_zip_with_ten_thousand_names_is_listed_in_one_go(tmp_path: Path) -> None:
    from jobs.adapters.archives import ArchiveLimits, list_archive

    with zipfile.ZipFile(tmp_path / "many.zip", "w") as made:
        for number in range(10_000):
            made.writestr(f"{number}.txt", b"")
    limits = ArchiveLimits.from_settings(Settings())
    assert len(list_archive(StoredFile(tmp_path / "many.zip"), limits).members) == 10_000


def one_document(bench: Bench, batch_id: str = "b") -> tuple[str, str]:
    """doc_id and place of a document of the batch's archives."""
    doc_id, path = bench.one("SELECT doc_id, source_path FROM file_extractions WHERE batch_id = %s ORDER BY id DESC LIMIT 1", batch_id)
    return doc_id, path


@pytest.mark.parametrize("source", ["zip", "folder"])
@pytest.mark.parametrize("how", ["deleted", "cancelled"])
async def test_the_same_zip_again_brings_back_what_was_deleted_or_cancelled_by_hand(how: str, source: str, bench: Bench) -> None:
    (bench.folder / "in").mkdir()
    path = bench.zip(FILES, "in/batch.zip")
    path = path if source == "zip" else path.parent
    submit_batch(path, batch_id="b")
    await bench.unpack()
    doc_id, place = one_document(bench)
    if how == "cancelled":
        cancel_document(doc_id)
    bench.finish()
    if how == "deleted":
        assert delete_document(doc_id)
    bench.settle("b")
    others = bench.all("SELECT doc_id, version, claim, updated_at FROM file_extractions WHERE doc_id <> %s ORDER BY 1", doc_id)
    assert submit_batch(path, batch_id="b").outcome == "new_run"
    await bench.unpack()
    assert bench.documents()[place] == "queued"
    assert bench.all("SELECT doc_id, version, claim, updated_at FROM file_extractions WHERE doc_id <> %s ORDER BY 1", doc_id) == others
    bench.finish()
    assert bench.settle("b") == "completed"
    assert submit_batch(path, batch_id="b").outcome == "unchanged"


async def test_the_same_zip_again_unpacks_the_rest_of_one_that_broke_off_in_the_middle(bench: Bench) -> None:
    path = bench.zip(FILES)
    submit_batch(path, batch_id="b")

    def fill_up(_: str) -> None:
        if len(bench.calls) == 3:
            raise RetryableError("The storage is full.")

    bench.before_call = fill_up
    await bench.unpack(max_retry_attempts=0)
    bench.finish()
    assert (bench.settle("b"), len(bench.documents())) == ("completed_with_errors", 3)
    bench.before_call = lambda _: None
    assert submit_batch(path, batch_id="b").outcome == "new_run"
    await bench.unpack()
    assert len(bench.documents()) == len(FILES)


async def test_the_same_zip_again_does_nothing_where_an_archive_inside_is_bad_for_good(bench: Bench) -> None:
    path = bench.zip({"a.txt": "a", "bad.zip": b"PK\x03\x04 and nothing more"})
    submit_batch(path, batch_id="b")
    await bench.unpack()
    bench.finish()
    assert bench.settle("b") == "completed_with_errors"
    assert submit_batch(path, batch_id="b").outcome == "unchanged"


async def test_a_document_that_was_deleted_while_its_archive_waits_for_a_worker_does_not_come_back(bench: Bench) -> None:
    path = bench.zip(FILES)
    submit_batch(path, batch_id="b")

    def die(_: str) -> None:
        if len(bench.calls) == 3:
            raise Interrupted

    bench.before_call = die
    with pytest.raises(Interrupted):
        await bench.unpack()
    doc_id, place = one_document(bench)
    assert delete_document(doc_id)
    bench.before_call = lambda _: None
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'todo' WHERE task_name = 'unpack'")
    await bench.unpack()
    assert set(bench.documents()) == set(FILES) - {place}
    bench.finish()
    assert bench.settle("b") == "completed"
    assert submit_batch(path, batch_id="b").outcome == "new_run", "somebody who submits it again wants it"
    await bench.unpack()
    assert set(bench.documents()) == set(FILES)


async def test_a_zip_submitted_again_while_it_is_unpacked_brings_back_what_was_deleted_before(bench: Bench) -> None:
    path = bench.zip(FILES)
    submit_batch(path, batch_id="b")

    def die(_: str) -> None:
        if len(bench.calls) == 3:
            raise Interrupted

    bench.before_call = die
    with pytest.raises(Interrupted):
        await bench.unpack()
    doc_id, _ = one_document(bench)
    assert submit_batch(path, batch_id="b").outcome == "unchanged", "the rest of it is on its way"
    assert delete_document(doc_id)
    assert submit_batch(path, batch_id="b").outcome == "new_run"
    assert submit_batch(path, batch_id="b").outcome == "unchanged"
    bench.before_call = lambda _: None
    await bench.unpack()
    assert set(bench.documents()) == set(FILES)


async def test_what_was_deleted_before_a_zip_is_submitted_comes_back_also_where_the_transaction_is_older(
    bench: Bench, database: str
) -> None:
    path = bench.zip(FILES)
    submit_batch(path, batch_id="b")
    await bench.unpack()
    bench.finish()
    bench.settle("b")
    doc_id, _ = one_document(bench)
    with psycopg.connect(database) as application:
        application.execute("SELECT")
        assert delete_document(doc_id)
        assert submit_batch(path, batch_id="b", connection=application).outcome == "new_run"
    await bench.unpack()
    assert set(bench.documents()) == set(FILES)
    bench.finish()
    assert bench.settle("b") == "completed"
    moments = [moment["event"] for moment in bench.one("SELECT ui_json -> 'timeline' FROM run_summaries ORDER BY id DESC LIMIT 1")[0]]
    assert moments[:3] == ["submitted", "sealed", "unpacked"]


async def test_a_document_that_was_cancelled_after_its_zip_was_submitted_again_stays_so(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    await bench.unpack()
    ids = dict(bench.all("SELECT source_path, doc_id FROM file_extractions"))
    again = submit_batch(bench.zip(FILES | {"d1/f01.txt": "other text"}), batch_id="b")
    for place in ("d0/f00.txt", "d1/f01.txt"):
        cancel_document(ids[place])
    await bench.unpack()
    assert bench.documents() == dict.fromkeys(FILES, "queued") | {"d0/f00.txt": "cancelled"}, "other content goes on"
    assert bench.one("SELECT count(*) FROM file_extractions WHERE run_id = %s", again.run_id) == (len(FILES),)


async def test_a_zip_submitted_once_more_takes_up_what_was_cancelled_before_it_was_unpacked(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    await bench.unpack()
    path = bench.zip(FILES | {"d1/f01.txt": "other text"})
    submit_batch(path, batch_id="b")
    assert submit_batch(path, batch_id="b").outcome == "unchanged"
    cancel_document(one_document(bench)[0])
    assert submit_batch(path, batch_id="b").outcome == "new_run"
    assert submit_batch(path, batch_id="b").outcome == "unchanged"
    await bench.unpack()
    assert bench.documents() == dict.fromkeys(FILES, "queued")


async def test_an_entry_whose_document_is_gone_before_it_is_accepted_is_taken_in_again(
    bench: Bench, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    await bench.unpack()
    doc_id, _ = one_document(bench)
    with psycopg.connect(database) as somebody:
        somebody.execute("SELECT delete_document(%s)", [doc_id])  # before the zip is submitted again, not to be seen until after the look
        submit_batch(bench.zip(FILES | {"new.txt": "new"}), batch_id="b")

        async def at(point: str, _: str) -> None:
            if point == "unpack_stored":
                somebody.commit()

        monkeypatch.setattr(faults, "at", at)
        await bench.unpack()
    assert bench.documents() == dict.fromkeys([*FILES, "new.txt"], "queued")
    assert bench.one("SELECT count(DISTINCT run_id), count(*) FROM file_extractions") == (1, len(FILES) + 1)


@pytest.mark.parametrize("how", ["deleted", "cancelled"])
async def test_an_unpacker_that_was_paused_undoes_nothing_that_was_done_to_its_documents_since(
    how: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    done: list[str] = []

    def die(_: str) -> None:
        if len(bench.calls) == 5:  # two listings, a group each, and the next one of the second unpacker
            raise Interrupted

    async def at(point: str, _: str) -> None:
        if point == "unpack_stored" and not done:
            done.append("")
            bench.before_call = die
            with pytest.raises(Interrupted):
                await bench.unpacker().run(archive)
            bench.before_call = lambda _: None
            doc_id, done[0] = one_document(bench)
            bench.conn.execute("SELECT delete_document(%s)" if how == "deleted" else "SELECT cancel_document(%s)", [doc_id])

    monkeypatch.setattr(faults, "at", at)
    await bench.unpacker().run(archive)
    assert bench.one("SELECT state FROM batch_archives") == ("unpacked",)
    left = {} if how == "deleted" else {done[0]: "cancelled"}
    assert bench.documents() == {name: "queued" for name in FILES if name != done[0]} | left
    # What it had stored for the deleted one goes.
    bench.finish()
    for file in bench.settings.storage_base_path.glob("uploads/*/*"):
        os.utime(file, (1, 1))
    while remove_noted_files(bench.settings, bench.conn):
        pass
    needed = {row[0] for row in bench.all("SELECT file_path FROM file_extractions UNION SELECT file_path FROM batch_archives")}
    assert {
        str(file.relative_to(bench.settings.storage_base_path)) for file in bench.settings.storage_base_path.glob("uploads/*/*")
    } == needed


async def test_an_archive_that_broke_the_shared_limits_takes_nothing_of_them(bench: Bench) -> None:
    large, small = zip_bytes({"x.txt": b"a" * 700_000}), zip_bytes({"y.txt": "b"})
    submit_batch(bench.zip({"f.txt": b"c" * 400_000, "large.zip": large, "small.zip": small}), batch_id="b")
    await bench.unpack(max_archive_unpacked_mb=1)
    assert dict(bench.all("SELECT entry_path, state FROM batch_archives")) == {
        "": "unpacked", "large.zip/": "failed", "small.zip/": "unpacked",
    }  # fmt: skip


async def test_an_archive_and_a_folder_of_the_same_name_are_told_apart(bench: Bench) -> None:
    entries = [Raw(b"x.zip", zip_bytes({"a.txt": "inside"})), Raw(b"x.zip/a.txt", b"beside")]
    submit_batch(bench.zip(raw_zip(entries)), batch_id="b")
    await bench.unpack()
    assert bench.documents() == {"x.zip/a.txt": "queued", "x (2).zip/a.txt": "queued"}


async def test_what_was_stored_while_the_batch_was_being_deleted_goes_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_batch(bench.zip({**FILES, "in.zip": zip_bytes({"x.txt": "x"})}), batch_id="b")

    async def delete(point: str, _: str) -> None:
        if point == "unpack_stored":
            await asyncio.to_thread(delete_batch, "b")

    monkeypatch.setattr("jobs.faults.at", delete)
    await bench.unpack()
    files = [path for path in bench.settings.storage_base_path.rglob("*") if path.is_file()]
    for path in files:
        os.utime(path, (0, 0))
    assert len(files) > 1

    def gone() -> bool:
        remove_noted_files(bench.settings, bench.conn)
        return not any(path.exists() for path in files)

    wait_for(gone, "the files to be removed; transactions of other tests on the same server are waited for")


OLD: dict[str, bytes | str] = {**FILES, "in.zip": zip_bytes({"x.txt": "x"}), "only before.txt": "old"}
NEW: dict[str, bytes | str] = {
    "first.txt": "new",
    **{name: f"{text!r} and more" for name, text in FILES.items()},
    "in.zip": zip_bytes({"x.txt": "changed"}),
}


def in_storage(bench: Bench, files: Mapping[str, bytes | str]) -> Path:
    """Put a zip to where it is submitted from by its path, as a rename does: there is always one, old or new."""
    path = bench.settings.storage_base_path / "inbox" / "x.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_zip(path.with_name("coming"), files).replace(path)
    return path


@pytest.mark.parametrize("when", ["between groups", "while it is read", "while it waits for a worker"])
async def test_a_zip_that_is_replaced_in_mid_unpack_becomes_a_batch_of_what_it_holds_now(when: str, bench: Bench) -> None:
    in_storage(bench, OLD)
    bench.conn.execute("SELECT submit_batch('inbox/x.zip', 'b', metadata => '{\"year\": 2026}', priority => 4)")
    (first,) = bench.one("SELECT run_id FROM processing_jobs")

    def disturb(_: str) -> None:
        if len(bench.calls) == 3 and when == "while it waits for a worker":
            bench.stopping = True
        elif len(bench.calls) == 3:
            in_storage(bench, NEW)

    if when == "while it is read":
        bench.after_call = disturb
    else:
        bench.before_call = disturb
    await bench.unpacker().run(bench.jobs()[0])
    assert bench.one("SELECT state, retry_count FROM batch_archives WHERE entry_path = ''") == ("unpacking", int(not bench.stopping))
    assert set(bench.documents().values()) == {"queued"}, "no entry is failed for a zip that is not its own"
    bench.stopping, bench.before_call, bench.after_call = False, lambda _: None, lambda _: None
    in_storage(bench, NEW)
    await bench.unpack()
    batch = bench.one(
        "SELECT metadata, priority, total_files, zip_path FROM processing_jobs JOIN batch_archives a USING (run_id) WHERE a.depth = 1"
    )
    assert batch == ({"year": 2026}, 4, 12, "inbox/x.zip")
    now = bench.all("SELECT d.source_path, d.content_sha256, d.state::text FROM file_extractions d JOIN processing_jobs USING (run_id)")
    texts = {**NEW, "in.zip/x.txt": "changed"}
    del texts["in.zip"]
    assert sorted(now) == sorted((path, hashlib.sha256(str(text).encode()).hexdigest(), "queued") for path, text in texts.items())
    assert bench.one("SELECT count(*) = count(DISTINCT source_path) FROM file_extractions") == (True,)
    assert bench.all("SELECT DISTINCT run_id, state FROM batch_archives WHERE run_id <> %s", first) == [
        (*bench.one("SELECT run_id FROM processing_jobs"), "unpacked")
    ]
    assert bench.one("SELECT count(*) FROM dead_letters") == (0,)
    bench.finish()
    assert bench.settle("b") == "completed"


async def test_a_zip_that_was_only_touched_is_gone_on_with(bench: Bench) -> None:
    path = in_storage(bench, OLD)
    bench.conn.execute("SELECT submit_batch('inbox/x.zip', 'b')")
    before = bench.one("SELECT run_id FROM processing_jobs")

    def touch(_: str) -> None:
        if len(bench.calls) == 3:
            path.touch()

    bench.before_call = touch
    await bench.unpack()
    assert bench.one("SELECT run_id FROM processing_jobs") == before
    assert bench.one("SELECT count(*), max(version) FROM file_extractions WHERE state = 'queued'") == (12, 1)
    assert bench.all("SELECT DISTINCT state FROM batch_archives") == [("unpacked",)]


async def test_a_zip_that_was_replaced_revives_no_batch_that_was_cancelled_meanwhile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    in_storage(bench, OLD)
    bench.conn.execute("SELECT submit_batch('inbox/x.zip', 'b')")
    bench.stopping = True
    await bench.unpacker().run(bench.jobs()[0])
    in_storage(bench, NEW)

    async def cancel(point: str, _: str) -> None:
        if point == "unpack_begun":
            await asyncio.to_thread(cancel_batch, "b")

    monkeypatch.setattr("jobs.faults.at", cancel)
    bench.stopping = False
    await bench.unpack()
    assert bench.one("SELECT status FROM processing_jobs") == ("cancelled",)
    assert bench.all("SELECT state FROM batch_archives") == [("cancelled",)]
    assert bench.documents() == {}


async def test_a_zip_that_was_replaced_waits_for_whoever_holds_its_batch(bench: Bench, database: str) -> None:
    in_storage(bench, OLD)
    bench.conn.execute("SELECT submit_batch('inbox/x.zip', 'b')")
    bench.stopping = True
    await bench.unpacker().run(bench.jobs()[0])
    in_storage(bench, NEW)
    bench.stopping = False
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM processing_jobs FOR UPDATE")
        await bench.unpacker().run(bench.jobs()[0])
        holder.rollback()
    assert bench.one("SELECT state, retry_count FROM batch_archives") == ("unpacking", 0)
    await bench.unpack()
    assert set(bench.documents().values()) == {"queued"}
    assert len(bench.documents()) == 12


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("moment", ["waiting", "begun", "listed", "done"])
async def test_an_archive_that_an_open_transaction_holds_is_put_off_and_not_waited_for(
    bench: Bench, database: str, monkeypatch: pytest.MonkeyPatch, moment: str, ending: str
) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    with psycopg.connect(database) as holder:

        async def reach(point: str, _: Any) -> None:
            if point == moment:
                holder.execute("SELECT cancel_batch('b')")

        monkeypatch.setattr(unpacking, "reach", reach)
        await reach("waiting", None)
        run = asyncio.create_task(bench.unpacker().run(archive))
        await asyncio.wait({run}, timeout=20)
        put_off = run.done()
        waiting = bench.jobs()
        requeued = bench.all("SELECT requeue_lost_archive(id, 3) FROM batch_archives")
        holder.execute(ending)
    await run
    assert put_off
    assert waiting == [archive], "nothing goes on with it when the transaction has ended"
    assert requeued == [(None,)]
    monkeypatch.undo()
    before = len(bench.documents())
    assert before == (10 if moment == "done" else 0)
    bench.calls.clear()
    await bench.unpack()
    assert bench.one("SELECT state, retry_count, requeue_count FROM batch_archives") == (
        "cancelled" if ending == "commit" else "unpacked", 0, 0,
    )  # fmt: skip
    assert len(bench.documents()) == (before if ending == "commit" else 10)
    assert bench.one("SELECT coalesce(max(version), 1) FROM file_extractions") == (1,)
    if moment == "done":
        assert "unpack_members" not in bench.calls, "what is in the tables was unpacked again"


async def test_an_archive_that_has_gone_from_storage_is_to_blame_and_not_its_entries(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    stored = bench.settings.storage_base_path / bench.one("SELECT zip_path FROM processing_jobs")[0]

    def remove(_: str) -> None:
        if len(bench.calls) == 3:
            stored.unlink()

    bench.before_call = remove
    await bench.unpack()
    assert set(bench.documents().values()) == {"queued"}
    state, message = bench.one("SELECT state, error_message FROM batch_archives")
    assert (state, "does not exist" in message) == ("failed", True)


def away(bench: Bench, gone: bool) -> None:
    base = bench.settings.storage_base_path
    elsewhere = base.with_name("elsewhere")
    (base if gone else elsewhere).rename(elsewhere if gone else base)


async def unpack_next(bench: Bench, **changes: Any) -> None:
    archive = bench.jobs()[0]
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE task_name = 'unpack' AND status = 'todo'")
    await bench.unpacker(retry_base_delay_seconds=0.01, **changes).run(archive)


@pytest.mark.parametrize("moment", ["before", "in mid-work"])
async def test_an_archive_outlives_a_storage_that_is_not_mounted(bench: Bench, moment: str) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    if moment == "before":
        away(bench, gone=True)
    else:
        bench.before_call = lambda _: away(bench, gone=True) if len(bench.calls) == 3 else None
    for _ in range(bench.settings.max_retry_attempts + 2):
        await unpack_next(bench)
        bench.before_call = lambda _: None
        state, attempts, message, waits = bench.one(
            "SELECT state, retry_count, error_message, waiting_since IS NOT NULL FROM batch_archives"
        )
        assert (state, attempts, waits) == ("unpacking", 0, True)
        assert "is not there: is it mounted?" in message
    assert not bench.settings.storage_base_path.exists(), "nothing is made in its place"
    away(bench, gone=False)
    await unpack_next(bench)
    assert bench.one("SELECT state, retry_count, waiting_since FROM batch_archives") == ("unpacked", 0, None)
    assert bench.documents() == dict.fromkeys(FILES, "queued")


async def test_an_archive_waits_for_the_storage_no_longer_than_a_document_does(bench: Bench) -> None:
    submit_batch(bench.zip(FILES), batch_id="b")
    away(bench, gone=True)
    await unpack_next(bench)
    bench.conn.execute("UPDATE batch_archives SET waiting_since = now() - interval '73 hours'")
    await unpack_next(bench)
    state, message = bench.one("SELECT state, error_message FROM batch_archives")
    assert state == "failed"
    assert "longer than MAX_WAIT_HOURS=72. Last: The storage at" in message
