"""One sync of a folder: look, plan, submit what is new or changed, and only then delete what is gone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from jobs import faults
from jobs.adapters.folders import Listing, own_folders, storage_folders
from jobs.adapters.storage import storable_text
from jobs.arguments import absolute_path, check_metadata, check_name, check_priority
from jobs.batch import BatchSubmission, FileResult, Listener, Looked, entries_of, submit_folder, told_apart
from jobs.sync.files import Found, Stored
from jobs.sync.looking import (
    FolderLook,
    Look,
    chunks,
    digest_files,
    is_steady,
    look_at,
    look_at_folder,
    may_be_archives,
    why_not_gone,
)
from jobs.sync.memory import FolderMemory, Memory, folder_lock
from jobs.sync.plan import Kept, Move, is_below, make_plan, missing, worth_reading
from jobs.sync.result import SyncOptions, SyncResult
from models.errors import RetryableError, SubmitConflict, SubmitError
from models.settings import Settings


class FolderSync:
    """Syncs one folder, as often as asked.

    `is_settled` is asked about each new, changed or missing (None) file whether it has been so for long enough to be believed; whoever
    gives it comes again for the others. SubmitError for a bad folder, user, metadata or priority.
    """

    def __init__(
        self,
        settings: Settings,
        folder: str | os.PathLike[str],
        options: SyncOptions,
        *,
        on_file: Listener | None = None,
        is_settled: Callable[[str, Look | None], bool] | None = None,
    ) -> None:
        check_name("user_id", options.user_id)
        check_metadata(options.metadata)
        check_priority(options.priority)
        self.root = absolute_path(folder)
        self._settings, self._options, self._on_file = settings, options, on_file
        self._comes_again = is_settled is not None
        self._is_settled = is_settled or (lambda _name, _look: True)
        self._most_bytes = max(settings.max_file_size_mb, settings.max_archive_mb) * 1_000_000
        self._memory = FolderMemory(settings, self.root, options.user_id)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._options.dry_run:
            yield  # it writes nothing, so it disturbs nobody
        else:
            async with folder_lock(self._settings, self._memory.batch_id, self.root):
                yield

    async def run(self) -> SyncResult:
        """Sync once.

        SubmitError: the folder is not there, cannot be listed, or is empty although documents are stored for it. SubmitConflict: another
        sync of it is at work, or somebody holds its batch. RetryableError: it went away meanwhile. In all these cases nothing is deleted.
        """
        async with self._alone():
            seen, ids, memory = await self._look()
            if gone := missing(memory.stored, ids):
                # A file that is moved while its folder is listed may be seen in neither place. It is seen in the next listing; only what
                # is missing from both is missing.
                before = {document.name for document in gone}
                seen, ids, memory = await self._look()
                memory.stored = [document for document in memory.stored if document.name in ids or document.name in before]
            self._refuse_empty(seen, memory)
            found = await self._read(seen, ids, memory)
            unsettled = {
                document.name for document in memory.stored if document.name not in ids and not self._is_settled(document.name, None)
            }
            unreadable = {name for name, _ in seen.listing.unreadable}
            plan = make_plan(memory.stored, found, unreadable, memory.archives, unsettled=unsettled, entry_id=self._memory.entry_id)
            result = SyncResult(self.root, self._memory.batch_id, plan, kept=list(plan.kept))
            if self._options.dry_run:
                await self._doubt(result, seen)
                return result
            # An archive that a run has is stored anew with every run, so none begins while one is being written.
            archive_is_busy = any(name in memory.archives for name in plan.busy)
            if self._comes_again and (archive_is_busy or (result.is_unsettled() and not result.has_work())):
                result.batch = BatchSubmission(self._memory.batch_id)  # one run for all of it, when it has settled
                self._report_busy(result)
            else:
                await self._memory.keep(plan.restored)
                await self._mark_moved(result, seen)
                await faults.at("sync_marked")
                await self._submit(result, seen, found, memory)
                await faults.at("sync_submitted")
                await self._remember(result, seen, found, memory)
                await self._delete_vanished(result, seen)
            return result

    async def _look(self) -> tuple[FolderLook, dict[str, str], Memory]:
        """Return what lies in the folder, the doc_id of each file by name, and what is stored."""
        seen = await asyncio.to_thread(look_at_folder, self.root, storage_folders(self._settings))
        entries, doubles = told_apart(entries_of(self._options.user_id, self.root, seen.listing.files))
        # Told of with what cannot be listed: of two files that are one document the first is synced.
        seen.listing.unreadable += [(double.name, double.error) for double in doubles if double.error is not None]
        seen.listing.files = [entry.name for entry in entries]
        ids = {entry.name: entry.doc_id for entry in entries}
        return seen, ids, await self._memory.recall(ids)

    def _refuse_empty(self, seen: FolderLook, memory: Memory) -> None:
        if not seen.listing.files and memory.stored and not self._options.allow_empty:
            raise SubmitError(
                f"Folder {str(self.root)!r} is empty, but {len(memory.stored)} documents are stored for it: nothing was deleted. "
                "Is something not mounted? If it is meant to be empty, say so with --allow-empty (allow_empty=True)."
            )

    async def _read(self, seen: FolderLook, ids: Mapping[str, str], memory: Memory) -> dict[str, Found]:
        """Return the files with the SHA-256 of those whose content matters; a file that looks as it did last time is not read again."""
        found: dict[str, Found] = {}
        for name in seen.listing.files:
            look = seen.looks.get(name)
            seen_as, sha256 = memory.seen.get(ids[name], ("", ""))
            known = look is not None and seen_as == str(look) and not self._options.checksum
            busy = look is not None and not known and not self._is_settled(name, look)
            found[name] = Found(name, ids[name], -1 if look is None else look.size, sha256 if known else None, busy)
        if any(document.entry is not None for document in missing(memory.stored, found)):
            for turn in chunks([file.name for file in found.values() if file.sha256 is None], seen.looks):
                for name in await asyncio.to_thread(may_be_archives, self.root, turn):
                    found[name] = replace(found[name], may_be_archive=True)
        for turn in chunks(worth_reading(memory.stored, found, memory.archives), seen.looks):
            digests = await asyncio.to_thread(digest_files, self.root, turn, self._most_bytes)
            for name, digest in digests.items():
                found[name] = replace(found[name], sha256=digest, busy=digest is None)
        return found

    async def _mark_moved(self, result: SyncResult, seen: FolderLook) -> None:
        """Before the submission, so that the new document never takes the old one for an original that stays."""
        for move in result.plan.moved:
            if (reason := await self._why_not(seen, move.old)) is not None:
                result.kept.append(Kept(move.old.shown, reason))
                continue
            try:
                if await self._memory.replace(move.old, move.doc_id) or move.old.replaced_by == move.doc_id:
                    result.moved.append(move)
            except SubmitConflict as error:
                result.kept.append(Kept(move.old.shown, str(error)))

    async def _submit(self, result: SyncResult, seen: FolderLook, found: Mapping[str, Found], memory: Memory) -> None:
        """Submit the folder. A file that is being written stays what it was, if it was anything."""
        contents = {document.doc_id: document.content_sha256 for document in memory.stored}
        contents |= {
            found[name].doc_id: archive.content_sha256 for name, archive in memory.archives.items() if name in found and archive.in_run
        }
        digests = {name: file.sha256 for name, file in found.items() if file.sha256 is not None}
        digests |= {name: sha256 for name in result.plan.busy if (sha256 := contents.get(found[name].doc_id)) is not None}
        unknown = {name for name in result.plan.busy if name not in digests}
        # Syncs of folders that lie in each other would take their documents from each other for ever.
        unchanged = set(result.plan.unchanged)
        others = frozenset(document.name for document in memory.stored if document.elsewhere and document.name in unchanged)
        listing = Listing([name for name in seen.listing.files if name not in unknown], seen.listing.skipped, seen.listing.unreadable)
        result.batch = await submit_folder(
            self._settings,
            self.root,
            user_id=self._options.user_id,
            priority=self._options.priority,
            metadata=self._options.metadata,
            on_file=self._on_file,
            listing=listing,
            looked=Looked(digests, resume=False, busy=frozenset(result.plan.busy), others=others),
        )
        if result.batch.run_id is not None:
            # Only now is it known which files have become archives; the documents that they were go once these are unpacked.
            files = {storable_text(document.name): document.name for document in memory.stored if document.entry is None}
            grown = [files[name] for name in result.batch.archives if name in files]
            result.plan.unpacking += [name for name in grown if name not in result.plan.unpacking]
        self._report_busy(result)

    def _report_busy(self, result: SyncResult) -> None:
        assert result.batch is not None
        for name in result.plan.busy:
            busy = FileResult(name, error=RetryableError(f"File {name!r} is being written: the next sync takes it."))
            result.batch.files.append(busy)
            if self._on_file is not None:
                self._on_file(busy)

    async def _remember(self, result: SyncResult, seen: FolderLook, found: Mapping[str, Found], memory: Memory) -> None:
        """Store what the files that were read look like, where a later change is sure to show."""
        assert result.batch is not None
        contents = {name: file.sha256 for name, file in found.items()}
        contents |= {file.name: file.content_sha256 for file in result.batch.files if file.content_sha256 is not None}

        def steady() -> list[tuple[str, str, str]]:
            return [
                (found[name].doc_id, str(look), sha256)
                for name, look in seen.looks.items()
                if (sha256 := contents.get(name)) is not None
                and memory.seen.get(found[name].doc_id) != (str(look), sha256)
                and is_steady(look, seen.at_ns)
                and look_at(self.root / name) == look
            ]

        await self._memory.remember(await asyncio.to_thread(steady))
        listed = {file.doc_id for file in found.values()}
        unreadable = {name for name, _ in seen.listing.unreadable}
        hidden = {document.doc_id for document in memory.stored if is_below(document.name, unreadable)}
        await self._memory.forget(doc_id for doc_id in memory.seen if doc_id not in listed and doc_id not in hidden)

    async def _delete_vanished(self, result: SyncResult, seen: FolderLook) -> None:
        """Delete what is gone, each document only if its file, unless that holds something else now, is gone at that very moment."""
        for document in result.plan.vanished:
            if (reason := await self._why_not(seen, document)) is not None:
                result.kept.append(Kept(document.shown, reason))
                continue
            await faults.at("sync_deletes", document.doc_id)
            try:
                if await self._memory.delete(document):
                    result.deleted.append(document)
            except SubmitConflict as error:
                result.kept.append(Kept(document.shown, str(error)))
        if result.deleted:
            await self._memory.settle()

    async def _doubt(self, result: SyncResult, seen: FolderLook) -> None:
        """Take out of a plan that is only shown what would be kept, as it is found out right before each deletion."""
        plan = result.plan
        gone = [*plan.vanished, *(move.old for move in plan.moved)]
        kept = {document.doc_id: reason for document in gone if (reason := await self._why_not(seen, document)) is not None}
        plan.vanished = [document for document in plan.vanished if document.doc_id not in kept]
        plan.moved = [move for move in plan.moved if move.old.doc_id not in kept]
        result.kept += [Kept(document.shown, kept[document.doc_id]) for document in gone if document.doc_id in kept]

    async def _why_not(self, seen: FolderLook, document: Stored) -> str | None:
        if document.name in seen.looks:
            return None  # its file is there and no longer holds it

        def ask() -> str | None:
            trusted = self._options.allow_empty
            # Where texts are extracted to was people's own before: what lies there and became a document is theirs.
            extracted = self._settings.storage_base_path / self._settings.storage_extracted_dir
            own = [path for path in own_folders(self._settings) if not path.is_relative_to(extracted)]
            return why_not_gone(self.root, seen.identity, document.name, document.created_at, trusted=trusted, own=own)

        return await asyncio.to_thread(ask)

    async def finish_moves(self, result: SyncResult) -> list[Move]:
        """Delete the old documents of moved files whose new ones are complete by now, and return the moves that are still on their way.

        Any worker's reconciler does the same in time.
        """
        deleted = {document.doc_id for document in result.deleted}
        gone, left = await self._memory.finish_replacing([move for move in result.moved if move.old.doc_id not in deleted])
        result.deleted += [move.old for move in result.moved if move.old.doc_id in gone]
        return left
