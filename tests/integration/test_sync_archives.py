"""Folder sync and what lies in archives: cancelled, deleted and taken up again like any file of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.arguments import derive_doc_id
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions, SyncResult
from tests.archives import Raw, raw_zip, zip_bytes
from tests.integration.conftest import Bench
from tests.integration.syncing import doc_id, names, put, put_zip, reconcile, shown, sync, unpack, work

ENTRY = "z.zip/in/one.txt"


@pytest.fixture
async def unpacked(front: Bench, folder: Path) -> Bench:
    """A bench with documents of the folder and of an archive in it, which wait for their work."""
    put_zip(folder / "z.zip", "one", "two")
    await sync(front, folder)
    await unpack(front)
    return front


async def test_an_entry_that_was_cancelled_stays_so_in_every_run_until_its_content_changes(unpacked: Bench, folder: Path) -> None:
    unpacked.conn.execute("SELECT cancel_document(doc_id) FROM file_extractions WHERE file_name = 'one.txt'")
    await work(unpacked)
    put(folder / "new.txt", "new")  # a new run, which unpacks the archive once more
    await sync(unpacked, folder)
    await unpack(unpacked)
    assert names(unpacked, folder)[ENTRY] == "cancelled"
    assert unpacked.one("SELECT count(DISTINCT run_id) FROM file_extractions") == (1,)
    put_zip(folder / "z.zip", "two", one="changed")
    await sync(unpacked, folder)
    await unpack(unpacked)
    assert names(unpacked, folder)[ENTRY] == "queued"


async def test_an_entry_that_was_deleted_by_hand_comes_back_with_the_next_sync_and_costs_one_run(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    unpacked.conn.execute("SELECT delete_document(doc_id) FROM file_extractions WHERE file_name = 'one.txt'")
    assert (await sync(unpacked, folder)).did_something()
    await unpack(unpacked)
    await work(unpacked)
    assert names(unpacked, folder)[ENTRY] == "complete"
    unpacked.conn.execute("UPDATE batch_archives SET entry_count = entry_count + 1")  # as if one could never become a document
    assert not (await sync(unpacked, folder)).did_something()


async def test_an_entry_that_was_taken_up_after_its_run_was_cancelled_goes_with_its_archive(unpacked: Bench, folder: Path) -> None:
    unpacked.conn.execute("SELECT cancel_batch(%s)", [doc_id(folder)])
    unpacked.conn.execute(
        "SELECT submit_document(file_path, doc_id => doc_id, content_sha256 => content_sha256) FROM file_extractions WHERE file_name = %s",
        ["one.txt"],
    )
    await work(unpacked)
    assert unpacked.one("SELECT state, run_id FROM file_extractions WHERE file_name = 'one.txt'") == ("complete", None)
    assert shown(await sync(unpacked, folder))[3] == [], "of a run that is cancelled it is not known that it has lost anything"
    put_zip(folder / "z.zip", "two", "three")
    await sync(unpacked, folder)
    await unpack(unpacked)
    assert shown(await sync(unpacked, folder))[3] == [ENTRY]


async def test_an_archive_whose_new_name_does_not_end_in_zip_takes_its_documents_along(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    (folder / "z.zip").rename(folder / "z.backup")
    result = await sync(unpacked, folder)
    assert shown(result)[2:] == ([("z.zip", "z.backup/in/one.txt"), ("z.zip", "z.backup/in/two.txt")], [])
    assert names(unpacked, folder)[ENTRY] == "complete"
    await unpack(unpacked)
    await work(unpacked)
    assert await reconcile(unpacked) == {"replaced": 2, "renewed": 1}
    states = names(unpacked, folder)
    assert (states["z.backup/in/one.txt"], ENTRY in states) == ("complete", False)


async def test_documents_of_a_missing_archive_wait_for_one_that_is_being_written_whatever_its_name(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    (folder / "z.zip").rename(folder / "z.backup")
    watched = FolderSync(unpacked.settings, folder, SyncOptions(), is_settled=lambda name, _: name != "z.backup")
    result = await watched.run()
    assert (result.plan.waiting, result.plan.busy) == (["z.zip/in/one.txt", "z.zip/in/two.txt"], ["z.backup"])
    assert names(unpacked, folder)[ENTRY] == "complete"


DEEP = zip_bytes({"deep.txt": "deep"})


@pytest.mark.parametrize("damaged", [Raw(b"in.zip", DEEP[:-30]), Raw(b"in.zip", DEEP, crc=7)], ids=["archive", "entry"])
async def test_an_archive_inside_that_cannot_be_unpacked_keeps_only_what_it_may_hold_and_that_is_named(
    front: Bench, folder: Path, damaged: Raw
) -> None:
    async def after(*entries: Raw) -> SyncResult:
        (folder / ".new").write_bytes(raw_zip(entries))
        (folder / ".new").replace(folder / "a.zip")
        await sync(front, folder)
        await unpack(front)
        await work(front)
        return await sync(front, folder)

    await after(Raw(b"e1.txt"), Raw(b"e2.txt"), Raw(b"in.zip", DEEP))
    result = await after(Raw(b"e2.txt"), damaged)
    assert (shown(result)[3], [kept.name for kept in result.kept]) == (["a.zip/e1.txt"], ["a.zip/in.zip/deep.txt"])
    assert "a.zip/in.zip has failed" in result.kept[0].reason
    assert (await sync(front, folder, dry_run=True)).kept == result.kept
    result = await after(Raw(b"e2.txt"), Raw(b"in.zip", zip_bytes({"other.txt": "other"})))
    assert ("a.zip/in.zip/deep.txt" in shown(result)[3], result.kept) == (True, [])


async def test_what_a_changed_archive_had_lost_before_it_was_moved_goes_once_it_is_unpacked_there(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    put_zip(folder / "z.zip", "two", "three")
    await sync(unpacked, folder)  # and moved before a worker came to it
    (folder / "z.zip").rename(folder / "y.zip")
    assert ("z.zip", "y.zip/in/one.txt") in shown(await sync(unpacked, folder))[2], "nobody knows yet that it is not in there"
    await unpack(unpacked)
    await work(unpacked)
    assert shown(await sync(unpacked, folder))[2:] == ([], [ENTRY, "z.zip/in/two.txt"])
    await reconcile(unpacked)
    assert [name for name in names(unpacked, folder) if ".zip" in name] == ["y.zip/in/three.txt", "y.zip/in/two.txt"]


async def test_what_an_archive_that_is_damaged_and_moved_may_hold_stays_and_is_named(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    (folder / "z.zip").write_bytes((folder / "z.zip").read_bytes()[:-30])
    await sync(unpacked, folder)
    (folder / "z.zip").rename(folder / "y.zip")
    await sync(unpacked, folder)
    await unpack(unpacked)
    result = await sync(unpacked, folder)
    assert (shown(result)[2:], [kept.name for kept in result.kept]) == (([], []), [ENTRY, "z.zip/in/two.txt"])
    assert "y.zip has failed" in result.kept[0].reason


async def test_what_cannot_be_stored_where_its_archive_was_moved_to_stays_where_it_was(unpacked: Bench, folder: Path) -> None:
    await work(unpacked)
    there = derive_doc_id("default", f"{doc_id(folder)}\ny.zip/in/one.txt")
    (folder / "z.zip").rename(folder / "y.zip")
    await sync(unpacked, folder)
    unpacked.conn.execute("SELECT submit_document('uploads/x', doc_id => %s, content_sha256 => repeat('1', 64), user_id => 'bob')", [there])
    await unpack(unpacked)
    await work(unpacked)
    await reconcile(unpacked)
    assert unpacked.one("SELECT state FROM batch_archives ORDER BY id DESC LIMIT 1") == ("unpacked",)
    result = await sync(unpacked, folder)
    assert (shown(result)[2:], [kept.name for kept in result.kept]) == (([], []), [ENTRY])
    assert "y.zip has entries without" in result.kept[0].reason
    assert unpacked.one("SELECT state FROM file_extractions WHERE source_path = %s", str(folder / ENTRY)) == ("complete",)


async def test_a_document_that_is_called_a_zip_and_was_cancelled_stays_so(front: Bench, folder: Path) -> None:
    put(folder / "z.zip", "no archive")
    await sync(front, folder)
    front.conn.execute("SELECT cancel_document(doc_id) FROM file_extractions WHERE file_name = 'z.zip'")
    assert not (await sync(front, folder)).did_something()
    assert names(front, folder)["z.zip"] == "cancelled"


async def test_a_document_that_is_called_a_zip_is_left_alone_while_it_is_being_written(front: Bench, folder: Path) -> None:
    put(folder / "z.zip", "no archive yet")
    await sync(front, folder)
    for content in (zip_bytes({"in.txt": "one"}), b"no archive either"):
        (folder / "z.zip").write_bytes(content)
        put(folder / "new.txt", f"new {content!r}")
        result = await FolderSync(front.settings, folder, SyncOptions(), is_settled=lambda name, _: name != "z.zip").run()
        assert (result.plan.busy, result.did_something()) == (["z.zip"], True)
        assert result.batch is not None
        assert (result.batch.archives, front.one("SELECT version FROM file_extractions WHERE file_name = 'z.zip'")) == ([], (1,))
