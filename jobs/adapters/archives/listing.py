"""Listing an archive: which files it holds, and which of them will not be unpacked and why. Runs in a sandbox child."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from itertools import pairwise

from jobs.adapters.archives.members import ArchiveLimits, Listing, Member
from jobs.adapters.archives.names import LONGEST_PATH, decode_names, escapes, is_folder, is_system_file, shown_path, tell_apart
from jobs.adapters.storage.faults import stored_file_faults
from jobs.adapters.stored_file import StoredFile
from jobs.adapters.zip_content import METHODS
from jobs.adapters.zip_directory import Directory, DirectoryEntry, read_directory
from models.errors import PermanentError

_OTHER_METHODS = {1: "shrink", 6: "implode", 9: "deflate64", 93: "zstd", 95: "xz", 97: "WavPack", 98: "PPMd", 99: "AES encryption"}
_LOCAL_HEADER = 30  # bytes, without name and extra fields
_SHOWN = 80  # characters of a name in a message about the archive


def list_archive(archive: StoredFile, limits: ArchiveLimits) -> Listing:
    """Return what an archive holds.

    PermanentError, to be read after the archive's name, if it is bad or over a limit as a whole; RetryableError if the storage fails.
    """
    with stored_file_faults(archive):
        try:
            return _list(archive, limits)
        except PermanentError as error:
            raise PermanentError(f"{error}.") from None


def _list(archive: StoredFile, limits: ArchiveLimits) -> Listing:
    size = archive.size
    if size > limits.archive_bytes:
        raise PermanentError(f"it has {size:,} bytes, more than the {limits.archive_bytes:,} that MAX_ARCHIVE_MB allows")
    with archive.open() as file:
        # Folders and hidden files are no files of the batch, but they cost time and memory too.
        directory, entries = read_directory(file, 2 * limits.entries + 1000)
    kept = [
        (name, entry)
        for name, entry in zip(decode_names(entries), entries, strict=True)
        if escapes(name) or not (stands_for_folder(name, entry) or is_system_file(name))
    ]
    skipped = len(entries) - len(kept)
    if not kept:
        raise PermanentError(f"it holds no files ({skipped} folders, hidden and system files)" if skipped else "it is empty")
    if len(kept) > limits.entries:
        raise PermanentError(f"it holds {len(kept):,} files, more than the {limits.entries:,} that MAX_ARCHIVE_ENTRIES allows")
    paths = tell_apart(shown_path(name) for name, _ in kept)
    members = tuple(_member(path, name, entry, directory, limits) for path, (name, entry) in zip(paths, kept, strict=True))
    sound = [member for member in members if member.reason is None]
    refuse_overlaps([(member, member.path) for member in members if lies_inside(member, directory)])
    total = sum(member.size for member in sound)
    if total > limits.unpacked_bytes:
        raise PermanentError(
            f"unpacked it has {total:,} bytes, more than the {limits.unpacked_bytes:,} that MAX_ARCHIVE_UNPACKED_MB allows"
        )
    return Listing(members, skipped, total)


def stands_for_folder(name: str, entry: DirectoryEntry) -> bool:
    """Say whether an entry is a folder, by its name, its mode or, where it holds nothing, its DOS attribute."""
    return is_folder(name) or stat.S_ISDIR(entry.unix_mode) or (entry.dos_folder and entry.size == 0)


def _member(path: str, name: str, entry: DirectoryEntry, directory: Directory, limits: ArchiveLimits) -> Member:
    reason = why_not(name, entry, directory, limits)
    if len(path.encode()) > LONGEST_PATH:
        # Cut, but still its own: the end of a path tells most.
        path = f"{path[:80]}...{hashlib.sha256(path.encode()).hexdigest()[:32]}...{path[-80:]}"
        reason = f"its path is longer than {LONGEST_PATH:,} bytes"
    return Member(path, entry.offset, entry.compressed, entry.size, entry.crc, entry.method, reason)


def why_not(name: str, entry: DirectoryEntry, directory: Directory, limits: ArchiveLimits) -> str | None:
    """Say why an entry will not be unpacked, by what the directory says of it; None if it will."""
    kind = stat.S_IFMT(entry.unix_mode)
    most = largest(name, limits)
    reasons = (
        (escapes(name) is not None, f"{escapes(name)}; nothing is unpacked outside"),
        (kind == stat.S_IFLNK, "it is a symbolic link, which is never followed"),
        (kind not in (0, stat.S_IFREG, stat.S_IFLNK), "it is a pipe, device or other special file"),
        (bool(entry.flags & 0x41) or entry.method == 99, "it is encrypted; pack it again without a password"),
        (entry.method not in METHODS, _unsupported(entry.method)),
        (bool(entry.flags & 0x20), "it is a patch for another file, which is not supported"),
        (entry.fault is not None, str(entry.fault)),
        (
            not lies_inside(entry, directory),
            "the archive is damaged here: its data would lie outside of the archive",
        ),
        (entry.size > most, f"unpacked it has {entry.size:,} bytes, more than the {most:,} that {limit_name(name)} allows"),
        (
            entry.size > limits.ratio_from and entry.size > limits.ratio * max(1, entry.compressed),
            f"unpacked it is {entry.size / max(1, entry.compressed):,.0f} times as large, as in a zip bomb; "
            f"MAX_ARCHIVE_RATIO allows {limits.ratio}",
        ),
    )
    return next((words for holds, words in reasons if holds), None)


def lies_inside(entry: DirectoryEntry | Member, directory: Directory) -> bool:
    """Say whether an entry's data lies in the archive, before its directory."""
    return entry.offset >= 0 and entry.offset + _LOCAL_HEADER + entry.compressed <= directory.start


def _unsupported(method: int) -> str:
    called = f" ({_OTHER_METHODS[method]})" if method in _OTHER_METHODS else ""
    return f"it is compressed by method {method}{called}, which is not supported; pack it again with deflate"


def largest(name: str, limits: ArchiveLimits) -> int:
    """Return how many bytes an entry may have: one that is called an archive may be a large one."""
    return limits.archive_bytes if name.lower().endswith(".zip") else limits.file_bytes


def limit_name(name: str) -> str:
    """Return the setting behind `largest`."""
    return "MAX_ARCHIVE_MB" if name.lower().endswith(".zip") else "MAX_FILE_SIZE_MB"


def refuse_overlaps(entries: Sequence[tuple[DirectoryEntry | Member, str]]) -> None:
    """Refuse entries, each with its name for people, that share data: no program makes such, and it is how the densest bombs work."""
    for (one, name), (other, other_name) in pairwise(sorted(entries, key=lambda entry: entry[0].offset)):
        if one.offset + _LOCAL_HEADER + one.compressed > other.offset:
            raise PermanentError(f"entries lie upon one another ({name[:_SHOWN]!r} and {other_name[:_SHOWN]!r}), as in a zip bomb")
