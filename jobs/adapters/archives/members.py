"""What is known of an archive's files: before they are unpacked, after, and where the limits are. Travels between parent and child."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.errors import ParseError

if TYPE_CHECKING:  # a child needs no settings
    from models.settings import Settings


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The limits that hold for one archive. Sizes in bytes."""

    entries: int
    archive_bytes: int
    unpacked_bytes: int
    file_bytes: int
    ratio: int
    ratio_from: int = 1_000_000
    """Up to this size a file may be as well compressed as it likes."""

    @classmethod
    def from_settings(cls, settings: Settings) -> ArchiveLimits:
        """Return the limits that MAX_ARCHIVE_* and MAX_FILE_SIZE_MB set."""
        return cls(
            entries=settings.max_archive_entries,
            archive_bytes=settings.max_archive_mb * 1_000_000,
            unpacked_bytes=settings.max_archive_unpacked_mb * 1_000_000,
            file_bytes=settings.max_file_size_mb * 1_000_000,
            ratio=settings.max_archive_ratio,
        )

    @classmethod
    def of_document(cls, settings: Settings) -> ArchiveLimits:
        """Return the limits for a document that is an archive inside: its parts are limited by their sum, and a part of some megabytes
        may be one sentence over and over."""
        most = settings.max_document_unpacked_mb * 1_000_000
        return cls(settings.max_archive_entries, most, most, most, settings.max_archive_ratio, ratio_from=32_000_000)


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive, as the archive's directory describes it."""

    path: str
    """Unique in the archive; for people, never a path on disk."""
    offset: int
    compressed: int
    size: int
    crc: int
    method: int
    reason: str | None = None
    """Why it will not be unpacked, in plain words."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What an archive holds."""

    members: tuple[Member, ...]
    skipped: int
    """Folders, hidden and system files."""
    unpacked_bytes: int
    """What the files that can be unpacked take, as the archive declares it."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What became of one member: a finished file in the workspace, or the reason why there is none."""

    path: str
    file: str | None = None
    """Name of the file in the workspace."""
    size: int | None = None
    sha256: str | None = None
    is_archive: bool = False
    reason: str | None = None


def refuse_strange(made: Sequence[Unpacked], asked: Sequence[Member]) -> None:
    """Raise a ParseError for files that were not asked for or lie elsewhere: a child that an archive has taken over could name any."""
    if [result.path for result in made] != [member.path for member in asked] or not all(
        result.file in (None, str(member.offset)) for result, member in zip(made, asked, strict=True)
    ):
        raise ParseError("the child returned other files than it was asked for")
