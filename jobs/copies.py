"""Making the copies of texts agree with the database: those go whose text is no longer served, and those come that are missing.

A worker writes a copy right after its commit and waits for nobody, so a crash, a full disk or a late writer can leave one too few or too
many. Copies are listed before the database is asked: what is there then, and is not named by it, nobody comes to need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from loguru import logger

from jobs.adapters.storage import LocalStorage
from jobs.adapters.storage.copies import FOLDERS, TextCopies, copy_name
from jobs.orphans import FEW, PARTS, SUSPICIOUS_SHARE
from jobs.redaction import describe
from models.errors import DocmillError
from models.settings import Settings
from sql import query

AT_A_TIME = 20_000
"""Documents, about, that one statement asks for: it goes through all of them for some folders of copies."""

Connection = psycopg.Connection[Any]


@dataclass(slots=True)
class Tidied:
    """What a look at the copies has come to."""

    removed: int = 0
    """Copies of what is no longer served."""
    written: int = 0
    """Copies that were missing, or cut short by a power failure."""
    suspicious: int = 0
    """Copies of texts that this database does not serve, but so many that they were left alone."""


@dataclass(frozen=True, slots=True)
class _Served:
    doc_id: str
    sha256: str
    size: int
    """In bytes of UTF-8."""


def tidy_copies(
    settings: Settings,
    conn: Connection,
    *,
    part: int | None = None,
    believe: bool = False,
    dry_run: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Tidied:
    """Remove and write copies, and return how many; trouble with the storage is a warning.

    `part`: look at one of PARTS only. `believe`: also remove suspiciously many. Without STORAGE_KEEP_EXTRACTED nothing is written, with
    ORPHAN_FILE_DAYS=0 nothing removed. `conn` commits each statement.
    """
    tidied, copies = Tidied(), TextCopies(LocalStorage.from_settings(settings))
    number, orphans = 0, list[str]()
    try:
        if copies.storage.is_away():
            return tidied
        for folders in _groups(conn, part):
            present = copies.present(folders)
            if not present and not settings.storage_keep_extracted:
                continue
            served = _served(conn, "served_texts_of_folders", folders=[int(folder, 16) for folder in folders])
            number += len(present)
            orphans += present.keys() - served.keys()
            missing = [it for name, it in served.items() if present.get(name) != it.size] if settings.storage_keep_extracted else []
            for each in missing:
                if stop():
                    return tidied
                tidied.written += dry_run or _write(copies, conn, each)
        if settings.orphan_file_days == 0:
            return tidied
        if part is not None and SUSPICIOUS_SHARE * number < len(orphans) <= FEW and not believe:
            # Few say nothing of one part, as with uploads.
            return tidy_copies(settings, conn, believe=believe, dry_run=dry_run, stop=stop)
        if len(orphans) > max(FEW, SUSPICIOUS_SHARE * number) and not believe:
            tidied.suspicious = len(orphans)
            return tidied
        for name in orphans:
            tidied.removed += dry_run or copies.remove(name)
    except (DocmillError, OSError) as error:
        logger.warning("Copies of parsed texts were not looked after, trying again later: {}", describe(error))
    return tidied


def remove_copies_of(settings: Settings, conn: Connection, doc_ids: Iterable[str]) -> int:
    """Remove the copies of documents but those of what they serve, and return how many; trouble with the storage is a warning."""
    copies, removed = TextCopies(LocalStorage.from_settings(settings)), 0
    by_folder: dict[str, list[str]] = {}
    for doc_id in doc_ids:
        by_folder.setdefault(copy_name(doc_id, "")[:2], []).append(doc_id)
    try:
        for folder, own in by_folder.items():
            present = copies.present([folder], own)
            served = _served(conn, "served_texts_of_documents", doc_ids=own) if present else {}
            removed += sum(copies.remove(name) for name in present if name not in served)
    except (DocmillError, OSError) as error:
        logger.warning("The copy of a deleted document's text was not removed, trying again later: {}", describe(error))
    return removed


def _groups(conn: Connection, part: int | None) -> Iterator[list[str]]:
    """Yield the folders of a part, or all, so many at a time that memory holds what is asked about them."""
    folders = [folder for number, folder in enumerate(FOLDERS) if part is None or number % PARTS == part]
    (documents,) = conn.execute(query("count_served_texts")).fetchone() or (0,)
    size = max(1, len(FOLDERS) * AT_A_TIME // max(1, documents))
    for start in range(0, len(folders), size):
        yield folders[start : start + size]


def _served(conn: Connection, name: str, **given: Any) -> dict[str, _Served]:
    """Return what is served, by the name of its copy."""
    rows = conn.execute(query(name), given).fetchall()
    return {copy_name(doc_id, sha256): _Served(doc_id, sha256, size) for doc_id, sha256, size in rows}


def _write(copies: TextCopies, conn: Connection, served: _Served) -> bool:
    """Write a copy from the database; say so, unless another text is served by now."""
    given = {"doc_id": served.doc_id, "markdown_sha256": served.sha256}
    row = conn.execute(query("load_served_text"), given).fetchone()
    if row is None:
        return False
    copies.write(copy_name(served.doc_id, served.sha256), row[0])
    return True
