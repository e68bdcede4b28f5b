"""Periodic tasks: looking after the vector indexes, removing the files of deleted documents, and pruning what was kept long enough.

Small tables are searched exactly. The index of a model is built when that pays: once it has VECTOR_INDEX_THRESHOLD passages and the bulk of
a load is through, because inserting into a standing index costs about three times what building it afterwards does.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Literal

import psycopg
from loguru import logger
from psycopg import sql as composing
from psycopg.rows import dict_row

from jobs.copies import Tidied, tidy_copies
from jobs.database import conninfo_of
from jobs.leftovers import remove_noted_files as remove_files
from jobs.orphans import find_orphans, part_of
from jobs.pipeline.claims import one
from jobs.retention import SomebodyElsePrunes, prune_rows
from jobs.sessions import connect, connect_async
from models.settings import Settings
from procrastinate_app import app
from sql import query

BUSY = 1000  # unfinished documents: while there are more, a bulk load is under way and the index would be in its way

MOST_DIMENSIONS = 2000
"""Of a vector that pgvector's HNSW takes. Wider ones are compared one by one."""

NOT_ALLOWED = (
    "only the owner of the tables may build or drop a vector index. Run `docmill index` as the owner, or let this worker's login do it: "
    "`docmill roles grant LOGIN --as worker --indexes`."
)

Outcome = Literal["not needed", "too wide", "waiting", "ready", "built", "busy elsewhere", "not allowed"]
Table = Literal["document_chunks", "chunk_embeddings"]
_told: set[str] = set()
"""Models whose index this process may not build, and has said so."""


def index_name(model: str, dimensions: int, table: Table = "document_chunks") -> str:
    """Return the name of the partial index of a model, the same on every host."""
    return f"{table}_hnsw_{hashlib.sha256(f'{model}:{dimensions}'.encode()).hexdigest()[:12]}"


async def look_after_index(
    settings: Settings, model: str, dimensions: int, *, table: Table = "document_chunks", even_under_load: bool = False
) -> Outcome:
    """Build the model's index if it pays and is not there, or again if a build was cut off; return what was found or done.

    Vectors of more than MOST_DIMENSIONS have none. It pays once the table holds VECTOR_INDEX_THRESHOLD vectors of the model.
    `even_under_load`: a bulk load is no reason to wait.
    """
    if dimensions > MOST_DIMENSIONS:
        return "too wide"
    name = index_name(model, dimensions, table)
    threshold = max(1, settings.vector_index_threshold)
    facts_wanted = {"model": model, "name": name, "table": table, "threshold": threshold, "busy": BUSY}
    conninfo = conninfo_of(settings, direct=True)
    async with await connect_async(settings, conninfo, row_factory=dict_row) as conn:
        asked = composing.SQL(query("vector_index_facts")).format(table=composing.Identifier(table))
        facts = await (await conn.execute(asked, facts_wanted)).fetchone()
        assert facts is not None
        if (found := _found(facts, even_under_load=even_under_load)) is not None:
            return found
        if not (await _one(conn, "try_lock_index", {"name": name}))["locked"]:
            return "busy elsewhere"
        names = {
            "name": composing.Identifier(name),
            "table": composing.Identifier(table),
            "model": composing.Literal(model),
            "dimensions": composing.SQL(str(int(dimensions))),
        }
        try:
            await conn.execute(query("act_as_owner_of"), {"table": table})
            await conn.execute(query("lift_limits"))
            # What a build that was cut off has left is of no use.
            await conn.execute(composing.SQL(query("drop_vector_index")).format(**names))
            if not facts["is_large"]:
                return "not needed"
            await conn.execute(query("build_in_parallel"))
            await conn.execute(composing.SQL(query("create_vector_index")).format(**names))
        finally:
            await conn.execute(query("unlock_index"), {"name": name})
        logger.info("The vector index of {} on {} is built", model, table)
        return "built"


def _found(facts: dict[str, Any], *, even_under_load: bool) -> Outcome | None:
    """Return how an index stands by the answers of vector_index_facts; None where it is to be built, or what is left of it dropped, now."""
    if facts["is_valid"]:
        return "ready"
    if not facts["is_large"]:
        # What a build that was cut off has left costs whoever inserts something.
        is_left = facts["is_valid"] is False and not facts["is_being_built"] and facts["may_build"]
        return None if is_left else "not needed"
    if facts["is_being_built"]:
        return "busy elsewhere"
    if facts["is_busy"] and not even_under_load:
        return "waiting"
    return None if facts["may_build"] else "not allowed"


async def drop_index(settings: Settings, model: str, dimensions: int, table: Table) -> bool:
    """Drop the model's index on a table if there is one; nobody who searches waits for it. Return False where this role may not."""
    name = index_name(model, dimensions, table)
    conninfo = conninfo_of(settings, direct=True)
    async with await connect_async(settings, conninfo, row_factory=dict_row) as conn:
        if not (await _one(conn, "vector_index_exists", {"name": name}))["exists"]:
            return True
        if await (await conn.execute(query("act_as_owner_of"), {"table": table})).fetchone() is None:
            return False
        await conn.execute(query("lift_limits"))
        await conn.execute(composing.SQL(query("drop_vector_index")).format(name=composing.Identifier(name)))
        return True


async def _one(conn: psycopg.AsyncConnection[dict[str, Any]], name: str, params: dict[str, Any]) -> dict[str, Any]:
    row = await (await conn.execute(query(name), params)).fetchone()
    assert row is not None
    return row


@app.periodic(cron="*/2 * * * *")
@app.task(name="look_after_vector_index", queue="maintenance", queueing_lock="look_after_vector_index", priority=1000)
async def look_after_vector_index(timestamp: int) -> str:
    """Look after the index of the model that serves searches."""
    async with app.pool.connection() as conn:
        serving = await one(conn, "serving_model", {})
        if serving is None:
            return "not needed"
        place = await one(conn, "where_served_vectors_lie", {"embedding_model": serving["embedding_model"]})
    if place is not None and place["table_name"] != "document_chunks":
        return "waiting"  # it is on its way there, and the re-embedding builds the index once all of it has arrived
    outcome = await look_after_index(app.settings, serving["embedding_model"], serving["dimensions"])
    if outcome in ("not allowed", "too wide") and serving["embedding_model"] not in _told:
        _told.add(serving["embedding_model"])
        why = NOT_ALLOWED if outcome == "not allowed" else f"an index takes vectors of at most {MOST_DIMENSIONS:,} dimensions."
        logger.warning("The vector index of {} is due, and searches are slow without it, but {}", serving["embedding_model"], why)
    return outcome


@app.periodic(cron="* * * * *")
@app.task(name="remove_noted_files", queue="maintenance", queueing_lock="remove_noted_files", priority=1000)
async def remove_noted_files(timestamp: int) -> int:
    """Remove the files of deleted documents and batches that nobody can need any more; return how many."""

    def remove() -> int:
        with connect(app.settings, conninfo_of(app.settings)) as conn:
            return sum(iter(lambda: remove_files(app.settings, conn, stop=app.stopping), 0))

    return await asyncio.to_thread(remove)


@app.periodic(cron="17 * * * *")
@app.task(name="prune", queue="maintenance", queueing_lock="prune", priority=1000)
async def prune(timestamp: int) -> dict[str, int]:
    """Remove what the settings let go, and look for orphans in the part of the storage whose hour it is; return how many of what."""

    def work() -> dict[str, int]:
        with connect(app.settings, conninfo_of(app.settings)) as conn:
            try:
                removed = prune_rows(app.settings, conn, stop=app.stopping)
            except SomebodyElsePrunes:
                return {}
            part = part_of(timestamp)
            found = find_orphans(app.settings, conn, part=part, stop=app.stopping)
            # Into what may be another database's storage nothing is written.
            copies = Tidied() if found.suspicious else tidy_copies(app.settings, conn, part=part, stop=app.stopping)
            if copies.written:
                logger.info("Copies of parsed texts that were missing: {} written", copies.written)
            if suspicious := found.suspicious + copies.suspicious:
                logger.warning(
                    "{} files in storage belong to nothing in this database: too many to be left-overs, so they stay. Is it the right "
                    "database? If they are to go: docmill prune --orphans",
                    suspicious,
                )
            return removed | {"orphaned files": found.noted, "temporary files": found.temporary, "copies of texts": copies.removed}

    removed = await asyncio.to_thread(work)
    if told := ", ".join(f"{count} {what}" for what, count in removed.items() if count):
        logger.info("Pruned: {}", told)
    return removed
