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
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from jobs.database import conninfo_of, run_migrations
from jobs.patience import ImpatientConnection
from jobs.redaction import describe
from jobs.sessions import connect_options, pin_async_session
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings
from sql import query

Row = dict[str, Any]
_Key = tuple[str, tuple[tuple[str, Any], ...]]  # of what is shared: the query's name and its parameters
_LONGEST_WAIT = 3.0  # seconds for a connection: a person waits for the page
_SHORTEST_WAIT = 1.0  # with less, what is only busy would be called away
_MOST_SHARED = 200  # answers that are remembered
_ABSENCE = ("08", "57P", "53300")
"""SQLSTATE classes and codes of a server that is not there, goes away or takes no more connections."""


class DatabaseAway(DocmillError):
    """The database cannot be reached now, or has no free connection for us."""


class TooSlow(DocmillError):
    """The database did not answer a question within SERVE_QUERY_SECONDS."""


class Look:
    """One read-only transaction."""

    def __init__(self, conn: ImpatientConnection, seconds: float, until: float | None) -> None:
        """`seconds`: for each question. `until`: for all, by the monotonic clock."""
        self._conn = conn
        self._seconds = seconds
        self._until = until

    async def rows(self, name: str, **params: Any) -> list[Row]:
        """Run a named query and return its rows."""
        return await (await self._ask(name, params)).fetchall()

    async def row(self, name: str, **params: Any) -> Row | None:
        """Run a named query and return its first row, if any."""
        return await (await self._ask(name, params)).fetchone()

    @asynccontextmanager
    async def apart(self, *, within: float) -> AsyncIterator[None]:
        """Let what runs inside fail without ending the transaction, and end after so many seconds."""
        before, self._until = self._until, time.monotonic() + within
        try:
            async with self._conn.transaction():
                yield
        finally:
            self._until = before

    async def limit(self) -> None:
        """Give the next question the time that it has. TooSlow: there is none left."""
        seconds = self._seconds if self._until is None else min(self._seconds, self._until - time.monotonic())
        if seconds < 0.001:
            raise TooSlow("There was no time left to ask the database.")
        self._conn.patience = seconds
        await self._conn.execute(query("limit_look"), {"statement_ms": f"{seconds * 1000:.0f}"})

    async def _ask(self, name: str, params: dict[str, Any]) -> psycopg.AsyncCursor[Row]:
        if self._until is not None:
            await self.limit()
        return await self._conn.execute(query(name), params)


class Database:
    """Pool of one server process. It opens whether the database is there or not, and comes back with it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool: AsyncConnectionPool[ImpatientConnection] | None = None
        self._opening = asyncio.Lock()
        self._known: dict[_Key, tuple[float, list[Row]]] = {}
        self._failed: dict[_Key, tuple[float, type[DocmillError], str]] = {}
        self._locks: dict[_Key, asyncio.Lock] = {}

    async def open(self) -> None:
        """Start or find the embedded server if no other is named; connect in the background."""
        async with self._opening:
            if self._pool is not None:
                return
            conninfo = await asyncio.to_thread(conninfo_of, self._settings)
            if self._settings.database_conninfo is None and not self._settings.serve_read_only:
                await asyncio.to_thread(run_migrations, self._settings)
            pool: AsyncConnectionPool[ImpatientConnection] = AsyncConnectionPool(
                conninfo,
                connection_class=ImpatientConnection,
                kwargs={**connect_options(self._settings), "autocommit": True, "row_factory": dict_row, "connect_timeout": 3},
                min_size=0,
                max_size=self._settings.serve_connections,
                max_waiting=50,
                check=_check,  # after an outage no page pays for a connection that broke in it
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
    async def look(self, *, within: float | None = None) -> AsyncIterator[Look]:
        """Yield a read-only transaction whose questions all see the same. Each ends after SERVE_QUERY_SECONDS, all together after `within`.

        DatabaseAway, TooSlow; what the database refuses otherwise is raised as it is.
        """
        until = None if within is None else time.monotonic() + within
        async with self._connection(psycopg.IsolationLevel.REPEATABLE_READ, within) as conn, conn.transaction():
            look = Look(conn, self._settings.serve_query_seconds, until)
            await look.limit()
            yield look

    async def shared(self, name: str, *, seconds: float = 2.0, within: float | None = None, **params: Any) -> list[Row]:
        """Run a named query at most once in so many seconds, however many people look; DatabaseAway and TooSlow are for all who wait.

        `within`: as for `look`.
        """
        came_at = time.monotonic()
        key = (name, tuple(sorted(params.items())))
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = self._known.get(key)
            if known is None or known[0] < time.monotonic():
                rows = await self._ask_for_all(key, came_at, within)
                if len(self._known) > _MOST_SHARED:
                    self._known.clear()
                    self._failed.clear()
                    self._locks.clear()
                known = self._known[key] = time.monotonic() + seconds, rows
            return known[1]

    async def _ask_for_all(self, key: _Key, came_at: float, within: float | None) -> list[Row]:
        failed_at, kind, message = self._failed.get(key, (0.0, DocmillError, ""))
        if failed_at >= came_at:
            raise kind(message)
        try:
            async with self.look(within=within) as look:
                return await look.rows(key[0], **dict(key[1]))
        except (DatabaseAway, TooSlow) as error:
            if within is None:  # who had less time than others says nothing to them
                self._failed[key] = time.monotonic(), type(error), str(error)
            raise

    async def act(self, name: str, **params: Any) -> list[Row]:
        """Run a named query that writes, as a transaction of its own, and return its rows."""
        async with self._connection() as conn, conn.transaction():
            conn.patience = self._settings.serve_query_seconds
            await conn.execute(query("limit_action"), {"statement_ms": f"{self._settings.serve_query_seconds * 1000:.0f}"})
            return await (await conn.execute(query(name), params)).fetchall()

    @asynccontextmanager
    async def _connection(
        self, isolation: psycopg.IsolationLevel = psycopg.IsolationLevel.READ_COMMITTED, within: float | None = None
    ) -> AsyncIterator[ImpatientConnection]:
        try:
            if self._pool is None:
                await self.open()
            assert self._pool is not None
            wait = self._pool.timeout if within is None else min(self._pool.timeout, max(_SHORTEST_WAIT, within))
            async with self._pool.connection(wait) as conn:
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


async def _check(conn: ImpatientConnection) -> None:
    conn.patience = _SHORTEST_WAIT
    await AsyncConnectionPool.check_connection(conn)
