"""What has to be done to a folder's documents, from what is stored and what lies there. Pure: no file is opened and nothing is asked."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from jobs.adapters.storage import storable_text
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
    elsewhere: bool = False
    """Whether it belongs to the batch of a folder around this one, or inside it."""
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

    batch_id: str
    """The folder's."""
    name: str
    shown: str
    """Its name as the paths of its entries begin."""
    run_id: uuid.UUID
    """The batch's present run."""
    content_sha256: str | None
    """What it held when it was last submitted."""
    in_run: bool
    """Whether the present run has it."""
    current: bool
    """Whether that run has unpacked it whole, archives inside of it included: what is not in the run is no longer in the archive."""
    open: bool = False
    """Whether that run is still unpacking it, or an archive inside of it."""


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
    unpacking: list[str] = field(default_factory=list)
    """Archives that are being unpacked, or will be: what they no longer hold is deleted by a sync after that."""


@dataclass(slots=True)
class _Holders:
    """Which files hold a content. Thousands may hold the same one, so that none goes through all of them for each that is missing."""

    files: dict[str, list[Found]] = field(default_factory=dict)
    serving: set[str] = field(default_factory=set)
    """Contents that a document of one of their files answers for."""
    _named: dict[tuple[str, str], Found] = field(default_factory=dict)
    """The first file of a content and a name."""

    def add(self, file: Found, sha256: str, *, serves: bool) -> None:
        self.files.setdefault(sha256, []).append(file)
        self._named.setdefault((sha256, _own_name(file.name)), file)
        if serves:
            self.serving.add(sha256)

    def best(self, document: Stored) -> list[tuple[str, str]]:
        """Return name and doc_id of the first file with a document's content, rather one that has its name too; nothing without any."""
        sha256 = document.content_sha256
        if sha256 not in self.files:
            return []
        file = self._named.get((sha256, _own_name(document.shown)), self.files[sha256][0])
        return [(file.name, file.doc_id)]


def places_above(path: str) -> Iterator[str]:
    """Yield the folders and archives that a path lies in, the outermost first."""
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def is_below(name: str, folders: Set[str]) -> bool:
    """Say whether a path lies inside one of the folders."""
    return any(place in folders for place in places_above(name))


def is_named_zip(file: Found) -> bool:
    """Say whether a file's name promises an archive."""
    return file.name.lower().endswith(".zip")


def missing(stored: Iterable[Stored], found: Collection[str]) -> list[Stored]:
    """Return the documents whose file, or whose archive, the listing does not hold."""
    return [document for document in stored if document.name not in found]


def worth_reading(stored: Sequence[Stored], found: Mapping[str, Found], archives: Mapping[str, Archive]) -> list[str]:
    """Return the names of the files whose content decides something and is not known yet.

    A stored file of the same size, or an archive, may have changed; any other file may be a missing one that was moved, if it has that
    one's size.
    """
    sizes = {document.doc_id: document.file_size for document in stored if document.entry is None}
    gone = {document.file_size for document in missing(stored, found)}
    zips_matter = any(name not in found for name in archives)

    def decides(file: Found) -> bool:
        if file.busy or file.sha256 is not None:
            return False
        may_have_changed = file.name in archives or (file.doc_id in sizes and sizes[file.doc_id] in {file.size, None})
        return may_have_changed or file.size in gone or None in gone or (zips_matter and is_named_zip(file))

    return [file.name for file in found.values() if decides(file)]


def make_plan(
    stored: Sequence[Stored],
    found: Mapping[str, Found],
    unreadable: Collection[str] = (),
    archives: Mapping[str, Archive] | None = None,
    *,
    unsettled: Collection[str] = (),
    entry_id: Callable[[str], str] = str,
) -> Plan:
    """Return what has to be done.

    `found` by name, in the order of the listing; `unreadable`: folders inside that could not be listed; `unsettled`: names of files that
    have been missing for too short a time; `entry_id`: doc_id of what lies at a path in an archive.
    """
    archives = archives or {}
    closed = frozenset(unreadable)
    plan = Plan()
    by_id = {document.doc_id: document for document in stored}
    files = {document.name: document for document in stored if document.entry is None}
    for file in found.values():
        _place_file(plan, file, by_id.get(file.doc_id), archives.get(file.name))
    plan.unpacking = [name for name, archive in archives.items() if name in found and (archive.open or name in plan.changed)]
    plan.restored = [document.doc_id for document in stored if document.name in found and document.replaced_by is not None]
    holders = _Holders()
    for file in found.values():
        if file.sha256 is not None and not file.busy:
            holders.add(file, file.sha256, serves=_serves(by_id.get(file.doc_id), file.sha256))
    written = {file.size for file in found.values() if file.busy}
    zip_is_written = any(file.busy and is_named_zip(file) for file in found.values())
    for document in sorted(stored, key=lambda document: document.shown.split("/")):
        if document.name in found:
            if _has_lost(found[document.name], archives.get(document.name), files.get(document.name), document):
                plan.vanished.append(document)
        elif is_below(document.name, closed):
            plan.kept.append(Kept(document.shown, "the folder that it lay in cannot be read"))
        elif document.name in unsettled or document.file_size in written or (zip_is_written and document.entry is not None):
            plan.waiting.append(document.shown)
        else:
            successors = _in_moved_archive(document, archives, holders, entry_id)
            served = any(_serves(by_id.get(doc_id), document.content_sha256) for _, doc_id in successors)
            served = served or document.content_sha256 in holders.serving
            successors += holders.best(document)
            _place_missing(plan, document, [] if served else successors)
    return plan


def _place_file(plan: Plan, file: Found, document: Stored | None, archive: Archive | None) -> None:
    if file.busy:
        plan.busy.append(file.name)
    elif document is None and archive is None:
        plan.new.append(file.name)
    elif file.sha256 is None or file.sha256 != _stored_content(document, archive):
        plan.changed.append(file.name)
    else:
        plan.unchanged.append(file.name)


def _stored_content(document: Stored | None, archive: Archive | None) -> str | None:
    if archive is not None and archive.in_run:
        return archive.content_sha256
    return document.content_sha256 if document is not None else None


def _in_moved_archive(
    document: Stored, archives: Mapping[str, Archive], holders: _Holders, entry_id: Callable[[str], str]
) -> list[tuple[str, str]]:
    """Return name and doc_id of the document in each place that the archive of an entry was moved to."""
    archive = archives.get(document.name)
    if document.entry is None or archive is None or archive.content_sha256 is None:
        return []
    inside = document.entry.removeprefix(archive.shown)
    places = [storable_text(file.name) + inside for file in holders.files.get(archive.content_sha256, ())]
    return [(place, entry_id(place)) for place in places]


def _place_missing(plan: Plan, document: Stored, successors: Sequence[tuple[str, str]]) -> None:
    """A missing document has vanished or was moved. `successors`: name and doc_id of those that take its place; none if one has already."""
    if not document.served or not successors:
        # Never served, or its content is found elsewhere already: nobody's search misses it.
        plan.vanished.append(document)
        return
    name = _own_name(document.shown)
    place, doc_id = min(successors, key=lambda pair: _own_name(pair[0]) != name)
    plan.moved.append(Move(document, place, doc_id))


def _own_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _serves(other: Stored | None, sha256: str | None) -> bool:
    """Say whether another document answers for a content by itself. A duplicate does not: it may be one of the very one that is missing."""
    return other is not None and other.content_sha256 == sha256 and other.state is State.COMPLETE


def _has_lost(file: Found, archive: Archive | None, own: Stored | None, document: Stored) -> bool:
    """Say whether a file that is there no longer holds a document. `own`: the document that the file itself is, or was."""
    if archive is None or file.busy:
        return False
    if document.entry is not None and own is not None and not archive.in_run:
        # No archive lies there any more, and what does is complete.
        return own.content_sha256 == file.sha256 and own.state in {State.COMPLETE, State.DUPLICATE}
    if document.entry is None and (document.batch_id != archive.batch_id or archive.content_sha256 != file.sha256):
        return False
    # The archive has lost it or, if it was a file of its own, has taken its place.
    return archive.current and document.run_id not in {archive.run_id, None}
