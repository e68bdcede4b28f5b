"""Folder sync: new, changed, moved and vanished files of a folder against what is stored for it.

`plan` decides, `looking` looks at files, `memory` asks the database, `folder` carries out, `watch` does so whenever something changes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jobs.front import close_async
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions, SyncResult
from models.settings import load_settings

__all__ = ["SyncOptions", "SyncResult", "sync_folder", "sync_folder_async"]


async def sync_folder_async(
    folder: str | os.PathLike[str],
    *,
    user_id: str = "default",
    priority: int = 0,
    metadata: Mapping[str, Any] | None = None,
    checksum: bool = False,
    allow_empty: bool = False,
    dry_run: bool = False,
) -> SyncResult:
    """Bring what is stored of a folder in line with what lies there, and return what was done.

    New and changed files are submitted as `submit_folder` does, one batch. A moved file's old document answers searches until the new one
    is complete, and nothing is parsed or embedded again. A vanished file's document is deleted. A cancelled document stays cancelled until
    its content changes. `checksum`: read every file, also those that look unchanged. `dry_run`: only say what would be done; nothing at all
    is written. Workers do the rest: this does not wait for documents.

    Errors: SubmitError (a bad argument, or the folder is not there, cannot be listed, or is empty although documents are stored for it and
    not `allow_empty`), SubmitConflict (another sync of the folder is at work, or another transaction holds its batch), RetryableError (the
    folder went away meanwhile). In all these cases nothing is deleted.
    """
    options = SyncOptions(user_id, priority, metadata, checksum, allow_empty, dry_run)
    return await FolderSync(load_settings(), folder, options).run()


def sync_folder(
    folder: str | os.PathLike[str],
    *,
    user_id: str = "default",
    priority: int = 0,
    metadata: Mapping[str, Any] | None = None,
    checksum: bool = False,
    allow_empty: bool = False,
    dry_run: bool = False,
) -> SyncResult:
    """Do as `sync_folder_async` does, for callers without an event loop, or inside of one that may be blocked."""

    async def whole() -> SyncResult:
        try:
            return await sync_folder_async(
                folder,
                user_id=user_id,
                priority=priority,
                metadata=metadata,
                checksum=checksum,
                allow_empty=allow_empty,
                dry_run=dry_run,
            )
        finally:
            await close_async()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, whole()).result()
