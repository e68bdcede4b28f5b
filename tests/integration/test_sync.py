"""Folder sync against a real database: what changed is done once, what moved is never missed, and nothing is deleted in doubt."""

from __future__ import annotations

import asyncio
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs.adapters.folders import list_folder
from jobs.adapters.storage.sources import read_blocks
from jobs.batch import submit_folder
from jobs.front import close_async
from jobs.sync.folder import FolderSync
from jobs.sync.looking import Look, digest_files, look_at_folder
from jobs.sync.memory import folder_lock
from jobs.sync.result import SyncOptions
from jobs.sync.watch import summary
from models.errors import RetryableError, SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from tests.integration.conftest import Bench
from tests.integration.syncing import doc_id, names, put, put_zip, reconcile, shown, sync, synced, work

TABLES = ("processing_jobs", "file_extractions", "document_events", "procrastinate_jobs", "folder_files", "document_chunks")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of what files look like, so that it does not matter how long ago a test has made them."""
    monkeypatch.setattr("jobs.sync.looking.RACY_NS", 10**15)


def written(conn: psycopg.Connection) -> dict[str, list[Any]]:
    return {t: conn.execute(f"SELECT t.xmin::text, t.ctid::text, t.* FROM {t} AS t ORDER BY 1, 2").fetchall() for t in TABLES}


async def test_a_sync_does_not_ask_what_would_be_taken_up_by_hand(front: Bench, folder: Path) -> None:
    await synced(front, folder)  # a look at each cancelled document, for nothing
    front.conn.execute(
        """CREATE OR REPLACE FUNCTION run_is_whole(batch processing_jobs) RETURNS boolean LANGUAGE plpgsql AS $$
            BEGIN RAISE EXCEPTION 'asked'; END $$"""
    )
    assert not (await sync(front, folder)).did_something()
    with pytest.raises(psycopg.errors.RaiseException, match="asked"):
        await submit_folder(front.settings, folder)


async def test_new_changed_moved_and_vanished_files_are_all_done_and_then_nothing_is_written(front: Bench, folder: Path) -> None:
    first = await synced(front, folder)
    assert shown(first) == (["a.txt", "b.txt", "sub/c.txt"], [], [], [])
    put(folder / "a.txt", "other text, of another length")
    put(folder / "new.txt", "new")
    (folder / "sub" / "c.txt").rename(folder / "sub" / "moved.txt")
    (folder / "b.txt").unlink()
    second = await synced(front, folder)
    assert shown(second) == (["new.txt", "sub/moved.txt"], ["a.txt"], [("sub/c.txt", "sub/moved.txt")], ["b.txt"])
    assert await reconcile(front) == {"replaced": 1, "renewed": 1}
    assert names(front, folder) == dict.fromkeys(("a.txt", "new.txt", "sub/moved.txt"), "complete")
    assert front.one("SELECT status, total_files FROM processing_jobs") == ("completed", 3)
    assert front.one("SELECT count(DISTINCT run_id) FROM file_extractions") == (1,)
    await sync(front, folder)
    before = written(front.conn)
    third = await sync(front, folder)
    assert (shown(third), third.did_something(), third.plan.unchanged) == (([], [], [], []), False, ["a.txt", "new.txt", "sub/moved.txt"])
    assert written(front.conn) == before


async def test_a_dry_run_shows_the_plan_and_writes_nothing(front: Bench, folder: Path) -> None:
    before = written(front.conn)
    plan = (await sync(front, folder, dry_run=True)).plan
    assert plan.new == ["a.txt", "b.txt", "sub/c.txt"]
    assert written(front.conn) == before
    await synced(front, folder)
    put(folder / "a.txt", "other")
    (folder / "b.txt").rename(folder / "d.txt")
    (folder / "sub" / "c.txt").unlink()
    before = written(front.conn)
    storage = sorted(front.settings.storage_base_path.rglob("*"))
    result = await sync(front, folder, dry_run=True)
    assert (result.plan.changed, [(m.old.name, m.name) for m in result.plan.moved]) == (["a.txt"], [("b.txt", "d.txt")])
    assert [document.name for document in result.plan.vanished] == ["sub/c.txt"]
    assert (result.batch, result.deleted, result.moved) == (None, [], [])
    assert written(front.conn) == before
    assert sorted(front.settings.storage_base_path.rglob("*")) == storage


async def test_a_sync_that_deletes_writes_the_summary_of_its_run_once_and_leaves_the_rest_to_the_reconciler(
    front: Bench, folder: Path
) -> None:
    await synced(front, folder)
    (folder / "b.txt").unlink()
    assert shown(await sync(front, folder)) == ([], [], [], ["b.txt"])
    assert front.all("SELECT file_count, updated_at = created_at FROM run_summaries ORDER BY id") == [(3, True), (2, True)]
    assert await reconcile(front) == {"renewed": 1}
    cards = "SELECT jsonb_path_query_array(ui_json, '$.files[*].path') FROM run_summaries"
    assert front.all(cards) == [(["a.txt", "sub/c.txt"],)] * 2


async def test_the_old_document_of_a_moved_file_is_served_until_the_new_one_is_complete(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").rename(folder / "z.txt")
    await sync(front, folder)
    assert front.one("SELECT replaced_by FROM file_extractions WHERE doc_id = %s", doc_id(folder / "a.txt")) == (doc_id(folder / "z.txt"),)
    assert await reconcile(front) == {}
    again = await sync(front, folder)  # as after a crash: the same plan once more, and nothing is lost or done twice
    assert shown(again) == ([], [], [("a.txt", "z.txt")], [])
    assert front.one("SELECT count(*) FROM document_chunks WHERE doc_id = %s", doc_id(folder / "a.txt"))[0] > 0
    await work(front)
    assert await reconcile(front) == {"replaced": 1, "renewed": 1}
    assert names(front, folder) == dict.fromkeys(("b.txt", "sub/c.txt", "z.txt"), "complete")
    events = front.all("SELECT event FROM document_events WHERE doc_id = %s ORDER BY id DESC LIMIT 2", doc_id(folder / "a.txt"))
    assert events == [("deleted",), ("replaced",)]


async def test_if_the_document_at_the_new_place_fails_the_old_one_stays(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").rename(folder / "a.odd")
    await sync(front, folder)
    front.conn.execute(
        "UPDATE file_extractions SET state = 'failed', error_type = 'PERMANENT', error_message = 'odd' WHERE state = 'queued'"
    )
    front.conn.execute("DELETE FROM procrastinate_jobs")
    for _ in range(2):
        assert "replaced" not in await reconcile(front)
        assert shown(await sync(front, folder))[2:] == ([("a.txt", "a.odd")], [])
    assert names(front, folder) == {"a.odd": "failed", "a.txt": "complete", "b.txt": "complete", "sub/c.txt": "complete"}
    (folder / "a.odd").rename(folder / "a.txt")  # and back
    back = await sync(front, folder)
    assert back.plan.restored == [doc_id(folder / "a.txt")]
    assert shown(back)[3] == ["a.odd"]
    assert front.one("SELECT count(*) FROM file_extractions WHERE replaced_by IS NOT NULL") == (0,)


async def test_a_file_moved_over_another_one_is_kept_until_the_others_new_version_is_complete(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").replace(folder / "b.txt")
    await sync(front, folder)
    assert await reconcile(front) == {}
    await work(front)
    assert await reconcile(front) == {"replaced": 1, "renewed": 1}
    assert names(front, folder) == {"b.txt": "complete", "sub/c.txt": "complete"}
    assert front.one("SELECT version, served_version FROM file_extractions WHERE file_name = 'b.txt'") == (2, 2)


async def test_a_document_that_is_submitted_again_is_replaced_by_nothing(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").rename(folder / "z.txt")
    await sync(front, folder)
    put(folder / "a.txt", "text of a.txt")
    await submit_folder(front.settings, folder)  # docmill ingest, not sync
    await work(front)
    assert await reconcile(front) == {}
    assert names(front, folder) == dict.fromkeys(("a.txt", "b.txt", "sub/c.txt", "z.txt"), "complete")


async def test_a_duplicate_of_a_third_document_that_stays_lets_the_old_one_go(front: Bench, folder: Path) -> None:
    put(folder / "third.txt", "text of a.txt")
    await synced(front, folder)
    ids = [doc_id(folder / name) for name in ("a.txt", "b.txt", "third.txt")]
    replaced = "SELECT is_replaced(d) FROM file_extractions AS d WHERE d.doc_id = %s"
    content = front.one("SELECT content_sha256 FROM file_extractions WHERE doc_id = %s", ids[0])[0]
    front.conn.execute("UPDATE file_extractions SET version = 2, milestone = 'uploaded', state = 'queued', claim = claim + 1,"
                       " content_sha256 = %s WHERE doc_id = %s", [content, ids[1]])  # fmt: skip
    front.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() WHERE doc_id = %s", [ids[1]])
    front.conn.execute(
        "UPDATE file_extractions SET state = 'duplicate', lease_until = NULL, duplicate_of = %s WHERE doc_id = %s", [ids[0], ids[1]]
    )
    front.conn.execute("UPDATE file_extractions SET replaced_by = %s WHERE doc_id = %s", [ids[1], ids[0]])
    assert front.one(replaced, ids[0]) == (False,)
    assert front.one("SELECT has_original(d) FROM file_extractions AS d WHERE d.doc_id = %s", ids[1]) == (False,)
    front.conn.execute("UPDATE file_extractions SET duplicate_of = %s WHERE doc_id = %s", [ids[2], ids[1]])
    assert front.one(replaced, ids[0]) == (True,)
    front.conn.execute("UPDATE file_extractions SET replaced_by = 'x' WHERE doc_id = %s", [ids[2]])
    assert front.one(replaced, ids[0]) == (False,)


async def test_reconcilers_at_the_same_time_and_a_held_document_are_no_trouble(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").rename(folder / "z.txt")
    await synced(front, folder)
    with psycopg.connect(front.conn.info.dsn) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = %s FOR UPDATE", [doc_id(folder / "z.txt")])
        assert await reconcile(front) == {}
    assert await reconcile(front) == {"replaced": 1, "renewed": 1}
    assert await reconcile(front) == {}


async def test_a_file_is_read_again_only_if_it_looks_different_or_was_changed_just_before(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def note(root: Path, looks: dict[str, Look], limit: int) -> dict[str, str | None]:
        read.extend(looks)
        return digest_files(root, looks, limit)

    monkeypatch.setattr("jobs.sync.folder.digest_files", note)
    await synced(front, folder)
    await sync(front, folder)
    assert (sorted(read), front.one("SELECT count(*) FROM folder_files")) == (["a.txt", "b.txt", "sub/c.txt"], (0,))
    monkeypatch.setattr("jobs.sync.looking.RACY_NS", -(10**12))
    await sync(front, folder)
    read.clear()
    await sync(front, folder)
    assert read == []
    await sync(front, folder, checksum=True)
    assert sorted(read) == ["a.txt", "b.txt", "sub/c.txt"]
    read.clear()
    kept = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("same length!!"[: kept.st_size].ljust(kept.st_size))
    os.utime(folder / "a.txt", ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as rsync and cp -p do; the change time shows it
    assert (await sync(front, folder)).plan.changed == ["a.txt"]
    assert read == ["a.txt"]


async def test_what_was_seen_of_files_that_are_gone_is_forgotten(front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.sync.looking.RACY_NS", -(10**12))
    await synced(front, folder)
    assert front.one("SELECT count(*) FROM folder_files") == (3,)
    (folder / "a.txt").unlink()
    await sync(front, folder)
    assert front.one("SELECT count(*) FROM folder_files") == (2,)


async def test_an_empty_folder_deletes_nothing_unless_it_is_meant(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    shutil.rmtree(folder)
    with pytest.raises(SubmitError, match="does not exist"):
        await sync(front, folder)
    os.mkdir(folder)  # noqa: PTH102
    (folder / ".DS_Store").write_text("x")
    before = written(front.conn)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(SubmitError, match=r"is empty, but 3 documents are stored.*--allow-empty"):
            await sync(front, folder, **options)
    assert written(front.conn) == before
    done = await sync(front, folder, allow_empty=True)
    assert sorted(document.name for document in done.deleted) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(front, folder) == {}


async def test_a_folder_that_cannot_have_lost_a_file_is_taken_for_one_that_is_not_mounted(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    front.conn.execute("UPDATE file_extractions SET created_at = now() + interval '1 day'")  # came in after the folder last changed
    (folder / "sub" / "c.txt").unlink()
    (folder / "b.txt").rename(folder / "moved.txt")
    shows = await sync(front, folder, dry_run=True)
    assert (sorted(kept.name for kept in shows.kept), shows.plan.vanished, shows.plan.moved) == (["b.txt", "sub/c.txt"], [], [])
    (folder / "moved.txt").rename(folder / "b.txt")
    held = await sync(front, folder)
    assert held.deleted == []
    assert [kept.name for kept in held.kept] == ["sub/c.txt"]
    assert str(folder / "sub") in held.kept[0].reason
    assert "not mounted" in held.kept[0].reason
    assert [document.name for document in (await sync(front, folder, allow_empty=True)).deleted] == ["sub/c.txt"]


async def test_a_new_file_is_counted_as_one_where_the_document_that_it_would_replace_is_kept(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    front.conn.execute("UPDATE file_extractions SET created_at = now() + interval '1 day'")
    (folder / "b.txt").rename(folder / "moved.txt")
    for dry_run in (True, False):
        assert summary(await sync(front, folder, dry_run=dry_run)) == "1 new, 1 kept though missing, 2 unchanged"


async def test_a_folder_that_goes_away_or_is_replaced_while_it_is_listed_deletes_nothing(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()

    def replaced(root: Path, **options: Any) -> Any:
        made = list_folder(root, **options)
        shutil.move(root, root.with_name("elsewhere"))
        root.mkdir()
        return made

    monkeypatch.setattr("jobs.sync.looking.list_folder", replaced)
    before = written(front.conn)
    with pytest.raises(RetryableError, match="went away or was replaced"):
        await sync(front, folder)
    assert written(front.conn) == before


async def test_a_folder_that_goes_away_after_the_listing_deletes_nothing(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()
    (folder / "b.txt").rename(folder / "z.txt")

    async def vanish(*arguments: Any, **options: Any) -> Any:
        made = await submit_folder(*arguments, **options)
        shutil.move(folder, folder.with_name("elsewhere"))
        return made

    monkeypatch.setattr("jobs.sync.folder.submit_folder", vanish)
    result = await sync(front, folder)
    assert (result.deleted, [kept.name for kept in result.kept]) == ([], ["a.txt"])
    assert "went away" in result.kept[0].reason
    assert len(names(front, folder)) == 4


async def test_nothing_below_an_unreadable_folder_is_deleted(front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()
    real = os.scandir

    def refuse(path: Any) -> Any:  # root may read everything, so chmod would not do
        if str(path).endswith("/sub"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("jobs.adapters.folders.os.scandir", refuse)
    result = await sync(front, folder)
    assert (shown(result)[3], [kept.name for kept in result.kept]) == (["a.txt"], ["sub/c.txt"])
    assert [file.name for file in result.batch.files if file.error] == ["sub"] if result.batch else False
    assert set(names(front, folder)) == {"b.txt", "sub/c.txt"}


async def test_a_folder_where_a_file_was_and_a_file_where_a_folder_was_are_deletions(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()
    shutil.rmtree(folder / "sub")
    put(folder / "sub", "now a file")
    result = await sync(front, folder)
    assert shown(result)[3] == ["a.txt", "sub/c.txt"]


async def test_what_is_there_but_not_listed_any_more_stays(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    outside = folder.parent / "outside.txt"
    (folder / "a.txt").replace(outside)
    (folder / "a.txt").symlink_to(outside)
    shutil.move(folder / "sub", folder.parent / "elsewhere")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    result = await sync(front, folder)
    assert shown(result)[3] == []
    assert sorted(kept.name for kept in result.kept) == ["a.txt", "sub/c.txt"]
    shutil.rmtree(folder.parent / "elsewhere")  # the link leads nowhere now, as one into a share that is not mounted
    result = await sync(front, folder)
    assert [kept.reason for kept in result.kept if kept.name == "sub/c.txt"] == [f"{folder / 'sub'} has become a link"]
    assert len(names(front, folder)) == 3


async def test_a_name_whose_case_alone_has_changed_is_a_move_also_where_both_are_found(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    (folder / "a.txt").rename(folder / "A.txt")
    (folder / "sub").rename(folder / "Sub")
    real = Path.lstat

    def lstat(path: Path) -> os.stat_result:  # as on a share: this host has no file system that takes both cases for the same
        place = folder
        for part in path.relative_to(folder).parts if path.is_relative_to(folder) else ():
            place = next((entry for entry in place.iterdir() if entry.name.lower() == part.lower()), place / part)
        return real(place if path.is_relative_to(folder) else path)

    monkeypatch.setattr(Path, "lstat", lstat)
    result = await synced(front, folder)
    assert (shown(result)[2], result.kept) == ([("a.txt", "A.txt"), ("sub/c.txt", "Sub/c.txt")], [])
    assert await reconcile(front) == {"replaced": 2, "renewed": 1}
    assert names(front, folder) == dict.fromkeys(("A.txt", "Sub/c.txt", "b.txt"), "complete")


async def test_a_file_that_comes_back_right_before_its_deletion_stays(front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()

    async def restore(*arguments: Any, **options: Any) -> Any:
        made = await submit_folder(*arguments, **options)
        put(folder / "a.txt", "text of a.txt")
        return made

    monkeypatch.setattr("jobs.sync.folder.submit_folder", restore)
    assert (await sync(front, folder)).deleted == []
    monkeypatch.undo()
    assert set((await sync(front, folder)).plan.unchanged) == {"a.txt", "b.txt", "sub/c.txt"}


async def test_a_document_that_was_submitted_again_since_it_was_looked_at_is_not_deleted(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()

    async def meanwhile(*arguments: Any, **options: Any) -> Any:
        made = await submit_folder(*arguments, **options)
        front.conn.execute("UPDATE file_extractions SET run_id = gen_random_uuid() WHERE file_name = 'a.txt'")
        return made

    monkeypatch.setattr("jobs.sync.folder.submit_folder", meanwhile)
    assert (await sync(front, folder)).deleted == []
    assert "a.txt" in names(front, folder)


async def test_a_document_that_somebody_holds_is_left_for_the_next_time(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    (folder / "a.txt").unlink()
    front.settings = front.settings.model_copy(update={"submit_lock_timeout_seconds": 0.1})
    with psycopg.connect(front.conn.info.dsn) as other:
        other.execute("SELECT FROM file_extractions WHERE file_name = 'a.txt' FOR UPDATE")
        held = await sync(front, folder)
        assert (held.deleted, [kept.name for kept in held.kept]) == ([], ["a.txt"])
        assert "another transaction" in held.kept[0].reason
    assert shown(await sync(front, folder))[3] == ["a.txt"]


async def test_two_syncs_of_one_folder_do_not_run_at_once_but_of_two_users_they_do(front: Bench, folder: Path) -> None:
    async with folder_lock(front.settings, doc_id(folder), folder):
        with pytest.raises(SubmitConflict, match="being synced by another process"):
            await sync(front, folder)
        assert (await sync(front, folder, user_id="ann")).plan.new
        assert (await sync(front, folder, dry_run=True)).plan.new
    assert (await sync(front, folder)).plan.new


async def test_only_documents_that_came_with_a_folder_are_ever_deleted(front: Bench, folder: Path) -> None:
    await sync(front, folder)
    ids = {name: doc_id(folder / name) for name in ("alone.txt", "named.txt")}
    front.conn.execute("SELECT submit_document('uploads/x', doc_id => %s, content_sha256 => %s)", [ids["alone.txt"], "1" * 64])
    front.conn.execute("SELECT begin_batch('a list', 'default', %s, 'c')", [str(folder)])
    front.conn.execute("SELECT submit_document('uploads/y', doc_id => %s, content_sha256 => %s)", [ids["named.txt"], "2" * 64])
    front.conn.execute("UPDATE file_extractions SET source_path = %s WHERE doc_id = %s", [str(folder / "alone.txt"), ids["alone.txt"]])
    front.conn.execute("UPDATE file_extractions SET source_path = %s, batch_id = 'a list' WHERE doc_id = %s",
                       [str(folder / "named.txt"), ids["named.txt"]])  # fmt: skip
    front.conn.execute("ALTER TABLE file_extractions DISABLE TRIGGER file_extractions_transition")
    front.conn.execute("UPDATE file_extractions SET source_path = %s, batch_id = %s, doc_id = 'somebody''s' WHERE doc_id = %s",
                       [str(folder / "c.txt"), doc_id(folder), doc_id(folder / "sub/c.txt")])  # fmt: skip
    front.conn.execute("ALTER TABLE file_extractions ENABLE TRIGGER file_extractions_transition")
    (folder / "sub" / "c.txt").unlink()
    (folder / "b.txt").unlink()
    assert shown(await sync(front, folder))[3] == ["b.txt"]
    assert set(names(front, folder)) == {"a.txt", "alone.txt", "c.txt", "named.txt"}


async def test_documents_of_a_folder_around_and_of_one_inside_belong_to_the_folder_too(front: Bench, folder: Path) -> None:
    (folder / "sub" / "deep").mkdir()
    put(folder / "sub" / "deep" / "d.txt", "deep")
    (folder.parent / "documents2").mkdir()
    put(folder.parent / "documents2" / "x.txt", "a neighbour whose name begins alike")
    await synced(front, folder)
    await synced(front, folder / "sub" / "deep", checksum=True)
    await synced(front, folder.parent / "documents2")
    for name in ("sub/c.txt", "sub/deep/d.txt", "a.txt"):
        (folder / name).unlink()
    put(folder / "sub" / "e.txt", "left")
    assert sorted(shown(await sync(front, folder / "sub"))[3]) == ["c.txt", "deep/d.txt"]
    assert set(names(front, folder.parent)) == {"documents/a.txt", "documents/b.txt", "documents/sub/e.txt", "documents2/x.txt"}


@pytest.mark.parametrize("outer_first", [True, False])
async def test_folders_that_lie_in_each_other_do_not_take_documents_from_each_other(front: Bench, folder: Path, outer_first: bool) -> None:
    both = [folder, folder / "sub"] if outer_first else [folder / "sub", folder]
    for each in both:
        await synced(front, each)
    before = written(front.conn)
    for each in both * 2:
        result = await sync(front, each)
        assert (result.did_something(), result.plan.new, result.plan.changed) == (False, [], [])
    assert written(front.conn) == before
    put(folder / "sub" / "c.txt", "other text, of another length")
    for each in both[::-1]:
        await synced(front, each)
    before = written(front.conn)
    for each in both * 2:
        assert not (await sync(front, each)).did_something()
    assert written(front.conn) == before
    assert names(front, folder) == dict.fromkeys(("a.txt", "b.txt", "sub/c.txt"), "complete")
    (folder / "sub" / "c.txt").unlink()
    (folder / "sub" / "d.txt").write_text("one must be left")
    assert shown(await synced(front, folder / "sub"))[3] == ["c.txt"]


async def test_names_that_no_text_can_hold_vanish_and_move_like_others(front: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = ("\udcff.txt", "\x1b[31mred\n.txt", "größe.txt", "back\\x1bslash.txt", "zero\u200bwidth.txt")  # the first is the byte 0xff
    for name in odd:
        put(folder / name, "x" + ascii(name))
    await synced(front, folder)
    put(folder / "stays.txt", "stays")
    for name in odd[1:]:
        (folder / name).unlink()
    (folder / odd[0]).rename(folder / "moved.txt")
    result = await sync(front, folder)
    assert ([move.name for move in result.moved], len(result.deleted), result.kept) == (["moved.txt"], 4, [])


async def test_what_docmill_keeps_in_the_storage_is_no_file_of_a_folder_that_is_the_storage(
    front: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = front.settings.storage_base_path
    for name in ("a.txt", "logs/b.txt", "uploads-2/c.txt"):
        (storage / name).parent.mkdir(parents=True, exist_ok=True)
        put(storage / name, f"text of {name}")
    with monkeypatch.context() as earlier:  # documents of an older version, which did not know them
        earlier.setattr("jobs.sync.folder.storage_folders", lambda _: [])
        await synced(front, storage)
        copies = (await synced(front, storage)).plan.new
    assert [name.split("/")[0] for name in copies] == ["uploads"] * 3
    for name in ("logs/b.txt", "uploads-2/c.txt"):
        (storage / name).rename((storage / name).with_name(".hidden"))
        (storage / name).symlink_to(storage.parent)  # in the listing no more, but there
    assert [document.name for document in (await sync(front, storage, dry_run=True)).plan.vanished] == copies
    result = await synced(front, storage)
    assert (shown(result), sorted(kept.name for kept in result.kept)) == (([], [], [], copies), ["logs/b.txt", "uploads-2/c.txt"])
    assert front.all("SELECT count(*) FROM file_extractions") == [(3,)]


async def test_documents_of_files_in_what_is_now_docmills_folder_of_texts_stay_while_the_files_are_there(
    front: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = front.settings.storage_base_path
    mine = storage / front.settings.storage_extracted_dir / "ab" / "mine.txt"
    mine.parent.mkdir(parents=True)
    put(mine, "mine")
    put(storage / "a.txt", "a")
    with monkeypatch.context() as earlier:
        earlier.setattr("jobs.sync.folder.storage_folders", lambda _: [storage / "uploads"])
        assert (await synced(front, storage)).plan.new == ["a.txt", "extracted/ab/mine.txt"]
    result = await sync(front, storage)
    assert (shown(result)[3], [kept.name for kept in result.kept]) == ([], ["extracted/ab/mine.txt"])
    assert "a folder of docmill's" in result.kept[0].reason
    mine.unlink()
    assert shown(await sync(front, storage))[3] == ["extracted/ab/mine.txt"]


@pytest.mark.parametrize("name", ["new\\text", "both\\x41\n"])
async def test_a_folder_whose_own_name_has_backslashes_is_known_again(front: Bench, tmp_path: Path, name: str) -> None:
    inner = tmp_path / name / "sub"
    inner.mkdir(parents=True)
    for number in (1, 2, 3):
        put(inner / f"{number}.txt", f"text {number}")
    await synced(front, inner.parent)
    (inner / "1.txt").unlink()
    assert shown(await synced(front, inner.parent))[3] == ["sub/1.txt"]
    if "\n" not in name:
        await synced(front, inner, checksum=True)
        (inner / "2.txt").unlink()
        assert shown(await sync(front, inner))[3] == ["2.txt"]


async def test_a_cancelled_document_stays_cancelled_until_its_content_changes(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    front.conn.execute(
        "UPDATE file_extractions SET milestone = 'uploaded', version = 2, state = 'queued', claim = claim + 1 WHERE file_name = 'a.txt'"
    )
    front.conn.execute("UPDATE file_extractions SET state = 'cancelled' WHERE file_name = 'a.txt'")
    put(folder / "new.txt", "new")  # a new run
    await sync(front, folder)
    assert names(front, folder)["a.txt"] == "cancelled"
    put(folder / "a.txt", "changed")
    await sync(front, folder)
    assert names(front, folder)["a.txt"] == "queued"


async def test_a_file_that_is_written_while_it_is_read_is_left_for_the_next_time(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await synced(front, folder)
    put(folder / "a.txt", "text of A.txt")  # the same size, so it has to be read
    put(folder / "new.txt", "new")

    def grow(path: Path, *arguments: Any) -> Any:
        for block in read_blocks(path, *arguments):
            with path.open("a") as file:
                file.write("more")
            yield block

    monkeypatch.setattr("jobs.sync.looking.read_blocks", grow)
    result = await sync(front, folder, checksum=True)
    assert result.plan.busy == ["a.txt", "b.txt", "sub/c.txt"]
    assert result.batch is not None
    assert {file.name for file in result.batch.files if isinstance(file.error, RetryableError)} == {"a.txt", "b.txt", "sub/c.txt"}
    assert front.one("SELECT max(version), count(*) FROM file_extractions") == (1, 4)
    assert front.one("SELECT count(DISTINCT run_id) FROM file_extractions") == (1,), "the files that wait stay in the run"
    monkeypatch.undo()
    assert (await sync(front, folder)).plan.changed == ["a.txt", "b.txt", "sub/c.txt"]


async def test_a_file_that_moves_while_its_folder_is_listed_is_not_taken_for_deleted(
    front: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "early").mkdir()
    await synced(front, folder)
    calls: list[int] = []

    def unlucky(root: Path, leave_out: list[Path]) -> Any:
        seen = look_at_folder(root, leave_out)
        if not calls:  # seen neither where it went nor where it was
            seen.listing.files.remove("a.txt")
            del seen.looks["a.txt"]
            (folder / "a.txt").rename(folder / "early" / "a.txt")
        calls.append(1)
        return seen

    monkeypatch.setattr("jobs.sync.folder.look_at_folder", unlucky)
    result = await sync(front, folder)
    assert shown(result)[2:] == ([("a.txt", "early/a.txt")], [])


async def test_the_storage_and_hidden_files_are_left_out(front: Bench, tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "a")
    put(tmp_path / ".hidden.txt", "hidden")
    for _ in range(2):
        result = await sync(front, tmp_path)
        assert sorted(result.plan.new + result.plan.unchanged) == ["a.txt"]


async def test_documents_of_a_folder_around_that_are_deleted_leave_its_batch_as_it_ended(front: Bench, folder: Path) -> None:
    await synced(front, folder)
    front.conn.execute("SELECT settle_batch(batch_id) FROM processing_jobs")
    (folder / "sub" / "c.txt").unlink()
    put(folder / "sub" / "d.txt", "another")
    assert shown(await synced(front, folder / "sub"))[3] == ["c.txt"]
    assert front.all("SELECT status FROM processing_jobs WHERE source_path = %s", str(folder)) == [("completed",)]


@pytest.mark.parametrize("ends", ["failed", "cancelled"])
async def test_what_was_moved_out_to_a_folder_around_answers_until_its_document_there_is_complete(
    front: Bench, folder: Path, ends: str
) -> None:
    put(folder / "sub" / "d.txt", "another")
    await synced(front, folder)
    await synced(front, folder / "sub")
    (folder / "sub" / "c.txt").rename(folder / "out.txt")
    assert shown(await sync(front, folder))[2] == [("sub/c.txt", "out.txt")]
    inner = await sync(front, folder / "sub")
    assert (inner.plan.moved_out, inner.deleted, inner.is_unsettled()) == (["c.txt"], [], False)
    front.conn.execute(
        "UPDATE file_extractions SET state = %s, error_type = 'PERMANENT', error_message = 'odd' WHERE file_name = 'out.txt'", [ends]
    )
    inner = await sync(front, folder / "sub")
    assert ([kept.name for kept in inner.kept], inner.deleted) == (["c.txt"], [])
    front.conn.execute("SELECT delete_document(doc_id) FROM file_extractions WHERE file_name = 'out.txt'")
    assert shown(await sync(front, folder / "sub"))[3] == ["c.txt"]


def test_application_code_syncs_with_and_without_an_event_loop(folder: Path, settings: Settings, conn: psycopg.Connection) -> None:
    from jobs import sync_folder, sync_folder_async

    load_settings.cache_clear()
    try:
        assert sync_folder(folder, user_id="ann").plan.new == ["a.txt", "b.txt", "sub/c.txt"]
        (folder / "a.txt").unlink()

        async def inside() -> list[str]:
            made = sync_folder(folder, user_id="ann", dry_run=True)  # in a notebook, say
            made = await sync_folder_async(folder, user_id="ann")
            await close_async()
            return [document.name for document in made.deleted]

        assert asyncio.run(inside()) == ["a.txt"]
    finally:
        load_settings.cache_clear()


@pytest.mark.parametrize("bad", ["", None, b"documents"], ids=repr)
def test_a_folder_that_is_no_path_is_refused_and_is_not_the_working_directory(
    bad: Any, folder: Path, settings: Settings, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import sync_folder

    monkeypatch.chdir(folder)
    load_settings.cache_clear()
    try:
        with pytest.raises(SubmitError, match="A path"):
            sync_folder(bad)
    finally:
        load_settings.cache_clear()
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (0,)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("bad", [{"priority": "high"}, {"priority": 10**20}, {"metadata": [1]}, {"metadata": {"a": {1}}}], ids=repr)
async def test_a_bad_priority_or_metadata_is_refused_before_anything_is_written(
    front: Bench, folder: Path, bad: dict[str, Any], dry_run: bool
) -> None:
    put_zip(folder / "z.zip", "in")
    before = written(front.conn)
    with pytest.raises(SubmitError, match=next(iter(bad))):
        await sync(front, folder, dry_run=dry_run, **bad)
    assert written(front.conn) == before


async def test_an_archive_that_failed_makes_no_new_run_until_it_changes(front: Bench, folder: Path) -> None:
    def put_archive(text: str) -> None:
        with zipfile.ZipFile(folder / "z.zip", "w") as archive:
            archive.writestr("in.txt", text)

    put_archive("one")
    assert (await sync(front, folder)).plan.new == ["a.txt", "b.txt", "sub/c.txt", "z.zip"]
    front.conn.execute("UPDATE batch_archives SET state = 'failed', error_message = 'broken', ended_at = now()")
    for _ in range(2):
        result = await sync(front, folder)
        assert (result.plan.unchanged, result.did_something()) == (["a.txt", "b.txt", "sub/c.txt", "z.zip"], False)
    put_archive("two and more")
    assert (await sync(front, folder)).plan.changed == ["z.zip"]
    assert front.all("SELECT count(*), count(DISTINCT run_id) FROM batch_archives") == [(2, 2)]


async def test_an_archive_that_is_being_written_holds_up_the_run_and_is_no_document(front: Bench, folder: Path) -> None:
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("in.txt", "one")
    await sync(front, folder)
    content = (folder / "z.zip").read_bytes()
    (folder / "z.zip").write_bytes(content[:20])
    put(folder / "new.txt", "new")
    half = await FolderSync(front.settings, folder, SyncOptions(), is_settled=lambda name, _: name != "z.zip").run()
    assert (half.plan.busy, half.plan.new, half.did_something()) == (["z.zip"], ["new.txt"], False)
    (folder / "z.zip").write_bytes(content)
    whole = await FolderSync(front.settings, folder, SyncOptions(), is_settled=lambda _name, _look: True).run()
    assert (whole.plan.new, whole.plan.changed, whole.did_something()) == (["new.txt"], [], True)
    assert "z.zip" not in names(front, folder)
