"""Folders as batches: submitted again, they do only what has changed."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs.arguments import absolute_path, path_doc_id
from jobs.batch import BatchSubmission, Entry, FileResult, folders, storing, submit_file, submit_folder
from jobs.batch.submission import Whole
from jobs.front import close_async
from models.errors import DocmillError
from models.settings import Settings


@pytest.fixture
async def front(settings: Settings) -> AsyncIterator[Settings]:
    yield settings
    await close_async()


def outcomes(made: BatchSubmission) -> dict[str, str]:
    return {file.name: file.submission.outcome if file.submission is not None else "refused" for file in made.files}


def written(conn: psycopg.Connection, table: str) -> list[Any]:
    """Every row of a table with the transaction that wrote it: equal before and after means that nothing was written."""
    return conn.execute(f"SELECT t.xmin::text, t.ctid::text, t.* FROM {table} AS t ORDER BY 1, 2").fetchall()


TABLES = ("processing_jobs", "file_extractions", "document_events", "procrastinate_jobs")


async def test_a_folder_is_one_sealed_batch_of_all_its_files(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    (folder / ".DS_Store").write_text("x")
    made = await submit_folder(front, folder, user_id="ann", priority=3, metadata={"year": 2026})
    assert outcomes(made) == {"a.txt": "accepted", "b.txt": "accepted", "sub/c.txt": "accepted"}
    assert made.skipped == 1
    row = conn.execute(
        "SELECT batch_id, run_id, user_id, total_files, status, sealed_at IS NOT NULL, metadata FROM processing_jobs"
    ).fetchone()
    assert row == (path_doc_id("ann", folder), made.run_id, "ann", 3, "processing", True, {"year": 2026})
    documents = conn.execute(
        "SELECT file_name, source_path, priority, batch_id, run_id FROM file_extractions ORDER BY source_path"
    ).fetchall()
    assert documents == [(Path(n).name, str(folder / n), 3, made.batch_id, made.run_id) for n in ("a.txt", "b.txt", "sub/c.txt")]


async def test_an_unchanged_folder_writes_nothing(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    (folder / "pipe").symlink_to("nowhere")  # refused each time, which begins no run either
    await submit_folder(front, folder)
    before = {table: written(conn, table) for table in TABLES}
    made = await submit_folder(front, folder)
    assert outcomes(made) == {"a.txt": "unchanged", "b.txt": "unchanged", "pipe": "refused", "sub/c.txt": "unchanged"}
    assert made.run_id is None
    assert {table: written(conn, table) for table in TABLES} == before


async def test_a_changed_file_makes_one_new_run_that_holds_all_files_and_defers_that_file_alone(
    front: Settings, folder: Path, conn: psycopg.Connection
) -> None:
    first = await submit_folder(front, folder)
    conn.execute("DELETE FROM procrastinate_jobs")
    (folder / "b.txt").write_text("other text")
    (folder / "d.txt").write_text("new")
    second = await submit_folder(front, folder)
    assert outcomes(second) == {"a.txt": "unchanged", "b.txt": "new_version", "d.txt": "accepted", "sub/c.txt": "unchanged"}
    assert second.batch_id == first.batch_id
    assert second.run_id not in {None, first.run_id}
    assert conn.execute("SELECT total_files, sealed_at IS NOT NULL FROM processing_jobs").fetchall() == [(4, True)]
    assert conn.execute("SELECT DISTINCT run_id FROM file_extractions").fetchall() == [(second.run_id,)]
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs").fetchone() == (2,)


async def test_an_archive_that_goes_away_while_the_folder_is_submitted_keeps_no_other_file_from_going_on(
    front: Settings, folder: Path, conn: psycopg.Connection
) -> None:
    for name in ("y.zip", "z.zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("in.txt", f"text in {name}")

    def remove(_: FileResult) -> None:
        (folder / "y.zip").unlink(missing_ok=True)

    made = await submit_folder(front, folder, on_file=remove)
    assert outcomes(made) == {"a.txt": "accepted", "b.txt": "accepted", "sub/c.txt": "accepted", "y.zip": "refused"}
    assert "does not exist" in str(made.files[-1].error)
    assert made.archives == ["z.zip"]
    assert conn.execute("SELECT sealed_at IS NOT NULL, direct_files FROM processing_jobs").fetchall() == [(True, 3)]
    assert conn.execute("SELECT entry_path FROM batch_archives").fetchall() == [("z.zip/",)]


async def test_a_folder_whose_only_file_is_an_archive_that_goes_away_begins_no_batch(
    front: Settings, tmp_path: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    with zipfile.ZipFile(tmp_path / "one" / "y.zip", "w") as archive:
        archive.writestr("in.txt", "text")

    def read_and_remove(*given: Any) -> str:
        digest = storing.digest_of(*given)
        (tmp_path / "one" / "y.zip").unlink()
        return digest

    monkeypatch.setattr(folders, "digest_of", read_and_remove)
    made = await submit_folder(front, tmp_path / "one")
    assert (outcomes(made), made.archives, made.run_id) == ({"y.zip": "refused"}, [], None)
    assert conn.execute("SELECT count(*) FROM processing_jobs").fetchone() == (0,)


async def test_a_vanished_file_leaves_the_run_but_stays_a_document(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    first = await submit_folder(front, folder)
    (folder / "a.txt").unlink()
    second = await submit_folder(front, folder)
    assert set(outcomes(second).values()) == {"unchanged"}
    assert conn.execute("SELECT count(*) FILTER (WHERE run_id = %s), count(*) FROM file_extractions", [second.run_id]).fetchone() == (2, 3)
    assert first.run_id != second.run_id
    assert (await submit_folder(front, folder)).run_id is None


async def test_a_run_that_was_cut_short_is_finished_by_the_next(
    front: Settings, folder: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_TOGETHER", 2)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await submit_folder(front, folder, on_file=stop)
    assert conn.execute("SELECT sealed_at FROM processing_jobs").fetchone() == (None,)
    made = await submit_folder(front, folder)
    assert outcomes(made) == {"a.txt": "unchanged", "b.txt": "unchanged", "sub/c.txt": "accepted"}
    assert conn.execute("SELECT total_files, sealed_at IS NOT NULL FROM processing_jobs").fetchone() == (3, True)


async def test_a_refused_file_keeps_no_neighbour_out(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    small = front.model_copy(update={"max_file_size_mb": 1})
    (folder / "b.txt").write_bytes(b"x" * 1_000_001)
    os.mkfifo(folder / "pipe")
    made = await submit_folder(small, folder)
    assert outcomes(made) == {"a.txt": "accepted", "b.txt": "refused", "pipe": "refused", "sub/c.txt": "accepted"}
    errors = {file.name: str(file.error) for file in made.files if file.error}
    assert "MAX_FILE_SIZE_MB" in errors["b.txt"]
    assert "pipe" in errors["pipe"]
    assert conn.execute("SELECT total_files FROM processing_jobs").fetchone() == (2,)


async def test_files_that_are_stored_together_are_bounded_in_size_and_each_is_accepted(
    front: Settings, folder: Path, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [400, 100, 100, 2000, 10, 990, 1]
    for number, size in enumerate(sizes):
        (folder / f"n{number}.txt").write_bytes(b"x" * size)
    monkeypatch.setattr(storing, "TOGETHER_BYTES", 1000)
    groups: list[list[str]] = []
    store = storing.store

    def noted(settings: Settings, whole: Whole, entries: Sequence[Entry]) -> list[dict[str, Any] | DocmillError]:
        groups.append([entry.name for entry in entries])
        return store(settings, whole, entries)

    monkeypatch.setattr(folders, "store", noted)
    made = await submit_folder(front, folder)
    assert set(outcomes(made).values()) == {"accepted"}
    assert groups == [["a.txt", "b.txt", "n0.txt", "n1.txt", "n2.txt"], ["n3.txt"], ["n4.txt", "n5.txt"], ["n6.txt", "sub/c.txt"]]
    assert conn.execute("SELECT count(*) FROM file_extractions WHERE run_id = %s", [made.run_id]).fetchone() == (10,)
    for file_path, sha256 in conn.execute("SELECT file_path, content_sha256 FROM file_extractions"):
        assert hashlib.sha256((front.storage_base_path / file_path).read_bytes()).hexdigest() == sha256


async def test_one_document_that_cannot_be_taken_keeps_none_out_that_are_accepted_with_it(
    front: Settings, folder: Path, conn: psycopg.Connection
) -> None:
    taken = path_doc_id("default", folder / "b.txt")
    conn.execute("SELECT submit_document('uploads/b', doc_id => %s, user_id => 'bob')", [taken])
    made = await submit_folder(front, folder)
    assert {file.name: str(file.error) for file in made.files if file.error} == {"b.txt": f'doc_id "{taken}" is taken; choose another.'}
    assert [(file.name, file.submission.outcome) for file in made.files if file.submission] == [
        ("a.txt", "accepted"),
        ("sub/c.txt", "accepted"),
    ]
    assert conn.execute("SELECT total_files, sealed_at IS NOT NULL FROM processing_jobs").fetchone() == (2, True)
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'").fetchone() == (3,)


async def test_a_folder_without_files_makes_no_batch(front: Settings, tmp_path: Path, conn: psycopg.Connection) -> None:
    (tmp_path / "empty").mkdir()
    made = await submit_folder(front, tmp_path / "empty")
    assert (made.files, made.run_id) == ([], None)
    assert conn.execute("SELECT count(*) FROM processing_jobs").fetchone() == (0,)


async def test_a_cancelled_document_is_taken_up_again(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    await submit_folder(front, folder)
    conn.execute("UPDATE file_extractions SET state = 'cancelled' WHERE file_name = 'a.txt'")
    assert outcomes(await submit_folder(front, folder))["a.txt"] == "resumed"


async def test_names_that_no_text_can_hold_are_stored_and_known_again(front: Settings, tmp_path: Path, conn: psycopg.Connection) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("\udcff.txt", "\x1b[31mred\n.txt", "größe.txt"):  # the first is the byte 0xff
        (folder / name).write_text("x" + ascii(name))
    assert set(outcomes(await submit_folder(front, folder)).values()) == {"accepted"}
    assert set(outcomes(await submit_folder(front, folder)).values()) == {"unchanged"}
    paths = [path for (path,) in conn.execute("SELECT source_path FROM file_extractions")]
    assert all(path.isprintable() for path in paths)


async def test_a_file_is_the_same_document_alone_in_its_folder_and_from_any_directory(
    front: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit_folder(front, folder)
    monkeypatch.chdir(folder / "sub")
    result = await submit_file(front, Path("../a.txt"))
    assert result.submission is not None
    assert (result.submission.outcome, result.submission.doc_id) == ("unchanged", path_doc_id("default", absolute_path(folder / "a.txt")))


async def test_two_users_have_documents_and_batches_of_their_own(front: Settings, folder: Path, conn: psycopg.Connection) -> None:
    await submit_folder(front, folder, user_id="ann")
    assert set(outcomes(await submit_folder(front, folder, user_id="bob")).values()) == {"accepted"}
    assert conn.execute("SELECT count(*) FROM processing_jobs").fetchone() == (2,)
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (6,)
