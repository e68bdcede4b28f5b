"""Cancelling and deleting documents and batches. What each does is a SQL function of `sql/migrations/0007_life.sql`.

Over a connection of its own an operation on a batch goes in chunks, each a transaction, and files are removed at once as far as nobody can
need them; with the caller's `connection` all of it is one statement of the caller's transaction, and a worker removes the files once that
has committed. Everything here can be done again after having been cut off anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from jobs.arguments import lookup
from jobs.front import async_connection, prepares, sync_connection
from jobs.leftovers import remove_files_of
from jobs.redaction import describe
from models.errors import NotFound, SubmitConflict
from models.settings import load_settings
from models.stages import State
from sql import query

AT_A_TIME = 200
"""Documents that one transaction cancels or deletes."""
_TRIES = 3  # of a statement of our own that met another in a deadlock

Connection = psycopg.Connection[Any]
AsyncConnection = psycopg.AsyncConnection[Any]


def cancel_document(doc_id: str, *, connection: Connection | None = None) -> State:
    """Cancel a document and return its state afterwards: `cancelled`, or the one it has ended in already.

    The row stays, and so does what searches see; submitting the same content again takes it up where it was left. Whoever works on it
    writes nothing any more. `connection` joins the caller's transaction.
    Errors: NotFound, SubmitConflict (another transaction holds the document).
    """
    claim = None if connection is not None else _ask(None, "claim_of_document", doc_id=doc_id)
    state = State(_ask(connection, "cancel_document", doc_id=doc_id))
    if connection is None and state is State.CANCELLED:
        # It may have been the last one that its batch waited for.
        _ask(None, "settle_cancelled", doc_id=doc_id, claim=claim)
    return state


def delete_document(doc_id: str, *, connection: Connection | None = None) -> bool:
    """Delete a document with everything but its events, whatever state it is in; say whether there was one.

    Documents that ended as its duplicates are queued again. Its files go at once unless they were stored within the last minutes, else a
    worker removes them then. `connection` joins the caller's transaction. Error: SubmitConflict (another transaction holds the document).
    """
    batch_id = None if connection is not None else _ask(None, "batch_of_document", doc_id=doc_id)
    deleted = bool(_ask(connection, "delete_document", doc_id=doc_id))
    if connection is None and deleted:
        if batch_id is not None:
            _ask(None, "settle_bereft", batch_id=batch_id)
        _remove_files(doc_id)
    return deleted


def cancel_batch(batch_id: str, *, connection: Connection | None = None) -> int:
    """Cancel a batch and return how many documents were cancelled with it; a batch that has ended stays as it is.

    Nothing is submitted to its run any more, and unpacking stops. A document that is being written in this moment follows within
    seconds. `connection` joins the caller's transaction. Errors: NotFound, SubmitConflict (another transaction holds the batch).
    """
    if connection is not None:
        return int(_ask(connection, "cancel_batch", batch_id=batch_id))
    count = 0
    if _ask(None, "mark_batch_cancelled", batch_id=batch_id):
        while cancelled := _ask(None, "cancel_documents", batch_id=batch_id):
            count += cancelled
    return count


def delete_batch(batch_id: str, *, connection: Connection | None = None) -> int | None:
    """Delete a batch with all its documents, archives and summaries; return how many documents, None if there is no such batch.

    `connection` joins the caller's transaction; while the batch is being worked on, cancel it first, in a transaction of its own.
    Error: SubmitConflict (another transaction holds the batch or one of its documents; what was deleted until then stays deleted).
    """
    if connection is not None:
        deleted: int | None = _ask(connection, "delete_batch", batch_id=batch_id)
        return deleted
    try:
        _ask(None, "mark_batch_cancelled", batch_id=batch_id)
    except NotFound:
        return None
    # Of its own files only: what others have left may be thousands, and the workers look after it.
    began: datetime = _ask(None, "look_at_clock")
    count = 0
    while some := _ask(None, "delete_documents", batch_id=batch_id):
        count += some
    count += _ask(None, "delete_batch", batch_id=batch_id) or 0
    _remove_files(None, began)
    return count


async def cancel_document_async(doc_id: str, *, connection: AsyncConnection | None = None) -> State:
    """Do as `cancel_document` does, without blocking the event loop; `connection` is an async one."""
    if connection is None:
        return await asyncio.to_thread(cancel_document, doc_id)
    return State(await _ask_async(connection, "cancel_document", doc_id=doc_id))


async def delete_document_async(doc_id: str, *, connection: AsyncConnection | None = None) -> bool:
    """Do as `delete_document` does, without blocking the event loop; `connection` is an async one."""
    if connection is None:
        return await asyncio.to_thread(delete_document, doc_id)
    return bool(await _ask_async(connection, "delete_document", doc_id=doc_id))


async def cancel_batch_async(batch_id: str, *, connection: AsyncConnection | None = None) -> int:
    """Do as `cancel_batch` does, without blocking the event loop; `connection` is an async one."""
    if connection is None:
        return await asyncio.to_thread(cancel_batch, batch_id)
    return int(await _ask_async(connection, "cancel_batch", batch_id=batch_id))


async def delete_batch_async(batch_id: str, *, connection: AsyncConnection | None = None) -> int | None:
    """Do as `delete_batch` does, without blocking the event loop; `connection` is an async one."""
    if connection is None:
        return await asyncio.to_thread(delete_batch, batch_id)
    deleted: int | None = await _ask_async(connection, "delete_batch", batch_id=batch_id)
    return deleted


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.NoDataFound as error:
        raise NotFound(f"{describe(error)}.") from error
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure) as error:
        raise SubmitConflict(
            "Another transaction holds this document or batch: sql/inspect/22_blocked.sql shows whose. Try again once it has ended "
            "(SUBMIT_LOCK_TIMEOUT_SECONDS says how long to wait)."
        ) from error


def _params(names: dict[str, Any]) -> dict[str, Any]:
    limits = {"lock_timeout_ms": int(load_settings().submit_lock_timeout_seconds * 1000), "max_count": AT_A_TIME}
    return lookup(names) | limits


def _ask(connection: Connection | None, name: str, **names: Any) -> Any:
    """Run a named query and return the first column of its row, None without one."""
    with _translated(), sync_connection(load_settings(), connection) as conn:
        for tries_left in reversed(range(1 if connection is not None else _TRIES)):
            try:
                cursor = psycopg.Cursor(conn, row_factory=tuple_row)
                row = cursor.execute(query(name), _params(names), prepare=prepares(conn)).fetchone()
                return None if row is None else row[0]
            except psycopg.errors.DeadlockDetected:
                if not tries_left:
                    raise
    return None


async def _ask_async(connection: AsyncConnection, name: str, **names: str) -> Any:
    with _translated():
        async with async_connection(load_settings(), connection) as conn:
            cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
            row = await (await cursor.execute(query(name), _params(names), prepare=prepares(conn))).fetchone()
            return None if row is None else row[0]


def _remove_files(doc_id: str | None, since: datetime | None = None) -> None:
    settings = load_settings()
    with sync_connection(settings, None) as conn:
        remove_files_of(settings, conn, doc_id, since)
