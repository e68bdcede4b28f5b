"""Unpacking one archive of a batch: listed, then group by group taken in, and what becomes of it when that fails.

Everything is keyed by doc_id and run, so a step may be done twice, also by two workers at once: the second one finds it done. A worker that
takes over skips what carries the run already.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import psycopg
from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs.adapters.archives import ArchiveLimits, Listing, list_archive, remove_leftovers, workspace
from jobs.adapters.folders import refuse_foreign_file
from jobs.adapters.storage import LocalStorage
from jobs.adapters.storage.faults import storage_faults
from jobs.adapters.stored_file import StoredFile
from jobs.batch.acceptance import LOCK_MS, Acceptance, BatchHeld, Superseded
from jobs.batch.archive import Archive, in_groups
from jobs.batch.failure import fail_archive
from jobs.batch.intake import Intake, reach
from jobs.batch.submission import archive_upload_id
from jobs.logs import bound
from jobs.pipeline.claims import Connection, one
from jobs.pipeline.durable import LAST_WAIT
from jobs.retry import StageRetry
from jobs.stages import Sandbox
from models.errors import DocmillError, PermanentError, RetryableError, TimeoutError
from models.settings import Settings

CRASHES = 3
"""How many times MAX_CRASHES beginnings may break off without progress. What the worker does besides may be to blame, not the archive."""
HELD_SECONDS = 5.0
"""After how long an archive is gone on with when somebody's open transaction holds some of its documents."""


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
        self._retry = StageRetry(
            max_attempts=settings.max_retry_attempts,
            base=settings.retry_base_delay_seconds,
            max_delay=settings.retry_max_delay_seconds,
            max_wait_hours=settings.max_wait_hours,
        )

    async def run(self, archive_id: int) -> None:
        """Unpack an archive, or go on with one. Returns well however it fares; only the database's errors and a cancellation come out."""
        began: dict[str, Any] | None = {"outcome": "held"}
        with suppress(BatchHeld):
            began = await self._one("begin_unpacking", archive_id=archive_id, max_attempts=CRASHES * self._settings.max_crashes)
        row = await self._one("look_at_archive", archive_id=archive_id)
        if row is None or began is None:
            return
        archive = Archive(**row)
        with bound(batch_id=archive.batch_id, correlation_id=archive.correlation_id, stage="unpack"):
            held = began["outcome"] == "held"
            if began["outcome"] == "begun":
                try:
                    await self._run(archive)
                except BatchHeld:
                    held = True
            await (self._put_off_held(archive) if held else self._count_and_settle(archive))

    async def _run(self, archive: Archive) -> None:
        """Raise BatchHeld where somebody's transaction holds the archive or its batch; what has been accepted until then stays."""
        await reach("begun", archive)
        try:
            if await self._unpack(archive):
                await reach("done", archive)
                await self._one("end_archive", archive_id=archive.id, state="unpacked", error_message=None)
                logger.success("{} is unpacked", archive.name)
        except Superseded:
            await self._one("end_archive", archive_id=archive.id, state="cancelled", error_message=None)
            logger.info("{}: a newer run of the batch has begun, or this one was ended; unpacking stops", archive.name)
        except (RetryableError, TimeoutError) as error:
            await self._try_later(archive, error)
        except DocmillError as error:
            await self._fail(archive, error)
        except asyncio.CancelledError:
            # The worker has run out of patience. Without this the reconciler would find it, a little later.
            await asyncio.wait({asyncio.ensure_future(self._leave(archive))}, timeout=LAST_WAIT)
            raise
        await reach("ended", archive)

    async def _leave(self, archive: Archive) -> None:
        """Hand the rest on at once, as far as the database lets it."""
        with suppress(psycopg.Error):
            try:
                await self._put_off(archive, 0.0)
            except BatchHeld:
                await self._put_off_held(archive)

    async def _unpack(self, archive: Archive) -> bool:
        """Do what is left to do; False if the rest has been put off."""
        await asyncio.to_thread(remove_leftovers, self._storage)
        file = self._storage.file(archive.file_path)
        stored_for = archive_upload_id(archive.batch_id, archive.entry_path)
        await asyncio.to_thread(refuse_foreign_file, self._settings, file.path, archive.file_path, stored_for)
        with workspace(self._storage) as folder:
            async with aclosing(self._sandbox(folder)) as sandbox:
                return await self._unpack_into(folder, archive, file, sandbox)

    async def _unpack_into(self, folder: Path, archive: Archive, file: StoredFile, sandbox: Sandbox) -> bool:
        stamp = await asyncio.to_thread(self._storage.stamp, archive.file_path)  # there, and a regular file: in words for people
        listing = await self._list(archive, file, sandbox)
        await reach("listed", archive)
        await self._count_and_settle(archive)
        acceptance = Acceptance(self._pool, archive)
        await acceptance.look(listing.members)
        intake = Intake(archive, file, sandbox, self._limits, self._storage, acceptance, self._pool, stamp, self._is_last_try(archive))
        left = [member for member in listing.members if member.path not in acceptance.done]
        for number, group in enumerate(in_groups(left)):
            if self._stopping():
                await self._put_off(archive, 0.0)
                logger.info("{}: the worker stops; unpacking goes on elsewhere", archive.name)
                return False
            place = folder / str(number)
            try:
                with storage_faults(self._storage.base, f"{self._storage.temp_dir}/{folder.name}"):
                    place.mkdir()
            except PermanentError as error:
                raise RetryableError(f"its workspace is gone: {error}") from error
            await intake.take(group, place)
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        if acceptance.held:
            logger.info("{}: somebody's transaction holds {} of its documents; they are tried again", archive.name, acceptance.held)
            await self._put_off(archive, HELD_SECONDS)
        return acceptance.held == 0

    async def _list(self, archive: Archive, file: StoredFile, sandbox: Sandbox) -> Listing:
        """Open the archive and note what it holds.

        PermanentError if it is bad, or breaks a limit, as a whole. Superseded, BatchHeld: it was replaced since its unpacking began.
        """
        sha256 = archive.content_sha256
        if archive.may_be_replaced:
            sha256 = (await asyncio.to_thread(self._storage.fingerprint, archive.file_path)).sha256
            if archive.content_sha256 not in (None, sha256):
                await self._begin_anew(archive)
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

    async def _begin_anew(self, archive: Archive) -> NoReturn:
        """Have a zip that was replaced unpacked by a new run, as one that is submitted again: this one would hold entries of both.

        Raises Superseded, or BatchHeld: the file is looked at again later.
        """
        await self._one(
            "submit_zip_again", batch_id=archive.batch_id, run_id=archive.run_id, priority=archive.priority, lock_timeout_ms=LOCK_MS
        )
        logger.warning("{}: its file was replaced since its unpacking began", archive.name)
        raise Superseded

    async def _count_and_settle(self, archive: Archive) -> None:
        """Bring the batch's numbers up to date, and end it if nothing is left. A submitter that holds the batch is not waited for."""
        try:
            async with self._pool.connection() as conn, conn.transaction():
                await one(conn, "limit_lock_waits", {"milliseconds": LOCK_MS})
                await one(conn, "count_batch_files", {"batch_id": archive.batch_id, "run_id": archive.run_id})
        except psycopg.errors.LockNotAvailable:
            logger.info("Somebody's transaction holds the batch; its number of files is brought up to date later")
        await self._one("settle_batch", batch_id=archive.batch_id)

    async def _put_off(self, archive: Archive, delay: float, reason: str | None = None, *, waits: bool = False) -> None:
        await self._one("put_off_archive", archive_id=archive.id, delay=delay, reason=reason, waits=waits)

    async def _put_off_held(self, archive: Archive) -> None:
        """Have the archive looked at again by a job of its own, which needs nothing that the transaction holds."""
        with suppress(BatchHeld):  # by the job that should do so: the reconciler finds it
            await self._one("put_off_held_archive", archive_id=archive.id)
        logger.info("{}: somebody's transaction holds the batch; unpacking goes on later", archive.name)

    async def _fail(self, archive: Archive, error: Exception) -> None:
        try:
            await fail_archive(self._pool, archive, error)
        except psycopg.errors.LockNotAvailable as held:
            raise BatchHeld from held

    def _is_last_try(self, archive: Archive) -> bool:
        return archive.retry_count >= self._settings.max_retry_attempts

    async def _try_later(self, archive: Archive, error: DocmillError) -> None:
        judged = self._retry.judge(error, archive.waited_seconds)
        plan = self._retry.plan(judged, archive.retry_count, archive.waited_seconds)
        if plan is None:
            await self._fail(archive, judged)
            return
        plan = self._retry.within_wait(plan, archive.waited_seconds)
        await self._put_off(archive, plan.delay, f"{archive.name}: {error}", waits=not plan.counts)
        logger.warning("{}: trying again in {:.1f} s: {}", archive.name, plan.delay, error)

    async def _one(self, name: str, **params: Any) -> dict[str, Any] | None:
        """Ask a named query for its row. Raises BatchHeld where it met somebody's lock for longer than it waits."""
        try:
            async with self._pool.connection() as conn:
                return await one(conn, name, params)
        except psycopg.errors.LockNotAvailable as error:
            raise BatchHeld from error
