"""Looking at a folder: what lies there, what it looks like, what is in it, and whether something is really gone. Writes nothing."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.adapters.folders import Listing, list_folder
from jobs.adapters.storage.faults import source_faults
from jobs.adapters.storage.sources import read_blocks
from models.errors import DocmillError, RetryableError, SubmitError

RACY_NS = 2_000_000_000
"""A file changed so shortly before it was read may change again without looking different: clocks of file systems tick in up to 2 s."""
CLOCK_SLACK_SECONDS = 600
"""How far the clocks of the database and of the file system may be apart."""
CHUNK_FILES, CHUNK_BYTES = 200, 64_000_000
"""Of one turn of reading, after which a sync that is being stopped stops."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a file looks like from outside."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def __str__(self) -> str:
        return f"{self.size} {self.mtime_ns} {self.ctime_ns} {self.inode}"

    @property
    def changed_ns(self) -> int:
        """When it was last written or otherwise changed, in nanoseconds since the epoch by the file system's clock."""
        return max(self.mtime_ns, self.ctime_ns)


@dataclass(slots=True)
class FolderLook:
    """A folder at one time."""

    identity: tuple[int, int]
    """Device and inode of the folder itself."""
    listing: Listing
    looks: dict[str, Look] = field(default_factory=dict)
    """By name; nothing for a file that could not be looked at."""
    at_ns: int = 0
    """When the looking began, in nanoseconds since the epoch by this host's clock."""


def folder_identity(root: Path) -> tuple[int, int]:
    """Return device and inode of a folder; SubmitError: it is not there, or no folder."""
    with source_faults(str(root)):
        found = root.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise SubmitError(f"{str(root)!r} is a file; a sync needs a folder.")
    return found.st_dev, found.st_ino


def is_same_folder(root: Path, identity: tuple[int, int]) -> bool:
    """Say whether a folder is still the one that it was."""
    try:
        return folder_identity(root) == identity
    except DocmillError:
        return False


def look_at(path: Path) -> Look | None:
    """Return what a file looks like, links followed; None if nobody can say."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Look(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def look_at_folder(root: Path, leave_out: Iterable[Path]) -> FolderLook:
    """List a folder and look at every file in it. RetryableError: it went away meanwhile."""
    seen = FolderLook(folder_identity(root), Listing(), at_ns=time.time_ns())
    seen.listing = list_folder(root, leave_out=leave_out)
    for name in seen.listing.files:
        if (look := look_at(root / name)) is not None:
            seen.looks[name] = look
    if not is_same_folder(root, seen.identity):
        raise RetryableError(f"Folder {str(root)!r} went away or was replaced while it was being listed: nothing was done.")
    return seen


def digest_files(root: Path, looks: Mapping[str, Look], max_bytes: int) -> dict[str, str | None]:
    """Read files and return their SHA-256 as lowercase hex by name.

    None: the file is being written or cannot be read well just now. A file that will be refused when it is submitted (too large, not
    regular, not readable) is left out.
    """
    made: dict[str, str | None] = {}
    for name, look in looks.items():
        path = root / name
        digest = hashlib.sha256()
        try:
            for block in read_blocks(path, str(path), max_bytes):
                digest.update(block)
        except RetryableError:
            made[name] = None
        except SubmitError:
            continue
        else:
            made[name] = digest.hexdigest() if look_at(path) == look else None
    return made


def may_be_archives(root: Path, names: Iterable[str]) -> list[str]:
    """Return the files that are called a zip or begin as one, which is all that tells of one that is still being written."""
    return [name for name in names if name.lower().endswith(".zip") or _begins_as_zip(root / name)]


def _begins_as_zip(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False  # opening a pipe could make us wait for ever
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False


def chunks(names: Sequence[str], looks: Mapping[str, Look]) -> Iterator[dict[str, Look]]:
    """Yield the names that were looked at in turns of a bounded number of files and bytes."""
    turn: dict[str, Look] = {}
    size = 0
    for name in names:
        if name in looks:
            turn[name] = looks[name]
            size += looks[name].size
        if len(turn) >= CHUNK_FILES or size >= CHUNK_BYTES:
            yield turn
            turn, size = {}, 0
    if turn:
        yield turn


def is_steady(look: Look, read_from_ns: int) -> bool:
    """Say whether a file had last changed so long before it was read that any later change must show."""
    return read_from_ns - look.changed_ns > RACY_NS


def why_not_gone(
    root: Path, identity: tuple[int, int], name: str, since: float, *, trusted: bool = False, own: Iterable[Path] = ()
) -> str | None:
    """Return why a file may not be taken for deleted; None: it is gone.

    `since`: when it was there, in seconds since the epoch by the database's clock. Deleting a file changes the folder that it is deleted
    from. One that has not changed since then cannot have lost it: it is another one, such as the mount point of a share that is not
    mounted. `trusted`: without that rule. What lies in one of the folders `own`, docmill's inside of this one, is no file of the folder.
    """
    if not is_same_folder(root, identity):
        return "the folder went away or was replaced while it was being synced"
    path = root / name
    if _lies_in(path.parent, root, own):
        return None
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        above = path.parent
    except OSError as error:
        return f"nobody can say whether it is gone: {error.strerror}"
    else:
        other = _other_spelling(root, name)
        if other is None and not stat.S_ISDIR(found.st_mode):
            return "it is there, but hidden, in a folder of docmill's, a link that leads elsewhere, or new since the folder was listed"
        above = other or path.parent  # a folder lies where the file was
    return _why_not_lost(root, above, since, trusted=trusted)


def _other_spelling(root: Path, name: str) -> Path | None:
    """Return the folder in which a path that is found is listed by another name; None: it is listed as it is, or nobody can say.

    File systems that take `a` and `A` for the same, as those of many shares do, find a file by the name that it had before, too.
    """
    place = root
    for part in name.split("/"):
        try:
            if part not in os.listdir(place):  # noqa: PTH208 - the names alone
                return place
        except OSError:
            return None
        place /= part
    return None


def _lies_in(folder: Path, root: Path, own: Iterable[Path]) -> bool:
    """Say whether a folder is, or lies in, one of some that lie inside of the root."""
    place, top = Path(os.path.realpath(folder)), Path(os.path.realpath(root))
    real = (Path(os.path.realpath(path)) for path in own)
    return any(path != top and path.is_relative_to(top) and place.is_relative_to(path) for path in real)


def _why_not_lost(root: Path, above: Path, since: float, *, trusted: bool) -> str | None:
    """Go up to the nearest folder that is there and say why it cannot be the one that something was deleted from."""
    while True:
        try:
            found = above.stat() if above == root else above.lstat()
        except (FileNotFoundError, NotADirectoryError):
            if above == root:
                return "the folder itself has gone away"
        except OSError as error:
            return f"nobody can say whether it is gone: {above} {error.strerror}"
        else:
            if stat.S_ISLNK(found.st_mode):
                return f"{above} has become a link"
            if stat.S_ISDIR(found.st_mode):
                break
        above = above.parent
    if not os.access(above, os.R_OK | os.X_OK):
        return f"{above} may not be read"
    changed = max(found.st_ctime, found.st_mtime)
    if not trusted and 0 < changed < since - CLOCK_SLACK_SECONDS:
        return f"{above} has not changed since before the file came in, so it cannot have been deleted there; is something not mounted?"
    return None
