"""CPU milliseconds for one text of 8,000 characters, step by step, apart from the runner; and of submitting a folder of such files.

Usage: python -m bench.small_text [--files 1000]. The least of five rounds, so that a busy machine changes little. Submitting is
`submit_folder` on the bench's own server, without starting Python; its files a second are the clock's.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from bench.running import bench_server, fresh_settings
from jobs.adapters.extractor import extract_locally
from jobs.adapters.parsers import parse_file
from jobs.adapters.sniff import sniff
from jobs.adapters.storage import LocalStorage
from jobs.adapters.storage.copies import TextCopies, copy_name
from jobs.adapters.stored_file import StoredFile
from jobs.batch import submit_folder
from jobs.front import close_async
from jobs.stages.check import normalise
from jobs.stages.chunk import cut
from models.documents import FileType
from models.settings import Settings

TIMES = 100
SENTENCES = (
    "The invoice of the third quarter is payable within thirty days. Each claim names the policy, the place and the sum of 1,250.00 EUR. "
    "A report of the audit was sent to the office on 12 March 2025, and nobody has answered it since.\n\n"
)


def text(number: int) -> str:
    """Return a text of about 8,000 characters, no two alike."""
    return f"Document {number}\n\n" + (SENTENCES * 40)[:8000]


def least(work: Callable[[], object]) -> float:
    """Return the CPU milliseconds of one call, the least of five rounds."""
    rounds = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(TIMES):
            work()
        rounds.append((time.process_time() - began) / TIMES * 1000)
    return min(rounds)


async def submitted(settings: Settings, folder: Path, files: int) -> str:
    """Submit a folder twice and say what a new and an unchanged file took."""
    told = []
    for what in ("new", "unchanged"):
        cpu, clock = time.process_time(), time.perf_counter()
        await submit_folder(settings, folder)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        told.append(f"{what} file: {cpu / files * 1000:.2f} ms, {files / clock:.0f} a second")
    await close_async()
    return "\n".join(told)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    given = parser.parse_args()
    with bench_server() as (server, scratch):
        folder = scratch / "folder"
        folder.mkdir()
        for file in range(given.files):
            (folder / f"{file:05}.txt").write_text(text(file), encoding="utf-8")
        path = folder / "00000.txt"
        settings = fresh_settings(server, scratch, "small_text", embedding_provider="hash")
        storage = LocalStorage.prepared(settings)
        stored = storage.store_upload("one", path, 1_000_000).file_path
        markdown = text(0)
        copies, sha256, number = TextCopies(storage), "0" * 64, count()

        def look() -> object:
            return storage.fingerprint(stored), sniff(storage.resolve(stored), path.name)

        steps: dict[str, Callable[[], object]] = {
            "fingerprint and type": look,
            "parse": lambda: parse_file(StoredFile(path), path.name, FileType.TEXT, "text/plain", 10_000),
            "check": lambda: normalise(markdown),
            "chunk": lambda: cut(markdown, (), doc_id="doc", size=1000, overlap=100),
            "extract": lambda: extract_locally(markdown, (), path.name, {}),
            "copy for people": lambda: copies.write(copy_name(str(next(number)), sha256), markdown),
        }
        for name, work in steps.items():
            work()  # what is loaded at the first call
            print(f"{name}: {least(work):.3f} ms", flush=True)
        print(asyncio.run(submitted(settings, folder, given.files)))


if __name__ == "__main__":
    main()
