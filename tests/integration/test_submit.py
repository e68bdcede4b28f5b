"""The front door: what is accepted, what is refused, and that a refused or rolled-back submission leaves nothing behind."""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from jobs import (
    connector,
    delete_document,
    delete_document_async,
    front,
    get_document,
    get_document_async,
    submit_batch,
    submit_batch_async,
    submit_document,
    submit_document_async,
)
from jobs.adapters.storage import local
from jobs.connector import DocmillConnector
from jobs.front import async_connection, close_async
from models.errors import ConfigurationError, RetryableError, SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from tests.running import REPOSITORY

pytestmark = pytest.mark.usefixtures("front_door")


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("hello")
    return path


def count(conn: psycopg.Connection, table: str) -> int:
    row = conn.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


def test_a_path_bytes_and_an_open_file_are_accepted_and_stored(conn: psycopg.Connection, file: Path, settings: Settings) -> None:
    with file.open("rb") as opened:
        ids = [submit_document(file), submit_document(str(file), doc_id="b"), submit_document(b"x"), submit_document(opened, doc_id="c")]
    assert [s.outcome for s in ids] == ["accepted"] * 4
    for doc_id in ids:
        row = conn.execute("SELECT file_path, file_size, content_sha256 FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone()
        assert row is not None
        stored = settings.storage_base_path / row[0]
        assert stored.stat().st_size == row[1]
        assert stored.name == row[2]
    assert count(conn, "procrastinate_jobs") == 4


def test_the_answer_is_the_doc_id_as_a_string(conn: psycopg.Connection, file: Path) -> None:
    answer = submit_document(file, doc_id="mine", correlation_id="corr", metadata={"k": ["ä", 1]}, priority=3, file_name="../x\x07.txt")
    assert (answer, answer.doc_id, answer.version, answer.correlation_id) == ("mine", "mine", 1, "corr")
    row = conn.execute("SELECT metadata, priority, correlation_id, file_name FROM file_extractions").fetchone()
    assert row is not None
    assert row[:3] == ({"k": ["ä", 1]}, 3, "corr")
    assert "\x07" not in row[3]
    assert "/" not in row[3]


def test_an_answer_can_be_copied_and_handed_to_another_process(file: Path) -> None:
    document, batch = submit_document(file, doc_id="mine"), submit_batch([file, file.parent / "none.txt"])
    for made in (copy.deepcopy(document), pickle.loads(pickle.dumps(document))):
        assert (repr(made), made.correlation_id) == (repr(document), document.correlation_id)
    for found in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert (repr(found), found.refused) == (repr(batch), batch.refused)


def test_new_content_without_metadata_keeps_those_that_the_document_has(conn: psycopg.Connection, file: Path) -> None:
    submit_document(file)
    conn.execute("""SELECT update_document(doc_id, '{"project": "north", "year": 2026}') FROM file_extractions""")
    file.write_text("changed")
    assert submit_document(file).outcome == "new_version"
    assert conn.execute("SELECT metadata FROM file_extractions").fetchone() == ({"project": "north", "year": 2026},)
    file.write_text("changed once more")
    submit_document(file, metadata={"project": "south"})
    assert conn.execute("SELECT metadata FROM file_extractions").fetchone() == ({"project": "south"},)


def test_the_answer_names_the_correlation_id_that_logs_and_events_have(conn: psycopg.Connection, file: Path) -> None:
    first = submit_document(file, doc_id="a", correlation_id="first")
    assert submit_document(file, doc_id="a", correlation_id="second").correlation_id == "first"
    conn.execute("SELECT cancel_document('a')")
    resumed = submit_document(file, doc_id="a", correlation_id="third")
    assert (first.correlation_id, resumed.outcome, resumed.correlation_id) == ("first", "resumed", "first")
    file.write_text("changed")
    assert submit_document(file, doc_id="a", correlation_id="fourth").correlation_id == "fourth"
    assert conn.execute("SELECT correlation_id FROM file_extractions").fetchone() == ("fourth",)


def test_of_two_who_submit_the_same_at_once_both_are_told_of_one_correlation_id(database: str, file: Path) -> None:
    with ThreadPoolExecutor(1) as thread, psycopg.connect(database) as ours, psycopg.connect(database, autocommit=True) as watching:
        submit_document(file, doc_id="a", correlation_id="first", connection=ours)
        other = thread.submit(submit_document, file, doc_id="a", correlation_id="second")
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while watching.execute(waits).fetchone() is None:
            time.sleep(0.01)
        ours.commit()
        assert (other.result().outcome, other.result().correlation_id) == ("unchanged", "first")


def test_metadata_may_hold_the_words_for_a_nul(conn: psycopg.Connection, file: Path) -> None:
    metadata = {"pattern": r"[\u0000-\u001f]", r"\u0000": r"\\u0000"}
    submit_document(file, metadata=metadata)
    assert conn.execute("SELECT metadata FROM file_extractions").fetchone() == (metadata,)


def test_derived_ids_are_stable_per_user_and_place(file: Path) -> None:
    assert submit_document(file) == submit_document(str(file))
    assert submit_document(file, user_id="bob") != submit_document(file)
    assert submit_document(b"same") == submit_document(io.BytesIO(b"same"))
    assert submit_document(b"same").outcome == "unchanged"


def test_a_stream_that_cannot_seek_is_accepted(conn: psycopg.Connection) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe")
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert submit_document(stream).outcome == "accepted"
    assert count(conn, "file_extractions") == 1


class Counted(io.FileIO):
    """An open file that counts the bytes that are read of it."""

    total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(-1 if size is None else size)
        self.total += len(block)
        return block


@pytest.mark.parametrize("doc_id", [None, "named"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_no_more_of_an_open_file_is_read_than_may_be_stored(
    kind: str, doc_id: str | None, conn: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_FILE_SIZE_MB", "1")
    load_settings.cache_clear()
    large = tmp_path / "large.bin"
    large.touch()
    os.truncate(large, 20_000_000)
    with subprocess.Popen(["cat", str(large)], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        stream = Counted(cat.stdout.fileno(), closefd=False) if kind == "pipe" else Counted(str(large))
        with stream, pytest.raises(SubmitError, match="MAX_FILE_SIZE_MB"):
            submit_document(stream, doc_id=doc_id)
        cat.stdout.close()
    assert stream.total <= 2 << 20
    assert count(conn, "file_extractions") == 0


@pytest.mark.parametrize("doc_id", [None, "named"])
def test_an_open_file_that_has_nothing_for_the_moment_or_fails_is_not_taken_for_one_that_ends(
    doc_id: str | None, conn: psycopg.Connection
) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, b"first half ")
    with open(reader, "rb", buffering=0) as stream, pytest.raises(TypeError, match="NoneType"):  # noqa: PTH123
        submit_document(stream, doc_id=doc_id)
    os.close(writer)
    with Path("/proc/self/mem").open("rb", buffering=0) as failing, pytest.raises(RetryableError, match="'mem' cannot be read"):
        submit_document(failing, doc_id=doc_id)
    assert count(conn, "file_extractions") == 0


def test_an_open_file_is_called_as_it_is_on_disk_and_upload_where_it_has_no_name_there(conn: psycopg.Connection, file: Path) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with (
        open(os.fsencode(file), "rb") as named,  # noqa: PTH123
        os.fdopen(reader, "rb") as pipe,
        tempfile.TemporaryFile() as temporary,
        tempfile.SpooledTemporaryFile() as spooled,
    ):
        files: list[Any] = [named, pipe, temporary, spooled]
        for number, each in enumerate(files):
            submit_document(each, doc_id=str(number))
    names = conn.execute("SELECT file_name FROM file_extractions ORDER BY doc_id").fetchall()
    assert names == [("a.txt",), ("upload",), ("upload",), ("upload",)]


@pytest.mark.parametrize(
    "case", ["missing", "folder", "too large", "text stream", "number", "NUL", "no character", "closed", "for writing"]
)
def test_a_bad_file_is_refused_by_name_and_nothing_is_stored(
    case: str, conn: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_FILE_SIZE_MB", "1")
    load_settings.cache_clear()
    large = tmp_path / "large.bin"
    large.write_bytes(b"x" * 1_000_001)
    closed = large.open("rb")
    closed.close()
    cases = {
        "missing": tmp_path / "no.txt", "folder": tmp_path, "too large": large, "text stream": io.StringIO("x"), "number": 7,
        "NUL": "a\0b.txt", "no character": "a\ud800.txt", "closed": closed, "for writing": (tmp_path / "new").open("wb"),
    }  # fmt: skip
    given: Any = cases[case]
    with pytest.raises(SubmitError) as caught:
        submit_document(given)
    named = {
        "missing": "no.txt", "folder": "folder", "too large": "MAX_FILE_SIZE_MB", "text stream": "binary", "number": "int",
        "NUL": "NUL", "no character": "no file name", "closed": "closed", "for writing": "cannot be read",
    }  # fmt: skip
    assert named[case] in str(caught.value)
    assert count(conn, "file_extractions") == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"doc_id": "x" * 201},
        {"doc_id": "a\nb"},
        {"doc_id": "\ud800"},
        {"user_id": ""},
        {"correlation_id": "a\x00"},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": "\x00"}},
        {"metadata": {"a": "\ud800"}},
        {"metadata": {"a": {1}}},
        {"metadata": [1]},
        {"metadata": {"a\\\x00": 1}},
        pytest.param({"metadata": {"a": nested(3000)}}, id="nested"),
        pytest.param({"metadata": {"a": nested(100)}}, id="101 levels"),
        {"metadata": {"a": -(10**309)}},
        {"priority": 2**31},
        {"priority": "high"},
        {"priority": True},
        {"doc_id": ""},
        {"file_name": Path("a/b")},
    ],
    ids=repr,
)
def test_a_bad_argument_is_refused(bad: dict[str, Any], conn: psycopg.Connection, file: Path) -> None:
    with pytest.raises(SubmitError):
        submit_document(file, **bad)
    assert count(conn, "file_extractions") == 0


def test_no_user_is_the_default_one_in_sql(conn: psycopg.Connection) -> None:
    named = conn.execute("SELECT submit_document('uploads/x', user_id => 'default')").fetchone()
    assert conn.execute("SELECT submit_document('uploads/x', user_id => NULL)").fetchone() == named
    assert conn.execute("SELECT user_id FROM file_extractions").fetchall() == [("default",)]


@pytest.mark.parametrize("metadata", ['{"n": 1e5000}', '{"n": [-1e309]}', '{"a":' * 101 + "1" + "}" * 101], ids=["large", "small", "deep"])
def test_metadata_that_not_every_reader_takes_is_refused_in_sql_too(metadata: str, conn: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="metadata must not"):
        conn.execute("SELECT submit_document('uploads/x', metadata => %s::jsonb)", [metadata])
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="metadata must not"):
        conn.execute("INSERT INTO processing_jobs (batch_id, correlation_id, metadata) VALUES ('b', 'c', %s::jsonb)", [metadata])
    at_most = '{"a":' * 99 + "[1e308]" + "}" * 99
    conn.execute("SELECT submit_document('uploads/x', metadata => %s::jsonb)", [at_most])
    submit_document(b"words", metadata=json.loads(at_most))
    assert count(conn, "file_extractions") == 2


def test_a_submission_lives_and_dies_with_the_callers_transaction(database: str, conn: psycopg.Connection, file: Path) -> None:
    with psycopg.connect(database) as caller:
        submit_document(file, doc_id="gone", connection=caller)
        caller.rollback()
        submit_document(file, doc_id="kept", connection=caller)
        caller.commit()
    assert conn.execute("SELECT doc_id FROM file_extractions").fetchall() == [("kept",)]
    assert conn.execute("SELECT args->>'doc_id' FROM procrastinate_jobs").fetchall() == [("kept",)]


async def test_a_callers_connection_may_have_cursors_of_any_kind(database: str, conn: psycopg.Connection) -> None:
    with psycopg.connect(database, autocommit=True, cursor_factory=psycopg.RawCursor) as caller:
        assert submit_document(b"words", doc_id="a", connection=caller).outcome == "accepted"
    async with await psycopg.AsyncConnection.connect(database, autocommit=True, cursor_factory=psycopg.AsyncRawCursor) as other:
        assert (await submit_document_async(b"words", doc_id="b", connection=other)).outcome == "accepted"
    assert count(conn, "file_extractions") == 2


def test_a_batch_may_come_over_a_connection_with_cursors_of_any_kind(database: str, conn: psycopg.Connection, file: Path) -> None:
    with psycopg.connect(database, cursor_factory=psycopg.RawCursor) as caller:
        assert submit_batch([file], batch_id="b", connection=caller).outcome == "accepted"
    assert count(conn, "file_extractions") == 1


async def test_a_connection_whose_cursors_prepare_no_statements_is_given_none(database: str, conn: psycopg.Connection, file: Path) -> None:
    prepared = "SELECT count(*) FROM pg_prepared_statements"
    with psycopg.connect(database, cursor_factory=psycopg.ClientCursor) as caller:
        for _ in range(7):
            submit_document(file, connection=caller)
            submit_batch([file], batch_id="b", connection=caller)
            get_document("x", connection=caller)
            delete_document("x", connection=caller)
        assert caller.execute(prepared).fetchone() == (0,)
    async with await psycopg.AsyncConnection.connect(database, cursor_factory=psycopg.AsyncClientCursor) as other:
        for _ in range(7):
            await submit_document_async(file, connection=other)
            await submit_batch_async([file], batch_id="b", connection=other)
            await get_document_async("x", connection=other)
            await delete_document_async("x", connection=other)
        assert await (await other.execute(prepared)).fetchone() == (0,)
    with psycopg.connect(database) as plain:
        for _ in range(7):
            submit_document(file, connection=plain)
        assert plain.execute(prepared).fetchone() != (0,)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_callers_connection_that_does_not_speak_utf8_is_refused_before_anything_is_sent(database: str, encoding: str) -> None:
    with psycopg.connect(database, client_encoding=encoding) as caller:
        with pytest.raises(ConfigurationError, match=f"{encoding}.*UTF8"):
            submit_document(b"words", connection=caller)
        assert caller.info.transaction_status == TransactionStatus.IDLE
    async with await psycopg.AsyncConnection.connect(database, client_encoding=encoding) as other:
        with pytest.raises(ConfigurationError, match=f"{encoding}.*UTF8"):
            await submit_document_async(b"words", connection=other)
        assert other.info.transaction_status == TransactionStatus.IDLE


def test_another_open_transaction_is_a_conflict_and_no_hang(
    database: str, conn: psycopg.Connection, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", "0.05")
    load_settings.cache_clear()
    with psycopg.connect(database) as caller:
        submit_document(file, doc_id="held", connection=caller)
        with pytest.raises(SubmitConflict, match="held"):
            submit_document(file, doc_id="held")
        caller.rollback()
    assert submit_document(file, doc_id="held").outcome == "accepted"


def test_another_users_doc_id_is_refused_without_saying_whose(file: Path) -> None:
    submit_document(file, doc_id="x", user_id="ann")
    with pytest.raises(SubmitError) as caught:
        submit_document(file, doc_id="x", user_id="bob")
    assert "ann" not in str(caught.value)


def test_the_same_document_from_many_threads_at_once_is_one_document(conn: psycopg.Connection, file: Path) -> None:
    outcomes: list[str] = []
    threads = [threading.Thread(target=lambda: outcomes.append(submit_document(file).outcome)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["accepted"] + ["unchanged"] * 11
    assert (count(conn, "file_extractions"), count(conn, "procrastinate_jobs")) == (1, 1)


def test_changed_content_is_a_new_version(conn: psycopg.Connection, file: Path) -> None:
    submit_document(file)
    file.write_text("changed")
    answer = submit_document(file)
    assert (answer.outcome, answer.version) == ("new_version", 2)
    assert conn.execute("SELECT status, count(*) FROM procrastinate_jobs GROUP BY status ORDER BY 1").fetchall() == [
        ("todo", 1),
        ("cancelled", 1),
    ]


def test_full_storage_is_retryable_and_leaves_nothing(conn: psycopg.Connection, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "write_all", full)
    with pytest.raises(RetryableError, match="full"):
        submit_document(file)
    assert count(conn, "file_extractions") == 0


def test_a_wrong_database_is_named_without_its_password(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://docmill:hunter2@127.0.0.1:1/nowhere")
    load_settings.cache_clear()
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        submit_document(file)
    assert "hunter2" not in str(caught.value)


async def test_the_async_twin_does_the_same_and_joins_an_async_transaction(database: str, conn: psycopg.Connection, file: Path) -> None:
    try:
        answers = await asyncio.gather(*(submit_document_async(b"%d" % i) for i in range(20)))
        assert {a.outcome for a in answers} == {"accepted"}
        async with await psycopg.AsyncConnection.connect(database) as caller:
            await submit_document_async(file, doc_id="gone", connection=caller)
            await caller.rollback()
    finally:
        await close_async()
    assert count(conn, "file_extractions") == 20


def other_connections(conn: psycopg.Connection) -> int:
    """Those to the test's database, which the server tells of for a moment longer than they last."""
    left, end = 1, time.monotonic() + 5
    while left and time.monotonic() < end:
        time.sleep(0.02)
        left = count(conn, "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
    return left


def test_event_loops_that_have_ended_leave_no_connections(conn: psycopg.Connection, caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()
    gc.disable()
    try:
        asyncio.run(submit_document_async(b"first"))
        assert other_connections(conn) == 0
        for number in range(4):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(submit_document_async(b"%d" % number))
            loop.close()  # with the pool's tasks left in it, as asyncio.run never does
        asyncio.run(submit_document_async(b"last"))
        assert other_connections(conn) == 0
    finally:
        gc.enable()
    gc.collect()
    assert not caplog.records, "nothing is complained of when it is thrown away"
    assert count(conn, "file_extractions") == 6


async def test_twenty_connections_serve_a_hundred_readers_and_submitters(conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """R3."""
    monkeypatch.setenv("DATABASE_MAX_CONNECTIONS", "20")
    load_settings.cache_clear()
    settings = load_settings()
    most = 0

    async def read() -> int:
        nonlocal most
        async with async_connection(settings, None) as mine:
            cursor = await mine.execute(
                """SELECT count(*), (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database())
                FROM document_status, pg_sleep(0.02)"""
            )
            row = await cursor.fetchone()
            assert row is not None
            most = max(most, row[1])
            return 1

    async def submit(i: int) -> int:
        await submit_document_async(b"number %d" % i)
        return 1

    try:
        done = await asyncio.gather(*(read() if i % 2 else submit(i) for i in range(200)))
    finally:
        await close_async()
    assert sum(done) == 200
    assert count(conn, "file_extractions") == 100
    assert most <= 21  # the test's own connection is one of them


def test_a_program_ends_while_a_connection_is_still_being_made(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = psycopg.AsyncConnection.connect
    ended = threading.Event()

    async def program() -> None:
        async with async_connection(settings, None):
            connecting = asyncio.Event()

            async def connect_slowly(*_: Any, **__: Any) -> psycopg.AsyncConnection[Any]:
                connecting.set()
                await asyncio.sleep(3600)
                return await connect()

            async def use() -> None:
                async with async_connection(settings, None):
                    await connecting.wait()

            monkeypatch.setattr(psycopg.AsyncConnection, "connect", connect_slowly)
            users = [asyncio.create_task(use()) for _ in range(5)]  # more than there are connections, so that the pool makes another
            await connecting.wait()
        await asyncio.gather(*users)
        ended.set()

    thread = threading.Thread(target=asyncio.run, args=[program()], daemon=True)
    thread.start()
    thread.join(20)
    assert ended.is_set()
    assert not thread.is_alive()


@pytest.mark.parametrize("door", ["front", "worker"])
def test_a_program_ends_while_its_first_connection_is_still_being_made(
    settings: Settings, database: str, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    async def program() -> None:
        connecting = asyncio.Event()

        async def connect_slowly(*_: Any, **__: Any) -> None:
            connecting.set()
            await asyncio.sleep(3600)

        async def use() -> None:
            if door == "worker":
                await DocmillConnector(settings).open_async()
            async with async_connection(settings, None):
                pass

        async def prepared(_: Settings) -> str:
            return database

        for module in (front, connector):
            monkeypatch.setattr(module, "prepare_database", prepared)
        monkeypatch.setattr(psycopg.AsyncConnection, "connect", connect_slowly)
        user = asyncio.create_task(use())
        await connecting.wait()
        assert not user.done()

    thread = threading.Thread(target=asyncio.run, args=[program()], daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("defer", ["defer_stage('new', 'validate', 0)", "defer_unpacking(1)"])
def test_a_job_that_has_come_since_the_transactions_snapshot_is_not_looked_for_without_an_end(database: str, defer: str) -> None:
    asked = f"SELECT {defer}".encode()
    with psycopg.connect(database) as conn, psycopg.connect(database, autocommit=True) as other:
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SET statement_timeout = '10s'")
        conn.execute("SELECT FROM file_extractions")
        other.execute(asked)
        with pytest.raises(psycopg.errors.SerializationFailure, match="try again"):
            conn.execute(asked)


async def test_the_sync_front_door_opens_inside_of_an_event_loop(conn: psycopg.Connection) -> None:
    assert submit_document(b"from a notebook").outcome == "accepted"


def test_processes_that_fork_do_not_share_connections(conn: psycopg.Connection) -> None:
    """As gunicorn with --preload and Celery do."""
    code = """
import asyncio, os, sys
import jobs

jobs.get_document("warm-up")
child = os.fork()
who = "parent" if child else "child"
for number in range(40):
    doc_id = jobs.submit_document(b"%d" % number, doc_id=f"{who}-{number}").doc_id
    assert doc_id == jobs.get_document(doc_id).doc_id == f"{who}-{number}", doc_id
assert asyncio.run(jobs.get_document_async(doc_id)).doc_id == doc_id
sys.exit(bool(child and os.waitpid(child, 0)[1]))
"""
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert count(conn, "file_extractions") == 80


@pytest.fixture
def hanging(front_door: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A database that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/x")
        monkeypatch.setenv("DATABASE_TIMEOUT", "2")
        load_settings.cache_clear()
        yield server


def connections(server: socket.socket) -> int:
    server.setblocking(False)
    made = 0
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
            made += 1
    return made


def test_threads_that_ask_first_while_the_database_hangs_hear_of_it_together(hanging: socket.socket) -> None:
    def ask(_: int) -> None:
        with pytest.raises(ConfigurationError):
            get_document("a")

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, range(6)))
    assert connections(hanging) == 1
    ask(7)
    assert connections(hanging) == 1, "the next one tries again"


async def test_coroutines_that_ask_first_while_the_database_hangs_hear_of_it_together(hanging: socket.socket) -> None:
    asked = await asyncio.gather(*(get_document_async("a") for _ in range(6)), return_exceptions=True)
    assert {type(answer) for answer in asked} == {ConfigurationError}
    assert connections(hanging) == 1
    with pytest.raises(ConfigurationError):
        await get_document_async("a")
    assert connections(hanging) == 1, "the next one tries again"
