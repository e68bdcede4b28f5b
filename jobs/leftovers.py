"""Removing the stored files of deleted documents and batches, once nobody can need them any more.

The same content may be submitted again under the same doc_id, and so to the same path, at any moment. A file goes only if no row refers to
it, no transaction is open that could have begun to before the file was noted, and nobody has stored it again within the last minutes: what
has been stored but not yet been submitted, a row does not speak for. Whoever submits it from now on waits for the note's row, and finds
either the file unnoted or no file, and then stores its own.

Only what docmill stored itself is removed, for that document where the note names one. What was submitted from SQL where it lay is its
submitter's, and a path that another document's file has may be given there too: such a note is forgotten and the file stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import psycopg
from loguru import logger

from jobs.adapters.storage import LocalStorage, discard, is_upload
from jobs.adapters.storage.names import folder_name
from jobs.copies import remove_copies_of
from jobs.redaction import describe
from models.errors import PermanentError, RetryableError, StorageAway
from models.settings import Settings
from sql import query

MOST = 1000  # files in a pass
UNTOUCHED_SECONDS = 300.0
"""How long nobody may have stored a file for it to be removed: longer than one submission can take from its copy to its statement."""

Connection = psycopg.Connection[Any]


def remove_noted_files(
    settings: Settings,
    conn: Connection,
    *,
    doc_id: str | None = None,
    since: datetime | None = None,
    untouched_for: float = UNTOUCHED_SECONDS,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Remove what may be removed of the noted files, of one document's or of those since a moment; return how many. The others stay noted.

    A storage that is away is a warning and ends it. `conn` commits each statement. `stop` is asked before each file.
    """
    storage = LocalStorage.from_settings(settings)
    noted = noted_files(conn, doc_id, since)
    remove_copies_of(settings, conn, {owner for _, owner in noted if owner is not None})
    owners = dict(noted)
    for path, owner in noted:
        if stop():
            break
        for older in _versions(storage, path, owner):
            conn.execute(query("note_unneeded_file"), {"path": older, "doc_id": owner})
            owners.setdefault(older, owner)
    return _remove_all(storage, conn, owners, untouched_for, stop)


def remove_files_of(settings: Settings, conn: Connection, doc_id: str | None, since: datetime | None = None) -> int:
    """Do so right after a deletion, for one document or all that came since; transactions that were open then get a moment to end."""
    removed = remove_noted_files(settings, conn, doc_id=doc_id, since=since)
    time.sleep(0.05)
    while more := remove_noted_files(settings, conn, doc_id=doc_id, since=since):
        removed += more
    return removed


def noted_files(conn: Connection, doc_id: str | None, since: datetime | None = None) -> list[tuple[str, str | None]]:
    """Return some files that are noted, of one document, since a moment or of all, those that come next: path and document."""
    name = "noted_files_of" if doc_id is not None else "noted_files_since" if since is not None else "noted_files"
    return conn.execute(query(name), {"doc_id": doc_id, "since": since, "most": MOST}).fetchall()


def _versions(storage: LocalStorage, path: str, doc_id: str | None) -> list[str]:
    """Return the other files that were stored for a document: those of its earlier versions."""
    if doc_id is None:
        return []
    try:
        names = storage.list_files("*", f"{storage.uploads_dir}/{folder_name(doc_id)}")
        return [name for name in names if name != path and is_upload(storage, name, doc_id)]
    except (PermanentError, RetryableError):
        return []


def _remove_all(
    storage: LocalStorage, conn: Connection, owners: dict[str, str | None], untouched_for: float, stop: Callable[[], bool]
) -> int:
    removed = 0
    for path, owner in owners.items():
        if stop():
            break
        try:
            removed += _remove(storage, conn, path, owner, untouched_for)
        except StorageAway as error:
            logger.warning("Files of deleted documents were not removed, trying again later: {}", describe(error))
            conn.execute(query("put_off_file"), {"path": path})  # should it be away for this file alone
            break
    return removed


def _remove(storage: LocalStorage, conn: Connection, path: str, owner: str | None, untouched_for: float) -> bool:
    with conn.transaction():
        row = conn.execute(query("judge_file"), {"path": path}).fetchone()
        if row is None or row[0] != "free":
            return False
        try:
            if not is_upload(storage, path, owner):
                conn.execute(query("forget_file"), {"path": path})
                return False
            gone = discard(storage, path, untouched_for=untouched_for)
        except PermanentError as error:
            logger.warning("A deleted document's file is none that could be removed: {}", describe(error))
            gone = True
        except StorageAway:
            raise
        except RetryableError as error:
            logger.warning("A deleted document's file was not removed, trying again later: {}", describe(error))
            gone = False
        conn.execute(query("forget_file" if gone else "put_off_file"), {"path": path})
        return gone
