"""What a folder sync compares: what lies in the folder, and what is stored of it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

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
    successor: State | None = None
    """State of the document that takes its place, while that has the same content."""
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
    may_be_archive: bool = False
    """Whether a missing archive may have been moved here."""


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
    """Whether that run is done with it, archives inside of it included: what is not in the run is no longer in it, or in a failed one."""
    open: bool = False
    """Whether that run is still unpacking it, or an archive inside of it."""
    cancelled: bool = False
    """Whether that run was cancelled: documents of it that were taken up again since belong to no run."""
    unmade: int = 0
    """How many entries, as far as they were unpacked, are no document of that run: they cannot be stored, or have been deleted since."""
    failed: frozenset[str] = frozenset()
    """Paths of those that could not be unpacked, of this one and the archives inside of it: nobody knows what they hold."""
