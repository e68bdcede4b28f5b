"""Removing a stored file that nobody needs, beside those who may be storing it again."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import PurePosixPath
from uuid import uuid4

from jobs.adapters.storage.durable import regular
from jobs.adapters.storage.faults import storage_fault, storage_faults
from jobs.adapters.storage.local import LocalStorage
from jobs.adapters.storage.names import folder_name
from models.errors import StorageAway

_DIGEST = re.compile("[0-9a-f]{64}")


def is_upload(storage: LocalStorage, relative: str, stored_for: str | None = None) -> bool:
    """Say whether a file is one that `store_upload` has stored, for this doc_id if one is given: whatever else lies in the storage is
    somebody's own. PermanentError if the name leaves the base."""
    name = PurePosixPath(relative)
    folder = name.parent.name
    if name.parent.parent != PurePosixPath(storage.uploads_dir) or not _DIGEST.fullmatch(name.name) or not _DIGEST.fullmatch(folder):
        return False
    if stored_for is not None and folder != folder_name(stored_for):
        return False
    return storage.resolve(relative) == storage.resolve(storage.uploads_dir) / folder / name.name  # no link to a file of somebody's


def discard(storage: LocalStorage, relative: str, *, untouched_for: float) -> bool:
    """Remove a stored file unless somebody has stored it again within the last seconds; tell whether it is gone.

    `store_upload` touches a file that it keeps. It may do so between a look and the removal, hence the second look, at a file that it can
    no longer find: then it puts its own copy there.
    """
    path = storage.resolve(relative)
    with storage_faults(storage.base, relative):
        try:
            if time.time() - regular(path.stat()).st_mtime < untouched_for:
                return False
            aside = storage.ensure_directory(storage.temp_dir) / f"{uuid4().hex}.part"
            path.rename(aside)
        except FileNotFoundError as error:
            fault = storage_fault(error, storage.base, relative)
            if isinstance(fault, StorageAway):
                raise fault from error
            return True
        if time.time() - aside.stat().st_mtime < untouched_for:
            aside.replace(path)
            return False
        aside.unlink()
        if path.parent.parent.name == PurePosixPath(storage.uploads_dir).name:
            with suppress(OSError):  # others are in it
                path.parent.rmdir()
    return True
