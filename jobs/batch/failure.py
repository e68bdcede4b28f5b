"""The end of an archive that cannot be unpacked. In a module of its own, because a command that shows the reason leaves out its log."""

from __future__ import annotations

from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs.batch.archive import Archive
from jobs.pipeline.claims import Connection, one


async def fail_archive(pool: AsyncConnectionPool[Connection], archive: Archive, error: Exception) -> None:
    """Keep the reason with the archive and say it in the log. Raises the database's errors."""
    async with pool.connection() as conn:
        await one(conn, "end_archive", {"archive_id": archive.id, "state": "failed", "error_message": f"{archive.name}: {error}"})
    logger.error("{} cannot be unpacked: {}", archive.name, error)
