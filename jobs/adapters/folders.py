"""Listing a folder for ingestion: nested files in a stable order, without what the system put there and without leaving the folder.

And what of the storage is docmill's own, which neither a folder nor a path in SQL brings in.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jobs.adapters.storage.copies import FOLDERS
from jobs.adapters.storage.faults import source_faults
from jobs.adapters.storage.names import folder_name
from models.errors import DocmillError, PermanentError
from models.settings import Settings

SYSTEM_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"})
"""Lower case. Names that begin with a dot, and the owner files `~$...` of open Office documents, are skipped as well."""
_DIGEST = re.compile("[0-9a-f]{64}", re.IGNORECASE)


@dataclass(slots=True)
class Listing:
    """What lies in a folder."""

    files: list[str] = field(default_factory=list)
    """Relative to the folder, `/` between the parts, sorted by their parts. Whatever is no folder, pipes and sockets included."""
    skipped: int = 0
    """Hidden and system files and folders (each counted once), and links that lead out of the folder or to folders."""
    unreadable: list[tuple[str, DocmillError]] = field(default_factory=list)
    """Folders inside that could not be listed, with the reason."""


def is_hidden(name: str) -> bool:
    """Say whether a file or folder of this name belongs to a system or a program rather than to a person."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def own_folders(settings: Settings) -> list[Path]:
    """Return the folders inside of the storage that are docmill's. Others there are people's own, also where they have a usual name."""
    base = settings.storage_base_path
    own = [base / settings.storage_uploads_dir, base / settings.storage_temp_dir]
    own += _folders_of_copies(base / settings.storage_extracted_dir, keep=settings.storage_keep_extracted)
    if settings.log_file_path is not None and not settings.log_file_path.is_absolute():
        own.append(base / settings.storage_logs_dir)
    if os.path.isfile(server := base / "postgres" / "PG_VERSION"):  # noqa: PTH113 - says no, where pathlib raises, if nobody can say
        own.append(server.parent)
    return own


def _folders_of_copies(extracted: Path, *, keep: bool) -> list[Path]:
    """Return what is docmill's of the folder of extracted texts: all of it, unless people have put something there themselves."""
    try:
        names = os.listdir(extracted)  # noqa: PTH208 - names alone
    except OSError:
        names = []
    made = [name for name in names if name in FOLDERS]
    return [extracted] if keep and len(made) == len(names) else [extracted / name for name in made]


def storage_folders(settings: Settings) -> list[Path]:
    """Return the folders not to ingest from: the storage and, for a folder that is the storage or lies in it, what is docmill's there."""
    return [settings.storage_base_path, *own_folders(settings)]


def is_own_upload(settings: Settings, name: str, stored_for: str) -> bool:
    """Say by a stored name alone, without asking the file system, whether it is in the folder of its own uploads."""
    folder, _, file = name.rpartition("/")
    return bool(file.strip(".")) and folder == f"{settings.storage_uploads_dir}/{folder_name(stored_for)}"


def refuse_foreign_file(settings: Settings, path: Path, name: str, stored_for: str) -> None:
    """Raise a PermanentError where a submission from SQL names a file that docmill keeps for itself, or has stored for somebody else.

    `path`: the file, symbolic links followed. `name`: what its submitter calls it. `stored_for`: the name that its own upload would be
    stored under. Other files in the folder of uploads are people's own.
    """
    digest = folder_name(stored_for)
    base = Path(os.path.realpath(settings.storage_base_path))
    uploads, *others = [Path(os.path.realpath(folder)) for folder in own_folders(settings)]
    if path.parent == uploads / digest:
        return
    for folder in others:
        if _lies_in(path, folder, base) is not None:
            raise PermanentError(
                f"File {name!r} lies in {folder.name!r}, which docmill keeps for itself (temporary files, logs, texts or its database). "
                "Submit files from other folders of the storage."
            )
    inside = _lies_in(path, uploads, base)
    if inside is not None and _DIGEST.fullmatch(inside):
        raise PermanentError(
            f"File {name!r} is an upload that docmill has stored for another document or archive. Submit the file that it was made of."
        )


def _lies_in(path: Path, folder: Path, base: Path) -> str | None:
    """Return the name of what lies in a folder below the base and is, or holds, a file; None if it lies elsewhere."""
    below = path
    while (parent := below.parent) not in (base, below):
        if parent == folder or _is_same(parent, folder):
            return below.name
        below = parent
    return None


def _is_same(one: Path, other: Path) -> bool:
    """Say whether two names are of one folder, as where the file system does not tell upper case from lower."""
    try:
        return os.path.samefile(one, other)  # noqa: PTH121 - as in own_folders
    except OSError:
        return False


def list_folder(folder: Path, *, leave_out: Iterable[Path] = ()) -> Listing:
    """List a folder with all folders inside. `leave_out` are some not to enter: the storage must not be ingested into itself.

    A link to a file inside the folder is listed; one to anything outside, or to a folder (it could lead in circles), is skipped.
    SubmitError: the folder itself is missing, is no folder or may not be read. RetryableError: a failing disk.
    """
    listing = Listing()
    root = Path(os.path.realpath(folder))
    shunned = {os.path.realpath(path) for path in leave_out}
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            with source_faults(str(folder / inside)), os.scandir(folder / inside) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except DocmillError as error:
            if not inside:
                raise
            listing.unreadable.append((inside, error))
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if is_hidden(entry.name) or not _belongs(entry, root) or (shunned and os.path.realpath(entry.path) in shunned):
                listing.skipped += 1
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            else:
                listing.files.append(name)
    listing.files.sort(key=lambda name: name.split("/"))
    listing.unreadable.sort(key=lambda pair: pair[0].split("/"))
    return listing


def _belongs(entry: os.DirEntry[str], root: Path) -> bool:
    """Say whether an entry is no link, or a link to a file inside the folder. A link that leads nowhere inside is listed, and reported."""
    if not entry.is_symlink():
        return True
    target = os.path.realpath(entry.path)
    if not Path(target).is_relative_to(root):
        return False
    try:
        return not stat.S_ISDIR(os.stat(target).st_mode)  # noqa: PTH116 - the path is a string that os gave
    except OSError:
        return True
