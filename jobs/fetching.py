"""How this worker gets its jobs: user by user, so that nobody's backlog stands in another's way. See docs/decisions/0006-fair-share.md."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from procrastinate.connector import BaseConnector
from procrastinate.jobs import Job
from procrastinate.manager import JobManager

from jobs.outages import outlive
from sql import query

_SIGN_OFF_SECONDS = 3.0
_CLAIM_SECONDS = 0.2  # most that a fetch waits for the claim before it


class DocmillJobManager(JobManager):
    """Procrastinate's own statements, except that jobs are fetched fairly, the first outlives an outage and the last waits for none."""

    def __init__(self, connector: BaseConnector, *, max_documents_per_user: int) -> None:
        """`max_documents_per_user`: in work at once, over all workers; 0 for any number."""
        super().__init__(connector)
        self._max_documents = max_documents_per_user
        self._served = ""
        self._others_first = True
        self._wake_ups = 0
        self._claimed = asyncio.Event()
        self._claimed.set()
        self.takes_along: frozenset[str] = frozenset()
        """Stages for which whoever claims a document takes others along: then no more is fetched until it has, or each would be left with
        few."""

    def claimed(self) -> None:
        """Say that the job that was fetched last has its documents, or gets none."""
        self._claimed.set()

    def wake(self) -> None:
        """Say that there may be work again: a fetch that finds nothing meanwhile looks once more, because it may have looked too early."""
        self._wake_ups += 1

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        """Take the job whose turn it is and mark it as doing; None if there is none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLAIM_SECONDS):
                await self._claimed.wait()
        while True:
            before = self._wake_ups
            row = await self.connector.execute_query_one_async(
                query=query("fetch_job"),
                queues=queues,
                worker_id=worker_id,
                after_user=self._served,
                others_first=self._others_first,
                max_documents=self._max_documents,
            )
            if row["id"] is not None:
                # Jobs that are nobody's take turns with all users', unless their priority is below 0.
                self._others_first = row["docmill_user"] != ""
                self._served = row["docmill_user"] or self._served
                if row["task_name"] in self.takes_along:
                    self._claimed.clear()
                return Job.from_row(row)
            if before == self._wake_ups:
                return None

    async def register_worker(self) -> int:
        """Register this process, once the database answers."""
        worker_id: int = await outlive("Registering", super().register_worker)
        return worker_id

    async def prune_stalled_workers(self, seconds_since_heartbeat: float) -> list[int]:
        """Remove the rows of workers that died, once the database answers."""
        prune = super().prune_stalled_workers
        pruned: list[int] = await outlive("Pruning workers", lambda: prune(seconds_since_heartbeat))
        return pruned

    async def unregister_worker(self, worker_id: int) -> None:
        """Sign off, or raise TimeoutError where the database is away: other workers remove the row then."""
        async with asyncio.timeout(_SIGN_OFF_SECONDS):
            await super().unregister_worker(worker_id)
