"""Leases while somebody's transaction holds the document, and while they cannot be renewed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import psycopg

from jobs import clock
from jobs.leases import LeaseKeeper
from tests.integration.conftest import Bench

SECONDS = 1.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it is about a thread
            await asyncio.sleep(0.02)


async def test_the_lease_of_a_document_that_a_transaction_holds_is_kept_until_that_ends_and_renewed_then(
    bench: Bench, database: str
) -> None:
    bench.submit()
    found = bench.fetch()
    assert found is not None
    bench.conn.execute(
        "UPDATE file_extractions SET state = 'working', claim = 1, claim_job_id = %s, lease_until = now() + make_interval(secs => %s)",
        [found[0].id, SECONDS],
    )
    lost: list[bool] = []
    keeper = LeaseKeeper(bench.settings.model_copy(update={"lease_seconds": SECONDS}), database)
    lease = keeper.hold("a", 1, claimed_at=clock.seconds(), on_lost=lost.append)
    try:
        with psycopg.connect(database) as application:
            application.execute("SELECT FROM file_extractions FOR UPDATE")
            await until(lambda: lease.is_held and clock.seconds() > lease.good_until + SECONDS)
            # A renewal that fails says nothing of who holds the document.
            ended = bench.all(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE query LIKE '%%SET lease_until%%' AND pid <> pg_backend_pid() AND datname = current_database()"
            )
            assert ended == [(True,)]
            await asyncio.sleep(SECONDS)
            assert (lost, keeper.held()) == ([], ["a"])
        await until(lambda: lease.good_until > clock.seconds())
        assert bench.one("SELECT lease_until > now() FROM file_extractions") == (True,)
        with psycopg.connect(database) as application:
            application.execute("SELECT FROM file_extractions FOR UPDATE")
            await until(lambda: lease.is_held)
            lease.deadline = -math.inf
            await until(lambda: lost == [False])
    finally:
        keeper.close()
