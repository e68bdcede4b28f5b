"""Repair by invariant: a side task of every worker, safe with any number of them.

Each unfinished document has exactly one live job or a live lease; otherwise it is queued again at its milestone. What is repaired, and how,
is written down in `sql/migrations/0003_rescue.sql`; here is only what is looked for, how often, and what is said about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from math import ceil, inf
from typing import Any

import psycopg
from loguru import logger
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from jobs import clock, faults
from jobs.alerts import RULE_SECONDS, log_changes
from jobs.outages import end_if_cancelled
from jobs.redaction import describe
from jobs.retry import is_away
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
# What is due rather than broken.
EXPECTED = {"bring_forward", "delete_replaced_document", "renew_summaries", "use_idle_budget", "wake_forgotten_equal"}
RENEW_SECONDS = 5.0  # in a pass; each batch can take some, and the others come in a later one
WINDOW = 2000  # waiting documents, duplicates, and open archives, that are looked at together
SWEEP_SHARE = 0.01  # of the time between two passes that looking at waiting documents may take, if one window does not take more
# Most documents that each worker brings forward in a second, once a service's calls pass unasked or its budget lies idle: more than it
# embeds. How many of their requests are under way the workers limit as for new documents.
_BROUGHT_PER_SECOND = 400
BROUGHT_AT_ONCE = 2000  # in one transaction, which holds their rows for half a second
_JUDGE_WHO_LIVES = frozenset({"rescue_document", "end_abandoned_job", "requeue_side_job", "fail_stalled_batch"})

_Step = tuple[str, Callable[[], Awaitable[Any]]]
"""A part of a pass, after its name."""


class Reconciler:
    """Looks for broken invariants every few seconds and repairs each in a small transaction of its own."""

    def __init__(self, settings: Settings, pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]]) -> None:
        self._settings = settings
        self._pool = pool
        self._awake_since = self._noted_at = clock.seconds()
        self._doing = ""
        self._took: dict[str, float] = {}
        self._after = self._after_duplicate = self._after_archive = 0
        self._disturbed_at: float | None = None
        self._after_batch = ""

    async def run(self) -> None:
        """Repair for ever; a pass that fails is logged and the next one tries again."""
        while True:
            try:
                await self.pass_once()
            except (psycopg.Error, OSError) as error:
                end_if_cancelled(error)
                if is_away(error) or isinstance(error, OSError):
                    self._disturb(clock.seconds())  # nobody could renew or beat meanwhile
                self._doing = ""  # how long an outage lasted is no step's usual time
                logger.warning("A pass of the reconciler failed: {}", describe(error))
            await asyncio.sleep(self._settings.reconcile_seconds)

    async def pass_once(self) -> dict[str, int]:
        """Look for everything once and return what was done: outcome -> how often."""
        done: dict[str, int] = {}
        for judges, steps in ((True, self._living(done)), (False, self._others(done))):
            for name, step in steps:
                self._note(name)
                if judges and not self._may_judge():
                    self._doing = ""  # not done, so how long it takes stays as it is known
                    continue
                try:
                    await step()
                except psycopg.Error as error:
                    end_if_cancelled(error)
                    if is_away(error):
                        raise
                    # One that always meets a timeout or a lock must not keep the others from being done.
                    logger.warning("The reconciler's step {} failed: {}", name, describe(error))
        self._note("")
        return done

    def _note(self, doing: str) -> None:
        """Note what is done from now on: a step, a repair, or nothing until the next pass.

        What was done until now and took too long says that this process was paused or the database away, unless it took so long the last
        time too: a statement that is always slow would keep leases from ever being judged, and so would a pass, were it measured as one.
        """
        now = clock.seconds()
        took = now - self._noted_at
        if took - self._took.get(self._doing, 0.0) > self._settings.lease_seconds / 2 + self._settings.reconcile_seconds:
            self._disturb(now)
        if self._doing:
            self._took[self._doing] = took
        self._noted_at, self._doing = now, doing

    def _may_judge(self) -> bool:
        """Say whether every worker that lives has had the time to renew what it holds: one lease length since this one woke up."""
        return clock.seconds() - self._awake_since >= self._settings.lease_seconds

    def _living(self, done: dict[str, int]) -> Iterator[_Step]:
        """Yield what is judged by who lives."""
        lease = self._settings.lease_seconds
        find = partial(self._repair_found, done)
        # Workers are heard of at least four times a lease: one that has not been for half of one has stopped renewing as well.
        alive = lease / 2
        yield find(
            "find_expired_leases", "rescue_document", "doc_id", {"lease_seconds": lease, "alive_seconds": alive},
            alive_seconds=alive, max_crashes=self._settings.max_crashes,
        )  # fmt: skip
        yield find("find_abandoned_jobs", "end_abandoned_job", "job_id", {"grace_seconds": lease}, grace_seconds=lease)
        yield find("find_dead_side_jobs", "requeue_side_job", "job_id", {"grace_seconds": lease, "tasks": SIDE_TASKS})
        yield "_fail_stalled", partial(self._fail_stalled, done)
        yield "forget_dead_workers", partial(self._rows, "forget_dead_workers")

    def _others(self, done: dict[str, int]) -> Iterator[_Step]:
        find, period = partial(self._repair_found, done), self._settings.reconcile_seconds
        yield "_reopen", partial(self._reopen, done)
        yield "_requeue_lost", partial(self._requeue_lost, done)
        yield "_requeue_duplicates", partial(self._requeue_duplicates, done)
        brought = {"most": min(ceil(_BROUGHT_PER_SECOND * period), BROUGHT_AT_ONCE), "seconds": period}
        yield find("find_recovered_services", "bring_forward", "service", {"seconds": period}, **brought)
        yield find("find_idle_budgets", "use_idle_budget", "service", {"seconds": period}, **brought)
        yield find("find_stragglers", "cancel_straggler", "doc_id")
        yield "_requeue_archives", partial(self._requeue_archives, done)
        yield find("find_replaced_documents", "delete_replaced_document", "doc_id")
        yield "queue_reembedding", partial(self._rows, "queue_reembedding", delay=0.0, job_id=None)
        yield find("find_unsettled_batches", "settle_batch", "batch_id")
        yield find("find_summaries_to_renew", "renew_summaries", "batch_id", seconds_at_most=RENEW_SECONDS)
        yield "evaluate_alerts", self._evaluate_alerts

    def _repair_found(
        self,
        done: dict[str, int],
        finder: str,
        repair: str,
        key: str,
        asked: Mapping[str, Any] = {},
        *,
        seconds_at_most: float = inf,
        **params: Any,
    ) -> _Step:
        """Return the step that asks a finder and repairs each thing that it names by `key`, until none is begun any more."""

        async def step() -> None:
            end = clock.seconds() + seconds_at_most
            for row in await self._rows(finder, most=MOST, **asked):
                (found,) = row.values()
                await self._repair(done, repair, **{key: found}, **params)
                if clock.seconds() >= end:
                    return

        return finder, step

    async def _evaluate_alerts(self) -> None:
        """Look at the alert rules unless some worker has lately, and say what has changed."""
        log_changes(await self._rows("evaluate_alerts", every_seconds=RULE_SECONDS))

    async def _reopen(self, done: dict[str, int]) -> None:
        seen = await self._rows("find_batches_to_reopen", after=self._after_batch, window=WINDOW)
        for row in seen:
            if row["reopen"]:
                await self._repair(done, "reopen_batch", batch_id=row["batch_id"])
        self._after_batch = seen[-1]["batch_id"] if len(seen) == WINDOW else ""

    def _disturb(self, now: float) -> None:
        self._awake_since = self._disturbed_at = now

    async def _fail_stalled(self, done: dict[str, int]) -> None:
        """Fail batches that got no further for too long. Time in which this process was paused or the database away does not count."""
        undisturbed = float("inf") if self._disturbed_at is None else clock.seconds() - self._disturbed_at
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
                elif row["forgotten"]:
                    await self._repair(done, "wake_forgotten_equal", doc_id=row["doc_id"])
            self._after = seen[-1]["id"] if len(seen) == WINDOW else 0
            if self._after == 0 or clock.seconds() >= end:
                return

    async def _requeue_duplicates(self, done: dict[str, int]) -> None:
        seen = await self._rows("find_orphaned_duplicates", after=self._after_duplicate, window=WINDOW)
        for row in seen:
            if row["orphaned"]:
                await self._repair(done, "requeue_duplicate", doc_id=row["doc_id"])
        self._after_duplicate = seen[-1]["id"] if len(seen) == WINDOW else 0

    async def _requeue_archives(self, done: dict[str, int]) -> None:
        seen = await self._rows("find_lost_archives", after=self._after_archive, window=WINDOW)
        for row in seen:
            if row["lost"]:
                await self._repair(done, "requeue_lost_archive", archive_id=row["id"], max_requeues=self._settings.max_requeues)
        self._after_archive = seen[-1]["id"] if len(seen) == WINDOW else 0

    async def _repair(self, done: dict[str, int], name: str, **params: Any) -> None:
        """Run one repair, a transaction of its own; one that fails keeps no other from being tried."""
        await faults.at(f"before_repair:{name}", params.get("doc_id", ""))
        self._note(name)
        if name in _JUDGE_WHO_LIVES and not self._may_judge():
            self._doing = ""
            return
        try:
            found = await self._rows(name, **params)
        except psycopg.Error as error:
            end_if_cancelled(error)
            if is_away(error):
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
