"""Unpacking: how long a zip of many small files and one of 2 GB take, and how much memory, alone and beside a bare `zipfile` loop.

Usage: python -m bench.archives [--files 10000] [--gigabytes 2] [--work]     (--work: also a real worker that sees the small files through)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psycopg

from bench.running import WORDS, bench_server, environment, fresh_settings, url_of, workers
from jobs import submit_batch
from models.settings import Settings, load_settings

LARGE_FILE = 90_000_000  # bytes; a document may have MAX_FILE_SIZE_MB=100
ARCHIVE = "SELECT id, state, entry_count, unpacked_count, error_message FROM batch_archives"


def many_files(path: Path, count: int) -> Path:
    """Write a zip of small texts, each its own."""
    rng = random.Random(count)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(count):
            archive.writestr(f"{number % 50:02}/{number:05}.txt", f"Document {number}\n\n" + " ".join(rng.choices(WORDS, k=150)))
    return path


def large_files(path: Path, gigabytes: float) -> Path:
    """Write a zip of few large files: numbers and words, compressed three to one or so."""
    rng = random.Random(1)
    block = "\n".join(f"{rng.random()} {rng.choice(WORDS)} {rng.randrange(10**9)}" for _ in range(30_000)).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(round(gigabytes * 1e9 / LARGE_FILE)):
            with archive.open(f"{number:03}.csv", "w", force_zip64=True) as entry:
                for part in range(LARGE_FILE // len(block)):
                    entry.write(b"%d,%d\n" % (number, part) + block)
    return path


def unpack_alone(archive_id: int) -> None:
    """Unpack one archive in this process as a worker does, and print seconds and peak memory. Run as a process of its own."""
    from jobs.adapters.sandbox import ProcessSandbox
    from jobs.adapters.sandbox_child import Limits
    from jobs.batch.unpacking import Unpacker
    from jobs.database import make_pool

    settings = load_settings()

    async def run() -> float:
        pool = make_pool(settings, url_of(settings))
        await pool.open()
        started = time.perf_counter()
        await Unpacker(
            settings=settings,
            pool=pool,
            sandbox=lambda folder: ProcessSandbox(children=1, limits=Limits(max_output_mb=settings.max_archive_mb), writable=folder),
            stopping=lambda: False,
        ).run(archive_id)
        taken = time.perf_counter() - started
        await pool.close()
        return taken

    taken = asyncio.run(run())
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{taken:.1f} s, peak memory {own:.0f} MB in the worker and {child:.0f} MB in its child")


def measure(settings: Settings, path: Path) -> None:
    """Submit a zip, then unpack it in a process of its own."""
    os.environ.update({name: value for name, value in environment(settings).items() if os.environ.get(name) != value})
    load_settings.cache_clear()
    started = time.perf_counter()
    submit_batch(path)
    print(
        f"{path.name} ({path.stat().st_size / 1e6:,.0f} MB): submitted in {time.perf_counter() - started:.1f} s, unpacked in ",
        end="",
        flush=True,
    )
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        row = conn.execute(ARCHIVE).fetchone()
        assert row is not None
        subprocess.run([sys.executable, "-m", "bench.archives", "--unpack", str(row[0])], check=True, env=environment(settings))
        row = conn.execute(ARCHIVE).fetchone()
        assert row is not None
        assert row[1:] == ("unpacked", row[2], row[2], None), row
        conn.execute("TRUNCATE procrastinate_jobs CASCADE")


def bare_loop(path: Path, folder: Path) -> None:
    """Unpack with the standard library, for scale."""
    started = time.perf_counter()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    print(f"{path.name}: bare zipfile.extractall, nothing durable, {time.perf_counter() - started:.1f} s")
    shutil.rmtree(folder)


def see_through(settings: Settings, path: Path) -> None:
    """Submit a zip to a real worker and time both the unpacking and the end of the batch."""
    with workers(settings), psycopg.connect(url_of(settings), autocommit=True) as conn:
        started, unpacked = time.perf_counter(), 0.0
        submit_batch(path, batch_id="worked on")
        while True:
            row = conn.execute("SELECT archives_open, status, total_files FROM batch_status WHERE batch_id = 'worked on'").fetchone()
            assert row is not None
            unpacked = unpacked or (time.perf_counter() - started if row[0] == 0 else 0.0)
            if row[1] not in {"pending", "processing"}:
                break
            time.sleep(0.2)
        print(f"{path.name}: by a worker, unpacked {unpacked:.1f} s and {row[1]} {time.perf_counter() - started:.1f} s after submission")


def main() -> None:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--unpack", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.unpack is not None:
        unpack_alone(given.unpack)
        return
    with bench_server() as (server, folder):
        for path in (many_files(folder / "many.zip", given.files), large_files(folder / "large.zip", given.gigabytes)):
            settings = fresh_settings(server, folder, path.stem, embedding_provider="hash")
            bare_loop(path, folder / "bare")
            measure(settings, path)
            if given.work and path.stem == "many":
                see_through(settings, path)
            shutil.rmtree(settings.storage_base_path)


if __name__ == "__main__":
    main()
