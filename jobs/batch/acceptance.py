"""Taking an archive's entries into the tables, group by group, each group in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import psycopg
from loguru import logger
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from jobs.adapters.archives import Member
from jobs.adapters.storage import StoredUpload
from jobs.batch.archive import Archive, EntryRow
from jobs.pipeline.claims import Connection, one, rows
from jobs.redaction import describe
from models.stages import State

LOCK_MS = 1000
"""How long a group waits for a row that somebody holds; then its entries go one by one."""
LOCK_ONE_MS = 200
_ENOUGH_HELD = 3  # entries in a row, none of which got through: it is the batch that is held, not they
_LOOK_AT = 5000  # documents that are asked for at a time
_HELD = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)


class Superseded(Exception):
    """A newer run of the batch has begun, or this one was ended: there is nothing left to do."""


class BatchHeld(Exception):
    """Somebody's transaction holds the batch, such as one that begins a new run of it."""


class Acceptance:
    """One archive's way into the tables."""

    def __init__(self, pool: AsyncConnectionPool[Connection], archive: Archive) -> None:
        self._pool = pool
        self._archive = archive
        self._known: dict[str, tuple[str | None, str]] = {}  # of archives of any size, so no more than is needed: content and state
        self.done: set[str] = set()
        """Paths of the entries that are in the run."""
        self.held = 0
        """Entries that were passed over because somebody's transaction holds them, or has deleted them since the look."""

    async def look(self, members: Sequence[Member]) -> None:
        """Find out which entries are known as documents, and which of those, and of the archives inside, the run has already."""
        archive = self._archive
        paths = {archive.doc_id(member.path): member.path for member in members}
        ids = list(paths)
        async with self._pool.connection() as conn:
            for start in range(0, len(ids), _LOOK_AT):
                asked = ids[start : start + _LOOK_AT]
                params = {"doc_ids": asked, "user_id": archive.user_id, "batch_id": archive.batch_id, "run_id": archive.run_id}
                for row in await rows(conn, "find_known_documents", params):
                    self._known[row["doc_id"]] = row["content_sha256"], row["state"]
                    if row["run_id"] == archive.run_id:
                        self.done.add(paths[row["doc_id"]])
                # What was accepted before and deleted since does not come back because a worker goes on.
                for row in await rows(conn, "find_deleted_since", params):
                    if row["doc_id"] not in self._known:
                        self.done.add(paths[row["doc_id"]])
            inner = await rows(conn, "find_inner_archives", {"archive_id": archive.id})
        self.done.update(row["entry_path"].removeprefix(archive.entry_path).rstrip("/") for row in inner)

    def is_unchanged(self, path: str, sha256: str | None) -> bool:
        """Say whether an entry's document is known with this content and needs no work."""
        content, state = self._known.get(self._archive.doc_id(path), (None, ""))
        return content is not None and content == sha256 and (state != State.CANCELLED or self._archive.keeps_cancelled)

    async def add_archive(self, path: str, stored: StoredUpload) -> None:
        """Take an archive inside of the archive into the run. Raises Superseded, BatchHeld."""
        archive = self._archive
        params = {
            "batch_id": archive.batch_id, "run_id": archive.run_id, "user_id": archive.user_id,
            "entry_path": f"{archive.entry_path}{path}/", "source_prefix": f"{archive.source_prefix}{path}/",
            "file_path": stored.file_path, "content_sha256": stored.sha256, "priority": archive.priority, "parent_id": archive.id,
            "lock_timeout_ms": LOCK_MS, "keeps_cancelled": archive.keeps_cancelled,
        }  # fmt: skip
        try:
            async with self._pool.connection() as conn:
                await one(conn, "add_archive", params)
        except psycopg.errors.ObjectNotInPrerequisiteState as error:
            raise Superseded from error
        except _HELD as error:
            raise BatchHeld from error
        self.done.add(path)

    async def accept(self, entries: Mapping[str, EntryRow]) -> None:
        """Take entries, by path, into the run: all at once or, where one of them stands in the way, one by one.

        One that somebody holds is counted in `held` and comes again later. Raises Superseded, BatchHeld.
        """
        try:
            await self._accept(entries, LOCK_MS)
        except (*_HELD, psycopg.IntegrityError, psycopg.DataError) as error:
            logger.info("A group of {} entries is taken one by one: {}", len(entries), describe(error))
        else:
            return
        before, held = len(self.done), 0
        for path, entry in entries.items():
            try:
                await self._accept({path: entry}, LOCK_ONE_MS)
            except _HELD as error:
                held += 1
                if held >= _ENOUGH_HELD and len(self.done) == before:
                    raise BatchHeld from error
            except (psycopg.IntegrityError, psycopg.DataError) as error:
                # Its doc_id is another user's, say. There is no row that could tell of it.
                logger.error("{}, entry {} cannot be stored: {}", self._archive.name, path, describe(error))
                self.done.add(path)
        self.held += held

    async def _accept(self, entries: Mapping[str, EntryRow], lock_timeout_ms: int) -> None:
        params = {
            "archive_id": self._archive.id,
            "entries": Jsonb([asdict(entry) for entry in entries.values()]),
            "unpacked_count": len(self.done | set(entries)),
            "lock_timeout_ms": lock_timeout_ms,
        }
        try:
            async with self._pool.connection() as conn:
                await one(conn, "accept_entries", params)
        except psycopg.errors.ObjectNotInPrerequisiteState as error:
            raise Superseded from error
        self.done.update(entries)
