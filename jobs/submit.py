"""Accepting documents: the file is copied into storage, then one statement makes the row and its first job."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, Unpack, cast

import psycopg
from psycopg.rows import dict_row

from jobs.adapters.storage import LocalStorage, StoredUpload, Upload, safe_display_name, storable_path
from jobs.adapters.storage.faults import source_faults
from jobs.adapters.storage.sources import read_blocks
from jobs.arguments import absolute_path, check_metadata, check_name, check_priority, derive_doc_id, path_doc_id
from jobs.front import async_connection, prepares, sync_connection
from jobs.redaction import describe
from models.errors import DocmillError, RetryableError, SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from models.stages import State
from models.submissions import Submission
from sql import query

File = str | os.PathLike[str] | bytes | BinaryIO

NOTHING_DONE = "Nothing was submitted"
_MEMORY_LIMIT = 8_000_000  # bytes of an open file that are kept in memory while its hash is not known yet


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document belongs, beside its content."""

    user_id: str = "default"
    batch_id: str | None = None
    run_id: uuid.UUID | None = None
    source_path: str | None = None


def _open_name(file: BinaryIO) -> str:
    """Return what an open file is called: `upload`, where it has the number of a pipe or of a temporary file for a name, or none."""
    name = getattr(file, "name", None)
    return (Path(os.fsdecode(name)).name if isinstance(name, str | bytes | os.PathLike) else "") or "upload"


def _hash_stream(file: BinaryIO, name: str, max_bytes: int) -> tuple[BinaryIO, str]:
    """Return an open file that stands where it stood, and the SHA-256 of what follows; one that cannot seek is spooled.

    Errors: those of `read_blocks`.
    """
    digest = hashlib.sha256()
    blocks = read_blocks(file, name, max_bytes)
    if file.seekable():
        start = file.tell()
        for block in blocks:
            digest.update(block)
        file.seek(start)
        return file, digest.hexdigest()
    spool = tempfile.SpooledTemporaryFile(max_size=_MEMORY_LIMIT)  # noqa: SIM115  # handed on to the caller
    try:
        for block in blocks:
            digest.update(block)
            spool.write(block)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return cast(BinaryIO, spool), digest.hexdigest()


def _refuse_unreadable(file: BinaryIO, name: str) -> None:
    with source_faults(name):
        try:
            nothing = file.read(0)
        except ValueError as error:  # io.UnsupportedOperation is one too
            raise SubmitError(f"A document is an open binary file, and this one cannot be read: {error}.") from error
    if not isinstance(nothing, bytes):
        raise SubmitError("A document is read in binary mode; open the file with mode 'rb'.")


class Options(TypedDict, total=False):
    """What may be said about a document beside its content; see `submit_document`."""

    place: Place
    doc_id: str | None
    file_name: str | None
    metadata: Mapping[str, Any] | None
    priority: int
    correlation_id: str | None


def prepare(settings: Settings, file: File, **options: Unpack[Options]) -> dict[str, Any]:
    """Check the arguments, copy the file into storage and return the parameters of the statement that accepts it."""
    (params,) = prepare_together(settings, [(file, options)])
    if isinstance(params, DocmillError):
        raise params
    return params


def prepare_together(settings: Settings, files: Sequence[tuple[File, Options]]) -> list[dict[str, Any] | DocmillError]:
    """Do as `prepare` does with several files, which wait for the disk together; return what it returns or raises for each."""
    prepared: list[dict[str, Any] | DocmillError] = []
    uploads: list[Upload] = []
    for file, options in files:
        try:
            upload, params = _checked(settings, file, options)
        except SubmitError as error:
            prepared.append(error)
        else:
            uploads.append(upload)
            prepared.append(params)
    stored = iter(LocalStorage.prepared(settings).store_uploads(uploads))
    return [params if isinstance(params, DocmillError) else _with_stored(params, next(stored)) for params in prepared]


def _with_stored(params: dict[str, Any], stored: StoredUpload | DocmillError) -> dict[str, Any] | DocmillError:
    if isinstance(stored, DocmillError):
        return stored
    return {**params, "file_path": stored.file_path, "file_size": stored.size, "content_sha256": stored.sha256}


def _checked(settings: Settings, file: File, options: Options) -> tuple[Upload, dict[str, Any]]:
    """Return what is to be stored, and the parameters but for what the storage tells. SubmitError for what no document can have."""
    place = options.get("place") or Place()
    doc_id, file_name = options.get("doc_id"), options.get("file_name")
    priority, correlation_id = options.get("priority", 0), options.get("correlation_id")
    max_bytes = settings.max_file_size_mb * 1_000_000
    check_name("user_id", place.user_id)
    metadata = check_metadata(options.get("metadata"))
    check_priority(priority)
    if file_name is not None and not isinstance(file_name, str):
        raise SubmitError(f"file_name must be a string, not {type(file_name).__name__}.")
    source: Path | bytes | BinaryIO
    if isinstance(file, bytes | bytearray | memoryview):
        source = bytes(file)
        doc_id = derive_doc_id(place.user_id, hashlib.sha256(source).hexdigest()) if doc_id is None else doc_id
        name = file_name or "upload"
    elif isinstance(file, str | os.PathLike):
        source = absolute_path(file)
        doc_id = path_doc_id(place.user_id, source) if doc_id is None else doc_id
        name = file_name or source.name
    elif hasattr(file, "read"):
        name = file_name or _open_name(file)
        _refuse_unreadable(file, name)
        source = file
        if doc_id is None:
            source, sha256 = _hash_stream(file, name, max_bytes)
            doc_id = derive_doc_id(place.user_id, sha256)
    else:
        raise SubmitError(f"A document is a path, bytes or an open binary file, not {type(file).__name__}.")
    check_name("doc_id", doc_id)
    called = str(source) if isinstance(source, Path) else name
    return Upload(doc_id, source, max_bytes, called), {
        "doc_id": doc_id,
        "user_id": place.user_id,
        "file_name": safe_display_name(name),
        "source_path": place.source_path or (storable_path(source) if isinstance(source, Path) else None),
        "metadata": metadata,
        "priority": priority,
        "correlation_id": check_name("correlation_id", correlation_id or str(uuid.uuid4())),
        "batch_id": place.batch_id,
        "run_id": place.run_id,
        "lock_timeout_ms": int(settings.submit_lock_timeout_seconds * 1000),
    }


def submission(params: Mapping[str, Any], row: Mapping[str, Any] | None) -> Submission:
    """Return what became of a submission, from its parameters and the row that the statement answered with."""
    if row is None:
        raise RetryableError(f'doc_id "{params["doc_id"]}": the database gave no answer; nothing was submitted.')
    correlation_id = row["kept_correlation_id"] or params["correlation_id"]
    return Submission(params["doc_id"], row["outcome"], row["version"], State(row["state"]), correlation_id)


def refused(error: psycopg.Error, doc_id: str) -> Exception:
    """Translate what Postgres said to a submission."""
    if isinstance(error, psycopg.errors.ObjectNotInPrerequisiteState):
        return SubmitConflict(f"The batch takes in no more documents of this run: {describe(error)}.")
    if isinstance(error, psycopg.errors.ForeignKeyViolation):
        # It was there when it was looked at. The document waited for whoever has deleted it.
        return SubmitConflict("The batch takes in no more documents of this run: it has been deleted.")
    return taken_or_held(error, f'doc_id "{doc_id}"', "this document")


def taken_or_held(error: psycopg.Error, name: str, held: str, done: str = NOTHING_DONE) -> Exception:
    """Translate what Postgres said where another user or another transaction was first; any other error is returned as it is.

    `held`, `done`: in words, what somebody holds and what was done until then.
    """
    if isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected | psycopg.errors.SerializationFailure):
        return SubmitConflict(
            f"{name}: another transaction holds {held}; sql/inspect/22_blocked.sql shows whose. {done}; try again once "
            "that transaction has ended (SUBMIT_LOCK_TIMEOUT_SECONDS says how long to wait)."
        )
    if isinstance(error, psycopg.errors.UniqueViolation):
        return SubmitError(f"{name} is taken; choose another.")
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return SubmitError(
            f"{name}: this connection may not submit it. An application submits for the user that it has named by docmill.user_id in the "
            "same transaction, and for no other (docs/row-security.md)."
        )
    return error


def submit_document(
    file: File,
    *,
    doc_id: str | None = None,
    user_id: str = "default",
    metadata: Mapping[str, Any] | None = None,
    priority: int = 0,
    correlation_id: str | None = None,
    file_name: str | None = None,
    connection: psycopg.Connection[Any] | None = None,
) -> Submission:
    """Submit one document and return its doc_id, a string that also tells the outcome.

    `file`: a path, bytes or an open binary file. `doc_id`: 1 to 200 characters, unique over the installation; left out, it is derived from
    user and absolute path, or user and content. `metadata`: JSON, searches can filter by it; a new version without any keeps those of the
    document. `priority`: higher is worked on first. `connection`: joins the caller's transaction, so that the document exists if and only
    if that commits.

    The same doc_id with the same content changes nothing; new content makes a new version. Errors: SubmitError (refused, nothing stored),
    SubmitConflict (another transaction holds the document), RetryableError (storage full or read-only), ConfigurationError.
    """
    settings = load_settings()
    place = Place(user_id=user_id)
    params = prepare(
        settings, file, place=place, doc_id=doc_id, file_name=file_name, metadata=metadata, priority=priority, correlation_id=correlation_id
    )
    with sync_connection(settings, connection) as conn:
        try:
            cursor = psycopg.Cursor(conn, row_factory=dict_row)
            row = cursor.execute(query("accept_document"), params, prepare=prepares(conn)).fetchone()
        except psycopg.Error as error:
            raise refused(error, params["doc_id"]) from error
    return submission(params, row)


async def submit_document_async(
    file: File,
    *,
    doc_id: str | None = None,
    user_id: str = "default",
    metadata: Mapping[str, Any] | None = None,
    priority: int = 0,
    correlation_id: str | None = None,
    file_name: str | None = None,
    connection: psycopg.AsyncConnection[Any] | None = None,
) -> Submission:
    """Do as `submit_document` does, without blocking the event loop; `connection` is an async one."""
    settings = load_settings()
    return await accept(
        settings,
        file,
        place=Place(user_id=user_id),
        doc_id=doc_id,
        file_name=file_name,
        metadata=metadata,
        priority=priority,
        correlation_id=correlation_id,
        connection=connection,
    )


async def accept(
    settings: Settings, file: File, *, connection: psycopg.AsyncConnection[Any] | None = None, **options: Unpack[Options]
) -> Submission:
    """Submit one document on behalf of a batch or a single submission; see `submit_document`."""
    params = await asyncio.to_thread(prepare, settings, file, **options)
    async with async_connection(settings, connection) as conn:
        cursor = psycopg.AsyncCursor(conn, row_factory=dict_row)
        try:
            await cursor.execute(query("accept_document"), params, prepare=prepares(conn))
            return submission(params, await cursor.fetchone())
        except psycopg.Error as error:
            raise refused(error, params["doc_id"]) from error
