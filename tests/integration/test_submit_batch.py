"""The front door for batches: what it takes and refuses, and that it joins the caller's transaction without getting in anybody's way."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import run_summary, submit_batch, submit_batch_async, sync_folder, update_batch
from jobs.arguments import absolute_path, path_doc_id
from jobs.batch import submit_folder
from jobs.batch.steps import run_steps
from jobs.front import close_async
from models.errors import SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from tests.archives import write_zip
from tests.running import REPOSITORY
from tests.summaries import check

pytestmark = pytest.mark.usefixtures("front_door")


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "batch.zip", {"a.txt": "a", "b/c.txt": "c"})


def count(conn: psycopg.Connection, table: str) -> int:
    row = conn.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


def test_a_zip_is_stored_and_has_one_waiting_job(batch: Path, conn: psycopg.Connection, settings: Settings) -> None:
    made = submit_batch(batch)
    assert (made, made.outcome) == (path_doc_id("default", batch), "accepted")
    row = conn.execute(
        "SELECT b.zip_path, b.source_path, b.run_id, a.file_path FROM processing_jobs b JOIN batch_archives a USING (run_id)"
    ).fetchone()
    assert row is not None
    assert (settings.storage_base_path / row[0]).read_bytes() == batch.read_bytes()
    assert row[1:] == (str(batch), made.run_id, row[0])
    job = conn.execute(
        "SELECT task_name, queue_name, queueing_lock = 'unpack:' || (args->>'archive_id') FROM procrastinate_jobs"
    ).fetchall()
    assert job == [("unpack", "cpu", True)]


async def test_the_async_twin_does_the_same(batch: Path, conn: psycopg.Connection) -> None:
    assert (await submit_batch_async(batch)).outcome == "accepted"
    assert (await submit_batch_async(str(batch))).outcome == "unchanged"
    folder = batch.parent / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert (await submit_batch_async(folder)).outcome == "accepted"
    await close_async()


def test_a_list_of_files_is_a_batch_whatever_its_order(tmp_path: Path, batch: Path, conn: psycopg.Connection) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    first = submit_batch([tmp_path / "a.txt", str(tmp_path / "b.txt"), batch])
    again = submit_batch([batch, tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "a.txt"])
    assert (first.outcome, first.archives, again, again.outcome, again.run_id) == ("accepted", 1, first, "unchanged", first.run_id)
    assert conn.execute("SELECT source_path, source_prefix FROM processing_jobs JOIN batch_archives USING (run_id)").fetchone() == (
        "",
        f"{batch}/",
    )
    assert count(conn, "file_extractions") == 2


def test_a_list_tells_what_it_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    made = submit_batch([tmp_path / "a.txt", tmp_path / "missing.txt"])
    assert [name for name, _ in made.refused] == [str(tmp_path / "missing.txt")]


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "text",
        "word",
        "pipe",
        "empty folder",
        "empty list",
        "bytes",
        "number",
        "all missing",
        "too large",
        "long name",
        "NUL",
        "empty name",
    ],
)
def test_what_is_no_batch_is_refused_by_name_and_nothing_is_stored(
    case: str, tmp_path: Path, batch: Path, conn: psycopg.Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "word.zip").write_bytes((REPOSITORY / "samples" / "warranty-policy.docx").read_bytes())
    with (tmp_path / "large.zip").open("wb") as large:
        large.write(batch.read_bytes())
        large.truncate(1_000_001)
    monkeypatch.setenv("MAX_ARCHIVE_MB", "1")
    load_settings.cache_clear()
    cases = {
        "missing": (tmp_path / "no.zip", "no.zip"), "text": (tmp_path / "text.zip", "text.zip"), "word": (tmp_path / "word.zip", "Word"),
        "pipe": (tmp_path / "pipe.zip", "pipe"), "empty folder": (tmp_path / "empty", "no file"), "empty list": ([], "several paths"),
        "bytes": (b"PK", "several paths"), "number": (7, "several paths"), "all missing": ([tmp_path / "x", tmp_path / "y"], "no file"),
        "too large": (tmp_path / "large.zip", "MAX_ARCHIVE_MB"), "long name": ("x" * 5000, "too long a name"), "NUL": ("a\0b", "NUL"),
        "empty name": ("", "must not be empty"),
    }  # fmt: skip
    source: Any = cases[case][0]
    with pytest.raises(SubmitError) as caught:
        submit_batch(source)
    assert cases[case][1] in str(caught.value)
    assert count(conn, "processing_jobs") == 0
    uploads = settings.storage_base_path / "uploads"
    assert not uploads.exists() or list(uploads.iterdir()) == []


@pytest.mark.parametrize(
    "bad",
    [{"batch_id": "x" * 201}, {"batch_id": "a\nb"}, {"batch_id": ""}, {"user_id": ""}, {"metadata": [1]}, {"priority": 2**31}],
    ids=repr,
)
def test_a_bad_argument_is_refused(bad: dict[str, Any], batch: Path, conn: psycopg.Connection) -> None:
    with pytest.raises(SubmitError):
        submit_batch(batch, **bad)
    assert count(conn, "processing_jobs") == 0


def test_another_users_batch_id_is_refused_without_saying_whose(
    batch: Path, tmp_path: Path, conn: psycopg.Connection, settings: Settings
) -> None:
    submit_batch(batch, batch_id="b", user_id="ann")
    stored = sorted(settings.storage_base_path.rglob("*"))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("a")
    for source in (batch, tmp_path / "f"):
        with pytest.raises(SubmitError) as caught:
            submit_batch(source, batch_id="b", user_id="bob")
        assert "ann" not in str(caught.value)
    assert sorted(settings.storage_base_path.rglob("*")) == stored
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute("SELECT submit_batch('uploads/x', batch_id => 'b', user_id => 'bob')")


@pytest.mark.parametrize("what", ["zip", "folder", "list"])
def test_a_batch_lives_and_dies_with_the_callers_transaction(
    what: str, batch: Path, tmp_path: Path, database: str, conn: psycopg.Connection
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    write_zip(folder / "b.zip", {"b.txt": "b"})
    source: Any = {"zip": batch, "folder": folder, "list": [folder / "a.txt", folder / "b.zip", folder / "missing"]}[what]
    tables = ("processing_jobs", "batch_archives", "file_extractions", "procrastinate_jobs")
    with psycopg.connect(database) as caller:
        assert submit_batch(source, batch_id="b", connection=caller).outcome == "accepted"
        assert [count(conn, table) for table in tables] == [0, 0, 0, 0]
        caller.rollback()
        assert [count(conn, table) for table in tables] == [0, 0, 0, 0]
        assert submit_batch(source, batch_id="b", connection=caller).outcome == "accepted"
        caller.commit()
    assert [count(conn, table) for table in tables] == ([1, 1, 0, 1] if what == "zip" else [1, 1, 1, 2])
    assert submit_batch(source, batch_id="b").outcome == "unchanged"


async def test_the_async_twin_joins_the_callers_transaction_too(batch: Path, database: str, conn: psycopg.Connection) -> None:
    async with await psycopg.AsyncConnection.connect(database) as caller:
        await submit_batch_async(batch, connection=caller)
        await caller.rollback()
    assert count(conn, "processing_jobs") == 0


def test_a_callers_long_transaction_holds_nobody_up(
    batch: Path, tmp_path: Path, database: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "0.1")
    load_settings.cache_clear()
    submit_batch(batch, batch_id="b")
    conn.execute("UPDATE batch_archives SET state = 'unpacked', ended_at = now()")
    write_zip(batch, {"a.txt": "other"})
    with psycopg.connect(database) as caller:
        submit_batch(batch, batch_id="b", connection=caller)
        started = time.monotonic()
        assert conn.execute("SELECT settle_batch('b')").fetchone() == (None,)
        assert time.monotonic() - started < 3, "settling waited for the caller"
        with pytest.raises(SubmitConflict, match="b"):
            submit_batch(batch, batch_id="b")
        caller.commit()
    assert conn.execute("SELECT count(*), count(DISTINCT run_id) FROM batch_archives").fetchone() == (2, 2)
    assert conn.execute("SELECT settle_batch('b')").fetchone() == (None,)


@pytest.fixture
def held_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files, and nobody who waits long."""
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "0.1")
    load_settings.cache_clear()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    return folder


def before_it_ends(holder: psycopg.Connection, submit: Callable[[], Any]) -> Any:
    """Do something in a thread while somebody's transaction is open. A wait without limit ends with the transaction, as an error."""
    with ThreadPoolExecutor(1) as threads:
        try:
            return threads.submit(submit).result(timeout=20)
        finally:
            holder.rollback()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("how", ["folder", "list", "async", "sync", "removed"])
def test_a_batch_that_somebody_holds_is_not_waited_for_for_ever(
    how: str, known: bool, held_folder: Path, database: str, conn: psycopg.Connection
) -> None:
    source: Any = sorted(held_folder.iterdir()) if how == "list" else held_folder
    if known:
        submit_batch(source)
        (held_folder / "b.txt").write_text("other")
    if how == "removed":  # its run is begun without any file that has changed
        (held_folder / "b.txt").unlink()

    def submit() -> Any:
        if how == "sync":
            return sync_folder(held_folder)
        if how != "async":
            return submit_batch(source)

        async def whole() -> str:
            try:
                return await submit_batch_async(source)
            finally:
                await close_async()

        return asyncio.run(whole())

    before = conn.execute("SELECT run_id, sealed_at FROM processing_jobs").fetchall()
    with psycopg.connect(database) as holder:
        submit_batch(source, connection=holder)
        with pytest.raises(SubmitConflict, match="Nothing was submitted"):
            before_it_ends(holder, submit)
    assert conn.execute("SELECT run_id, sealed_at FROM processing_jobs").fetchall() == before


def test_a_batch_that_is_held_when_it_is_to_be_sealed_says_that_a_part_was_submitted(
    held_folder: Path, database: str, conn: psycopg.Connection, settings: Settings
) -> None:
    async def whole(on_file: Any) -> Any:
        try:
            return await submit_folder(load_settings(), held_folder, on_file=on_file)
        finally:
            await close_async()

    with psycopg.connect(database) as holder:

        def hold(_: object) -> None:
            holder.execute("SELECT FROM processing_jobs FOR UPDATE")

        with pytest.raises(SubmitConflict, match="A part of the batch has been submitted"):
            before_it_ends(holder, lambda: asyncio.run(whole(hold)))
    assert submit_batch(held_folder).outcome == "new_run"
    assert conn.execute("SELECT status, direct_files FROM processing_jobs").fetchone() == ("processing", 2)


def test_a_sync_whose_batch_is_held_remembers_nothing_instead_of_waiting(
    held_folder: Path, database: str, conn: psycopg.Connection
) -> None:
    sync_folder(held_folder)
    for path in held_folder.iterdir():
        os.utime(path, (1e9, 1e9))
    time.sleep(2.2)  # until then a file may change again without looking different, and is not remembered at all
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM processing_jobs FOR UPDATE")
        assert before_it_ends(holder, lambda: sync_folder(held_folder)).batch.run_id is None
    assert count(conn, "folder_files") == 0
    sync_folder(held_folder)
    assert count(conn, "folder_files") == 2


def hold_document(holder: psycopg.Connection, path: Path) -> None:
    found = holder.execute("SELECT doc_id FROM file_extractions WHERE source_path = %s FOR UPDATE", [str(path)]).fetchall()
    assert found != []


@pytest.mark.parametrize("batch_id", ["B", "a new one"])
def test_a_batch_all_of_whose_changed_files_are_held_stays_as_it_is(
    batch_id: str, held_folder: Path, database: str, conn: psycopg.Connection
) -> None:
    (held_folder / "b.txt").unlink()
    submit_batch(held_folder, batch_id="B", metadata={"dept": "legal"})
    (held_folder / "a.txt").write_text("other")
    before = conn.execute("SELECT * FROM processing_jobs").fetchall()
    with psycopg.connect(database) as holder:
        hold_document(holder, held_folder / "a.txt")
        with pytest.raises(SubmitConflict, match="Nothing was submitted"):
            submit_batch(held_folder, batch_id=batch_id)
    assert conn.execute("SELECT * FROM processing_jobs").fetchall() == before
    assert submit_batch(held_folder, batch_id=batch_id).outcome == ("new_run" if batch_id == "B" else "accepted")
    assert conn.execute("SELECT version FROM file_extractions").fetchall() == [(2,)]


def test_a_changed_file_that_is_held_is_told_and_its_batch_does_without_no_other(
    held_folder: Path, database: str, conn: psycopg.Connection
) -> None:
    first = submit_batch(held_folder)
    (held_folder / "a.txt").write_text("other")
    with psycopg.connect(database) as holder:
        hold_document(holder, held_folder / "a.txt")
        made = submit_batch(held_folder)
        assert ([name for name, _ in made.refused], made.outcome, made.run_id) == (["a.txt"], "unchanged", first.run_id)
        (held_folder / "b.txt").write_text("other")
        made = submit_batch(held_folder)
        assert ([name for name, _ in made.refused], made.outcome) == (["a.txt"], "new_run")
    assert submit_batch(held_folder).refused == ()
    assert conn.execute("SELECT min(version), count(DISTINCT run_id) FROM file_extractions").fetchone() == (2, 1)


def test_an_unchanged_file_that_is_held_has_the_message_say_what_was_submitted(
    held_folder: Path, database: str, conn: psycopg.Connection
) -> None:
    submit_batch(held_folder)
    (held_folder / "b.txt").write_text("other")
    with psycopg.connect(database) as holder:
        hold_document(holder, held_folder / "a.txt")
        with pytest.raises(SubmitConflict, match="A part of the batch has been submitted, and submitting it again does the rest"):
            submit_batch(held_folder)
    assert submit_batch(held_folder).outcome == "new_run"
    assert conn.execute("SELECT status, direct_files FROM processing_jobs").fetchone() == ("processing", 2)
    assert conn.execute("SELECT version FROM file_extractions ORDER BY source_path").fetchall() == [(1,), (2,)]


def test_a_run_that_an_unchanged_file_cannot_be_taken_into_is_not_begun(held_folder: Path, database: str, conn: psycopg.Connection) -> None:
    submit_batch(held_folder)
    (held_folder / "b.txt").unlink()
    before = conn.execute("SELECT * FROM processing_jobs").fetchall()
    with psycopg.connect(database) as holder:
        hold_document(holder, held_folder / "a.txt")
        with pytest.raises(SubmitConflict, match="Nothing was submitted"):
            submit_batch(held_folder)
    assert conn.execute("SELECT * FROM processing_jobs").fetchall() == before


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_submission_that_waits_for_a_document_does_not_hold_its_batch(
    change: str, held_folder: Path, database: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_batch(held_folder)
    (held_folder / "b.txt").unlink()
    if change == "changed":
        (held_folder / "a.txt").write_text("other")
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "10")
    load_settings.cache_clear()
    with psycopg.connect(database) as holder, ThreadPoolExecutor(1) as threads:
        hold_document(holder, held_folder / "a.txt")
        made = threads.submit(submit_batch, held_folder)
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        while not made.done() and conn.execute(waiting).fetchone() == (0,):
            time.sleep(0.01)
        try:
            assert not made.done()
            assert conn.execute("SELECT FROM processing_jobs FOR UPDATE NOWAIT").rowcount == 1
        finally:
            holder.rollback()
        assert made.result().outcome == "new_run"


def test_files_that_somebody_holds_are_not_each_waited_for(
    held_folder: Path, database: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        (held_folder / f"{number:02}.txt").write_text("words")
    submit_batch(held_folder)
    for number in range(40):
        (held_folder / f"{number:02}.txt").write_text("other")
    (held_folder / "a.txt").write_text("other")
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "1")
    load_settings.cache_clear()
    with psycopg.connect(database) as holder:
        for number in range(40):
            hold_document(holder, held_folder / f"{number:02}.txt")
        made = before_it_ends(holder, lambda: submit_batch(held_folder))
    assert (len(made.refused), made.outcome) == (40, "new_run")
    assert conn.execute("SELECT source_path FROM file_extractions WHERE version = 2").fetchall() == [(str(held_folder / "a.txt"),)]


def test_a_batch_that_is_held_once_its_run_has_begun_has_no_other_file_refused(
    held_folder: Path, database: str, conn: psycopg.Connection, settings: Settings
) -> None:
    for number in range(40):
        (held_folder / f"{number:02}.txt").write_text("words")
    told: list[Any] = []

    async def whole(on_file: Any) -> Any:
        try:
            return await submit_folder(load_settings(), held_folder, on_file=on_file)
        finally:
            await close_async()

    with psycopg.connect(database) as holder:

        def hold(result: Any) -> None:
            told.append(result)
            holder.execute("SELECT FROM processing_jobs FOR UPDATE")

        with pytest.raises(SubmitConflict, match="A part of the batch has been submitted"):
            before_it_ends(holder, lambda: asyncio.run(whole(hold)))
    assert [result.error for result in told] == [None] * count(conn, "file_extractions")
    assert submit_batch(held_folder).outcome == "new_run"
    assert conn.execute("SELECT direct_files FROM processing_jobs").fetchone() == (42,)


def test_a_batch_none_of_whose_documents_can_be_had_is_not_begun(held_folder: Path, conn: psycopg.Connection) -> None:
    for path in held_folder.iterdir():
        taken = path_doc_id("default", path)
        conn.execute("SELECT submit_document('uploads/b', doc_id => %s, user_id => 'bob')", [taken])
    with pytest.raises(SubmitError, match="is taken"):
        submit_batch(held_folder)
    assert count(conn, "processing_jobs") == 0


@pytest.mark.parametrize("what", ["zip", "folder", "sync"])
def test_a_batch_that_is_submitted_again_without_metadata_keeps_what_it_has(
    what: str, batch: Path, tmp_path: Path, conn: psycopg.Connection
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")

    def submit(**given: Any) -> str:
        if what == "sync":
            return sync_folder(folder, **given).batch_id
        return submit_batch(batch if what == "zip" else folder, **given)

    batch_id = submit(metadata={"dept": "legal"})
    update_batch(batch_id, metadata={"label": 1})
    write_zip(batch, {"a.txt": "other"})
    (folder / "b.txt").write_text("b")
    submit()
    known = "SELECT metadata, count(*) OVER () FROM processing_jobs"
    assert conn.execute(known).fetchone() == ({"dept": "legal", "label": 1}, 1)
    write_zip(batch, {"a.txt": "and another"})
    (folder / "c.txt").write_text("c")
    submit(metadata={"year": 2026})
    assert conn.execute(known).fetchone() == ({"year": 2026}, 1)


def test_the_same_zip_from_many_threads_at_once_is_one_batch(batch: Path, conn: psycopg.Connection) -> None:
    async def all_at_once() -> list[str]:
        return [str(made) for made in await asyncio.gather(*(asyncio.to_thread(submit_batch, batch) for _ in range(6)))]

    assert len(set(asyncio.run(all_at_once()))) == 1
    assert count(conn, "processing_jobs") == 1
    live = "SELECT count(*) FROM batch_archives a JOIN processing_jobs b USING (run_id) WHERE a.state = 'waiting'"
    assert conn.execute(live).fetchone() == (1,)


def test_a_zip_that_lies_in_storage_is_submitted_by_sql(conn: psycopg.Connection) -> None:
    row = conn.execute(
        "SELECT submit_batch('uploads/x.zip', metadata => '{\"k\": 1}', priority => 3), submit_batch('uploads/y.zip', 'mine')"
    ).fetchone()
    assert row is not None
    assert row[1] == "mine"
    found = conn.execute("SELECT batch_id, zip_path, sealed_at IS NOT NULL, status FROM processing_jobs ORDER BY id").fetchall()
    assert found == [(row[0], "uploads/x.zip", True, "pending"), ("mine", "uploads/y.zip", True, "pending")]
    assert conn.execute("SELECT priority FROM procrastinate_jobs ORDER BY id").fetchall() == [(3,), (0,)]
    conn.execute("SELECT submit_batch('uploads/y.zip', 'mine', content_sha256 => repeat('1', 64))")
    before = conn.execute("SELECT xmin::text, run_id FROM processing_jobs").fetchall()
    conn.execute("SELECT submit_batch('uploads/y.zip', 'mine', content_sha256 => repeat('1', 64))")
    assert conn.execute("SELECT xmin::text, run_id FROM processing_jobs").fetchall() == before
    assert conn.execute("SELECT submit_batch('uploads/x.zip', user_id => NULL)").fetchone() == row[:1]


@pytest.mark.parametrize("path", ["/etc/x.zip", "../x.zip", "a\\b.zip", ""])
def test_sql_refuses_a_path_that_leaves_storage(path: str, conn: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        conn.execute("SELECT submit_batch(%s)", [path])


def test_the_steps_see_an_error_where_it_happens(settings: Settings) -> None:
    def steps() -> Any:
        try:
            yield lambda: 1 / 0
        except ZeroDivisionError:
            return (yield lambda: "seen")

    assert run_steps(steps(), settings, None) == "seen"
    assert absolute_path("x").is_absolute()


def test_files_and_archives_of_a_list_are_called_by_their_names_in_its_summary(tmp_path: Path, conn: psycopg.Connection) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and nothing more")
    batch = submit_batch([tmp_path / "a.txt", tmp_path / "bad.zip"])
    conn.execute("SELECT end_archive(id, 'failed', 'no') FROM batch_archives")
    conn.execute("SELECT cancel_document(doc_id) FROM file_extractions")
    conn.execute("SELECT settle_batch(%s)", [batch])
    summary = run_summary(batch)
    assert summary is not None
    check(summary.ui_json, summary.nested_summary)
    assert [card["path"] for card in summary.ui_json["files"]] == ["a.txt", "bad.zip"]
    assert [folder["path"] for folder in summary.nested_summary["folders"]] == [""]
