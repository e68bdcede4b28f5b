"""The gate before any parser of a document that is an archive inside (Office, OpenDocument, EPUB): the rules of archives, for its parts.

Runs in a sandbox child. Whether a part is damaged is left to the parsers, some of which do without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from jobs.adapters.archives.listing import lies_inside, refuse_overlaps, stands_for_folder, why_not
from jobs.adapters.archives.members import ArchiveLimits
from jobs.adapters.archives.names import decode_names, shown_path, split_path
from jobs.adapters.storage.faults import stored_file_faults
from jobs.adapters.stored_file import StoredFile
from jobs.adapters.zip_content import Damaged, entry_blocks
from jobs.adapters.zip_directory import Directory, DirectoryEntry, read_directory
from models.errors import PermanentError

_DECLARATION = b"<!ENTITY"
_CARRIED = 4 * len(_DECLARATION)
"""Bytes at the end of a block in which a declaration may begin that goes on in the next, in the widest encoding."""
_LONGEST_NAME = 200


class _Part(NamedTuple):
    entry: DirectoryEntry
    name: str

    @property
    def shown(self) -> str:
        return repr(shown_path(self.name)[:_LONGEST_NAME])


def check_package(package: StoredFile, name: str, limits: ArchiveLimits) -> None:
    """Read every part of the package, called `name` in errors, and keep nothing.

    PermanentError: a part's name leads out of the package or stands twice, parts share data, there are too many, they unpack to more than
    they declare, too much or too densely, or one declares XML entities. RetryableError: the storage fails.
    """
    with stored_file_faults(package), package.open() as file:
        try:
            directory, entries = read_directory(file, limits.entries)
            named = (_Part(entry, part) for part, entry in zip(decode_names(entries), entries, strict=True))
            parts = [part for part in named if not stands_for_folder(part.name, part.entry)]
            _refuse_by_directory(directory, parts, limits)
            for part in parts:
                _refuse_by_content(file, part)
        except PermanentError as error:
            raise PermanentError(f"{name}: {error}.") from None


def _refuse_by_directory(directory: Directory, parts: Sequence[_Part], limits: ArchiveLimits) -> None:
    total = sum(part.entry.size for part in parts)
    if total > limits.unpacked_bytes:
        raise PermanentError(
            f"unpacked it has {total:,} bytes, more than the {limits.unpacked_bytes:,} that MAX_DOCUMENT_UNPACKED_MB allows"
        )
    seen: set[str] = set()
    for part in parts:
        if reason := why_not(part.name, part.entry, directory, limits):
            raise PermanentError(f"its part {part.shown}: {reason}")
        # Programs disagree on whether case counts, and on which of two parts of one name is the real one.
        key = "/".join(split_path(part.name)).lower()
        if key in seen:
            raise PermanentError(f"its part {part.shown} is there twice, so that programs would not agree on what it says")
        seen.add(key)
    refuse_overlaps([(part.entry, part.name) for part in parts if lies_inside(part.entry, directory)])


def _refuse_by_content(file: BinaryIO, part: _Part) -> None:
    """Unpack a part, which shows its real size, and refuse declarations of XML entities: whatever harm XML can do (expansion, files,
    addresses) begins with one. Pictures in SVG may have them, because drawing programs write some and no parser reads them."""
    rest = b""
    picture = part.name.lower().endswith(".svg")
    try:
        for block in entry_blocks(file, part.entry):
            seen = rest + block
            rest = seen[-_CARRIED:]
            if not picture and _DECLARATION in seen.replace(b"\0", b""):  # without zeros: UTF-16 and UTF-32 too
                raise PermanentError("it declares XML entities, which no Office program does")
    except Damaged:
        return
    except PermanentError as error:
        raise PermanentError(f"its part {part.shown}: {error}") from None
