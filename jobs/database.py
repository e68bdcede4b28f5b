"""Connections: where the database is, pools with limits and timeouts, and a check with clear words."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from jobs.embedded import start_embedded
from jobs.redaction import describe
from jobs.sessions import PooledConnection, behind_pooler, connect, connect_async, connect_options, pin_async_session
from jobs.transport import warn_of_clear_text
from jobs.vector_array import register_vectors
from models.errors import ConfigurationError
from models.settings import Settings
from sql import query
from sql.migrate import migrate, missing_migrations

MIN_POSTGRES = 170000
MIN_VECTOR = (0, 8)


def conninfo_of(settings: Settings, *, direct: bool = False) -> str:
    """Return where the database is, starting the embedded server if no other is named. `direct`: around a transaction pooler."""
    conninfo = settings.database_conninfo_direct if direct else settings.database_conninfo
    return start_embedded(settings.storage_base_path) if conninfo is None else conninfo


async def _configure(conn: psycopg.AsyncConnection[Any], settings: Settings) -> None:
    # A process that is paused or cut off in mid-transaction must not keep its documents locked, or nobody could rescue them.
    limits = {"idle_ms": f"{settings.lease_seconds * 1000:.0f}", "transaction_ms": f"{settings.stage_timeout_seconds * 1000:.0f}"}
    if isinstance(conn, PooledConnection):
        conn.limits = {**limits, "local": True}
        await pin_async_session(conn, settings)
    else:
        async with conn.pipeline():  # one round trip
            await conn.execute(query("limit_transactions"), {**limits, "local": False})
            await pin_async_session(conn, settings)
    try:
        await register_vectors(conn)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError("The database has no vector type: run `docmill migrate` first.") from error


class Pool(AsyncConnectionPool[psycopg.AsyncConnection[Any]]):
    """A pool that keeps no event loop from ending: one of its tasks that is connecting outlives being cancelled until the pool closes."""

    async def open(self, wait: bool = False, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as psycopg has it
        """Open it, and close it where that fails or is waited for no longer: then nobody else would."""
        try:
            await super().open(wait, timeout)
        except BaseException:
            await self.close_cancelled()
            raise

    async def close_cancelled(self) -> None:
        """Close it, also where its tasks, for which it waits, have been cancelled: then its own end is never reached."""
        self._close_idle()
        with suppress(asyncio.CancelledError):
            await self.close()

    def abandon(self) -> None:
        """Give everything back where the event loop is closed: its tasks run no more, and so cannot end by themselves."""
        self._close_idle()
        for task in (*self._workers, self._sched_runner):
            if task is not None and (coroutine := task.get_coro()) is not None:
                with suppress(RuntimeError):  # the last thing that it does is to ask something of the closed loop
                    coroutine.close()

    def _close_idle(self) -> None:
        while self._pool:
            self._pool.popleft().pgconn.finish()


def make_pool(settings: Settings, conninfo: str, *, max_size: int | None = None) -> Pool:
    """Return an unopened pool of autocommit connections that know the vector type; waiting for one ends after DATABASE_TIMEOUT."""
    return Pool(
        conninfo,
        connection_class=PooledConnection if behind_pooler(settings) else psycopg.AsyncConnection,
        kwargs={**connect_options(settings), "autocommit": True},
        min_size=1,
        max_size=max_size or settings.database_max_connections,
        timeout=settings.database_timeout,
        max_idle=300,
        configure=partial(_configure, settings=settings),
        open=False,
        name="docmill",
    )


def _check_facts(facts: dict[str, Any]) -> None:
    where = f'database "{facts["database"]}"'
    if facts["version_number"] < MIN_POSTGRES:
        raise ConfigurationError(f"{where} runs on Postgres {facts['version']}; docmill needs 17 or newer.")
    if facts["encoding"] != "UTF8":
        raise ConfigurationError(
            f"{where} keeps its text in {facts['encoding']}; docmill needs UTF8: CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0."
        )
    installed, available = facts["vector_installed"], facts["vector_available"]
    if installed is None and available is None:
        raise ConfigurationError(f"{where}: the extension pgvector is not installed on this server; docmill needs 0.8 or newer.")
    found = installed or available
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_VECTOR:
        how = "ALTER EXTENSION vector UPDATE;" if installed else "install a newer package on the server"
        raise ConfigurationError(f"{where} has pgvector {found}; docmill needs 0.8 or newer ({how}).")
    if installed is None and not facts["superuser"] and not (facts["vector_trusted"] and facts["may_create"]):
        raise ConfigurationError(
            f'{where}: the role "{facts["role"]}" may not create the extension pgvector. '
            "Let an administrator run: CREATE EXTENSION vector; then run `docmill migrate` again."
        )


def unreachable(error: psycopg.Error) -> ConfigurationError:
    """Say in plain words that no connection could be made."""
    # psycopg's messages name host, port and user, never the password.
    return ConfigurationError(f"DATABASE_URL: no connection to the database: {describe(error).strip()}")


def run_migrations(settings: Settings) -> list[str]:
    """Check the server, bring it to the present schema and return what was applied; every complaint is a ConfigurationError."""
    conninfo = conninfo_of(settings, direct=True)
    try:
        conn = connect(settings, conninfo)
    except psycopg.Error as error:
        raise unreachable(error) from error
    with conn:
        warn_of_clear_text(conn)
        facts = conn.cursor(row_factory=dict_row).execute(query("server_facts")).fetchone()
        if facts is not None:
            _check_facts(facts)
        return migrate(conn)


async def check_database(settings: Settings, conninfo: str) -> None:
    """Raise a ConfigurationError in plain words unless the database can be reached and holds the present schema."""
    try:
        conn = await connect_async(settings, conninfo, row_factory=dict_row)
    except psycopg.Error as error:
        raise unreachable(error) from error
    async with conn:
        warn_of_clear_text(conn)
        facts = await (await conn.execute(query("server_facts"))).fetchone()
        if facts is not None:
            _check_facts(facts)
        known = await (await conn.execute(query("migrations_table_exists"))).fetchone()
        applied: set[tuple[str, str]] = set()
        if known is not None and list(known.values()) == [True]:
            applied = {(row["component"], row["name"]) async for row in await conn.execute(query("applied_migrations"))}
        if missing := missing_migrations(applied):
            raise ConfigurationError(f'database "{conn.info.dbname}" lacks {len(missing)} migrations: run `docmill migrate`.')


async def prepare_database(settings: Settings) -> str:
    """Return the conninfo of a database that is ready. The embedded server is started and migrated; any other is only checked."""
    conninfo = await asyncio.to_thread(conninfo_of, settings)
    if settings.database_conninfo is None:
        await asyncio.to_thread(run_migrations, settings)
    await check_database(settings, conninfo)
    return conninfo
