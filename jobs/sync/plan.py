"""What has to be done to a folder's documents, from what is stored and what lies there. Pure: no file is opened and nothing is asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from uuid import UUID

from jobs.adapters.storage import storable_text
from jobs.sync.files import Archive, Found, Stored
from models.stages import State


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
    moved_out: list[str] = field(default_factory=list)
    """Missing files that the sync of a folder around this one has found elsewhere, and whose document there is not complete yet."""
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

    _first: dict[str | None, Found] = field(default_factory=dict)
    """The first file of a content."""
    _named: dict[tuple[str | None, str], Found] = field(default_factory=dict)
    """The first file of a content and a name."""
    _serving: set[str | None] = field(default_factory=set)
    """Contents that a document of one of their files answers for."""
    _serving_inside: set[tuple[str | None, str, str | None]] = field(default_factory=set)
    """An archive's content, the path inside and the content there of entries whose document answers for it."""
    _inside: set[tuple[str, str | None]] = field(default_factory=set)
    """Path and content of the entries of archives."""

    @classmethod
    def of(cls, found: Mapping[str, Found], stored: Sequence[Stored]) -> _Holders:
        """Go through the files whose content is known and that nobody is writing."""
        made = cls(_inside={(document.entry, document.content_sha256) for document in stored if document.entry is not None})
        known = {name: file.sha256 for name, file in found.items() if file.sha256 is not None and not file.busy}
        for name, sha256 in known.items():
            made._first.setdefault(sha256, found[name])
            made._named.setdefault((sha256, _own_name(name)), found[name])
        contents = {found[name].doc_id: sha256 for name, sha256 in known.items()}
        for document in stored:
            if document.state is not State.COMPLETE:  # a duplicate may be one of the very document that is missing
                continue
            if document.doc_id in contents and document.content_sha256 == contents[document.doc_id]:
                made._serving.add(document.content_sha256)
            if document.entry is not None and document.name in known:
                inside = document.entry.removeprefix(storable_text(document.name))
                made._serving_inside.add((known[document.name], inside, document.content_sha256))
        return made

    def moved_to(self, document: Stored, archive: Archive | None) -> tuple[Found, str] | None:
        """Return where an entry's `archive` lies now, and the entry's path there."""
        moved = self._first.get(archive.content_sha256) if archive is not None else None
        if moved is None or archive is None or document.entry is None:
            return None
        return moved, storable_text(moved.name) + document.entry.removeprefix(archive.shown)

    def is_unpacked_without(self, document: Stored, file: Found, place: str, there: Archive | None) -> bool:
        """Say whether the archive that lies `there` does not hold an entry at a place: it was changed before it was moved."""
        unpacked = there is not None and there.current and there.content_sha256 == file.sha256
        return unpacked and (place, document.content_sha256) not in self._inside

    def successor(self, document: Stored, archive: Archive | None, entry_id: Callable[[str], str]) -> tuple[str, str] | None:
        """Return name and doc_id of what takes a missing document's place; None if nothing does, or something has already.

        For an entry rather the same one in the place that its `archive` was moved to; else a file with its content, rather one of its name.
        """
        sha256 = document.content_sha256
        if sha256 in self._serving:
            return None
        moved = self.moved_to(document, archive)
        if moved is not None:
            there, place = moved
            inside = place.removeprefix(storable_text(there.name))
            return None if (there.sha256, inside, sha256) in self._serving_inside else (place, entry_id(place))
        file = self._named.get((sha256, _own_name(document.shown)), self._first.get(sha256))
        return None if file is None else (file.name, file.doc_id)


def places_above(path: str) -> Iterator[str]:
    """Yield the folders and archives that a path lies in, the outermost first."""
    at = path.find("/")
    while at >= 0:
        yield path[:at]
        at = path.find("/", at + 1)


def is_below(name: str, folders: Set[str]) -> bool:
    """Say whether a path lies inside one of the folders."""
    return any(place in folders for place in places_above(name))


def missing(stored: Iterable[Stored], found: Collection[str]) -> list[Stored]:
    """Return the documents whose file, or whose archive, the listing does not hold."""
    return [document for document in stored if document.name not in found]


def worth_reading(stored: Sequence[Stored], found: Mapping[str, Found], archives: Mapping[str, Archive]) -> list[str]:
    """Return the names of the files whose content decides something and is not known yet.

    A stored file of the same size, or an archive, may have changed; any other file may be a missing one that was moved, if it has that
    one's size. How large a missing archive was is not known.
    """
    sizes = {document.doc_id: document.file_size for document in stored if document.entry is None}
    gone = {document.file_size for document in missing(stored, found)}

    def decides(file: Found) -> bool:
        if file.busy or file.sha256 is not None:
            return False
        may_have_changed = file.name in archives or (file.doc_id in sizes and sizes[file.doc_id] in {file.size, None})
        return may_have_changed or file.size in gone or None in gone or file.may_be_archive

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
    holders = _Holders.of(found, stored)
    written = {file.size for file in found.values() if file.busy}
    failed = {(document.entry, document.run_id) for document in stored if document.entry is not None and document.state is State.FAILED}
    archive_is_written = any(file.busy and file.may_be_archive for file in found.values())
    for document in sorted(stored, key=lambda document: document.shown.split("/")):
        if document.name in found:
            archive = archives.get(document.name)
            if _has_lost(found[document.name], archive, files.get(document.name), document):
                _place_lost(plan, document, archive, failed)
        elif is_below(document.name, closed):
            plan.kept.append(Kept(document.shown, "the folder that it lay in cannot be read"))
        elif document.name in unsettled or document.file_size in written or (archive_is_written and document.entry is not None):
            plan.waiting.append(document.shown)
        else:
            is_known = document.replaced_by in by_id
            _place_gone(plan, document, holders, archives, failed=failed, entry_id=entry_id, is_known=is_known)
    return plan


def _place_gone(
    plan: Plan,
    document: Stored,
    holders: _Holders,
    archives: Mapping[str, Archive],
    *,
    failed: Set[tuple[str, UUID | None]],
    entry_id: Callable[[str], str],
    is_known: bool,
) -> None:
    """A document whose file, or whose archive, is not where it was. `is_known`: what takes its place is a document of the folder."""
    archive = archives.get(document.name)
    if (moved := holders.moved_to(document, archive)) is not None:
        file, place = moved
        there = archives.get(file.name)
        if holders.is_unpacked_without(document, file, place, there):
            if _is_in_doubt(plan, document, there, f"{place}/", failed):
                return
            if there is not None and there.unmade > 0:
                plan.kept.append(Kept(document.shown, f"nobody can say whether it is gone: {there.shown} has entries without a document"))
                return
            archive = None  # what it held is looked for by its content alone
    successor = holders.successor(document, archive, entry_id)
    if successor is None and not is_known and _is_served_until_replaced(document):
        _place_moved_out(plan, document)
    else:
        _place_missing(plan, document, successor)


def _is_served_until_replaced(document: Stored) -> bool:
    return document.served and document.successor not in {None, State.COMPLETE, State.DUPLICATE}


def _place_moved_out(plan: Plan, document: Stored) -> None:
    """A missing document that the sync of a folder around this one has found elsewhere: it answers searches until it is complete there."""
    if document.successor in {State.FAILED, State.CANCELLED}:
        plan.kept.append(Kept(document.shown, f"it was moved out of the folder, and the document in its new place is {document.successor}"))
    else:
        plan.moved_out.append(document.shown)


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


def _place_missing(plan: Plan, document: Stored, successor: tuple[str, str] | None) -> None:
    """A missing document has vanished or was moved. `successor`: name and doc_id of what takes its place."""
    if not document.served or successor is None:
        # Never served, or its content is found elsewhere already: nobody's search misses it.
        plan.vanished.append(document)
    else:
        plan.moved.append(Move(document, *successor))


def _place_lost(plan: Plan, document: Stored, archive: Archive | None, failed: Set[tuple[str, UUID | None]]) -> None:
    """A document that an archive does not hold any more, as far as anybody can say. `failed`: path and run of the entries that have failed.

    An archive inside that could not be unpacked may hold what was in it before, and one whose entry is damaged has become such an entry.
    """
    if not _is_in_doubt(plan, document, archive, document.shown, failed):
        plan.vanished.append(document)


def _is_in_doubt(plan: Plan, document: Stored, archive: Archive | None, path: str, failed: Set[tuple[str, UUID | None]]) -> bool:
    """Keep a document if its archive, or what its path there lies in, has failed; say whether that is so."""
    if archive is None:
        return False
    for place in (archive.shown, *places_above(path)):
        if place in archive.failed or (place, archive.run_id) in failed:
            plan.kept.append(Kept(document.shown, f"nobody can say whether it is gone: {place} has failed"))
            return True
    return False


def _own_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _has_lost(file: Found, archive: Archive | None, own: Stored | None, document: Stored) -> bool:
    """Say whether a file that is there no longer holds a document. `own`: the document that the file itself is, or was."""
    if archive is None or file.busy:
        return False
    if document.entry is not None and own is not None and not archive.in_run:
        # No archive lies there any more, and what does is complete.
        return own.content_sha256 == file.sha256 and own.state in {State.COMPLETE, State.DUPLICATE}
    if archive.content_sha256 != file.sha256 or (document.entry is None and document.batch_id != archive.batch_id):
        return False
    # The archive has lost it or, if it was a file of its own, has taken its place.
    return archive.current and document.run_id != archive.run_id and not (document.run_id is None and archive.cancelled)
