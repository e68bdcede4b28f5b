"""An archive's members on their way in, a group at a time: unpacked in the sandbox, stored, and accepted into the run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.adapters.archives import ArchiveLimits, Member, Unpacked, refuse_strange, unpack_members
from jobs.adapters.storage import LocalStorage, StoredUpload
from jobs.adapters.stored_file import StoredFile
from jobs.batch.acceptance import Acceptance, Superseded
from jobs.batch.archive import Archive, EntryRow, refused_entry, stored_entry
from jobs.batch.submission import archive_upload_id
from jobs.pipeline.claims import Connection, one
from jobs.stages import Sandbox
from models.errors import ParseError, RetryableError, TimeoutError

DEPTH = 2
"""How deep archives may lie in one another; the outermost one is 1."""
STORING = 8
"""Files that are stored at a time: each waits for the disk, which writes several at once as quickly as one."""
WAITS = 3
"""After how many members in a row that each waited alone until the time was up it is the storage that fails, and not they."""


async def reach(point: str, archive: Archive) -> None:
    """Name a point of the work, where the fault suite may break in."""
    await faults.at(f"unpack_{point}", archive.batch_id)


@dataclass(slots=True)
class Intake:
    """One archive's way from its file to the tables."""

    archive: Archive
    file: StoredFile
    sandbox: Sandbox
    limits: ArchiveLimits
    storage: LocalStorage
    acceptance: Acceptance
    pool: AsyncConnectionPool[Connection]
    stamp: tuple[int, int]
    """The file's, from before it was listed."""
    last_try: bool
    """Whether the archive is not tried again after this."""
    waits: int = 0
    """Members in a row that waited alone until the time was up."""

    async def take(self, group: Sequence[Member], place: Path) -> None:
        """Take in a group, by way of an empty folder that the sandbox may write to.

        Superseded if the run is over. TimeoutError: unpacking waited until the time was up, for a disk say. RetryableError: the file is not
        the one that was listed.
        """
        results = await self._extract([member for member in group if member.reason is None], place)
        results += [Unpacked(member.path, reason=member.reason) for member in group if member.reason is not None]
        if self.archive.may_be_replaced and await asyncio.to_thread(self.storage.stamp, self.archive.file_path) != self.stamp:
            raise RetryableError("it changed while it was being unpacked.")
        await reach("unpacked", self.archive)
        several = asyncio.Semaphore(STORING)

        async def store(result: Unpacked) -> tuple[str, EntryRow | StoredUpload]:
            async with several:
                return result.path, await asyncio.to_thread(self._store, result, place)

        stored = dict(await asyncio.gather(*(store(result) for result in results)))
        await reach("stored", self.archive)
        await self._accept(stored)
        await reach("accepted", self.archive)

    async def _extract(self, members: Sequence[Member], place: Path) -> list[Unpacked]:
        """Unpack members in a child. Where that takes the child down or takes too long, one by one: then it is one member's fault.

        A wait is nobody's fault before the last try.
        """
        if not members:
            return []
        try:
            made = await self.sandbox.run(unpack_members, self.file, members, str(place), self.limits)
            refuse_strange(made, members)
        except (ParseError, TimeoutError) as error:
            waited = isinstance(error, TimeoutError)
            if waited and not self.last_try:
                raise
            if len(members) == 1:
                self.waits = self.waits + 1 if waited else 0
                if self.waits == WAITS:
                    raise
                return [Unpacked(members[0].path, reason=f"unpacking it failed: {str(error).rstrip('.')}")]
            return [result for member in members for result in await self._extract([member], place)]
        self.waits = 0
        return made

    def _store(self, result: Unpacked, place: Path) -> EntryRow | StoredUpload:
        """Bring what became of a member to where it stays: an archive's stored file, or the row of a document. Runs in a thread."""
        archive, reason = self.archive, result.reason
        if result.is_archive and archive.depth >= DEPTH:
            reason = f"it is an archive inside of {archive.depth} others; archives are unpacked {DEPTH} deep"
        if reason is not None or result.file is None or result.sha256 is None or result.size is None:
            return refused_entry(archive, self.storage, result.path, reason or "it could not be unpacked")
        file = place / result.file
        if result.is_archive:
            upload_id = archive_upload_id(archive.batch_id, f"{archive.entry_path}{result.path}/")
            return self.storage.take_upload(upload_id, file, result.size, result.sha256)
        unchanged = self.acceptance.is_unchanged(result.path, result.sha256)
        if unchanged:
            stored = StoredUpload("", result.size, result.sha256)
        else:
            stored = self.storage.take_upload(archive.doc_id(result.path), file, result.size, result.sha256)
        return stored_entry(archive, result.path, stored, unchanged=unchanged)

    async def _accept(self, stored: dict[str, EntryRow | StoredUpload]) -> None:
        try:
            for inner, upload in stored.items():
                if isinstance(upload, StoredUpload):
                    await self.acceptance.add_archive(inner, upload)
                    await reach("inner_added", self.archive)
            entries = {path: entry for path, entry in stored.items() if isinstance(entry, EntryRow)}
            if entries:
                await self.acceptance.accept(entries)
        except Superseded:
            # Whoever deleted the batch could not know of these files. They go unless somebody refers to them.
            for kept in stored.values():
                if kept.file_path:
                    doc_id = kept.doc_id if isinstance(kept, EntryRow) else None
                    async with self.pool.connection() as conn:
                        await one(conn, "note_unneeded_file", {"path": kept.file_path, "doc_id": doc_id})
            raise
