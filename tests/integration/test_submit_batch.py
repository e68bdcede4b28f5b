"""The front door for batches: what it takes and refuses, and that it joins the caller's transaction without getting in anybody's way."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_batch, submit_batch_async
from jobs.arguments import absolute_path, path_doc_id
from jobs.batch.steps import run_steps
from jobs.front import close_async
from models.errors import SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from tests.archives import write_zip
from tests.running import REPOSITORY

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
