"""Files of deleted documents go, and no file that a row needs or may come to need."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from loguru import logger

import jobs
from jobs.adapters.storage import LocalStorage, StoredUpload
from jobs.leftovers import noted_files, remove_noted_files
from jobs.orphans import find_orphans
from tests.archives import write_zip
from tests.integration.conftest import Bench
from tests.running import wait_for

pytestmark = pytest.mark.usefixtures("front_door")


def file_of(bench: Bench, doc_id: str) -> Path:
    path: str = bench.one("SELECT file_path FROM file_extractions WHERE doc_id = %s", doc_id)[0]
    return LocalStorage.from_settings(bench.settings).base / path


def grow_old(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def sweep(bench: Bench, *paths: Path) -> None:
    """See files removed: transactions that happen to be open, of other tests on the same server too, are waited for."""

    def gone() -> bool:
        remove_noted_files(bench.settings, bench.conn)
        return not any(path.exists() for path in paths)

    wait_for(gone, "the files to be removed")


def forget_all(bench: Bench) -> None:
    """See every note gone, and what may be removed with it."""

    def forgotten() -> bool:
        remove_noted_files(bench.settings, bench.conn, untouched_for=-1)
        return bench.one("SELECT count(*) FROM files_to_remove") == (0,)

    wait_for(forgotten, "the notes to be forgotten")


def own_file(bench: Bench, name: str, content: bytes = b"mine") -> Path:
    """Put a file of somebody's own into the storage."""
    path = LocalStorage.from_settings(bench.settings).base / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    grow_old(path)
    return path


def test_whoever_removes_files_reads_the_notes_of_those_alone_however_many_there_are(bench: Bench) -> None:
    bench.conn.execute(
        """INSERT INTO files_to_remove (path, doc_id, noted_at)
        SELECT 'uploads/' || md5(n::text), 'doc ' || n, now() - n * interval '1 s' FROM generate_series(1, 20000) AS n"""
    )
    bench.conn.execute("ANALYZE files_to_remove")
    read = """SELECT sum(pg_stat_get_xact_tuples_returned(c.oid)) FROM pg_class AS c LEFT JOIN pg_index AS i ON i.indexrelid = c.oid
        WHERE coalesce(i.indrelid, c.oid) = 'files_to_remove'::regclass"""
    for doc_id, most in ((None, 1000), ("doc 7", 1)):
        for _ in range(7):  # by the plan for any values too
            with bench.conn.transaction():
                before = bench.one(read)[0]
                noted = noted_files(bench.conn, doc_id)
                assert bench.one(read)[0] - before == most
        assert noted == [
            (f"uploads/{hashlib.md5(str(n).encode()).hexdigest()}", f"doc {n}") for n in ([7] if doc_id else range(20000, 19000, -1))
        ]


def test_whoever_deletes_a_batch_does_not_look_after_the_files_that_others_have_left(bench: Bench, folder: Path) -> None:
    other = jobs.submit_document(b"another")
    bench.conn.execute("SELECT delete_document(%s)", [other])
    left = "SELECT noted_at, settled_at_xid FROM files_to_remove WHERE doc_id = %s"
    before = bench.one(left, other)
    assert jobs.delete_batch(jobs.submit_batch(folder)) == 3
    assert bench.one(left, other) == before


async def test_delete_removes_the_files_of_all_versions_and_their_folder(bench: Bench) -> None:
    paths = []
    for content in (b"one", b"two"):
        jobs.submit_document(content, doc_id="a")
        paths.append(file_of(bench, "a"))
    for path in paths:
        grow_old(path)
    assert jobs.delete_document("a")
    sweep(bench, *paths)
    assert not paths[0].parent.exists()
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)


async def test_a_file_that_an_open_transaction_notes_too_keeps_no_other_from_being_removed(bench: Bench, database: str) -> None:
    for doc_id in ("a", "b"):
        jobs.submit_document(doc_id.encode(), doc_id=doc_id)
    paths = [file_of(bench, doc_id) for doc_id in ("a", "b")]
    for path in paths:
        grow_old(path)
    # The file of a is noted; that of its next version an open transaction notes.
    bench.conn.execute("SELECT delete_document(doc_id) FROM unnest(ARRAY['a', 'b']) AS doc_id")
    jobs.submit_document(b"anew", doc_id="a")
    with psycopg.connect(database) as caller:
        jobs.delete_document("a", connection=caller)
        passes = asyncio.create_task(asyncio.to_thread(remove_noted_files, bench.settings, bench.conn))
        done, _ = await asyncio.wait({passes}, timeout=20)
        caller.rollback()
    await passes
    assert done, "it waited for somebody's transaction"
    sweep(bench, *paths)
    assert file_of(bench, "a").exists()


async def test_a_file_that_was_stored_lately_stays_for_a_while(bench: Bench) -> None:
    """Whoever stored it may be about to submit it: no row says so."""
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    assert jobs.delete_document("a")
    assert path.exists()
    grow_old(path)
    sweep(bench, path)


async def test_a_file_that_is_stored_again_before_its_removal_is_kept(bench: Bench) -> None:
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    bench.conn.execute("SELECT delete_document('a')")
    grow_old(path)
    LocalStorage.from_settings(bench.settings).store_upload("a", b"one", 1000)
    assert remove_noted_files(bench.settings, bench.conn) == 0
    assert path.read_bytes() == b"one"


async def test_a_file_that_a_submission_has_referred_to_is_kept_whether_it_has_committed_or_not(bench: Bench, database: str) -> None:
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    bench.conn.execute("SELECT delete_document('a')")
    with psycopg.connect(database) as caller:
        jobs.submit_document(b"one", doc_id="a", connection=caller)
        grow_old(path)
        assert remove_noted_files(bench.settings, bench.conn) == 0
        assert path.exists()
        caller.commit()
    grow_old(path)
    assert remove_noted_files(bench.settings, bench.conn) == 0
    assert path.exists()
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)


async def test_a_file_waits_for_transactions_that_may_have_begun_to_refer_to_it(bench: Bench, database: str) -> None:
    """Two documents that share one file, as SQL callers may have it."""
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    grow_old(path)
    with psycopg.connect(database) as caller:
        caller.execute("SELECT submit_document((SELECT file_path FROM file_extractions WHERE doc_id = 'a'), doc_id => 'copy')")
        bench.conn.execute("SELECT delete_document('a')")
        assert remove_noted_files(bench.settings, bench.conn) == 0
        caller.commit()
    assert remove_noted_files(bench.settings, bench.conn) == 0
    assert path.exists()
    assert jobs.delete_document("copy")
    forget_all(bench)
    assert path.exists(), "it was not stored for that document"
    storage = LocalStorage.from_settings(bench.settings)
    assert find_orphans(bench.settings, bench.conn, now=time.time() + 86_400 * 100).noted == 1
    sweep(bench, storage.base / path)


def test_notes_that_a_dump_has_brought_from_another_cluster_wait_for_no_transaction_of_that_one(bench: Bench) -> None:
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    grow_old(path)
    bench.conn.execute("SELECT delete_document('a')")
    bench.conn.execute("UPDATE files_to_remove SET settled_at_xid = (pg_current_xact_id()::text::bigint + 1000000000)::text::xid8")
    sweep(bench, path)
    assert bench.one("SELECT count(*) FROM files_to_remove") == (0,)


def test_a_storage_that_is_away_is_said_once_and_not_once_a_file(bench: Bench) -> None:
    paths = []
    for doc_id in ("a", "b", "c"):
        jobs.submit_document(doc_id.encode(), doc_id=doc_id)
        paths.append(file_of(bench, doc_id))
        grow_old(paths[-1])
        bench.conn.execute("SELECT delete_document(%s)", [doc_id])
    base = LocalStorage.from_settings(bench.settings).base
    base.rename(base.with_name("away"))
    told: list[str] = []
    handler = logger.add(lambda message: told.append(message.record["message"]), level="WARNING")

    def tried() -> bool:
        assert remove_noted_files(bench.settings, bench.conn) == 0
        return bool(told)

    try:
        wait_for(tried, "the storage to be asked")
    finally:
        logger.remove(handler)
    assert len(told) == 1 and "is not there: is it mounted?" in told[0]
    base.with_name("away").rename(base)
    sweep(bench, *paths)


async def test_a_submission_that_is_rolled_back_gives_the_file_up_again(bench: Bench, database: str) -> None:
    jobs.submit_document(b"one", doc_id="a")
    path = file_of(bench, "a")
    bench.conn.execute("SELECT delete_document('a')")
    with psycopg.connect(database) as caller:
        jobs.submit_document(b"one", doc_id="a", connection=caller)
        caller.rollback()
    grow_old(path)
    sweep(bench, path)


async def test_deleting_and_submitting_the_same_at_once_never_loses_a_file_that_a_row_needs(bench: Bench) -> None:
    stop = threading.Event()
    storage = LocalStorage.from_settings(bench.settings)

    def delete() -> None:
        while not stop.is_set():
            jobs.delete_document("a")

    def remove() -> None:
        with psycopg.connect(bench.conn.info.dsn, autocommit=True) as conn:
            while not stop.is_set():
                # A grace that is longer than it takes from a copy to its statement, and no longer than the test.
                remove_noted_files(bench.settings, conn, untouched_for=0.5)

    threads = [threading.Thread(target=delete), threading.Thread(target=remove), threading.Thread(target=remove)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(150):
            jobs.submit_document(b"one", doc_id="a")
            await asyncio.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    jobs.submit_document(b"one", doc_id="a")
    assert storage.fingerprint(bench.one("SELECT file_path FROM file_extractions")[0]).size == 3


OWN = ("inbox/a.zip", "a.zip", "logs/a.zip", "uploads/a.zip", "uploads/mine/a.zip", f"inbox/{'1' * 64}/{'2' * 64}")


@pytest.mark.parametrize("name", OWN)
async def test_a_file_that_was_submitted_where_it_lies_outlives_its_document_and_its_batch(bench: Bench, name: str) -> None:
    path = own_file(bench, name)
    bench.conn.execute("SELECT submit_document(%s, doc_id => 'a')", [name])
    bench.conn.execute("SELECT submit_batch(%s, batch_id => 'b')", [name])
    assert jobs.delete_document("a")
    assert jobs.delete_batch("b") == 0
    forget_all(bench)
    assert path.read_bytes() == b"mine"


async def test_an_own_file_outlives_what_it_was_a_version_of_and_the_stored_versions_go(bench: Bench) -> None:
    jobs.submit_document(b"stored", doc_id="a")
    stored = file_of(bench, "a")
    first, last = own_file(bench, "inbox/first.txt", b"first"), own_file(bench, "inbox/last.txt", b"last")
    for name in ("inbox/first.txt", "inbox/last.txt"):
        bench.conn.execute(
            "SELECT submit_document(%s, doc_id => 'a', content_sha256 => %s)", [name, hashlib.sha256(name.encode()).hexdigest()]
        )
    grow_old(stored)
    assert jobs.delete_document("a")
    forget_all(bench)
    assert (first.read_bytes(), last.read_bytes(), stored.exists()) == (b"first", b"last", False)


@pytest.mark.parametrize("as_batch", [False, True], ids=["a document", "a batch"])
async def test_nobody_removes_by_a_submission_of_theirs_what_was_stored_for_somebody_else(bench: Bench, as_batch: bool) -> None:
    """An earlier version of Bob's, say, to which no row refers; whoever knows his doc_id and its content can name it."""
    jobs.submit_document(b"one", doc_id="bob's", user_id="bob")
    earlier = file_of(bench, "bob's")
    jobs.submit_document(b"two", doc_id="bob's", user_id="bob")
    grow_old(earlier)
    name = earlier.relative_to(LocalStorage.from_settings(bench.settings).base).as_posix()
    if as_batch:
        bench.conn.execute("SELECT submit_batch(%s, batch_id => 'b', user_id => 'alice')", [name])
        jobs.delete_batch("b")
    else:
        bench.conn.execute("SELECT submit_document(%s, doc_id => 'a', user_id => 'alice')", [name])
        jobs.delete_document("a")
    forget_all(bench)
    assert earlier.read_bytes() == b"one"


async def test_a_link_in_the_place_of_a_stored_file_takes_no_other_file_along(bench: Bench) -> None:
    jobs.submit_document(b"one", doc_id="a")
    path, other = file_of(bench, "a"), own_file(bench, "inbox/other.txt")
    path.unlink()
    path.symlink_to(other)
    assert jobs.delete_document("a")
    forget_all(bench)
    assert other.read_bytes() == b"mine"


ALIASES = ("inbox//a.txt", "./inbox/a.txt", "inbox/./a.txt", "inbox/a.txt/", "inbox/a.txt/.", "inbox/x/../a.txt", "/inbox/a.txt")


@pytest.mark.parametrize("alias", ALIASES)
def test_a_file_is_submitted_by_one_name_so_that_nobody_deletes_it_by_another(bench: Bench, alias: str) -> None:
    for statement in ("SELECT submit_document(%s, 'two')", "SELECT submit_batch(%s, 'b')"):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="must be relative to the storage base path, without empty parts"):
            bench.conn.execute(statement.encode(), [alias])
    for name in ("inbox/a.txt", "a", ".a/..b/c..", "inbox/.a.txt"):
        bench.conn.execute("SELECT submit_document(%s)", [name])
        bench.conn.execute("SELECT submit_batch(%s)", [name])


def test_an_archive_of_a_folder_that_takes_long_to_store_is_there_when_it_is_submitted(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of an earlier run have just been noted for removal, and more than UNTOUCHED_SECONDS pass until the last one is stored."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("1.zip", "2.zip"):
        write_zip(folder / name, {f"{name}.txt": name})
    jobs.submit_batch(folder, batch_id="b")
    jobs.delete_batch("b")
    removed: list[Path] = []
    store = LocalStorage.store_upload

    def slowly(storage: LocalStorage, doc_id: str, source: Path, *rest: Any) -> StoredUpload:
        made = store(storage, doc_id, source, *rest)
        if source.name == "1.zip" and not removed:
            removed.append(storage.base / made.file_path)
            grow_old(removed[0])
            sweep(bench, removed[0])
        return made

    monkeypatch.setattr(LocalStorage, "store_upload", slowly)
    made = jobs.submit_batch(folder, batch_id="b")
    assert (made.archives, len(removed)) == (2, 1)
    storage = LocalStorage.from_settings(bench.settings)
    for path, sha256 in bench.all("SELECT file_path, content_sha256 FROM batch_archives"):
        assert storage.fingerprint(path).sha256 == sha256
