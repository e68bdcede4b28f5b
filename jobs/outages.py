"""Outliving outages of Postgres: what a worker runs for ever goes on once the database is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg
from loguru import logger
from procrastinate import exceptions

from jobs import clock
from jobs.redaction import describe
from jobs.retry import calculate_backoff
from models.errors import ConfigurationError

DATABASE_ERRORS = (exceptions.ConnectorException, psycopg.Error, OSError)
_LONGEST_PAUSE = 5.0  # seconds between two tries to reach the database: work is picked up within seconds of its return


_START_SECONDS = 5.0  # a database that restarts is back by then; one that is not there is better said than waited for


async def outlive_start(action: Callable[[], Awaitable[str]]) -> str:
    """Run what a worker begins with, again for a few seconds while the database does not answer; then raise what it raised."""
    end = clock.seconds() + _START_SECONDS
    while True:
        try:
            return await action()
        except (ConfigurationError, psycopg.OperationalError) as error:
            away = isinstance(error, psycopg.OperationalError) or isinstance(error.__cause__, psycopg.OperationalError)
            if not away or clock.seconds() > end:
                raise
            logger.warning("The database does not answer yet: {}", describe(error))
            await asyncio.sleep(0.5)


def end_if_cancelled(error: Exception) -> None:
    """Raise CancelledError where this task has been cancelled, and met the error while it left a connection that was broken.

    For whoever takes an error for an outage and goes on: it would go on for ever.
    """
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError from error


def cancel_later() -> None:
    """Have this task, which has just been cancelled, be cancelled at its next await instead: it has something that must not get lost."""
    if (task := asyncio.current_task()) is not None:
        task.uncancel()  # it is one cancellation, also for a timeout that counts them
        task.cancel()


async def drop_late(deadline: asyncio.Timeout) -> None:
    """Take in the cancellation of a deadline that ran out while `cancel_later` put it off, where its block has ended well all the same."""
    task = asyncio.current_task()
    if deadline.expired() and task is not None and not task.cancelling():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)


async def outlive(what: str, action: Callable[[], Awaitable[Any]], *, until: Callable[[], bool] = lambda: False) -> Any:
    """Run an action until it succeeds, with backoff while the database is away; give up, with None, once `until` says so."""
    attempt = 0
    while True:
        try:
            return await action()
        except DATABASE_ERRORS as error:
            end_if_cancelled(error)
            if until():
                return None
            if isinstance(error.__cause__ or error, psycopg.ProgrammingError | psycopg.IntegrityError | psycopg.DataError):
                raise  # the database has answered, and waiting does not change its answer
            pause = calculate_backoff(attempt, 0.2, _LONGEST_PAUSE)
            attempt += 1
            logger.warning("{} did not reach the database, trying again in {:.1f} s: {}", what, pause, describe(error.__cause__ or error))
            await asyncio.sleep(pause)
