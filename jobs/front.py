"""The connections behind the front door: one small pool a process for threads, one an event loop for coroutines, opened on first use."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from jobs.database import make_pool, prepare_database
from jobs.sessions import connect_options, pin_session
from models.settings import Settings

_sync_pools: dict[Settings, ConnectionPool[psycopg.Connection[Any]]] = {}
_sync_lock = threading.Lock()
_AsyncPool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]
_Loops = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Settings, tuple[_AsyncPool, asyncio.Task[None]]]]
_async_pools: _Loops = weakref.WeakKeyDictionary()
_async_locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


def _sync_pool(settings: Settings) -> ConnectionPool[psycopg.Connection[Any]]:
    with _sync_lock:
        pool = _sync_pools.get(settings)
        if pool is None:
            # In a thread, because the caller may itself be inside of an event loop, as in a notebook.
            with ThreadPoolExecutor(1) as thread:
                conninfo = thread.submit(asyncio.run, prepare_database(settings)).result()
            pool = ConnectionPool(
                conninfo,
                kwargs={**connect_options(settings), "autocommit": True},
                min_size=0,
                max_size=settings.database_max_connections,
                timeout=settings.database_timeout,
                max_idle=60,
                open=True,
                configure=partial(pin_session, settings=settings),
                name="docmill-front",
            )
            atexit.register(pool.close)
            _sync_pools[settings] = pool
        return pool


async def _async_pool(settings: Settings) -> _AsyncPool:
    loop = asyncio.get_running_loop()
    async with _async_locks.setdefault(loop, asyncio.Lock()):
        pools = _async_pools.setdefault(loop, {})
        if settings not in pools:
            pool = make_pool(settings, await prepare_database(settings))
            await pool.open(wait=True)  # else the first user makes the pool grow while its first connection is on the way
            pools[settings] = pool, loop.create_task(_close_with_loop(pool))
        return pools[settings][0]


async def _close_with_loop(pool: _AsyncPool) -> None:
    """Close a pool when `asyncio.run` cancels what is left: a task of the pool that is connecting outlives that otherwise."""
    try:
        await asyncio.Event().wait()
    finally:
        _async_pools.pop(asyncio.get_running_loop(), None)
        with suppress(asyncio.CancelledError):  # the pool waits for its tasks, which have been cancelled too
            await pool.close()


def close_sync() -> None:
    """Close the pools that threads use; they open again on the next use."""
    with _sync_lock:
        for pool in _sync_pools.values():
            pool.close()
            atexit.unregister(pool.close)
        _sync_pools.clear()


async def close_async() -> None:
    """Close the pools of the running event loop; they open again on the next use."""
    for pool, closing in _async_pools.pop(asyncio.get_running_loop(), {}).values():
        await pool.close()
        closing.cancel()
        await asyncio.wait([closing])


@contextmanager
def sync_connection(settings: Settings, given: psycopg.Connection[Any] | None) -> Iterator[psycopg.Connection[Any]]:
    """Yield the caller's connection as it stands, or one of ours that commits each statement."""
    if given is not None:
        yield given
        return
    with _sync_pool(settings).connection() as conn:
        yield conn


@asynccontextmanager
async def async_connection(settings: Settings, given: psycopg.AsyncConnection[Any] | None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Do as `sync_connection` does, for coroutines."""
    if given is not None:
        yield given
        return
    pool = await _async_pool(settings)
    async with pool.connection() as conn:
        yield conn
