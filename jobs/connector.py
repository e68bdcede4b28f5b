"""Procrastinate's connector over our own pool, with a listener that comes back after an outage."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any, LiteralString

import psycopg
from procrastinate import PsycopgConnector
from procrastinate.connector import Notify
from psycopg_pool import AsyncConnectionPool

from jobs.database import conninfo_of, make_pool, prepare_database
from jobs.outages import outlive, outlive_start
from jobs.sessions import connect_async
from models.settings import Settings


class DocmillConnector(PsycopgConnector):
    """Procrastinate's connector over our own pool; LISTEN goes around a transaction pooler and comes back after an outage."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings
        self._asked_at: dict[object, float] = {}

    def oldest_query_at(self) -> float | None:
        """Return since when, by the monotonic clock, the oldest of procrastinate's queries waits for its answer; None when none does."""
        return min(list(self._asked_at.values()), default=None)

    async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
        """Run a query, noting for the watchdog since when."""
        token = object()
        self._asked_at[token] = time.monotonic()
        try:
            row: dict[str, Any] = await super().execute_query_one_async(query, **arguments)
            return row
        finally:
            del self._asked_at[token]

    async def _create_pool(self, pool_args: dict[str, Any]) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        # Procrastinate would have the pool check each connection at each checkout: a round trip for every query.
        conninfo = await outlive_start(lambda: prepare_database(self._settings))
        return make_pool(self._settings, conninfo)

    @asynccontextmanager
    async def _get_standalone_connection(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        conninfo = await asyncio.to_thread(conninfo_of, self._settings, direct=True)
        async with await connect_async(self._settings, conninfo) as connection:
            yield connection

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        """Listen until cancelled, over a new connection whenever the old one is gone."""
        names = list(channels)

        async def hear(*, channel: str, payload: str) -> None:
            if _is_notification(payload):
                await on_notification(channel=channel, payload=payload)

        await outlive("The listener", lambda: super(DocmillConnector, self).listen_notify(hear, names))


def _is_notification(payload: str) -> bool:
    """Say whether procrastinate can have sent this. Whoever may connect may notify, and anything else would end the worker."""
    try:
        told = json.loads(payload)
    except ValueError:
        return False
    return isinstance(told, dict) and isinstance(told.get("type"), str) and isinstance(told.get("job_id"), int)
