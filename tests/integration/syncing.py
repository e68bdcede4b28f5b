"""Folder syncs for tests: a sync, the work that it makes, and what is stored of the folder afterwards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from jobs.adapters.sandbox import ProcessSandbox
from jobs.arguments import path_doc_id
from jobs.batch.unpacking import Unpacker
from jobs.reconcile import Reconciler
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions, SyncResult
from tests.archives import write_zip
from tests.integration.conftest import Bench

OLD = time.time() - 3600


def put(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (OLD, OLD))


async def sync(bench: Bench, folder: Path, **options: Any) -> SyncResult:
    return await FolderSync(bench.settings, folder, SyncOptions(**options)).run()


async def synced(bench: Bench, folder: Path, **options: Any) -> SyncResult:
    """Sync and let the documents be worked on to the end."""
    result = await sync(bench, folder, **options)
    await work(bench)
    return result


async def work(bench: Bench) -> None:
    sizes = bench.all("SELECT doc_id, file_size FROM file_extractions")
    await bench.drain()
    for document, size in sizes:  # which the plain stages invent
        bench.conn.execute("UPDATE file_extractions SET file_size = %s WHERE doc_id = %s", [size, document])


def names(bench: Bench, folder: Path) -> dict[str, str]:
    """State by path inside the folder."""
    found = bench.all("SELECT source_path, state::text FROM file_extractions ORDER BY 1")
    return {str(Path(path).relative_to(folder)): state for path, state in found}


def doc_id(path: Path) -> str:
    return path_doc_id("default", path)


def shown(result: SyncResult) -> tuple[list[str], list[str], list[tuple[str, str]], list[str]]:
    """New and changed files, moves, deletions."""
    moves = [(move.old.name, move.name) for move in result.moved]
    return result.plan.new, result.plan.changed, moves, [document.shown for document in result.deleted]


async def reconcile(bench: Bench) -> dict[str, int]:
    return await Reconciler(bench.settings, bench.pool).pass_once()


def put_zip(path: Path, *entries: str, **contents: str) -> None:
    """Put an archive in its place at once, as careful programs do. Entries hold a text of their own, or what is given."""
    texts = {entry: f"text of {entry}" for entry in entries} | contents
    write_zip(path.with_name(f".{path.name}"), {f"in/{entry}.txt": text for entry, text in texts.items()}).replace(path)


async def unpack(bench: Bench) -> None:
    """Unpack all archives that wait for it, also those that come out of them."""
    unpacker = Unpacker(
        settings=bench.settings, pool=bench.pool, sandbox=lambda place: ProcessSandbox(children=1, writable=place), stopping=lambda: False
    )
    while found := bench.conn.execute(
        """UPDATE procrastinate_jobs SET status = 'doing' WHERE id = (
            SELECT min(id) FROM procrastinate_jobs WHERE task_name = 'unpack' AND status = 'todo'
        ) RETURNING id, (args->>'archive_id')::int"""
    ).fetchone():
        await unpacker.run(found[1])
        bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0]])
