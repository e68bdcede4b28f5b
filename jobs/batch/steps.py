"""Work on the database that is written once and runs over any connection: blocking or not, ours or a caller's.

What is to be done is a generator. It yields questions (named queries) and pieces of blocking work, and is sent the answers; an error of
either is thrown into it where it stands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from jobs.front import async_connection, prepares, sync_connection
from models.settings import Settings
from sql import query

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """A named query; its answer is the list of rows, as dictionaries."""

    name: str
    params: Mapping[str, Any]


Steps = Generator[Ask | Callable[[], Any], Any, T]


def _opens_implicitly(conn: psycopg.BaseConnection[Any]) -> bool:
    """Say whether the next statement opens a transaction that the caller will end. A block of psycopg's would end it itself."""
    return not conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE


def _in_transaction(conn: psycopg.BaseConnection[Any]) -> bool:
    return conn.info.transaction_status == TransactionStatus.INTRANS


def run_steps(steps: Steps[T], settings: Settings, connection: psycopg.Connection[Any] | None) -> T:
    """Run the steps. Over a caller's connection each statement has a savepoint: one that is refused leaves the transaction whole."""

    def answer(step: Ask | Callable[[], Any]) -> Any:
        if not isinstance(step, Ask):
            return step()
        with sync_connection(settings, connection) as conn:
            if _opens_implicitly(conn):
                conn.execute(query("open_transaction"))
            with conn.transaction() if _in_transaction(conn) else nullcontext():
                cursor = psycopg.Cursor(conn, row_factory=dict_row)
                return cursor.execute(query(step.name), step.params, prepare=prepares(conn)).fetchall()

    try:
        step = next(steps)
        while True:
            try:
                found = answer(step)
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(found)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()


async def run_steps_async(steps: Steps[T], settings: Settings, connection: psycopg.AsyncConnection[Any] | None) -> T:
    """Do as `run_steps` does; blocking work is done in a thread."""

    async def answer(step: Ask | Callable[[], Any]) -> Any:
        if not isinstance(step, Ask):
            return await asyncio.to_thread(step)
        async with async_connection(settings, connection) as conn:
            if _opens_implicitly(conn):
                await conn.execute(query("open_transaction"))
            async with conn.transaction() if _in_transaction(conn) else nullcontext():
                cursor = psycopg.AsyncCursor(conn, row_factory=dict_row)
                return await (await cursor.execute(query(step.name), step.params, prepare=prepares(conn))).fetchall()

    try:
        step = next(steps)
        while True:
            try:
                found = await answer(step)
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(found)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        steps.close()
