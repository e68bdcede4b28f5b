"""The front door for batches: a zip archive, a folder or a list of files, submitted as one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from jobs.adapters.folders import Listing, list_folder, storage_folders
from jobs.adapters.sniff import sniff
from jobs.adapters.sniff_types import NAMES
from jobs.adapters.storage import LocalStorage, storable_path
from jobs.adapters.storage.faults import source_faults
from jobs.adapters.storage.sources import read_blocks
from jobs.arguments import absolute_path, check_metadata, check_name, check_priority, derive_doc_id, path_doc_id
from jobs.batch.folders import FolderRun
from jobs.batch.steps import Ask, Steps, run_steps, run_steps_async
from jobs.batch.submission import (
    BatchSubmission,
    Entry,
    FileResult,
    Listener,
    Looked,
    Whole,
    archive_upload_id,
    look_at_batch,
    refused_batch,
)
from jobs.submit import Place, prepare, refused, submission
from models.documents import FileType
from models.errors import ConfigurationError, DocmillError, RetryableError, SubmitConflict, SubmitError
from models.settings import Settings, load_settings
from models.submissions import BatchOutcome, Submission, SubmittedBatch

AnyPath = str | os.PathLike[str]
Source = AnyPath | Sequence[AnyPath]


def submit_batch(
    source: Source,
    *,
    batch_id: str | None = None,
    user_id: str = "default",
    metadata: Mapping[str, Any] | None = None,
    priority: int = 0,
    connection: psycopg.Connection[Any] | None = None,
) -> SubmittedBatch:
    """Submit a zip archive, a folder or a list of files as one batch, and return its batch_id, a string that also tells the outcome.

    `source`: the path of a zip or folder, or several paths of files. `batch_id`: 1 to 200 characters, unique over the installation; left
    out, it is derived from user and absolute path. `metadata`: JSON, kept with the batch; a new run without any keeps those of the batch.
    `priority`: of its documents, higher is worked on first. `connection`: joins the caller's transaction, so that the batch exists if and
    only if that commits.

    Workers unpack archives, also those in a folder and those inside of archives. What has not changed since the batch's last run stays as
    it is; the same zip, or a folder of which nothing has changed, writes nothing. Errors: SubmitError (refused: no zip, no such file,
    another user's batch_id, no file that can be submitted; nothing stored), SubmitConflict (another transaction holds the batch or
    documents of it; a part may have been submitted, as the message says, and submitting again does the rest), RetryableError (storage full
    or read-only), ConfigurationError.

    A changed file whose document somebody's transaction holds is one of `refused`, unless all are.
    """
    settings = load_settings()
    steps = _steps(settings, source, batch_id, user_id, metadata=check_metadata(metadata), priority=check_priority(priority))
    return run_steps(steps, settings, connection)


async def submit_batch_async(
    source: Source,
    *,
    batch_id: str | None = None,
    user_id: str = "default",
    metadata: Mapping[str, Any] | None = None,
    priority: int = 0,
    connection: psycopg.AsyncConnection[Any] | None = None,
) -> SubmittedBatch:
    """Do as `submit_batch` does, without blocking the event loop; `connection` is an async one."""
    settings = load_settings()
    steps = _steps(settings, source, batch_id, user_id, metadata=check_metadata(metadata), priority=check_priority(priority))
    return await run_steps_async(steps, settings, connection)


def _steps(
    settings: Settings, source: Source, batch_id: str | None, user_id: str, *, metadata: Jsonb, priority: int
) -> Steps[SubmittedBatch]:
    check_name("user_id", user_id)
    if batch_id is not None:
        check_name("batch_id", batch_id)
    if isinstance(source, str | os.PathLike):
        path = absolute_path(source)
        whole = Whole(batch_id or path_doc_id(user_id, path), user_id, storable_path(path), priority, metadata)
        if not (yield partial(is_folder, path)):
            return (yield from submit_zip(settings, path, whole))
        listing = yield lambda: list_folder(path, leave_out=storage_folders(settings))
        made = yield from submit_listing(FolderRun(settings, whole), user_id, path, listing)
    elif isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | memoryview) and (given := list(source)):
        paths = list(dict.fromkeys(absolute_path(path) for path in given))
        named = "\n".join(sorted(str(path) for path in paths)).encode("utf-8", "backslashreplace").decode()
        whole = Whole(batch_id or derive_doc_id(user_id, named), user_id, "", priority, metadata)
        entries = [Entry(storable_path(path), path_doc_id(user_id, path), path, storable_path(path)) for path in paths]
        made = yield from FolderRun(settings, whole).submit(entries)
    else:
        raise SubmitError(f"A batch is the path of a zip or folder, or several paths of files, not {source!r:.100}.")
    return _answer(made)


def _answer(made: BatchSubmission) -> SubmittedBatch:
    """Tell the outcome of a folder or list. If no file was taken: SubmitConflict or RetryableError where that may pass, or SubmitError."""
    errors = [(file.name, file.error) for file in made.files if file.error is not None]
    if len(errors) == len(made.files) and not made.archives:
        # One that passes shows first: the caller may try again.
        first = next((error for _, error in errors if isinstance(error, RetryableError)), errors[0][1] if errors else None)
        kind = SubmitConflict if isinstance(first, SubmitConflict) else RetryableError if isinstance(first, RetryableError) else SubmitError
        told = f" {first}" if first is not None else ""
        raise kind(f"There is no file that can be submitted ({len(errors)} refused, {made.skipped} skipped).{told}")
    outcome: BatchOutcome = "unchanged" if made.run_id is None else "new_run" if made.known else "accepted"
    told_of = tuple((name, str(error)) for name, error in errors)
    return SubmittedBatch(made.batch_id, outcome, made.run_id or made.standing, archives=len(made.archives), refused=told_of)


def submit_zip(settings: Settings, path: Path, whole: Whole) -> Steps[SubmittedBatch]:
    """Submit a zip as a batch; its files are known once a worker has opened it."""
    yield lambda: _refuse_other_than_zip(path)
    most = settings.max_archive_mb * 1_000_000

    def digest() -> str:
        made = hashlib.sha256()
        for block in read_blocks(path, str(path), most, "MAX_ARCHIVE_MB"):
            made.update(block)
        return made.hexdigest()

    sha256 = yield digest
    batch = yield from look_at_batch(whole.batch_id, whole.user_id, resume=True)
    if batch is not None and batch["content_sha256"] == sha256 and not batch["lacking"] and batch["status"] not in {"failed", "cancelled"}:
        return SubmittedBatch(whole.batch_id, "unchanged", batch["run_id"], archives=1)
    storage = yield lambda: LocalStorage.prepared(settings)
    stored = yield lambda: storage.store_upload(archive_upload_id(whole.batch_id, ""), path, most, str(path), "MAX_ARCHIVE_MB")
    params = {
        "batch_id": whole.batch_id, "user_id": whole.user_id, "source_path": whole.source_path, "zip_path": stored.file_path,
        "content_sha256": stored.sha256, "metadata": whole.metadata or Jsonb({}), "priority": whole.priority,
        "correlation_id": whole.correlation_id, "lock_timeout_ms": int(settings.submit_lock_timeout_seconds * 1000),
    }  # fmt: skip
    try:
        row = (yield Ask("submit_zip", params))[0]
    except psycopg.Error as error:
        raise refused_batch(error, whole.batch_id) from error
    return SubmittedBatch(whole.batch_id, row["outcome"], row["run_id"], archives=1)


def is_folder(path: Path) -> bool:
    """Say whether a folder lies at a path; SubmitError, RetryableError: nobody can say."""
    with source_faults(str(path)):
        return path.is_dir()


def _refuse_other_than_zip(path: Path) -> None:
    with source_faults(str(path)):
        if not stat.S_ISREG(path.stat().st_mode):
            raise SubmitError(f"File {str(path)!r} is not a regular file but a pipe, socket or device.")
        found = sniff(path, path.name)
    if found.file_type is not FileType.ZIP:
        raise SubmitError(
            f"File {str(path)!r} is no zip archive by its content but {NAMES.get(found.mime_type, found.mime_type)}; "
            "a batch is a zip, a folder or a list of files."
        )


def entries_of(user_id: str, root: Path, names: Iterable[str]) -> list[Entry]:
    """Return the files of a folder as entries of its batch."""
    return [Entry(name, path_doc_id(user_id, root / name), root / name, storable_path(root / name)) for name in names]


def submit_listing(run: FolderRun, user_id: str, root: Path, listing: Listing) -> Steps[BatchSubmission]:
    """Submit what lies in a folder."""
    made = yield from run.submit(entries_of(user_id, root, listing.files))
    for name, error in listing.unreadable:
        made.files.append(FileResult(name, error=error))
        run.tell(made.files[-1])
    made.skipped = listing.skipped
    return made


async def submit_folder(
    settings: Settings,
    folder: Path,
    *,
    user_id: str = "default",
    priority: int = 0,
    metadata: Mapping[str, Any] | None = None,
    on_file: Listener | None = None,
    batch_id: str | None = None,
    listing: Listing | None = None,
    looked: Looked | None = None,
) -> BatchSubmission:
    """Submit all files of a folder as one batch, named by user and absolute path if not otherwise, and return what became of each, by path.

    Hidden and system files are skipped. A file that is refused keeps no other from going on. A folder of which nothing has changed since
    its last run writes nothing. `on_file` is told of each file as it is done. Raises SubmitError if the folder cannot be listed.
    `listing`, `looked`: what lies there and is known of it, for those who have looked already.
    """
    check_name("user_id", user_id)
    root = absolute_path(folder)
    whole = Whole(batch_id or path_doc_id(user_id, root), user_id, storable_path(root), priority, check_metadata(metadata))
    if listing is None:
        listing = await asyncio.to_thread(list_folder, root, leave_out=storage_folders(settings))
    return await run_steps_async(submit_listing(FolderRun(settings, whole, on_file, looked), user_id, root, listing), settings, None)


async def submit_file(settings: Settings, path: Path, *, user_id: str = "default", priority: int = 0) -> FileResult:
    """Submit one file under the id of its path. A file that is refused is a result with an error; only configuration and database raise."""
    source = absolute_path(path)
    place = Place(user_id=user_id, source_path=storable_path(source))
    doc_id = path_doc_id(user_id, source)
    try:
        params = await asyncio.to_thread(prepare, settings, source, place=place, doc_id=doc_id, priority=priority)
        return FileResult(str(path), await run_steps_async(_accept(params), settings, None))
    except ConfigurationError:
        raise
    except DocmillError as error:
        return FileResult(str(path), error=error)


def _accept(params: Mapping[str, Any]) -> Steps[Submission]:
    """Accept a document whose file has been stored."""
    try:
        return submission(params, next(iter((yield Ask("accept_document", params))), None))
    except psycopg.Error as error:
        raise refused(error, params["doc_id"]) from error
