"""Submitting files together: a folder or a list is one batch, and submitting it again does only what has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from jobs.adapters.archives.names import LONGEST_PATH
from jobs.adapters.storage import LocalStorage, StoredUpload, storable_text
from jobs.batch.steps import Ask, Steps
from jobs.batch.storing import Seen, digest_of, in_groups, look, store
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
    same_name,
    stands,
    told_apart,
    unchanged,
)
from jobs.submit import refused, submission
from models.errors import ConfigurationError, DocmillError, SubmitConflict, SubmitError
from models.settings import Settings
from models.stages import State
from models.submissions import Submission

_TOGETHER = 16
"""Files that are looked at, stored and, if new, accepted in one transaction: each step waits for the disk."""
_ENOUGH_HELD = 3
"""Documents in a row that somebody holds. There may be thousands: those after them are waited for no longer than _SHORT_MS each."""
_SHORT_MS = 50


class FolderRun:
    """One submission of a batch. The run is begun with the first file that changes anything, not before."""

    def __init__(self, settings: Settings, whole: Whole, on_file: Listener | None = None, looked: Looked | None = None) -> None:
        self._settings = settings
        self._looked = looked or Looked()
        self._whole = whole
        self.tell = on_file or (lambda _: None)
        self.made = BatchSubmission(whole.batch_id)
        self._held: list[str] = []
        """doc_ids of documents that were refused because somebody's transaction holds them."""
        self._held_in_a_row = 0

    def submit(self, given: Sequence[Entry]) -> Steps[BatchSubmission]:
        """Submit the entries in order, then make sure that the batch's run holds just the accepted ones, and seal it.

        SubmitConflict: somebody's transaction holds the batch or an unchanged document of it.
        """
        made = self.made
        entries, doubles = told_apart(given)
        for double in doubles:
            self._note(double)
        params = {"doc_ids": [entry.doc_id for entry in entries], "user_id": self._whole.user_id, "batch_id": made.batch_id}
        known = {row["doc_id"]: row for row in (yield Ask("find_known_documents", params))}
        batch = yield from look_at_batch(made.batch_id, self._whole.user_id, resume=self._looked.resume)
        before = {
            row["entry_path"]: row["content_sha256"]
            for row in (yield Ask("direct_archives", params))
            if row["state"] not in {"failed", "cancelled"} or not self._looked.resume
        }
        made.known, made.standing = batch is not None, batch["run_id"] if batch is not None else None
        archives = yield from self._submit_each(entries, known, before)
        mine = (result for result in made.files if result.name not in self._looked.others)
        accepted = [result.submission.doc_id for result in mine if result.submission is not None]
        made.archives = list(archives)
        there = {f"{name}/": sha256 for name, (_, sha256) in archives.items()}
        # A changed document that somebody holds stays what it was: no reason to begin a run without it.
        stay = [*accepted, *(doc_id for doc_id in self._held if doc_id in known)]
        if made.run_id is not None or not (stands(batch, [known[doc_id] for doc_id in stay]) and before == there):
            # Stored before the run is begun, as documents are.
            stored = yield from self._store_archives(archives)
            made.archives = list(stored)
            if made.run_id is None and (accepted or stored):
                yield from self._begin(accepted)
            if made.run_id is not None:
                yield from self._add_archives(stored)
                yield from self._seal(accepted)
        order = {entry.name: number for number, entry in enumerate(given)}
        made.files.sort(key=lambda result: order[result.name])
        return made

    def _submit_each(
        self, entries: Sequence[Entry], known: Mapping[str, Mapping[str, Any]], before: Mapping[str, str]
    ) -> Steps[dict[str, tuple[Entry, str]]]:
        """Submit the documents among the entries, new ones some at a time, and return the archives among them: name -> entry, SHA-256."""
        archives: dict[str, tuple[Entry, str]] = {}
        together: list[Entry] = []
        for entry in entries:
            kept = self._kept(entry, known.get(entry.doc_id))
            if kept is not None:
                self._note(kept)
            elif self._is_kept_archive(entry, before):
                yield from self._look_at_archive(entry, archives)
            else:
                together.append(entry)
            if len(together) == _TOGETHER:
                yield from self._submit_together(together, known, archives)
                together.clear()
        yield from self._submit_together(together, known, archives)
        return archives

    def _submit_together(
        self, entries: Sequence[Entry], known: Mapping[str, Mapping[str, Any]], archives: dict[str, tuple[Entry, str]]
    ) -> Steps[None]:
        """Submit the documents among some entries of which nothing is known from a look at them; add the archives to the others."""
        seen: list[Seen | DocmillError] = yield partial(look, self._settings, entries, known, resume=self._looked.resume)
        new: list[tuple[Entry, int]] = []
        for entry, found in zip(entries, seen, strict=True):
            if isinstance(found, DocmillError):
                self._note(FileResult(entry.name, error=found))
            elif found.kind == "archive":
                yield from self._look_at_archive(entry, archives)
            elif found.kind == "unchanged":
                self._note(unchanged(entry, known[entry.doc_id]))
            elif entry.doc_id in known:  # its row is locked: many at once, in another order than others have, could end in a deadlock
                yield from self._store([entry])
            else:
                new.append((entry, found.size))
        for group in in_groups(new):
            yield from self._store(group)

    def _kept(self, entry: Entry, known: Mapping[str, Any] | None) -> FileResult | None:
        """Return the result of a document that is known to be unchanged without reading its file; None if that is not known."""
        digest = self._looked.digests.get(entry.name)
        may_be_archive = entry.name.lower().endswith(".zip") and entry.name not in self._looked.busy  # though it failed as a document
        if known is None or digest is None or digest != known["content_sha256"] or may_be_archive:
            return None
        return None if known["state"] == State.CANCELLED and self._looked.resume else unchanged(entry, known)

    def _is_kept_archive(self, entry: Entry, before: Mapping[str, str]) -> bool:
        digest = self._looked.digests.get(entry.name)
        return digest is not None and before.get(f"{storable_text(entry.name)}/") == digest

    def _look_at_archive(self, entry: Entry, archives: dict[str, tuple[Entry, str]]) -> Steps[None]:
        name = storable_text(entry.name)
        digest = partial(digest_of, entry.path, self._settings.max_archive_mb * 1_000_000, "MAX_ARCHIVE_MB")
        try:
            if len(name.encode()) > LONGEST_PATH:
                raise SubmitError(f"Archive {str(entry.path)!r}: its path in the batch is longer than {LONGEST_PATH:,} bytes.")
            if name in archives:
                raise same_name(entry, archives[name][0])
            archives[name] = entry, self._looked.digests.get(entry.name) or (yield digest)
        except DocmillError as error:
            self._note(FileResult(entry.name, error=error))

    def _note(self, result: FileResult) -> None:
        self.made.files.append(result)
        self.tell(result)

    def _store(self, entries: Sequence[Entry]) -> Steps[None]:
        """Store files and accept them together. They are stored before the run is begun: if all are refused there is none."""
        prepared: list[dict[str, Any] | DocmillError] = yield partial(store, self._settings, self._whole, entries)
        stored: list[tuple[Entry, dict[str, Any]]] = []
        for entry, params in zip(entries, prepared, strict=True):
            if isinstance(params, DocmillError):
                self._note(FileResult(entry.name, error=params))
            else:
                stored.append((entry, params))
        yield from self._accept(stored)

    def _accept(self, stored: Sequence[tuple[Entry, dict[str, Any]]]) -> Steps[None]:
        """Accept documents whose files have been stored: all at once or, where one of them stands in the way, one by one."""
        together = (yield from self._take([params for _, params in stored])) if len(stored) > 1 else None
        for entry, params in stored:
            taken = together if isinstance(together, dict) else (yield from self._take([params]))
            if isinstance(taken, dict):
                self._held_in_a_row = 0
                self._note(FileResult(entry.name, taken[params["doc_id"]], content_sha256=params["content_sha256"]))
                continue
            error = refused(taken, params["doc_id"])
            if not isinstance(error, DocmillError):
                raise error
            if isinstance(error, SubmitConflict):
                self._held.append(params["doc_id"])
                self._held_in_a_row += 1
            self._note(FileResult(entry.name, error=error))

    def _take(self, documents: Sequence[Mapping[str, Any]]) -> Steps[dict[str, Submission] | psycopg.Error]:
        """Accept documents, all or none, in the batch's run, which is begun with them if it has not been.

        Returns what became of each by doc_id, or what stands in the way of one of them. Raises what stands in the way of the batch.
        """
        run_id = self.made.run_id
        lock_timeout_ms = self._lock_timeout_ms if self._held_in_a_row < _ENOUGH_HELD else min(self._lock_timeout_ms, _SHORT_MS)
        same = {"run_id": None if run_id is None else str(run_id), "lock_timeout_ms": lock_timeout_ms}
        plain = [{**params, **same, "metadata": params["metadata"].obj} for params in documents]
        try:
            if run_id is None:
                beginning = self._beginning([params["doc_id"] for params in documents], lock_timeout_ms)
                found = yield Ask("begin_batch_with_documents", {**beginning, "documents": Jsonb(plain)})
                self.made.run_id = found[0]["run_id"]
            else:
                found = yield Ask("accept_documents", {"documents": Jsonb(plain)})
        except psycopg.Error as error:
            if error.diag.table_name == "processing_jobs" or (yield from self._is_held(error)):
                raise self._refused(error) from error
            return error
        rows = {row["doc_id"]: row for row in found}
        return {params["doc_id"]: submission(params, rows.get(params["doc_id"])) for params in documents}

    def _is_held(self, error: psycopg.Error) -> Steps[bool]:
        """Say whether documents could not be taken into the run that has been begun because somebody holds its batch."""
        if self.made.run_id is None or not isinstance(error, psycopg.errors.LockNotAvailable):
            return False
        return bool((yield Ask("find_held_batch", {"batch_id": self.made.batch_id})))

    def _begin(self, doc_ids: Sequence[str]) -> Steps[None]:
        """Begin the run with documents that have not changed."""
        try:
            self.made.run_id = (yield Ask("begin_batch", self._beginning(doc_ids, self._lock_timeout_ms)))[0]["run_id"]
        except psycopg.Error as error:
            raise self._refused(error) from error

    def _beginning(self, doc_ids: Sequence[str], lock_timeout_ms: int) -> dict[str, Any]:
        whole = self._whole
        return {
            "batch_id": whole.batch_id, "user_id": whole.user_id, "source_path": whole.source_path,
            "correlation_id": whole.correlation_id, "metadata": whole.metadata or Jsonb({}), "lock_timeout_ms": lock_timeout_ms,
            "doc_ids": list(doc_ids),
        }  # fmt: skip

    def _refused(self, error: psycopg.Error) -> Exception:
        return refused_batch(error, self._whole.batch_id, in_part=self.made.run_id is not None)

    def _store_archives(self, archives: Mapping[str, tuple[Entry, str]]) -> Steps[dict[str, tuple[Entry, StoredUpload]]]:
        """Store archives and return those that could be."""
        stored: dict[str, tuple[Entry, StoredUpload]] = {}
        for name, (entry, _) in archives.items():
            made = yield from self._store_archive(name, entry)
            if made is not None:
                stored[name] = entry, made
        return stored

    def _store_archive(self, name: str, entry: Entry) -> Steps[StoredUpload | None]:
        """Store an archive; None for one that cannot be read any more, which keeps no other file from going on."""
        storage: LocalStorage = yield partial(LocalStorage.prepared, self._settings)
        upload_id, most = archive_upload_id(self._whole.batch_id, f"{name}/"), self._settings.max_archive_mb * 1_000_000
        try:
            made: StoredUpload = yield partial(storage.store_upload, upload_id, entry.path, most, str(entry.path), "MAX_ARCHIVE_MB")
        except ConfigurationError:
            raise
        except DocmillError as error:
            self._note(FileResult(entry.name, error=error))
            return None
        return made

    def _add_archives(self, archives: Mapping[str, tuple[Entry, StoredUpload]]) -> Steps[None]:
        whole = self._whole
        storage = LocalStorage.from_settings(self._settings)
        for name, (entry, first) in archives.items():
            stored: StoredUpload | None = first
            # Copying those behind it may have taken so long that it was removed again, as a file that no row needs.
            if not (yield partial(storage.touch, first.file_path)):
                stored = yield from self._store_archive(name, entry)
            if stored is None:
                self.made.archives.remove(name)
                continue
            params = {
                "batch_id": whole.batch_id, "run_id": self.made.run_id, "user_id": whole.user_id, "entry_path": f"{name}/",
                "source_prefix": f"{entry.source_path}/", "file_path": stored.file_path, "content_sha256": stored.sha256,
                "priority": whole.priority, "parent_id": None, "lock_timeout_ms": self._lock_timeout_ms,
                "keeps_cancelled": not self._looked.resume,
            }  # fmt: skip
            try:
                yield Ask("add_archive", params)
            except psycopg.Error as error:
                raise self._refused(error) from error

    def _seal(self, doc_ids: Sequence[str]) -> Steps[None]:
        params = {
            "batch_id": self.made.batch_id,
            "run_id": self.made.run_id,
            "user_id": self._whole.user_id,
            "doc_ids": list(doc_ids),
            "total_files": len(doc_ids),
            "lock_timeout_ms": self._lock_timeout_ms,
        }
        try:
            yield Ask("adopt_documents", params)
            # After the documents have been let go: sealing locks the batch.
            yield Ask("seal_batch", params)
        except psycopg.Error as error:
            raise self._refused(error) from error

    @property
    def _lock_timeout_ms(self) -> int:
        return int(self._settings.submit_lock_timeout_seconds * 1000)
