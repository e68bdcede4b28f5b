"""Submitting documents together: a folder is one batch, and submitting it again does only what has changed."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from jobs.adapters.folders import Listing, list_folder
from jobs.adapters.storage import storable_path
from jobs.adapters.storage.sources import read_blocks
from jobs.front import async_connection
from jobs.submit import Place, absolute_path, check_name, path_doc_id, prepare, refused, submission
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings
from models.stages import State
from models.submissions import Submission
from sql import query


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a batch, wherever it came from."""

    name: str
    """Path inside the folder or archive, for people."""
    doc_id: str
    path: Path
    """Where its bytes can be read now."""
    source_path: str
    """Where the submitter has it; stored for people, never opened."""


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file: a submission, or the error that kept it out."""

    name: str
    submission: Submission | None = None
    error: DocmillError | None = None
    content_sha256: str | None = None
    """Of what was read and submitted; None where nothing was read."""


@dataclass(slots=True)
class BatchSubmission:
    """What became of a batch."""

    batch_id: str
    run_id: uuid.UUID | None = None
    """The run that was begun; None when there was nothing to change."""
    files: list[FileResult] = field(default_factory=list)
    skipped: int = 0
    """Hidden and system files, and links that lead out of the folder."""


Listener = Callable[[FileResult], None]


async def submit_file(settings: Settings, path: Path, *, user_id: str = "default", priority: int = 0) -> FileResult:
    """Submit one file under the id of its path. A file that is refused is a result with an error; only configuration and database raise."""
    source = absolute_path(path)
    place = Place(user_id=user_id, source_path=storable_path(source))
    doc_id = path_doc_id(user_id, source)
    try:
        params = await asyncio.to_thread(prepare, settings, source, place=place, doc_id=doc_id, priority=priority)
        return FileResult(str(path), await _accept(settings, params))
    except ConfigurationError:
        raise
    except DocmillError as error:
        return FileResult(str(path), error=error)


async def submit_folder(
    settings: Settings,
    folder: Path,
    *,
    user_id: str = "default",
    priority: int = 0,
    metadata: Mapping[str, Any] | None = None,
    on_file: Listener | None = None,
    listing: Listing | None = None,
    digests: Mapping[str, str] | None = None,
    resume: bool = True,
) -> BatchSubmission:
    """Submit all files of a folder as one batch named by user and absolute path, and return what became of each, sorted by path.

    Hidden and system files are skipped. A file that is refused keeps no other from going on. A folder of which nothing has changed since
    its last run writes nothing. `on_file` is told of each file as it is done. Raises SubmitError if the folder cannot be listed.

    For whoever has looked at the folder already: `listing`, what lies in it; `digests`, SHA-256 by name of files that need not be read to
    see whether they have changed. Not `resume`: a cancelled document stays so until its content changes.
    """
    check_name("user_id", user_id)
    root = absolute_path(folder)
    if listing is None:
        listing = await asyncio.to_thread(list_folder, root, leave_out=settings.storage_base_path)
    entries = [Entry(name, path_doc_id(user_id, root / name), root / name, storable_path(root / name)) for name in listing.files]
    run = _Run(
        settings,
        BatchSubmission(path_doc_id(user_id, root)),
        user_id=user_id,
        source_path=storable_path(root),
        priority=priority,
        metadata=metadata or {},
        on_file=on_file,
        digests=digests or {},
        resume=resume,
    )
    made = await run.submit(entries)
    for name, error in listing.unreadable:
        made.files.append(FileResult(name, error=error))
        if on_file is not None:
            on_file(made.files[-1])
    made.skipped = listing.skipped
    return made


class _Run:
    """One submission of a batch. The run is begun with the first file that changes anything, not before."""

    def __init__(
        self,
        settings: Settings,
        made: BatchSubmission,
        *,
        user_id: str,
        source_path: str,
        priority: int,
        metadata: Mapping[str, Any],
        on_file: Listener | None,
        digests: Mapping[str, str],
        resume: bool,
    ) -> None:
        self._settings = settings
        self._user_id = user_id
        self._source_path = source_path
        self._priority = priority
        self._metadata = metadata
        self._tell = on_file or (lambda _: None)
        self._correlation_id = str(uuid.uuid4())
        self._made = made
        self._digests = digests
        self._resume = resume

    async def submit(self, entries: Sequence[Entry]) -> BatchSubmission:
        """Submit the entries in order, then make sure that the batch's run holds just the accepted ones, and seal it."""
        made = self._made
        params = {"doc_ids": [entry.doc_id for entry in entries], "user_id": self._user_id, "batch_id": made.batch_id}
        known = {row["doc_id"]: row for row in await self._ask("find_known_documents", params)}
        batch = next(iter(await self._ask("look_at_batch", params)), None)
        for entry in entries:
            made.files.append(await self._submit_one(entry, known.get(entry.doc_id)))
            self._tell(made.files[-1])
        accepted = [result.submission.doc_id for result in made.files if result.submission is not None]
        if accepted and made.run_id is None and not self._stands(batch, [known[doc_id] for doc_id in accepted]):
            await self._begin()
        if made.run_id is not None:
            await self._seal(accepted)
        return made

    async def _submit_one(self, entry: Entry, known: Mapping[str, Any] | None) -> FileResult:
        try:
            standing = known is not None and (known["state"] != State.CANCELLED or not self._resume)
            if known is not None and standing and await self._is_unchanged(entry, known):
                kept = Submission(entry.doc_id, "unchanged", known["version"], State(known["state"]), known["correlation_id"])
                return FileResult(entry.name, kept)
            place = Place(self._user_id, self._made.batch_id, None, entry.source_path)
            # The file is stored before the run is begun: one that is refused begins none.
            params = await asyncio.to_thread(
                prepare,
                self._settings,
                entry.path,
                place=place,
                doc_id=entry.doc_id,
                priority=self._priority,
                correlation_id=self._correlation_id,
            )
            params["run_id"] = self._made.run_id or await self._begin()
            return FileResult(entry.name, await _accept(self._settings, params), content_sha256=params["content_sha256"])
        except ConfigurationError:
            raise
        except DocmillError as error:
            return FileResult(entry.name, error=error)

    async def _is_unchanged(self, entry: Entry, known: Mapping[str, Any]) -> bool:
        def digest() -> str:
            made = hashlib.sha256()
            for block in read_blocks(entry.path, str(entry.path), self._settings.max_file_size_mb * 1_000_000):
                made.update(block)
            return made.hexdigest()

        found = self._digests.get(entry.name) or await asyncio.to_thread(digest)
        return bool(found == known["content_sha256"])

    def _stands(self, batch: Mapping[str, Any] | None, documents: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether the batch's last run was sealed and holds just these documents."""
        if batch is None or not batch["sealed"] or batch["documents"] != len(documents):
            return False
        return all(document["run_id"] == batch["run_id"] for document in documents)

    async def _begin(self) -> uuid.UUID:
        params = {
            "batch_id": self._made.batch_id,
            "user_id": self._user_id,
            "source_path": self._source_path,
            "correlation_id": self._correlation_id,
            "metadata": Jsonb(dict(self._metadata)),
        }
        run_id: uuid.UUID = (await self._ask("begin_batch", params))[0]["run_id"]
        self._made.run_id = run_id
        return run_id

    async def _seal(self, doc_ids: Sequence[str]) -> None:
        params = {
            "batch_id": self._made.batch_id,
            "run_id": self._made.run_id,
            "user_id": self._user_id,
            "doc_ids": list(doc_ids),
            "total_files": len(doc_ids),
            "lock_timeout_ms": str(int(self._settings.submit_lock_timeout_seconds * 1000)),
        }
        async with async_connection(self._settings, None) as conn:
            try:
                async with conn.transaction():
                    await conn.execute(query("limit_lock_wait"), params)
                    await conn.execute(query("adopt_documents"), params)
            except psycopg.errors.LockNotAvailable as error:
                raise refused(error, self._made.batch_id) from error
            # After the documents have been let go: sealing locks the batch.
            await conn.execute(query("seal_batch"), params)

    async def _ask(self, name: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        async with async_connection(self._settings, None) as conn, conn.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query(name), params)
            return await cursor.fetchall()


async def _accept(settings: Settings, params: Mapping[str, Any]) -> Submission:
    async with async_connection(settings, None) as conn, conn.cursor(row_factory=dict_row) as cursor:
        try:
            await cursor.execute(query("accept_document"), params)
            return submission(params, await cursor.fetchone())
        except psycopg.Error as error:
            raise refused(error, params["doc_id"]) from error
