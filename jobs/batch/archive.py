"""An archive in hand, and the entries that come out of it on their way into the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from uuid import UUID

from jobs.adapters.archives import Member
from jobs.adapters.storage import LocalStorage, StoredUpload, restored_text, safe_display_name
from jobs.adapters.storage.names import folder_name
from jobs.arguments import derive_doc_id

GROUP_ENTRIES = 100
"""Entries that are unpacked, stored and accepted together, in one transaction."""
GROUP_BYTES = 64_000_000
"""Unpacked size from which on a group is closed: so much lies in the workspace at a time, or one larger entry."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive as its row describes it."""

    id: int
    batch_id: str
    run_id: UUID
    user_id: str
    entry_path: str
    """Path inside the batch with a slash at its end; empty for the zip that is the batch."""
    source_prefix: str
    file_path: str
    content_sha256: str | None
    depth: int
    priority: int
    keeps_cancelled: bool
    """Whether entries that are cancelled stay so while their content is the same."""
    retry_count: int
    waited_seconds: float
    """For how long it has waited for the storage, which counts as no attempt."""
    source_path: str | None
    correlation_id: str

    @property
    def name(self) -> str:
        """What people call it."""
        return self.entry_path.rstrip("/") or PurePath(self.source_path or self.file_path).name

    @property
    def may_be_replaced(self) -> bool:
        """Whether its file lies where its submitter put it: a copy of ours is called by its content and stays what it is."""
        return PurePath(self.file_path).name != self.content_sha256

    def doc_id(self, path: str) -> str:
        """Return the id of the document that an entry becomes: UUIDv5 of user, batch and path in the batch."""
        return derive_doc_id(self.user_id, f"{self.batch_id}\n{self.entry_path}{path}")


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One entry as the database is told of it."""

    doc_id: str
    file_name: str
    file_path: str
    source_path: str
    file_size: int | None = None
    content_sha256: str | None = None
    reason: str | None = None
    unchanged: bool = False
    """The document has this content already; it is only taken into the run."""


def stored_entry(archive: Archive, path: str, stored: StoredUpload, *, unchanged: bool) -> EntryRow:
    """Return the row of an entry whose file lies in the storage."""
    return EntryRow(
        archive.doc_id(path),
        _file_name(path),
        stored.file_path,
        f"{archive.source_prefix}{path}",
        stored.size,
        stored.sha256,
        unchanged=unchanged,
    )


def refused_entry(archive: Archive, storage: LocalStorage, path: str, reason: str) -> EntryRow:
    """Return the row of an entry that could not be unpacked. Its file path names where a file of it would be; there is none."""
    doc_id = archive.doc_id(path)
    nowhere = f"{storage.uploads_dir}/{folder_name(doc_id)}/refused"
    return EntryRow(doc_id, _file_name(path), nowhere, f"{archive.source_prefix}{path}", reason=f"{archive.name}, entry {path}: {reason}.")


def _file_name(path: str) -> str:
    """Return what people call an entry: every backslash in its path begins an escape, and none parts folders."""
    return safe_display_name(restored_text(path))


def in_groups(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Yield the members in groups of limited number and size, in the order in which they lie in the archive: a disk reads on best."""
    group: list[Member] = []
    size = 0
    for member in sorted(members, key=lambda member: member.offset):
        takes = 0 if member.reason else member.size
        if group and (len(group) == GROUP_ENTRIES or size + takes > GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(member)
        size += takes
    if group:
        yield group
