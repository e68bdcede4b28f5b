"""The server's way to the database: a small pool of its own, short read-only transactions, one error for all that keeps it away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psycopg
from loguru import logger
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from jobs.database import conninfo_of, run_migrations
from jobs.redaction import describe
from jobs.sessions import connect_options, pin_async_session
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings
from sql import query

Row = dict[str, Any]
_Connection = psycopg.AsyncConnection[DictRow]
_LONGEST_WAIT = 3.0  # seconds for a connection: a person waits for the page
_MOST_SHARED = 200  # answers that are remembered
_ABSENCE = ("08", "57P", "53300")
"""SQLSTATE classes and codes of a server that is not there, goes away or takes no more connections."""


class DatabaseAway(DocmillError):
    """The database cannot be reached now, or has no free connection for us."""


class TooSlow(DocmillError):
    """The database did not answer a question within SERVE_QUERY_SECONDS."""


class Look:
    """One read-only transaction."""

    def __init__(self, conn: _Connection) -> None:
        self._conn = conn

    async def rows(self, name: str, **params: Any) -> list[Row]:
        """Run a named query and return its rows."""
        return await (await self._conn.execute(query(name), params)).fetchall()

    async def row(self, name: str, **params: Any) -> Row | None:
        """Run a named query and return its first row, if any."""
        return await (await self._conn.execute(query(name), params)).fetchone()

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[None]:
        """Let what runs inside fail without ending the transaction."""
        async with self._conn.transaction():
            yield


class Database:
    """Pool of one server process. It opens whether the database is there or not, and comes back with it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool: AsyncConnectionPool[_Connection] | None = None
        self._opening = asyncio.Lock()
        self._known: dict[tuple[Any, ...], tuple[float, list[Row]]] = {}
        self._locks: dict[tuple[Any, ...], asyncio.Lock] = {}

    async def open(self) -> None:
        """Start or find the embedded server if no other is named; connect in the background."""
        async with self._opening:
            if self._pool is not None:
                return
            conninfo = await asyncio.to_thread(conninfo_of, self._settings)
            if self._settings.database_conninfo is None:
                await asyncio.to_thread(run_migrations, self._settings)
            pool: AsyncConnectionPool[_Connection] = AsyncConnectionPool(
                conninfo,
                kwargs={**connect_options(self._settings), "autocommit": True, "row_factory": dict_row, "connect_timeout": 3},
                min_size=0,
                max_size=self._settings.serve_connections,
                max_waiting=50,
                check=AsyncConnectionPool.check_connection,  # after an outage no page pays for a connection that broke in it
                timeout=min(_LONGEST_WAIT, self._settings.database_timeout),
                max_idle=60,
                reconnect_timeout=5,  # who asks later begins anew, rather than wait with a backoff of minutes
                open=False,
                configure=partial(pin_async_session, settings=self._settings),
                name="docmill-serve",
            )
            await pool.open()
            self._pool = pool

    async def close(self) -> None:
        """Close the pool."""
        if self._pool is not None:
            await self._pool.close(timeout=2)

    @asynccontextmanager
    async def look(self, *, seconds: float | None = None) -> AsyncIterator[Look]:
        """Yield a read-only transaction whose questions all see the same, and end after so many seconds each (SERVE_QUERY_SECONDS).

        DatabaseAway, TooSlow; what the database refuses otherwise is raised as it is.
        """
        limit = self._settings.serve_query_seconds if seconds is None else seconds
        async with self._connection(psycopg.IsolationLevel.REPEATABLE_READ) as conn, conn.transaction():
            await conn.execute(query("limit_look"), {"statement_ms": f"{limit * 1000:.0f}"})
            yield Look(conn)

    async def shared(self, name: str, *, seconds: float = 2.0, **params: Any) -> list[Row]:
        """Run a named query at most once in so many seconds, however many people look."""
        key = (name, tuple(sorted(params.items())))
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = self._known.get(key)
            if known is None or known[0] < time.monotonic():
                async with self.look() as look:
                    rows = await look.rows(name, **params)
                if len(self._known) > _MOST_SHARED:
                    self._known.clear()
                    self._locks.clear()
                known = self._known[key] = time.monotonic() + seconds, rows
            return known[1]

    async def act(self, name: str, **params: Any) -> list[Row]:
        """Run a named query that writes, as a transaction of its own, and return its rows."""
        async with self._connection() as conn, conn.transaction():
            await conn.execute(query("limit_action"), {"statement_ms": f"{self._settings.serve_query_seconds * 1000:.0f}"})
            return await (await conn.execute(query(name), params)).fetchall()

    @asynccontextmanager
    async def _connection(self, isolation: psycopg.IsolationLevel = psycopg.IsolationLevel.READ_COMMITTED) -> AsyncIterator[_Connection]:
        try:
            if self._pool is None:
                await self.open()
            assert self._pool is not None
            async with self._pool.connection() as conn:
                await conn.set_isolation_level(isolation)
                yield conn
        except (PoolTimeout, TooManyRequests) as error:
            raise DatabaseAway("No connection to the database within a few seconds.") from error
        except ConfigurationError as error:
            raise DatabaseAway(str(error)) from error
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
            limit = self._settings.serve_query_seconds
            raise TooSlow(f"The database did not answer within SERVE_QUERY_SECONDS={limit:g}.") from error
        except psycopg.OperationalError as error:
            if error.sqlstate is not None and not error.sqlstate.startswith(_ABSENCE):
                raise
            raise DatabaseAway(f"The connection to the database broke: {describe(error)}") from error

    async def keep_trying(self) -> None:
        """Open the pool, again and again until it succeeds: the embedded server may still be starting elsewhere."""
        while True:
            try:
                await self.open()
                return
            except Exception as error:
                logger.warning("The database could not be opened yet: {}", describe(error))
                await asyncio.sleep(2)
