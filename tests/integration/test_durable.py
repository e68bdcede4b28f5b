"""Who waits for a connection while the database is away or busy, and is asked to stop meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from jobs.database import make_pool
from jobs.pipeline import durable
from jobs.pipeline.claims import Connection
from models.settings import Settings


@pytest.fixture
async def pool(settings: Settings, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncConnectionPool[Connection]]:
    """One connection, for which half a minute is waited, and a tenth of a second by who must stop."""
    monkeypatch.setattr(durable, "LAST_WAIT", 0.1)
    pool = make_pool(settings, database, max_size=1)
    await pool.open()
    yield pool
    await pool.close()


async def test_who_is_asked_to_stop_while_it_waits_does_not_wait_for_the_pools_time(pool: AsyncConnectionPool[Connection]) -> None:
    stopping = asyncio.Event()

    async def wait() -> None:
        async with durable.connection(pool, stopping.is_set):
            pass

    async with pool.connection():
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        stopping.set()
        async with asyncio.timeout(pool.timeout / 2):
            with pytest.raises(PoolTimeout):
                await waiting


async def test_who_need_not_stop_gets_the_connection_once_it_is_free(pool: AsyncConnectionPool[Connection]) -> None:
    async def ask() -> int:
        async with durable.connection(pool, lambda: False) as conn:
            row = await (await conn.execute("SELECT 1 AS one")).fetchone()
            assert row is not None
            return int(row[0])

    async with pool.connection():
        asked = asyncio.create_task(ask())
        await asyncio.sleep(0.5)
        assert not asked.done()
    assert await asked == 1
