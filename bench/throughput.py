"""Documents per second: both hand-off modes beside two loops that have no queue, no state and no retries.

Usage: python -m bench.throughput [--documents 300] [--rounds 3] [--corpus FOLDER] [--provider hash] [--workers 1] [--only MODE ...]
    [--warm] [--json FILE]

Without --corpus: small text documents. With it: every document below the folder, or `--documents` of them spread evenly. All modes of a
round run one after another on the same server; the figures are medians over the rounds. Submitting (a durable copy, the row and the
first job) is part of docmill's time, and building the HNSW index of everybody's. The bare loop does docmill's own work in one process;
the simplest loop (text documents only) cuts at fixed lengths and hashes, which is less work than docmill does.
--warm: one document of each suffix goes before, untimed, so that no child still loads what reads a type.
--json: beside these figures also the medians of each stage's time and CPU time by file type, from the audit trail of the mode inline.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import psycopg

from bench.floors import bare_loop, simplest_loop
from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, index_passages, small_documents, submit_all, url_of, wait_until_ended, workers
from jobs.adapters.embedders import make_embedder
from models.settings import Settings

MODES = ["simplest loop", "bare loop", "inline", "queue"]
STAGES = """SELECT d.file_type, e.stage, count(*), percentile_cont(0.5) WITHIN GROUP (ORDER BY e.duration_ms),
        percentile_cont(0.5) WITHIN GROUP (ORDER BY e.cpu_ms)
    FROM document_events AS e JOIN file_extractions AS d USING (doc_id)
    WHERE e.event IN ('stage_completed', 'completed') AND d.state = 'complete' AND d.file_name <> ALL(%s)
    GROUP BY d.file_type, e.stage ORDER BY 1, min(e.id)"""


def docmill(settings: Settings, paths: list[Path], warm_up: list[Path], count: int) -> tuple[float, float]:
    """Submit everything to idle workers and return the seconds until all has ended and is indexed, and those of submitting."""
    dimensions = make_embedder(settings).dimensions
    with workers(settings, count):
        asyncio.run(submit_all(settings, warm_up))
        wait_until_ended(settings, len(warm_up), time.perf_counter(), 600)
        started = time.perf_counter()
        submitting = asyncio.run(submit_all(settings, paths))
        wait_until_ended(settings, len(paths) + len(warm_up), started, 7200)
        index_passages(settings, dimensions)
        return time.perf_counter() - started, submitting


def note_stages(settings: Settings, warm_up: list[Path], into: Path | None) -> None:
    """Write what each stage of the documents that are complete took, by file type."""
    with psycopg.connect(url_of(settings)) as conn:
        for file_type, found in groupby(conn.execute(STAGES, [[path.name for path in warm_up]]), key=itemgetter(0)):
            _, names, documents, durations, cpu = zip(*found, strict=True)
            about = {"provider": settings.embedding_provider, "file_type": file_type, "documents": max(documents), "stages": list(names)}
            write_row(into, "stages", **about, duration_ms=list(durations), cpu_ms=list(cpu))


def corpus_documents(folder: Path, limit: int) -> list[Path]:
    """Return the documents below a folder of the corpus, or `limit` of them spread evenly; ground truth and lists are no documents."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "gt" and p.name != "MANIFEST.tsv")
    return found[:: -(-len(found) // limit)]


def main() -> None:
    """Run the rounds and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--provider", default="hash")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    add_option(parser)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    with bench_server() as (server, folder):
        paths = corpus_documents(given.corpus, given.documents) if given.corpus else small_documents(folder / "documents", given.documents)
        warm_up = [folder / "warm-up.txt"]
        warm_up[0].write_text("warm up")
        if given.warm:
            warm_up += {path.suffix: path for path in paths}.values()
            paths = [path for path in paths if path not in warm_up]

        def one_round() -> Iterator[tuple[str, float]]:
            settings = fresh_settings(server, folder, "floors", embedding_provider=given.provider)
            if given.corpus is None and "simplest loop" in given.only:
                yield "simplest loop", simplest_loop(url_of(settings), paths)
            if "bare loop" in given.only:
                yield "bare loop", bare_loop(settings, url_of(settings), paths)
            for mode in MODES[2:]:
                if mode not in given.only:
                    continue
                settings = fresh_settings(server, folder, mode, embedding_provider=given.provider, handoff=mode)
                whole, submitting = docmill(settings, paths, warm_up, given.workers)
                yield mode, whole
                if mode == "inline" and given.json:
                    note_stages(settings, warm_up, given.json)
                yield f"{mode}: submitting", submitting

        for number in range(given.rounds):
            for name, taken in one_round():
                print(f"round {number + 1}: {name} {taken:.2f} s", file=sys.stderr, flush=True)
                seconds.setdefault(name, []).append(taken)
                write_row(given.json, "throughput", name=name, documents=len(paths), provider=given.provider, seconds=taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{len(paths)} documents, {given.rounds} rounds, provider {given.provider}, workers {given.workers}\n")
    print("| what | documents/s | of the bare loop | of the simplest loop |\n|---|---|---|---|")
    for name, taken in medians.items():
        ratios = [f"{medians[floor] / taken:.2f}" if floor in medians else "" for floor in ("bare loop", "simplest loop")]
        print(f"| {name} | {len(paths) / taken:.1f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
