"""What workers and time do to the batches of `batch_play`, and how all of it comes to an end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from jobs.batch.unpacking import Unpacker
from jobs.leftovers import remove_noted_files
from jobs.orphans import find_orphans
from jobs.pipeline.claiming import Job
from jobs.reconcile import Reconciler
from jobs.retention import prune_rows
from tests.faults.batch_play import SHIFTS, Play
from tests.faults.batch_world import InProcess, Killed, Source, worker

PATIENCE = 6.0
"""Seconds in which whoever works on small files has ended, or has met the open transaction."""
OTHERS_SECONDS = 60.0
"""How long files may stay noted: transactions that are open anywhere on the server, those of other tests too, keep them from going."""
OPEN = """SELECT doc_id FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')
    UNION ALL SELECT entry_path FROM batch_archives WHERE state IN ('waiting', 'unpacking')
    UNION ALL SELECT batch_id FROM processing_jobs WHERE settled_at IS NULL AND (sealed_at IS NOT NULL OR completed_at IS NULL)
    UNION ALL SELECT batch_id FROM summaries_to_renew"""


class Workers(Play):
    """Everybody who works, and the clock."""

    def _fetch(self, what: str) -> tuple[int, str, dict[str, Any]] | None:
        statement = f"""UPDATE procrastinate_jobs SET status = 'doing' WHERE id = (
            SELECT id FROM procrastinate_jobs WHERE status = 'todo' AND args ? '{what}' ORDER BY priority DESC, id LIMIT 1
            FOR UPDATE SKIP LOCKED) RETURNING id, task_name, args"""
        row = self.conn.execute(statement).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    async def _with_job(self, job: int, work: Awaitable[None]) -> None:
        with suppress(Killed):
            await work
            # Procrastinate's acknowledgement, which refuses a row that was ended meanwhile.
            self.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s AND status = 'doing'", [job])

    async def _watch(self, task: asyncio.Task[None]) -> None:
        """Let somebody work until they end, fall asleep, or wait for the open transaction."""
        until = time.monotonic() + (PATIENCE if self.tx is None else 0.2)
        while not task.done() and id(task) not in self.danger.paused:
            if time.monotonic() > until:
                assert self.tx is not None, "somebody waits for nothing"
                break
            await asyncio.sleep(0)
        self.danger.deed = ""
        for ended in [task for task in self.tasks if task.done()]:
            self.tasks.discard(ended)
            ended.result()

    def _let(self, work: Awaitable[None], deed: str = "", after: int = 0) -> None:
        async def begin() -> None:
            task = asyncio.current_task()
            assert task is not None
            worker.set(task)
            await work

        async def go() -> None:
            task = asyncio.get_running_loop().create_task(begin())
            self.tasks.add(task)
            await self._watch(task)

        self.danger.plan(deed, after)
        self.loop.run(go())

    def unpack(self, deed: str = "", after: int = 0) -> bool:
        if (found := self._fetch("archive_id")) is None:
            return False
        sandbox: Any = lambda _: InProcess(self.danger)  # noqa: E731
        unpacker = Unpacker(settings=self.settings, pool=self.bench.pool, sandbox=sandbox, stopping=lambda: False)
        self._let(self._with_job(found[0], unpacker.run(found[2]["archive_id"])), deed, after)
        return True

    def work(
        self, deed: str = "", after: int = 0, handoff: str = "inline", each: bool = False, fault: tuple[str, str] | None = None
    ) -> bool:
        if (found := self._fetch("doc_id")) is None:
            return False
        runner = self.bench.runner(
            handoff=handoff, checkpoint_seconds=0.0 if each else 1000.0, retry_base_delay_seconds=0.0, duplicate_policy=self.policy
        )
        self.fault = fault
        self._let(self._with_job(found[0], runner.run(Job(found[0], found[1], None), found[2]["doc_id"])), deed, after)
        self.fault = None
        return True

    def work_on_all(self) -> None:
        for _ in range(60):
            if not (self.unpack() or self.work()):
                break

    def wake(self, which: int, deed: str = "", after: int = 0) -> None:
        if self.danger.paused:
            key = list(self.danger.paused)[which % len(self.danger.paused)]
            task, awake = self.danger.paused.pop(key)
            self.danger.plan(deed, after)
            awake.set()
            self.loop.run(self._watch(task))

    def reconcile(self, deed: str = "", after: int = 0) -> None:
        now = {"lease_seconds": 0.0, "reconcile_seconds": 3600.0, "max_crashes": 5, "max_requeues": 500}
        judging = self.settings.model_copy(update={**now, "batch_processing_timeout": self.time_out})

        async def once() -> None:
            with suppress(Killed):
                await Reconciler(judging, self.bench.pool).pass_once()

        self._let(once(), deed, after)

    def jobs_are_due(self) -> None:
        for table, change, which in (
            ("file_extractions", "not_before = NULL", "not_before IS NOT NULL"),
            ("file_extractions", "lease_until = now() - interval '1 s'", "state = 'working'"),
            ("procrastinate_jobs", "scheduled_at = NULL", "status = 'todo' AND scheduled_at IS NOT NULL"),
        ):
            self.conn.execute(f"UPDATE {table} SET {change} WHERE id IN (SELECT id FROM {table} WHERE {which} FOR UPDATE SKIP LOCKED)")

    def time_passes(self, span: str) -> None:
        """Move all that is known of when something was into the past."""
        if self.tx is not None:
            return
        self.conn.execute("SET session_replication_role = replica")
        for (statement,) in self.conn.execute(SHIFTS).fetchall():
            self.conn.execute(statement.replace("$1", f"'{span}'"))
        self.conn.execute("SET session_replication_role = origin")
        if not self.danger.paused:
            self.age_files()

    def age_files(self) -> None:
        for file in self.storage.glob("uploads/*/*"):
            os.utime(file, (time.time() - 10_000, time.time() - 10_000))

    def prune(self) -> None:
        prune_rows(self.settings, self.conn, pause=lambda _: None)
        self.pruned = True

    def remove_files(self) -> None:
        remove_noted_files(self.settings, self.conn)

    def settle(self, source: Source) -> None:
        self.conn.execute("SELECT settle_batch(%s)", [source.batch_id])

    def come_to_an_end(self) -> None:
        """Roll back, wake everybody, and work until nothing is left to do."""
        self.end(commit=False)
        while self.danger.paused:
            self.wake(0)
        quiet = 0
        for number in range(60):
            if number == 30:  # whoever has not submitted all of a batch does not come back
                unsealed = self.conn.execute("SELECT batch_id FROM processing_jobs WHERE sealed_at IS NULL").fetchall()
                assert unsealed != [] and {row[0] for row in unsealed} <= self.vague, self.conn.execute(OPEN).fetchall()
                self.time_out = 0.0
            self.jobs_are_due()
            self.work_on_all()
            self.reconcile()
            quiet = quiet + 1 if not self.tasks and self.conn.execute(OPEN).fetchone() is None else 0
            if quiet == 2:
                break
        assert self.conn.execute(OPEN).fetchall() == []

    def remove_orphans(self) -> None:
        """As far as they are found: one beside a file that is noted is once that one has gone."""
        until = time.monotonic() + OTHERS_SECONDS
        for _ in range(2):
            find_orphans(self.settings, self.conn, believe=True, now=time.time() + 30 * 86_400)
            self.age_files()
            while remove_noted_files(self.settings, self.conn) or (self._is_noted() and time.monotonic() < until):
                time.sleep(0.01)

    def _is_noted(self) -> bool:
        return self.conn.execute("SELECT FROM files_to_remove LIMIT 1").fetchone() is not None

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tx is not None:
            self.tx.close()
        self.bench.leases.close()
        self.loop.run(self.pool.close())
        self.loop.close()
        self.conn.close()
