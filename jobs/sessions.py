"""How connections are made: under which name, with what options, and what a session is told so that its answers are understood."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

from jobs.process_ids import process_id
from models.settings import Settings
from sql import query

AsyncKind = TypeVar("AsyncKind", bound=psycopg.AsyncConnection[Any])


def process_name(longest_host: int | None = None) -> str:
    """Return what this process is called: host:pid, in a container host:pid:namespace."""
    return f"{socket.gethostname()[:longest_host]}:{process_id(':')}"


def application_name() -> str:
    """Return what this process' connections are called in pg_stat_activity: `docmill` and its name, in the 63 bytes that Postgres keeps."""
    return f"docmill {process_name(34)}"


def connect_options(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments that every connection is made with: a silently cut connection is noticed within a minute."""
    return {
        "connect_timeout": max(2, int(settings.database_timeout)),
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
        "application_name": application_name(),
        "client_encoding": "UTF8",
        # A pooler may give the next transaction another connection of the server, which knows nothing of what was prepared.
        "prepare_threshold": None if behind_pooler(settings) else 5,
    }


def behind_pooler(settings: Settings) -> bool:
    """Say whether DATABASE_URL leads through a transaction pooler: then, and only then, there is a way around it."""
    return settings.database_url_direct is not None


class PooledConnection(psycopg.AsyncConnection[Any]):
    """A connection to a transaction pooler. What a session is told stays with whichever connection of the server it used, so limits
    are set anew in each transaction: a round trip more."""

    limits: dict[str, Any] | None = None

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncGenerator[psycopg.AsyncTransaction]:
        """Do as psycopg does, within the limits."""
        outermost = self.info.transaction_status == TransactionStatus.IDLE
        async with super().transaction(savepoint_name, force_rollback) as transaction:
            if outermost and self.limits is not None:
                await self.execute(query("limit_transactions"), self.limits)
            yield transaction


def pin_session(conn: psycopg.Connection[Any], settings: Settings) -> None:
    """Tell a session what docmill takes for granted, whatever the server, database or role has as its defaults.

    A transaction pooler keeps for each client what the server reports of it; the isolation is said with each BEGIN.
    """
    if pooled := behind_pooler(settings):
        conn.isolation_level = IsolationLevel.READ_COMMITTED
    conn.execute(query("pin_session"), {"pooled": pooled})


async def pin_async_session(conn: psycopg.AsyncConnection[Any], settings: Settings) -> None:
    """Do as `pin_session` does."""
    if pooled := behind_pooler(settings):
        await conn.set_isolation_level(IsolationLevel.READ_COMMITTED)
    await conn.execute(query("pin_session"), {"pooled": pooled})


def connect(settings: Settings, conninfo: str) -> psycopg.Connection[Any]:
    """Return an autocommit connection whose session is pinned. psycopg.Error."""
    conn = psycopg.connect(conninfo, **connect_options(settings), autocommit=True)
    try:
        pin_session(conn, settings)
    except BaseException:
        conn.close()
        raise
    return conn


async def connect_async(settings: Settings, conninfo: str, **more: Any) -> psycopg.AsyncConnection[Any]:
    """Do as `connect` does; `more` goes to psycopg."""
    return await pinned(await psycopg.AsyncConnection.connect(conninfo, **{**connect_options(settings), **more}, autocommit=True), settings)


async def pinned(conn: AsyncKind, settings: Settings) -> AsyncKind:
    """Return a new connection whose session is pinned. psycopg.Error, after which it is closed."""
    try:
        await pin_async_session(conn, settings)
    except BaseException:
        await conn.close()
        raise
    return conn
