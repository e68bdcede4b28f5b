"""Two who meet on the same rows at the same moment: each hears what it was promised, and docmill's own do not wait for each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_batch, submit_document
from jobs.arguments import path_doc_id
from jobs.batch import submit_folder
from jobs.front import close_async
from jobs.reconcile import Reconciler
from jobs.sync.memory import FolderMemory
from models.errors import SubmitConflict
from models.settings import load_settings
from tests.archives import write_zip
from tests.integration.batches import accept, add_archive, batch_of, begin
from tests.integration.conftest import Bench

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


def meet(conn: psycopg.Connection, act: Callable[[], Any], then: Callable[[], object], *, waiting: int = 1) -> Future[Any]:
    """Begin something in a thread, do something else once so many wait for a lock, and return what came of the first."""
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(act)
        try:
            wait_for(conn, waiting, begun)
        finally:
            then()
        begun.exception(timeout=30)
        return begun


def wait_for(conn: psycopg.Connection, waiting: int, *begun: Future[Any]) -> None:
    end = time.monotonic() + 10
    while conn.execute(WAITING).fetchone() != (waiting,):
        assert not any(one.done() for one in begun), [one.exception() or one.result() for one in begun if one.done()]
        assert time.monotonic() < end, "nobody waits"
        time.sleep(0.01)


def with_loop(made: Callable[[], Any]) -> Any:
    """Run a coroutine in a loop of its own, whose connections end with it."""

    async def whole() -> Any:
        try:
            return await made()
        finally:
            await close_async()

    return asyncio.run(whole())


@pytest.mark.usefixtures("front_door")
@pytest.mark.parametrize("what", ["document", "archive", "unchanged"])
def test_a_batch_that_is_deleted_while_it_is_submitted_is_a_conflict(
    what: str, folder: Path, database: str, conn: psycopg.Connection
) -> None:
    known = {"document": ("a.txt", "b.txt"), "archive": (), "unchanged": ("b.txt",)}[what]
    for name in known:  # of no batch, so that the run takes them in
        submit_document(folder / name)
        if what == "document":
            (folder / name).write_text(f"other text of {name}")
    if what == "archive":
        write_zip(folder / "z.zip", {"a.txt": "a"})
    began: list[object] = []
    with psycopg.connect(database) as deleter:

        def delete(_: object) -> None:
            """Delete the batch once its run has begun, without committing."""
            if not began and conn.execute("SELECT FROM processing_jobs").fetchone() is not None:
                began.append(deleter.execute("SELECT delete_batch(%s)", [path_doc_id("default", folder)]).fetchone())

        made = meet(conn, lambda: with_loop(lambda: submit_folder(load_settings(), folder, on_file=delete)), deleter.commit)
    if what == "document":  # one refused file keeps no other from going on
        assert {file.name: type(file.error) for file in made.result().files if file.error is not None} == dict.fromkeys(
            ("b.txt", "sub/c.txt"), SubmitConflict
        )
    else:
        with pytest.raises(SubmitConflict, match="deleted"):
            made.result()
    assert conn.execute("SELECT count(*) FROM processing_jobs").fetchone() == (0,)


@pytest.mark.usefixtures("front_door")
def test_a_sync_whose_batch_is_deleted_remembers_nothing(folder: Path, database: str, conn: psycopg.Connection) -> None:
    batch_id = submit_batch(folder)
    memory = FolderMemory(load_settings(), folder, "default")
    doc_id = path_doc_id("default", folder / "a.txt")
    with psycopg.connect(database) as deleter:
        deleter.execute("SELECT delete_batch(%s)", [batch_id])
        meet(conn, lambda: with_loop(lambda: memory.remember([(doc_id, "look", "1" * 64)])), deleter.commit).result()
    assert conn.execute("SELECT count(*) FROM folder_files").fetchone() == (0,)


@pytest.mark.usefixtures("front_door")
def test_a_sync_in_a_deadlock_with_a_callers_transaction_is_a_conflict(folder: Path, database: str, conn: psycopg.Connection) -> None:
    submit_batch(folder)
    doc_ids = [doc_id for (doc_id,) in conn.execute("UPDATE file_extractions SET replaced_by = 'other' RETURNING doc_id").fetchall()]
    first, *_, last = [row[0] for row in conn.execute("SELECT doc_id FROM file_extractions ORDER BY id").fetchall()]
    memory = FolderMemory(load_settings(), folder, "default")
    with psycopg.connect(database) as caller:
        caller.execute("SET deadlock_timeout = '1 min'")  # so that it is the other that Postgres ends
        caller.execute("SELECT FROM file_extractions WHERE doc_id = %s FOR UPDATE", [last])
        made = meet(
            conn,
            lambda: with_loop(lambda: memory.keep(doc_ids)),
            lambda: caller.execute("SELECT FROM file_extractions WHERE doc_id = %s FOR UPDATE", [first]),
        )
        with pytest.raises(SubmitConflict):
            made.result()


@pytest.mark.parametrize("statement", ["SELECT cancel_batch('b')", "SELECT delete_batch('b')"])
def test_a_batch_that_ends_and_the_listing_of_an_archive_inside_of_another_take_both_in_one_order(
    statement: str, database: str, conn: psycopg.Connection
) -> None:
    run = begin(conn)
    for place in ("", "inner.zip/"):
        add_archive(conn, run, place, "unpacking")
    outer, inner = (row[0] for row in conn.execute("SELECT id FROM batch_archives ORDER BY id").fetchall())
    conn.execute("UPDATE batch_archives SET parent_id = %s WHERE id = %s", [outer, inner])
    conn.execute("UPDATE batch_archives SET attempts = 1 WHERE id = %s", [outer])  # so that it is the later one in the table
    with (
        psycopg.connect(database) as holder, psycopg.connect(database, autocommit=True) as ending,
        psycopg.connect(database, autocommit=True) as listing, ThreadPoolExecutor(2) as threads,
    ):  # fmt: skip
        holder.execute("SELECT FROM batch_archives WHERE id = %s FOR UPDATE", [inner])
        try:
            ended = threads.submit(ending.execute, statement)
            wait_for(conn, 1, ended)
            listed = threads.submit(listing.execute, "SELECT record_listing(%s, repeat('1', 64), 1, 0, 1)", [inner])
            wait_for(conn, 2, ended, listed)
        finally:
            holder.rollback()
        ended.result(timeout=30), listed.result(timeout=30)


def test_the_deletion_of_a_batch_gives_way_to_whoever_submits_it(database: str, conn: psycopg.Connection) -> None:
    run = begin(conn)
    accept(conn, run, "a")
    with psycopg.connect(database) as submitter, psycopg.connect(database, autocommit=True) as deleter:
        deleter.execute("SET deadlock_timeout = '1 min'")  # were there a deadlock, Postgres would end the other
        (new_run,) = submitter.execute("SELECT begin_batch('b', 'ann', '/data/in', 'corr')").fetchone() or (None,)

        def submit() -> None:
            accept(submitter, new_run, "a")
            submitter.commit()

        deleted = meet(conn, lambda: deleter.execute("SELECT delete_batch('b')").fetchone(), submit)
        assert deleted.result() == (1,)
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (0,)


def test_a_deletion_that_does_not_see_all_of_the_batch_is_to_be_tried_again(database: str, conn: psycopg.Connection) -> None:
    run = begin(conn)
    with psycopg.connect(database) as deleter:
        deleter.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        deleter.execute("SELECT FROM processing_jobs")
        accept(conn, run, "a")
        with pytest.raises(psycopg.errors.SerializationFailure, match='could not delete batch "b"'):
            deleter.execute("SELECT delete_batch('b')")
    assert conn.execute("SELECT state FROM file_extractions").fetchall() == [("queued",)]


@pytest.mark.parametrize("statement", ["SELECT cancel_documents('b', 1)", "SELECT cancel_straggler('a')"])
def test_a_batch_that_is_submitted_again_while_it_is_being_cancelled_is_cancelled_no_further(
    statement: str, database: str, conn: psycopg.Connection
) -> None:
    run = begin(conn)
    accept(conn, run, "a")
    accept(conn, run, "b")
    conn.execute("SELECT mark_batch_cancelled('b')")
    with psycopg.connect(database) as submitter, psycopg.connect(database, autocommit=True) as canceller:
        submitter.execute("SELECT begin_batch('b', 'ann', '/data/in', 'corr')")
        if "straggler" in statement:  # which holds its document
            assert canceller.execute(statement).fetchone() == (None,)
            submitter.commit()
        else:
            meet(conn, lambda: canceller.execute(statement).fetchone(), submitter.commit).result()
        assert canceller.execute(statement).fetchone() in ((0,), (None,))
    assert conn.execute("SELECT state FROM file_extractions").fetchall() == [("queued",), ("queued",)]


async def test_a_batch_that_cannot_be_ended_costs_no_document_its_outcome(bench: Bench) -> None:
    batch_of(bench, "a")
    bench.conn.execute("ALTER FUNCTION settle_batch(text) RENAME TO away")
    assert await bench.drain() == 1
    bench.conn.execute("ALTER FUNCTION away(text) RENAME TO settle_batch")
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)
    await Reconciler(bench.settings, bench.pool).pass_once()
    assert bench.one("SELECT status FROM processing_jobs") == ("completed",)
