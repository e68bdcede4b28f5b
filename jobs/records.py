"""Looking at documents and batches, and changing them by hand: R6's operations for application code. docs/operations-api.md lists them.

Each function has an `_async` twin. `connection` joins the caller's transaction; without it each call is a transaction of its own.
Asking for what is not there gives None; changing it raises OperationRefused, and SubmitConflict where another transaction holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg.rows import dict_row

from jobs.arguments import check_metadata, check_priority, lookup
from jobs.front import async_connection, prepares, sync_connection
from jobs.redaction import describe
from models.documents import FileType
from models.errors import ErrorType, OperationRefused, SubmitConflict
from models.records import Advice, BatchRecord, BatchStatistics, DocumentRecord, Retry, RunSummary
from models.settings import load_settings
from models.stages import Milestone, State
from sql import query

Sync = psycopg.Connection[Any] | None
Async = psycopg.AsyncConnection[Any] | None
Rows = list[dict[str, Any]]

LONGEST_LIST = 1000


def _translated(error: psycopg.Error) -> Exception:
    """Translate what Postgres said; anything unforeseen stays as it is."""
    if isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure):
        return SubmitConflict(
            "Another transaction holds this document or batch: sql/inspect/22_blocked.sql shows whose. Nothing was changed; try again once "
            "it has ended."
        )
    refusals = psycopg.errors.NoDataFound | psycopg.errors.ObjectNotInPrerequisiteState | psycopg.errors.InvalidParameterValue
    return OperationRefused(f"{describe(error)}.") if isinstance(error, refusals) else error


def _ask(connection: Sync, name: str, **params: Any) -> Rows:
    plain = lookup(params)
    with sync_connection(load_settings(), connection) as conn:
        try:
            return psycopg.Cursor(conn, row_factory=dict_row).execute(query(name), plain, prepare=prepares(conn)).fetchall()
        except psycopg.Error as error:
            raise _translated(error) from error


async def _ask_async(connection: Async, name: str, **params: Any) -> Rows:
    plain = lookup(params)
    async with async_connection(load_settings(), connection) as conn:
        cursor = psycopg.AsyncCursor(conn, row_factory=dict_row)
        try:
            await cursor.execute(query(name), plain, prepare=prepares(conn))
            return await cursor.fetchall()
        except psycopg.Error as error:
            raise _translated(error) from error


def _document(row: Mapping[str, Any]) -> DocumentRecord:
    typed = {
        "file_type": FileType(row["file_type"]) if row["file_type"] else None,
        "milestone": Milestone(row["milestone"]),
        "state": State(row["state"]),
        "error_type": ErrorType(row["error_type"]) if row["error_type"] else None,
    }
    return DocumentRecord(**{**row, **typed})


def _page(batch_id: str, state: State | None, after: str | None, limit: int) -> dict[str, Any]:
    if not 1 <= limit <= LONGEST_LIST:
        raise OperationRefused(f"limit is {limit}, but must be 1 to {LONGEST_LIST}.")
    return {"batch_id": batch_id, "state": None if state is None else State(state), "after": after, "limit": limit}


def _changes(metadata: Mapping[str, Any] | None, priority: int | None = None) -> dict[str, Any]:
    return {
        "metadata": None if metadata is None else check_metadata(metadata),
        "priority": None if priority is None else check_priority(priority),
    }


def _limits() -> dict[str, Any]:
    settings = load_settings()
    return {"deadline_seconds": settings.stage_timeout_seconds, "max_retries": settings.max_retry_attempts}


def get_document(doc_id: str, *, connection: Sync = None) -> DocumentRecord | None:
    """Return a document as it stands."""
    return next(map(_document, _ask(connection, "get_document", doc_id=doc_id)), None)


async def get_document_async(doc_id: str, *, connection: Async = None) -> DocumentRecord | None:
    """Do as `get_document` does."""
    return next(map(_document, await _ask_async(connection, "get_document", doc_id=doc_id)), None)


def get_batch(batch_id: str, *, connection: Sync = None) -> BatchRecord | None:
    """Return a batch with its current run as it stands."""
    return next((BatchRecord(**row) for row in _ask(connection, "get_batch", batch_id=batch_id)), None)


async def get_batch_async(batch_id: str, *, connection: Async = None) -> BatchRecord | None:
    """Do as `get_batch` does."""
    return next((BatchRecord(**row) for row in await _ask_async(connection, "get_batch", batch_id=batch_id)), None)


def list_batch_documents(
    batch_id: str, *, state: State | None = None, after: str | None = None, limit: int = 100, connection: Sync = None
) -> list[DocumentRecord]:
    """Return documents of a batch's current run in the order of doc_ids from behind `after` on, at most `limit` (up to 1,000)."""
    return [_document(row) for row in _ask(connection, "list_batch_documents", **_page(batch_id, state, after, limit))]


async def list_batch_documents_async(
    batch_id: str, *, state: State | None = None, after: str | None = None, limit: int = 100, connection: Async = None
) -> list[DocumentRecord]:
    """Do as `list_batch_documents` does."""
    return [_document(row) for row in await _ask_async(connection, "list_batch_documents", **_page(batch_id, state, after, limit))]


def batch_statistics(batch_id: str, *, connection: Sync = None) -> BatchStatistics | None:
    """Return the current run of a batch in figures."""
    return next((BatchStatistics(**row) for row in _ask(connection, "batch_statistics", batch_id=batch_id)), None)


async def batch_statistics_async(batch_id: str, *, connection: Async = None) -> BatchStatistics | None:
    """Do as `batch_statistics` does."""
    return next((BatchStatistics(**row) for row in await _ask_async(connection, "batch_statistics", batch_id=batch_id)), None)


def run_summary(id: str, *, present: bool = False, connection: Sync = None) -> RunSummary | None:
    """Return the summary of a batch's current run by batch_id, or of any run by run_id; None before it has ended.

    `present`: build it from how the batch with that batch_id stands now, also before it has ended.
    """
    name = "present_summary" if present else "run_summary"
    return next((RunSummary(**row) for row in _ask(connection, name, id=str(id))), None)


async def run_summary_async(id: str, *, present: bool = False, connection: Async = None) -> RunSummary | None:
    """Do as `run_summary` does."""
    name = "present_summary" if present else "run_summary"
    return next((RunSummary(**row) for row in await _ask_async(connection, name, id=str(id))), None)


def update_document(
    doc_id: str, *, metadata: Mapping[str, Any] | None = None, priority: int | None = None, connection: Sync = None
) -> None:
    """Set keys of a document's metadata (None as a value removes a key) and its priority, also of its waiting job."""
    _ask(connection, "update_document", doc_id=doc_id, **_changes(metadata, priority))


async def update_document_async(
    doc_id: str, *, metadata: Mapping[str, Any] | None = None, priority: int | None = None, connection: Async = None
) -> None:
    """Do as `update_document` does."""
    await _ask_async(connection, "update_document", doc_id=doc_id, **_changes(metadata, priority))


def update_batch(batch_id: str, *, metadata: Mapping[str, Any], connection: Sync = None) -> None:
    """Set keys of a batch's metadata; None as a value removes a key."""
    _ask(connection, "update_batch", batch_id=batch_id, **_changes(metadata))


async def update_batch_async(batch_id: str, *, metadata: Mapping[str, Any], connection: Async = None) -> None:
    """Do as `update_batch` does."""
    await _ask_async(connection, "update_batch", batch_id=batch_id, **_changes(metadata))


def fail_document(doc_id: str, reason: str, *, connection: Sync = None) -> None:
    """Fail an unfinished document for good, also one in a worker's hands; a dead letter says why. Its batch follows within seconds."""
    row = _ask(connection, "fail_document_by_operator", doc_id=doc_id, reason=reason)[0]
    if connection is None and row["batch_id"] is not None:
        _ask(None, "settle_batch", batch_id=row["batch_id"])


async def fail_document_async(doc_id: str, reason: str, *, connection: Async = None) -> None:
    """Do as `fail_document` does."""
    row = (await _ask_async(connection, "fail_document_by_operator", doc_id=doc_id, reason=reason))[0]
    if connection is None and row["batch_id"] is not None:
        await _ask_async(None, "settle_batch", batch_id=row["batch_id"])


def fail_batch(batch_id: str, reason: str, *, connection: Sync = None) -> None:
    """Fail the current run of a batch for good. Its documents go on; what becomes of them only changes the summary."""
    _ask(connection, "fail_batch", batch_id=batch_id, reason=reason)


async def fail_batch_async(batch_id: str, reason: str, *, connection: Async = None) -> None:
    """Do as `fail_batch` does."""
    await _ask_async(connection, "fail_batch", batch_id=batch_id, reason=reason)


def retry_document(doc_id: str, *, priority: int | None = None, connection: Sync = None) -> Retry:
    """Take a failed document up again at the stage that failed, with another priority if one is given.

    Its ended batch goes on again, within seconds.
    """
    row = _ask(connection, "retry_document", doc_id=doc_id, **_changes(None, priority))[0]
    if connection is None and row["batch_id"] is not None:
        _ask(None, "reopen_batch", batch_id=row["batch_id"])
    return Retry(row["stage"], _ask(connection, "count_retries", doc_id=doc_id)[0]["count"])


async def retry_document_async(doc_id: str, *, priority: int | None = None, connection: Async = None) -> Retry:
    """Do as `retry_document` does."""
    row = (await _ask_async(connection, "retry_document", doc_id=doc_id, **_changes(None, priority)))[0]
    if connection is None and row["batch_id"] is not None:
        await _ask_async(None, "reopen_batch", batch_id=row["batch_id"])
    return Retry(row["stage"], (await _ask_async(connection, "count_retries", doc_id=doc_id))[0]["count"])


def retry_extraction(doc_id: str, *, connection: Sync = None) -> str:
    """Have the extraction of a complete document that lacks it tried again; return the stage that is due. Searches see it all the while.

    Nothing happens if it is under way already. OperationRefused for a document without a failed extraction.
    """
    row = _ask(connection, "requeue_extraction", doc_id=doc_id)[0]
    if connection is None and row["batch_id"] is not None:
        _ask(None, "reopen_batch", batch_id=row["batch_id"])
    return str(row["stage"])


async def retry_extraction_async(doc_id: str, *, connection: Async = None) -> str:
    """Do as `retry_extraction` does."""
    row = (await _ask_async(connection, "requeue_extraction", doc_id=doc_id))[0]
    if connection is None and row["batch_id"] is not None:
        await _ask_async(None, "reopen_batch", batch_id=row["batch_id"])
    return str(row["stage"])


def should_reprocess(doc_id: str, *, connection: Sync = None) -> Advice:
    """Say whether a document should be processed again, and why.

    Done, put away or a permanent error: no. Retries left, past its deadline (STAGE_TIMEOUT_SECONDS) or its worker dead: yes.
    """
    return Advice(**_ask(connection, "should_reprocess", doc_id=doc_id, **_limits())[0])


async def should_reprocess_async(doc_id: str, *, connection: Async = None) -> Advice:
    """Do as `should_reprocess` does."""
    return Advice(**(await _ask_async(connection, "should_reprocess", doc_id=doc_id, **_limits()))[0])
