"""What the database knows of a folder, as the plan wants it, and the lock that lets one sync of a folder run at a time."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from jobs.adapters.storage import storable_path, storable_text
from jobs.arguments import derive_doc_id, path_doc_id
from jobs.database import conninfo_of
from jobs.front import async_connection
from jobs.sessions import connect_async
from jobs.submit import refused
from jobs.sync.files import Archive, Stored
from jobs.sync.plan import Move, places_above
from models.errors import SubmitConflict
from models.settings import Settings
from models.stages import State
from sql import query

_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])")
Row = dict[str, Any]


@dataclass(slots=True)
class Memory:
    """What is stored of a folder."""

    stored: list[Stored] = field(default_factory=list)
    archives: dict[str, Archive] = field(default_factory=dict)
    """Those that lie in no other, by name."""
    seen: dict[str, tuple[str, str]] = field(default_factory=dict)
    """doc_id -> what the file looked like and its SHA-256, from earlier syncs."""


class FolderMemory:
    """Asks and tells the database about one folder of one user."""

    def __init__(self, settings: Settings, root: Path, user_id: str) -> None:
        self._settings, self._root, self._user_id = settings, root, user_id
        self.batch_id = path_doc_id(user_id, root)
        self._below = storable_path(root).rstrip("/") + "/"

    async def recall(self, doc_ids: Mapping[str, str]) -> Memory:
        """Return what is stored. `doc_ids`: name -> doc_id of the files that lie in the folder now."""
        params = {"user_id": self._user_id, "batch_id": self.batch_id, "below": self._below}
        rows = await self._ask("find_stored_files", params)
        shown = {storable_text(name): name for name in reversed(list(doc_ids))}  # of two that are shown alike the first is submitted
        memory = Memory(archives=_archives(self.batch_id, await self._ask("find_archives", params), shown))
        names = {doc_id: name for name, doc_id in doc_ids.items()}
        archives = {archive.shown: archive for archive in memory.archives.values()}
        for row in rows:
            document = self._document(row, names, archives)
            if document is not None:
                memory.stored.append(replace(document, elsewhere=row["batch_id"] != self.batch_id and self._is_of_folder(row)))
        made = Counter((document.name, document.run_id) for document in memory.stored if document.entry is not None)
        for name, archive in memory.archives.items():
            memory.archives[name] = replace(archive, unmade=archive.unmade - made[name, archive.run_id])
        known = {document.doc_id for document in memory.stored}
        others = {"user_id": self._user_id, "doc_ids": [doc_id for doc_id in names if doc_id not in known]}
        memory.stored += [_stored(row, names[row["doc_id"]]) for row in await self._ask("find_files_by_id", others)]
        memory.seen = {row["path_id"]: (row["seen_as"], row["content_sha256"]) for row in await self._ask("find_seen_files", params)}
        return memory

    def _document(self, row: Row, names: Mapping[str, str], archives: Mapping[str, Archive]) -> Stored | None:
        """Return a document if its file, or the archive that it was in, is known to be one of this folder; else nobody touches it.

        `archives`: by how they are shown.
        """
        if row["doc_id"] in names:
            return _stored(row, names[row["doc_id"]])
        inside = row["source_path"].removeprefix(self._below)
        for name in dict.fromkeys((inside, unescaped(inside))):
            if path_doc_id(self._user_id, self._root / name) == row["doc_id"]:
                # Not a document of a list or of a batch with a name of its own: these are not the folder's.
                return _stored(row, name) if self._is_of_folder(row) else None
        if row["batch_id"] == self.batch_id and row["doc_id"] == self.entry_id(inside):
            for place in places_above(inside):
                if place in archives:
                    return _stored(row, archives[place].name, entry=inside)
        return None

    def _is_of_folder(self, row: Row) -> bool:
        """Say whether a document's batch is one that is made of a folder, with the name that such a batch has."""
        folders = {row["folder"], unescaped(row["folder"])}  # a backslash may be one of the folder's own name
        return row["batch_id"] in {self.batch_id, *(path_doc_id(self._user_id, Path(folder)) for folder in folders)}

    def entry_id(self, path: str) -> str:
        """Return the doc_id of what lies in an archive, by its path in the folder."""
        return derive_doc_id(self._user_id, f"{self.batch_id}\n{path}")

    async def remember(self, seen: Sequence[tuple[str, str, str]]) -> None:
        """Store what files looked like when they were read: doc_id, look, SHA-256. Nothing where the folder is no batch yet, or somebody's
        transaction holds it: then they are read once more next time."""
        if seen:
            path_ids, seen_as, hashes = (list(column) for column in zip(*seen, strict=True))
            params = {"batch_id": self.batch_id, "path_ids": path_ids, "seen_as": seen_as, "hashes": hashes}
            with suppress(SubmitConflict):
                await self._guarded("remember_seen_files", params)

    async def forget(self, doc_ids: Iterable[str]) -> None:
        """Drop what is stored of files that are no longer there. Nothing where somebody's transaction holds the batch: then next time."""
        if path_ids := list(doc_ids):
            with suppress(SubmitConflict):
                await self._guarded("forget_seen_files", {"batch_id": self.batch_id, "path_ids": path_ids})

    async def keep(self, doc_ids: Sequence[str]) -> None:
        """Say of documents that nothing takes their place any more."""
        if doc_ids:
            await self._guarded("keep_documents", {"doc_ids": list(doc_ids), "user_id": self._user_id})

    async def replace(self, old: Stored, doc_id: str) -> bool:
        """Say that another document takes a document's place; tell whether this is news. SubmitConflict: somebody holds it."""
        return bool(await self._guarded("let_document_be_replaced", {**_as_planned(old), "replaced_by": doc_id}))

    async def delete(self, old: Stored) -> bool:
        """Delete a document, unless it has been submitted again meanwhile; tell whether it was there. SubmitConflict: somebody holds it."""
        found = await self._guarded("delete_vanished_document", _as_planned(old))
        return bool(found and found[0]["deleted"])

    async def finish_replacing(self, moves: Sequence[Move]) -> tuple[set[str], list[Move]]:
        """Delete the old documents whose successor is complete by now, as any reconciler would.

        Returns the doc_ids of all that are gone, and the moves that are still on their way: of the others the new document has failed.
        """
        for move in moves:
            await self._ask("delete_replaced_document", {"doc_id": move.old.doc_id})
        doc_ids = [doc_id for move in moves for doc_id in (move.old.doc_id, move.doc_id)]
        states = {
            row["doc_id"]: row["state"] for row in await self._ask("find_files_by_id", {"doc_ids": doc_ids, "user_id": self._user_id})
        }
        gone = {move.old.doc_id for move in moves} - set(states)
        ended = {None, State.FAILED, State.CANCELLED}
        return gone, [move for move in moves if move.old.doc_id in states and states.get(move.doc_id) not in ended]

    async def settle(self) -> None:
        """End the folder's batch if its last unfinished document has just been deleted; of one that had ended the summary follows soon."""
        await self._ask("settle_bereft", {"batch_id": self.batch_id})

    async def _ask(self, name: str, params: Mapping[str, Any]) -> list[Row]:
        async with async_connection(self._settings, None) as conn, conn.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query(name), params)
            return await cursor.fetchall() if cursor.description else []

    async def _guarded(self, name: str, params: Mapping[str, Any]) -> list[Row]:
        """Ask without waiting long for somebody's open transaction."""
        wait = {"lock_timeout_ms": str(int(self._settings.submit_lock_timeout_seconds * 1000))}
        async with async_connection(self._settings, None) as conn, conn.transaction(), conn.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query("limit_sync_wait"), wait)
            try:
                await cursor.execute(query(name), params)
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
                raise refused(error, str(params.get("doc_id", self.batch_id))) from error
            return await cursor.fetchall() if cursor.description else []


def _as_planned(document: Stored) -> dict[str, Any]:
    return {"doc_id": document.doc_id, "version": document.version, "run_id": document.run_id}


def unescaped(text: str) -> str:
    """Undo what storable_path did to control characters; where it did nothing, the text itself."""
    return _ESCAPE.sub(lambda found: found.group().encode("ascii").decode("unicode_escape"), text)


def _stored(row: Row, name: str, *, entry: str | None = None) -> Stored:
    return Stored(
        doc_id=row["doc_id"],
        name=name,
        content_sha256=row["content_sha256"],
        file_size=row["file_size"],
        version=row["version"],
        run_id=row["run_id"],
        batch_id=row["batch_id"],
        state=State(row["state"]),
        served=row["served"],
        created_at=row["created_at"],
        duplicate_of=row["duplicate_of"],
        replaced_by=row["replaced_by"],
        successor=State(row["successor_state"]) if row["successor_state"] else None,
        entry=entry,
    )


def _archives(batch_id: str, rows: Sequence[Row], listed: Mapping[str, str]) -> dict[str, Archive]:
    """Return the archives that lie in no other, as if no document had been made of them.

    `listed`: the names of the files that are there now, by how they are shown.
    """
    by_path = {row["entry_path"].rstrip("/"): row for row in rows}
    parts: dict[str, list[Row]] = {}  # of the outermost archives: themselves and what lies in them
    for row in rows:
        if (outermost := next((place for place in places_above(row["entry_path"]) if place in by_path), None)) is not None:
            parts.setdefault(outermost, []).append(row)
    made: dict[str, Archive] = {}
    for shown in sorted(parts, key=len):
        row, inside = by_path[shown], parts[shown]
        current = row["ended"] and not any(part["unfinished"] for part in inside)
        failed = frozenset(part["entry_path"].rstrip("/") for part in inside if part["failed"])
        name = listed.get(shown) or unescaped(shown)
        is_open = any(part["open"] for part in inside)
        content, in_run, cancelled = row["content_sha256"], row["in_run"], row["cancelled"]
        unmade = sum(part["documents"] for part in inside)
        made[name] = Archive(batch_id, name, shown, row["run_id"], content, in_run, current, is_open, cancelled, unmade, failed)
    return made


@asynccontextmanager
async def folder_lock(settings: Settings, batch_id: str, folder: Path) -> AsyncIterator[None]:
    """Hold the lock of a folder's sync, on a connection of its own: it ends with this process. SubmitConflict: another sync holds it."""
    conninfo = await asyncio.to_thread(conninfo_of, settings, direct=True)
    async with await connect_async(settings, conninfo) as conn:
        row = await (await conn.execute(query("try_lock_folder"), {"batch_id": batch_id})).fetchone()
        if row is None or not row[0]:
            raise SubmitConflict(f"Folder {str(folder)!r} is being synced by another process; one at a time. Try again when it has ended.")
        try:
            yield
        finally:
            with suppress(psycopg.Error):  # by the connection's end it would be let go too, but some moments after this has returned
                await conn.execute(query("unlock_folder"), {"batch_id": batch_id})
