"""CocoIndex at its work, for bench.unchanged: run by an interpreter of its own, which has cocoindex and asyncpg and nothing of docmill.

Usage: python cocoindex_peer.py POSTGRES_URL FOLDER STATE_FOLDER. Reads lines from standard input; for each it brings the folder's table up
to date once and prints the seconds that it took and the rows that there are then. The pipeline is the one that its documentation shows:
memoised by file, split, embed in batches, rows in Postgres. There is no vector index, which an unchanged run would not touch.
"""

# mypy: ignore-errors
from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

os.environ["COCOINDEX_DISABLE_USAGE_TRACKING"] = "1"

import asyncpg
import cocoindex as coco
import numpy as np
from cocoindex.connectors import localfs, postgres
from cocoindex.resources.file import FileLike
from cocoindex.resources.schema import VectorSchema
from numpy.typing import NDArray

DIMENSIONS = 8
URL, FOLDER, STATE = sys.argv[1:4]
POOL = coco.ContextKey("pool")


@coco.lifespan
async def life(builder: coco.EnvironmentBuilder) -> AsyncIterator[None]:
    builder.settings.db_path = pathlib.Path(STATE)
    builder.settings.db_settings.map_size = 1 << 30
    async with asyncpg.create_pool(URL, min_size=1, max_size=8) as pool:
        builder.provide(POOL, pool)
        yield


@coco.fn.as_async(batching=True, max_batch_size=256)
def vectors(texts: list[str]) -> list[NDArray[np.float32]]:
    return [np.full(DIMENSIONS, len(text), dtype=np.float32) for text in texts]


@dataclass
class Row:
    """A row of the table that it keeps."""

    source: str
    seq: int
    content: str
    embedding: Annotated[NDArray, VectorSchema(dtype=np.dtype(np.float32), size=DIMENSIONS)]


@coco.fn
async def one(item, name: str, table) -> None:
    seq, text = item
    table.declare_row(row=Row(name, seq, text, await vectors(text)))


@coco.fn(memo=True)
async def process(file: FileLike, table) -> None:
    text = await file.read_text()
    parts = [text[start : start + 1000] for start in range(0, max(1, len(text) - 100), 900)]
    await coco.map(one, list(enumerate(parts)), str(file.file_path.path), table)


@coco.fn
async def main(folder: pathlib.Path) -> None:
    schema = await postgres.TableSchema.from_class(Row, primary_key=["source", "seq"])
    table = await postgres.mount_table_target(POOL, table_name="chunks", table_schema=schema)
    await coco.mount_each(process, localfs.walk_dir(folder, recursive=True).items(), table)


app = coco.App(coco.AppConfig(name="peer"), main, folder=pathlib.Path(FOLDER))

for _ in sys.stdin:
    began, cpu = time.perf_counter(), time.process_time()
    app.update_blocking()
    print(f"{time.perf_counter() - began:.3f} {time.process_time() - cpu:.3f}", flush=True)
