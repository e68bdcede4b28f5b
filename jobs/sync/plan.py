"""What has to be done to a folder's documents, from what is stored and what lies there. Pure: no file is opened and nothing is asked."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from models.stages import State


@dataclass(frozen=True, slots=True)
class Stored:
    """A document that came from the folder."""

    doc_id: str
    name: str
    """Where its file was: path inside the folder, `/` between the parts. For a document out of an archive, the archive's path."""
    content_sha256: str | None
    file_size: int | None
    version: int
    run_id: uuid.UUID | None
    batch_id: str | None
    state: State
    served: bool
    """Whether searches see a version of it."""
    created_at: float
    """When it was first submitted, in seconds since the epoch by the database's clock."""
    duplicate_of: str | None = None
    replaced_by: str | None = None
    entry: str | None = None
    """Path inside the folder with the path inside the archive behind it; None for a file."""

    @property
    def shown(self) -> str:
        """What people know it by."""
        return self.entry or self.name


@dataclass(frozen=True, slots=True)
class Found:
    """A file that lies in the folder."""

    name: str
    doc_id: str
    size: int
    """In bytes; -1 where nobody could ask."""
    sha256: str | None = None
    """Lowercase hex; None where it was not read."""
    busy: bool = False
    """Somebody is writing it."""


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive of the folder that has been unpacked before."""

    name: str
    run_id: uuid.UUID
    """The batch's present run."""
    content_sha256: str | None
    """What that run was given; None where the archive is not in it."""
    current: bool
    """Whether that run has unpacked it whole, archives inside of it included: what is not in the run is no longer in the archive."""


@dataclass(frozen=True, slots=True)
class Move:
    """A file that has been moved."""

    old: Stored
    name: str
    """Where it lies now."""
    doc_id: str
    """The document there."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A document that stays although its file seems to be gone, with the reason."""

    name: str
    reason: str


@dataclass(slots=True)
class Plan:
    """What is new, changed, moved, gone. All names are paths inside the folder, sorted by their parts."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    """Files that somebody is writing: left for the next time."""
    waiting: list[str] = field(default_factory=list)
    """Missing files that have been missing for too short a time, or may be one that somebody is writing: left for the next time."""
    moved: list[Move] = field(default_factory=list)
    vanished: list[Stored] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    """doc_ids of documents that were about to be replaced and whose file is there again."""
    kept: list[Kept] = field(default_factory=list)


def is_below(name: str, folders: Iterable[str]) -> bool:
    """Say whether a path lies inside one of the folders."""
    return any(name.startswith(f"{folder}/") for folder in folders)


def missing(stored: Iterable[Stored], found: Collection[str]) -> list[Stored]:
    """Return the stored files, not those out of archives, that the listing does not hold."""
    return [document for document in stored if document.entry is None and document.name not in found]


def worth_reading(stored: Sequence[Stored], found: Mapping[str, Found], archives: Mapping[str, Archive]) -> list[str]:
    """Return the names of the files whose content decides something and is not known yet.

    A stored file of the same size, or an archive, may have changed; any other file may be a missing one that was moved, if it has that
    one's size.
    """
    sizes = {document.doc_id: document.file_size for document in stored if document.entry is None}
    gone = {document.file_size for document in missing(stored, found)}
    return [
        file.name
        for file in found.values()
        if not file.busy
        and file.sha256 is None
        and (
            file.size in gone or None in gone or file.name in archives or (file.doc_id in sizes and sizes[file.doc_id] in {file.size, None})
        )
    ]


def make_plan(
    stored: Sequence[Stored],
    found: Mapping[str, Found],
    unreadable: Collection[str] = (),
    archives: Mapping[str, Archive] | None = None,
    unsettled: Collection[str] = (),
) -> Plan:
    """Return what has to be done.

    `found` by name, in the order of the listing; `unreadable`: folders inside that could not be listed; `unsettled`: names of files that
    have been missing for too short a time.
    """
    archives = archives or {}
    plan = Plan()
    known = {document.doc_id: document for document in stored if document.entry is None}
    holders: dict[str | None, list[Found]] = {}
    for file in found.values():
        document = known.get(file.doc_id)
        if file.busy:
            plan.busy.append(file.name)
        elif document is None and file.name not in archives:
            plan.new.append(file.name)
        elif file.sha256 is None or file.sha256 != _stored_content(document, archives.get(file.name)):
            plan.changed.append(file.name)
        else:
            plan.unchanged.append(file.name)
        if document is not None and document.replaced_by is not None:
            plan.restored.append(document.doc_id)
        if file.sha256 is not None and not file.busy:
            holders.setdefault(file.sha256, []).append(file)
    written = {file.size for file in found.values() if file.busy}
    for document in sorted(missing(stored, found), key=lambda document: document.name.split("/")):
        if document.name in unsettled or document.file_size in written:
            plan.waiting.append(document.name)
            continue
        successors = [(file, known.get(file.doc_id)) for file in holders.get(document.content_sha256, ())]
        _place(plan, document, successors, unreadable)
    for document in sorted((document for document in stored if document.entry is not None), key=lambda document: document.shown.split("/")):
        if document.name not in unsettled:
            _place_entry(plan, document, found, unreadable, archives)
    return plan


def _stored_content(document: Stored | None, archive: Archive | None) -> str | None:
    return archive.content_sha256 if archive is not None else document.content_sha256 if document is not None else None


def _place(plan: Plan, document: Stored, successors: Sequence[tuple[Found, Stored | None]], unreadable: Collection[str]) -> None:
    """A missing file has vanished or was moved. `successors`: the files that hold its content now, each with what is stored of it."""
    if is_below(document.name, unreadable):
        plan.kept.append(Kept(document.name, "the folder that it lay in cannot be read"))
    elif document.served and successors and not any(_serves(other, document) for _, other in successors):
        best = min(successors, key=lambda pair: pair[0].name.rsplit("/", 1)[-1] != document.name.rsplit("/", 1)[-1])[0]
        plan.moved.append(Move(document, best.name, best.doc_id))
    else:
        # Never served, or its content is found elsewhere already: nobody's search misses it.
        plan.vanished.append(document)


def _serves(other: Stored | None, document: Stored) -> bool:
    """Say whether another document answers for the same content by itself. A duplicate does not: it may be one of this very document."""
    return other is not None and other.content_sha256 == document.content_sha256 and other.state is State.COMPLETE


def _place_entry(
    plan: Plan, document: Stored, found: Mapping[str, Found], unreadable: Collection[str], archives: Mapping[str, Archive]
) -> None:
    """A document out of an archive goes with the archive, or when the archive's present content, once unpacked, no longer has it."""
    archive = archives.get(document.name)
    if is_below(document.name, unreadable):
        plan.kept.append(Kept(document.shown, "the folder that its archive lay in cannot be read"))
    elif document.name not in found or (archive is not None and _has_lost(archive, document) and not found[document.name].busy):
        plan.vanished.append(document)


def _has_lost(archive: Archive, document: Stored) -> bool:
    return archive.current and document.run_id != archive.run_id
