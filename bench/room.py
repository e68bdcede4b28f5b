"""How much room small documents take: bytes a document in each table and index, and in the storage folder.

Usage: python -m bench.room [--documents 2000]

Texts of 8,000 characters with vectors of 384 dimensions by the `hash` provider, and the vector index, which maintenance would build later.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import psycopg

from bench.running import bench_server, fresh_settings, index_passages, small_documents, submit_all, url_of, wait_until_ended, workers

DIMENSIONS = 384
PASSAGES = "SELECT count(*)::float8 / %s FROM document_chunks"
TABLES = """SELECT c.relname, pg_table_size(c.oid), pg_indexes_size(c.oid) FROM pg_class AS c
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace ORDER BY pg_total_relation_size(c.oid) DESC LIMIT 6"""
INDEXES = "SELECT indexrelname, pg_relation_size(indexrelid) FROM pg_stat_user_indexes WHERE relname = 'document_chunks' ORDER BY 2 DESC"


def used(folder: Path) -> tuple[int, int]:
    """Return how many bytes of the disk, and how many files and folders, lie in a folder."""
    found = [path.lstat() for path in folder.rglob("*")]
    return sum(512 * each.st_blocks for each in found), len(found)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2000)
    count = parser.parse_args().documents
    with bench_server() as (server, folder):
        settings = fresh_settings(server, folder, "room", embedding_provider="hash")
        with workers(settings):
            asyncio.run(submit_all(settings, small_documents(folder / "texts", count)))
            wait_until_ended(settings, count, time.perf_counter())
        index_passages(settings, DIMENSIONS)
        with psycopg.connect(url_of(settings), autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE")
            row = conn.execute(PASSAGES, [count]).fetchone()
            assert row is not None
            print(f"{row[0]:.1f} passages a document\n\n| KB a document | rows | indexes |\n|---|---|---|")
            for name, rows, indexes in conn.execute(TABLES):
                print(f"| {name} | {rows / count / 1000:.1f} | {indexes / count / 1000:.1f} |")
            print("\n| index of document_chunks | KB a document |\n|---|---|")
            for name, size in conn.execute(INDEXES):
                print(f"| {name} | {size / count / 1000:.1f} |")
        size, files = used(settings.storage_base_path)
        print(f"\nstorage: {size / count / 1000:.1f} KB and {files / count:.1f} files and folders a document")


if __name__ == "__main__":
    main()
