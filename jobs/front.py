"""The connections behind the front door: one small pool a process for threads, one an event loop for coroutines, opened on first use.

Whoever asks while a pool is being opened waits for that attempt: while the database hangs, all hear of it at once, not one after the other.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from jobs.database import Pool, make_pool, prepare_database
from jobs.sessions import connect_options, pin_session
from models.errors import ConfigurationError
from models.settings import Settings

_SyncPool = ConnectionPool[psycopg.Connection[Any]]
_Loops = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Settings, asyncio.Task[tuple[Pool, asyncio.Task[None]]]]]
_sync_pools: dict[Settings, Future[_SyncPool]] = {}
_sync_lock = threading.Lock()
_async_pools: _Loops = weakref.WeakKeyDictionary()
_inherited: list[object] = []


def _sync_pool(settings: Settings) -> _SyncPool:
    with _sync_lock:
        opening = _sync_pools.get(settings)
        if opening is None or _has_failed(opening):
            # In a thread, because the caller may itself be inside of an event loop, as in a notebook.
            thread = ThreadPoolExecutor(1)
            opening = _sync_pools[settings] = thread.submit(_open_sync, settings)
            thread.shutdown(wait=False)
    return opening.result()


def _open_sync(settings: Settings) -> _SyncPool:
    conninfo = asyncio.run(prepare_database(settings))
    pool: _SyncPool = ConnectionPool(
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
    atexit.register(close_sync)  # here, so that it comes before the end of the embedded server
    return pool


async def _async_pool(settings: Settings) -> Pool:
    loop = asyncio.get_running_loop()
    if (pools := _async_pools.get(loop)) is None:
        _abandon_closed_loops()
        pools = _async_pools.setdefault(loop, {})
    opening = pools.get(settings)
    if opening is None or _has_failed(opening):
        opening = pools[settings] = asyncio.create_task(_open_async(settings))
    pool, _ = await asyncio.shield(opening)  # others may be waiting for it too
    return pool


async def _open_async(settings: Settings) -> tuple[Pool, asyncio.Task[None]]:
    pool = make_pool(settings, await prepare_database(settings))
    await pool.open(wait=True)  # else the first user makes the pool grow while its first connection is on the way
    return pool, asyncio.create_task(_close_with_loop(pool))


def _abandon_closed_loops() -> None:
    """Give back what belongs to event loops that were closed while tasks were left, as `asyncio.run` never does.

    It would stay for good: what is kept for a loop refers to the loop.
    """
    for reference in _async_pools.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            loop.set_exception_handler(lambda *_: None)  # it would tell of each task of the pools that it never ended
            for opening in _async_pools.pop(loop, {}).values():
                if opening.done() and not _has_failed(opening):
                    opening.result()[0].abandon()


def _has_failed(opening: Future[Any] | asyncio.Task[Any]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None)


async def _close_with_loop(pool: Pool) -> None:
    """Close a pool when `asyncio.run` cancels what is left."""
    loop = asyncio.get_running_loop()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:  # and not when the loop is closed and this is thrown away, maybe inside of another loop
        _async_pools.pop(loop, None)
        await pool.close_cancelled()
        raise


def _begin_anew() -> None:
    """Let a child of fork open connections of its own: over those of its parent each would read the other's answers.

    What the parent has opened is kept as it is, because to close it would close it for the parent. The lock may be held by a thread of the
    parent, and those are not here.
    """
    global _sync_pools, _sync_lock, _async_pools
    _inherited.append((_sync_pools, dict(_async_pools)))
    _sync_pools, _sync_lock, _async_pools = {}, threading.Lock(), weakref.WeakKeyDictionary()


os.register_at_fork(after_in_child=_begin_anew)


def close_sync() -> None:
    """Close the pools that threads use; they open again on the next use."""
    with _sync_lock:
        openings = [*_sync_pools.values()]
        _sync_pools.clear()
    for opening in openings:
        if opening.exception() is None:
            opening.result().close()
    atexit.unregister(close_sync)


async def close_async() -> None:
    """Close the pools of the running event loop; they open again on the next use."""
    for opening in _async_pools.pop(asyncio.get_running_loop(), {}).values():
        opening.cancel()
        await asyncio.wait([opening])
        if not _has_failed(opening):
            pool, closing = opening.result()
            await pool.close()
            closing.cancel()
            await asyncio.wait([closing])


def _refuse_other_text(given: psycopg.BaseConnection[Any]) -> None:
    """Refuse a connection over which the server translates text, or gives bytes: that would fail once a statement has been carried out."""
    if given.info.encoding != "utf-8":
        encoding = given.info.parameter_status("client_encoding")
        raise ConfigurationError(f"connection has client_encoding {encoding}, but docmill needs UTF8: connect with client_encoding='UTF8'.")


def prepares(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool | None:
    """Return psycopg's `prepare` for statements over a connection that are run by a cursor of psycopg's plain kind.

    None, as psycopg does by itself, where that is the connection's own kind. Else False: its owner may have chosen another because the
    server's end of it changes with each transaction, and a statement that was prepared at one is not known at the next.
    """
    return None if conn.cursor_factory in (psycopg.Cursor, psycopg.AsyncCursor) else False


@contextmanager
def sync_connection(settings: Settings, given: psycopg.Connection[Any] | None) -> Iterator[psycopg.Connection[Any]]:
    """Yield the caller's connection as it stands, or one of ours that commits each statement.

    Before anything is sent: TypeError for an async one, ConfigurationError for one whose text is not UTF-8.
    """
    if given is not None:
        if not isinstance(given, psycopg.Connection):
            raise TypeError(f"connection must be a psycopg.Connection, not {type(given).__name__}; an async one is for the _async twin.")
        _refuse_other_text(given)
        yield given
        return
    with _sync_pool(settings).connection() as conn:
        yield conn


@asynccontextmanager
async def async_connection(settings: Settings, given: psycopg.AsyncConnection[Any] | None) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Do as `sync_connection` does, for coroutines."""
    if given is not None:
        if not isinstance(given, psycopg.AsyncConnection):
            raise TypeError(
                f"connection must be a psycopg.AsyncConnection, not {type(given).__name__}; others are for the twin without _async."
            )
        _refuse_other_text(given)
        yield given
        return
    pool = await _async_pool(settings)
    async with pool.connection() as conn:
        yield conn
