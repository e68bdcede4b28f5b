"""Repair by invariant: a side task of every worker, safe with any number of them.

Each unfinished document has exactly one live job or a live lease; otherwise it is queued again at its milestone. What is repaired, and how,
is written down in `sql/migrations/0003_rescue.sql`; here is only what is looked for, how often, and what is said about it.
"""

from __future__ import annotations

import asyncio
from math import ceil
from typing import Any

import psycopg
from loguru import logger
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from jobs import clock, faults
from jobs.alerts import RULE_SECONDS, log_changes
from jobs.breaker import PLACES_PER_SECOND
from jobs.outages import end_if_cancelled
from jobs.redaction import describe
from models.settings import Settings
from sql import query

MOST = 100  # repairs of one kind in a pass: a pass stays short, the next one goes on
SIDE_TASKS = [
    "look_after_vector_index",
    "prune",
    "reembed",
    "remove_noted_files",
    "unpack",
]  # docmill's tasks that are no stages; an application's own are none of our business
EXPECTED = {"bring_forward", "delete_replaced_document", "renew_summaries"}  # what is due rather than broken
WINDOW = 2000  # waiting documents, and duplicates, that are looked at together
SWEEP_SHARE = 0.01  # of the time between two passes that looking at waiting documents may take, if one window does not take more


class Reconciler:
    """Looks for broken invariants every few seconds and repairs each in a small transaction of its own."""

    def __init__(self, settings: Settings, pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]]) -> None:
        self._settings = settings
        self._pool = pool
        self._awake_since = self._last_pass = clock.seconds()
        self._after = self._after_duplicate = 0
        self._disturbed_at: float | None = None
        self._after_batch = ""

    async def run(self) -> None:
        """Repair for ever; a pass that fails is logged and the next one tries again."""
        while True:
            try:
                await self.pass_once()
            except (psycopg.Error, OSError) as error:
                end_if_cancelled(error)
                self._disturb(clock.seconds())  # nobody could renew or beat meanwhile
                logger.warning("A pass of the reconciler failed: {}", describe(error))
            await asyncio.sleep(self._settings.reconcile_seconds)

    async def pass_once(self) -> dict[str, int]:
        """Look for everything once and return what was done: outcome -> how often."""
        lease = self._settings.lease_seconds
        done: dict[str, int] = {}
        now = clock.seconds()
        if now - self._last_pass > lease / 2 + self._settings.reconcile_seconds:
            self._disturb(now)  # this process was paused, or the database away
        self._last_pass = now
        # One lease length after waking up every worker that lives has renewed what it holds.
        if now - self._awake_since >= lease:
            crashes = {"max_crashes": self._settings.max_crashes}
            for row in await self._rows("find_expired_leases", lease_seconds=lease, most=MOST):
                await self._repair(done, "rescue_document", doc_id=row["doc_id"], **crashes)
            for row in await self._rows("find_abandoned_jobs", grace_seconds=lease, most=MOST):
                await self._repair(done, "end_abandoned_job", job_id=row["id"], grace_seconds=lease)
            for row in await self._rows("find_dead_side_jobs", grace_seconds=lease, most=MOST, tasks=SIDE_TASKS):
                await self._repair(done, "requeue_side_job", job_id=row["id"])
            await self._fail_stalled(done, now)
            await self._rows("forget_dead_workers")
        await self._reopen(done)
        await self._requeue_lost(done)
        await self._requeue_duplicates(done)
        period = self._settings.reconcile_seconds
        for row in await self._rows("find_recovered_services", seconds=period):
            await self._repair(done, "bring_forward", service=row["service"], most=ceil(PLACES_PER_SECOND * period), seconds=period)
        for row in await self._rows("find_stragglers", most=MOST):
            await self._repair(done, "cancel_straggler", doc_id=row["doc_id"])
        for row in await self._rows("find_lost_archives", most=MOST):
            await self._repair(done, "requeue_lost_archive", archive_id=row["id"], max_requeues=self._settings.max_requeues)
        for row in await self._rows("find_replaced_documents", most=MOST):
            await self._repair(done, "delete_replaced_document", doc_id=row["doc_id"])
        await self._rows("queue_reembedding", delay=0.0, job_id=None)
        for row in await self._rows("find_unsettled_batches", most=MOST):
            await self._repair(done, "settle_batch", batch_id=row["batch_id"])
        for row in await self._rows("find_summaries_to_renew", most=MOST):
            await self._repair(done, "renew_summaries", batch_id=row["batch_id"])
        await self._evaluate_alerts()
        return done

    async def _evaluate_alerts(self) -> None:
        """Look at the alert rules unless some worker has lately, and say what has changed. A rule that fails is no fault of the repairs."""
        try:
            log_changes(await self._rows("evaluate_alerts", every_seconds=RULE_SECONDS))
        except psycopg.DatabaseError as error:
            if isinstance(error, psycopg.OperationalError):
                raise
            logger.warning("The alert rules could not be evaluated: {}", describe(error))

    async def _reopen(self, done: dict[str, int]) -> None:
        seen = await self._rows("find_batches_to_reopen", after=self._after_batch, window=WINDOW)
        for row in seen:
            if row["reopen"]:
                await self._repair(done, "reopen_batch", batch_id=row["batch_id"])
        self._after_batch = seen[-1]["batch_id"] if len(seen) == WINDOW else ""

    def _disturb(self, now: float) -> None:
        self._awake_since = self._disturbed_at = now

    async def _fail_stalled(self, done: dict[str, int], now: float) -> None:
        """Fail batches that got no further for too long. Time in which this process was paused or the database away does not count."""
        undisturbed = float("inf") if self._disturbed_at is None else now - self._disturbed_at
        limits = {"timeout_seconds": self._settings.batch_processing_timeout, "undisturbed_seconds": undisturbed}
        for row in await self._rows("find_stalled_batches", most=MOST, **limits):
            await self._repair(done, "fail_stalled_batch", batch_id=row["batch_id"], **limits)

    async def _requeue_lost(self, done: dict[str, int]) -> None:
        """Look at as many windows as fit into a small share of the time: a sweep of a million takes minutes, not most of an hour."""
        end = clock.seconds() + SWEEP_SHARE * self._settings.reconcile_seconds
        while True:
            seen = await self._rows("find_lost_documents", after=self._after, window=WINDOW)
            for row in seen:
                if row["lost"]:
                    await self._repair(done, "requeue_lost_document", doc_id=row["doc_id"], max_requeues=self._settings.max_requeues)
            self._after = seen[-1]["id"] if len(seen) == WINDOW else 0
            if self._after == 0 or clock.seconds() >= end:
                return

    async def _requeue_duplicates(self, done: dict[str, int]) -> None:
        seen = await self._rows("find_orphaned_duplicates", after=self._after_duplicate, window=WINDOW)
        for row in seen:
            if row["orphaned"]:
                await self._repair(done, "requeue_duplicate", doc_id=row["doc_id"])
        self._after_duplicate = seen[-1]["id"] if len(seen) == WINDOW else 0

    async def _repair(self, done: dict[str, int], name: str, **params: Any) -> None:
        """Run one repair, a transaction of its own; one that fails keeps no other from being tried."""
        await faults.at(f"before_repair:{name}", params.get("doc_id", ""))
        try:
            found = await self._rows(name, **params)
        except psycopg.DatabaseError as error:
            if isinstance(error, psycopg.OperationalError):
                raise
            logger.warning("{} of {} failed: {}", name, params, describe(error))
            return
        await faults.at(f"after_repair:{name}", params.get("doc_id", ""))
        outcome = next(iter(found[0].values()), None) if found else None
        if outcome is not None:
            about = {key: params[key] for key in ("doc_id", "batch_id", "job_id") if key in params}
            logger.bind(**about).log("INFO" if name in EXPECTED else "WARNING", "{}: {} {}", name, next(iter(params.values())), outcome)
            key = outcome if isinstance(outcome, str) else name
            done[key] = done.get(key, 0) + 1

    async def _rows(self, name: str, **params: Any) -> list[dict[str, Any]]:
        async with self._pool.connection() as conn, conn.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query(name), params)
            return await cursor.fetchall()
