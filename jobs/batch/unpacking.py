"""Unpacking one archive of a batch: listed, then group by group unpacked, stored and accepted.

Everything is keyed by doc_id and run, so a step may be done twice, also by two workers at once: the second one finds it done. A worker that
takes over skips what carries the run already.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Protocol

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.adapters.archives import (
    ArchiveLimits,
    Listing,
    Member,
    Unpacked,
    list_archive,
    refuse_strange,
    remove_leftovers,
    unpack_members,
    workspace,
)
from jobs.adapters.storage import LocalStorage, StoredUpload
from jobs.adapters.stored_file import StoredFile
from jobs.batch.acceptance import Acceptance, BatchHeld, Superseded
from jobs.batch.archive import Archive, EntryRow, in_groups, refused_entry, stored_entry
from jobs.batch.submission import archive_upload_id
from jobs.logs import bound
from jobs.pipeline.claims import Connection, one
from jobs.retry import calculate_backoff
from jobs.stages import Sandbox
from models.errors import DocmillError, ParseError, PermanentError, RetryableError, TimeoutError
from models.settings import Settings

DEPTH = 2
"""How deep archives may lie in one another; the outermost one is 1."""
CRASHES = 3
"""How many times MAX_CRASHES beginnings may break off without progress. What the worker does besides may be to blame, not the archive."""
HELD_SECONDS = 5.0
"""After how long an archive is gone on with when somebody's open transaction is in the way."""
STORING = 8
"""Files that are stored at a time: each waits for the disk, which writes several at once as quickly as one."""


class ClosableSandbox(Sandbox, Protocol):
    """A sandbox for one archive."""

    async def aclose(self) -> None:
        """End its child."""
        ...


class Unpacker:
    """Unpacks archives for one worker process."""

    def __init__(
        self,
        *,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        sandbox: Callable[[Path], ClosableSandbox],
        stopping: Callable[[], bool],
    ) -> None:
        """Take what makes a sandbox whose child may write to a folder, and nowhere else."""
        self._settings = settings
        self._pool = pool
        self._sandbox = sandbox
        self._stopping = stopping
        self._storage = LocalStorage.from_settings(settings)
        self._limits = ArchiveLimits.from_settings(settings)

    async def run(self, archive_id: int) -> None:
        """Unpack an archive, or go on with one. Returns well however it fares; only the database's errors and a cancellation come out."""
        began = await self._one("begin_unpacking", archive_id=archive_id, max_attempts=CRASHES * self._settings.max_crashes)
        row = await self._one("look_at_archive", archive_id=archive_id)
        if row is None or began is None:
            return
        archive = Archive(**row)
        with bound(batch_id=archive.batch_id, correlation_id=archive.correlation_id, stage="unpack"):
            if began["outcome"] == "begun":
                await self._run(archive)
            await self._count_and_settle(archive)

    async def _run(self, archive: Archive) -> None:
        await self._at("begun", archive)
        try:
            if await self._unpack(archive):
                await self._at("done", archive)
                await self._one("end_archive", archive_id=archive.id, state="unpacked", error_message=None)
                logger.success("{} is unpacked", archive.name)
        except Superseded:
            await self._one("end_archive", archive_id=archive.id, state="cancelled", error_message=None)
            logger.info("{}: a newer run of the batch has begun, or this one was ended; unpacking stops", archive.name)
        except BatchHeld:
            logger.info("{}: somebody's transaction holds the batch; unpacking goes on later", archive.name)
            await self._put_off(archive, HELD_SECONDS)
        except (RetryableError, TimeoutError) as error:
            await self._try_later(archive, error)
        except DocmillError as error:
            await self._fail(archive, error)
        except asyncio.CancelledError:
            # The worker has run out of patience. Without this the reconciler would find it, a little later.
            with suppress(psycopg.Error):
                await asyncio.shield(self._put_off(archive, 0.0))
            raise
        await self._at("ended", archive)

    async def _unpack(self, archive: Archive) -> bool:
        """Do what is left to do; False if the rest has been put off."""
        await asyncio.to_thread(remove_leftovers, self._storage)
        path = self._storage.resolve(archive.file_path)
        with workspace(self._storage) as folder:
            async with aclosing(self._sandbox(folder)) as sandbox:
                return await self._unpack_into(folder, archive, StoredFile(path), sandbox)

    async def _unpack_into(self, folder: Path, archive: Archive, file: StoredFile, sandbox: Sandbox) -> bool:
        listing = await self._list(archive, file, sandbox)
        await self._at("listed", archive)
        await self._count_and_settle(archive)
        acceptance = Acceptance(self._pool, archive)
        await acceptance.look(listing.members)
        left = [member for member in listing.members if member.path not in acceptance.done]
        for number, group in enumerate(in_groups(left)):
            if self._stopping():
                await self._put_off(archive, 0.0)
                logger.info("{}: the worker stops; unpacking goes on elsewhere", archive.name)
                return False
            place = folder / str(number)
            place.mkdir()
            sound = [member for member in group if member.reason is None]
            results = await _extract(sandbox, file, sound, place, self._limits)
            results += [Unpacked(member.path, reason=member.reason) for member in group if member.reason is not None]
            await self._take_group(archive, results, place, acceptance)
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        if acceptance.held:
            logger.info("{}: somebody's transaction holds {} of its documents; they are tried again", archive.name, acceptance.held)
            await self._put_off(archive, HELD_SECONDS)
        return acceptance.held == 0

    async def _list(self, archive: Archive, file: StoredFile, sandbox: Sandbox) -> Listing:
        """Open the archive and note what it holds. PermanentError if it is bad, or breaks a limit, as a whole."""
        sha256 = archive.content_sha256
        if sha256 is None:
            sha256 = (await asyncio.to_thread(self._storage.fingerprint, archive.file_path)).sha256
        await asyncio.to_thread(self._storage.size, archive.file_path)  # there, and a regular file: in words for people
        listing: Listing = await sandbox.run(list_archive, file, self._limits)
        found = await self._one(
            "record_listing",
            archive_id=archive.id,
            content_sha256=sha256,
            entry_count=len(listing.members),
            skipped_count=listing.skipped,
            unpacked_bytes=listing.unpacked_bytes,
        )
        entries, size = (found["all_entries"] or 0, found["all_bytes"] or 0) if found is not None else (0, 0)
        if entries > self._limits.entries:
            raise PermanentError(
                f"with the archives that it lies beside and in there are {entries:,} files, more than the "
                f"{self._limits.entries:,} that MAX_ARCHIVE_ENTRIES allows."
            )
        if size > self._limits.unpacked_bytes:
            raise PermanentError(
                f"with the archives that it lies beside and in there are {size:,} bytes when unpacked, more than the "
                f"{self._limits.unpacked_bytes:,} that MAX_ARCHIVE_UNPACKED_MB allows."
            )
        return listing

    async def _take_group(self, archive: Archive, results: Sequence[Unpacked], folder: Path, acceptance: Acceptance) -> None:
        await self._at("unpacked", archive)
        several = asyncio.Semaphore(STORING)

        async def store(result: Unpacked) -> tuple[str, EntryRow | StoredUpload]:
            async with several:
                return result.path, await asyncio.to_thread(self._store, archive, result, folder, acceptance)

        stored = dict(await asyncio.gather(*(store(result) for result in results)))
        await self._at("stored", archive)
        try:
            for inner, upload in stored.items():
                if isinstance(upload, StoredUpload):
                    await acceptance.add_archive(inner, upload)
                    await self._at("inner_added", archive)
            entries = {path: entry for path, entry in stored.items() if isinstance(entry, EntryRow)}
            if entries:
                await acceptance.accept(entries)
        except Superseded:
            # Whoever deleted the batch could not know of these files. They go unless somebody refers to them.
            for kept in stored.values():
                if kept.file_path:
                    doc_id = kept.doc_id if isinstance(kept, EntryRow) else None
                    await self._one("note_unneeded_file", path=kept.file_path, doc_id=doc_id)
            raise
        await self._at("accepted", archive)

    def _store(self, archive: Archive, result: Unpacked, folder: Path, acceptance: Acceptance) -> EntryRow | StoredUpload:
        """Bring what became of a member to where it stays: an archive's stored file, or the row of a document. Runs in a thread."""
        reason = result.reason
        if result.is_archive and archive.depth >= DEPTH:
            reason = f"it is an archive inside of {archive.depth} others; archives are unpacked {DEPTH} deep"
        if reason is not None or result.file is None or result.sha256 is None or result.size is None:
            return refused_entry(archive, self._storage, result.path, reason or "it could not be unpacked")
        file = folder / result.file
        if result.is_archive:
            upload_id = archive_upload_id(archive.batch_id, f"{archive.entry_path}{result.path}/")
            return self._storage.take_upload(upload_id, file, result.size, result.sha256)
        unchanged = acceptance.is_unchanged(result.path, result.sha256)
        if unchanged:
            stored = StoredUpload("", result.size, result.sha256)
        else:
            stored = self._storage.take_upload(archive.doc_id(result.path), file, result.size, result.sha256)
        return stored_entry(archive, result.path, stored, unchanged=unchanged)

    async def _count_and_settle(self, archive: Archive) -> None:
        """Bring the batch's numbers up to date, and end it if nothing is left. A submitter that holds the batch is not waited for."""
        try:
            async with self._pool.connection() as conn, conn.transaction():
                await one(conn, "limit_wait_for_batch", {})
                await one(conn, "count_batch_files", {"batch_id": archive.batch_id, "run_id": archive.run_id})
        except psycopg.errors.LockNotAvailable:
            logger.info("Somebody's transaction holds the batch; its number of files is brought up to date later")
        await self._one("settle_batch", batch_id=archive.batch_id)

    async def _fail(self, archive: Archive, error: DocmillError) -> None:
        await self._one("end_archive", archive_id=archive.id, state="failed", error_message=f"{archive.name}: {error}")
        logger.error("{} cannot be unpacked: {}", archive.name, error)

    async def _put_off(self, archive: Archive, delay: float, reason: str | None = None) -> None:
        await self._one("put_off_archive", archive_id=archive.id, delay=delay, reason=reason)

    async def _try_later(self, archive: Archive, error: DocmillError) -> None:
        if archive.retry_count >= self._settings.max_retry_attempts:
            await self._fail(archive, error)
            return
        delay = calculate_backoff(archive.retry_count, self._settings.retry_base_delay_seconds, self._settings.retry_max_delay_seconds)
        await self._put_off(archive, delay, f"{archive.name}: {error}")
        logger.warning("{}: trying again in {:.1f} s: {}", archive.name, delay, error)

    async def _one(self, name: str, **params: Any) -> dict[str, Any] | None:
        async with self._pool.connection() as conn:
            return await one(conn, name, params)

    async def _at(self, point: str, archive: Archive) -> None:
        await faults.at(f"unpack_{point}", archive.batch_id)


async def _extract(sandbox: Sandbox, file: StoredFile, members: Sequence[Member], folder: Path, limits: ArchiveLimits) -> list[Unpacked]:
    """Unpack members in a child. Where that takes the child down or takes too long, one by one: then it is one member's fault."""
    if not members:
        return []
    try:
        made = await sandbox.run(unpack_members, file, members, str(folder), limits)
        refuse_strange(made, members)
    except (ParseError, TimeoutError) as error:
        if len(members) == 1:
            return [Unpacked(members[0].path, reason=f"unpacking it failed: {str(error).rstrip('.')}")]
        return [result for member in members for result in await _extract(sandbox, file, [member], folder, limits)]
    return made
