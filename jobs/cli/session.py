"""What the commands share: quiet logs, questions to the database, and a clean end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from psycopg.rows import dict_row

from jobs.arguments import as_key
from jobs.front import async_connection, close_async
from jobs.logs import configure_logging
from models.settings import Settings
from sql import query

T = TypeVar("T")
Row = dict[str, Any]

_CHATTY = frozenset({"INFO", "SUCCESS"})


def shows_details(settings: Settings) -> bool:
    """Say whether LOG_LEVEL asks for more than a person at a terminal wants to see."""
    return settings.log_level in {"TRACE", "DEBUG"}


def quiet_logs(settings: Settings) -> None:
    """Log from WARNING on, so that progress and tables stay readable. LOG_LEVEL=DEBUG still shows everything."""
    level = "WARNING" if settings.log_level in _CHATTY else settings.log_level
    configure_logging(settings.model_copy(update={"log_level": level}), role="cli")


async def rows(settings: Settings, name: str, **params: Any) -> list[Row]:
    """Run a named query and return its rows as dictionaries. Its words may be any that a command line can hold."""
    plain = {key: as_key(value) if isinstance(value, str) else value for key, value in params.items()}
    async with async_connection(settings, None) as conn, conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query(name), plain)
        return await cursor.fetchall()


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine and close the connections that it used."""

    async def whole() -> T:
        try:
            return await work
        finally:
            await close_async()

    return asyncio.run(whole())
