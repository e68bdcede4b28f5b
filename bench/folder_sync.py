"""How long a sync of an unchanged folder takes: files that look as they did are not read, against reading them all.

    python -m bench.folder_sync [--files 10000] [--kb 20]

Uses DATABASE_URL or the embedded server below a temporary folder. Prints seconds for a listing, for the first sync, and for the next ones.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
import time
from pathlib import Path

from jobs.front import close_async
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions
from models.settings import Settings


def make_folder(root: Path, files: int, size: int) -> None:
    """Write files of random content, a hundred to a folder, all an hour old."""
    old = time.time() - 3600
    source = random.Random(1)
    for number in range(files):
        folder = root / f"{number // 100:04}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:06}.txt"
        path.write_bytes(source.randbytes(size))
        os.utime(path, (old, old))


async def measure(files: int, size: int) -> None:
    """Print how long each kind of sync takes."""
    with tempfile.TemporaryDirectory() as base:
        root = Path(base) / "files"
        make_folder(root, files, size)
        settings = Settings(storage_base_path=Path(base) / "storage")
        await asyncio.sleep(2.1)  # the change times must be older than the looks
        for name, options in (
            ("first sync", SyncOptions()),
            ("unchanged, looks", SyncOptions()),
            ("unchanged, looks", SyncOptions()),
            ("unchanged, --checksum", SyncOptions(checksum=True)),
            ("dry run", SyncOptions(dry_run=True)),
        ):
            started = time.perf_counter()
            result = await FolderSync(settings, root, options).run()
            took = time.perf_counter() - started
            print(f"{name:24} {took:8.2f} s  {len(result.plan.new)} new, {len(result.plan.unchanged)} unchanged", flush=True)
        await close_async()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--kb", type=int, default=20)
    given = parser.parse_args()
    asyncio.run(measure(given.files, given.kb * 1000))
