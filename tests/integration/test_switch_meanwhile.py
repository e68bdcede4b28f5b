"""Another model comes to serve while a document is being completed with vectors of the one that did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from jobs.database import make_pool
from jobs.pipeline.checkpoint import Outcome, checkpoint
from jobs.pipeline.claims import Connection, NotClaimed, claim_document
from jobs.pipeline.completing import StaleVectors
from jobs.pipeline.work import Work
from models.settings import Settings
from models.stages import State
from tests.integration.conftest import sha
from tests.integration.test_stored_passages import made

WAITING = """SELECT count(*) FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
    WHERE l.locktype = 'advisory' AND NOT l.granted AND d.datname = current_database()"""


@pytest.fixture
async def theirs(settings: Settings, database: str) -> AsyncIterator[Connection]:
    """A worker's connection; a document of MODEL is complete."""
    async with make_pool(settings, database, max_size=1) as pool, pool.connection() as conn:
        await checkpoint(conn, await claimed(conn, "first"), Outcome(State.COMPLETE), worker="test:1")
        yield conn


async def claimed(conn: Connection, name: str) -> Work:
    await conn.execute("SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => %s)", [name, sha(name)])
    work = await claim_document(conn, name, job_id=0, worker="test:1", lease_seconds=60, reconcile_seconds=5, serialise=True)
    assert not isinstance(work, NotClaimed)
    return made(work, [f"passage of {name}"], "de")


async def test_a_switch_that_the_passages_wait_for_is_seen(theirs: Connection, conn: psycopg.Connection) -> None:
    work = await claimed(theirs, "second")
    with conn.transaction():
        conn.execute("SELECT await_passage_writers()")
        conn.execute("UPDATE serving_embeddings SET embedding_model = 'other@1'")
        completing_it = asyncio.create_task(checkpoint(theirs, work, Outcome(State.COMPLETE), worker="test:1"))
        while conn.execute(WAITING).fetchone() != (1,):
            assert not completing_it.done()
            await asyncio.sleep(0.01)
    with pytest.raises(StaleVectors):
        await completing_it
    assert conn.execute("SELECT state FROM file_extractions WHERE doc_id = 'second'").fetchone() == ("working",)
    assert conn.execute("SELECT DISTINCT doc_id FROM document_chunks").fetchall() == [("first",)]
    assert conn.execute("SELECT DISTINCT doc_id FROM document_markdown").fetchall() == [("first",)]
