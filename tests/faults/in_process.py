"""Workers within the test's own process, which take one job at a time, and die, fall asleep and wake up when a schedule says so.

A death is an exception that nothing catches: what the worker held stays as it lay, as after kill -9. Time passes only when a rule says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import psycopg

from jobs.adapters.sandbox_child import Answer
from jobs.batch.unpacking import Unpacker
from jobs.database import Pool, make_pool
from jobs.leases import LeaseKeeper
from jobs.pipeline.claiming import Job
from jobs.pipeline.runner import Runner
from jobs.reconcile import Reconciler
from jobs.stages import SandboxCall
from models.documents import Document
from models.errors import ParseError, RetryableError
from models.settings import Settings
from tests.integration.conftest import STAGE_NAMES, Bench

PATIENCE = 30.0
"""Seconds in which whoever works on small files has ended: many, should the machine be busy."""
EMPTY = """SET docmill.prune = 'on';
TRUNCATE file_extractions, processing_jobs, document_markdown, document_chunks, chunk_buffer, vector_buffer,
    extraction_buffer, extraction_answers, hosted_jobs, document_events, dead_letters, run_summaries, summaries_to_renew,
    alerts, alert_conditions, worker_registry, files_to_remove,
    procrastinate_jobs, procrastinate_events, procrastinate_periodic_defers CASCADE"""
WAITING = """SELECT id, task_name, args FROM procrastinate_jobs
    WHERE status = 'todo' AND args ?| %s AND (%s OR coalesce(scheduled_at, now()) <= now()) ORDER BY priority DESC, id
    FOR UPDATE SKIP LOCKED"""

_worker: ContextVar[asyncio.Task[Any]] = ContextVar("worker")
"""The task of whoever works, whatever tasks of their own they have begun."""


class Killed(BaseException):
    """The process is gone."""


class Danger:
    """What is to happen to whoever works: a deed after some of their steps, or in a stage."""

    def __init__(self) -> None:
        self.plan()
        self.holding = 0
        """Connections that are in use: who holds one is killed, but not paused, because the database would end its transaction."""
        self.paused: dict[asyncio.Task[Any], asyncio.Event] = {}

    def plan(self, deed: str = "", after: int = 0, in_stage: tuple[str, str] | None = None) -> None:
        self.deed, self.left, self.in_stage = deed, after, in_stage

    async def step(self) -> None:
        if not self.deed:
            return
        self.left -= 1
        if self.left < 0 and not (self.deed == "pause" and self.holding):
            deed, self.deed = self.deed, ""
            await self._do(deed)

    async def meet(self, stage: str, _: Document) -> None:
        await self.step()
        if self.in_stage is not None and self.in_stage[0] == stage:
            deed, self.in_stage = self.in_stage[1], None
            await self._do(deed)

    async def _do(self, deed: str) -> None:
        match deed:
            case "kill":
                raise Killed
            case "retry":
                raise RetryableError("busy")
            case "fail":
                raise ParseError("broken")
            case "pause":
                awake = self.paused[_worker.get()] = asyncio.Event()
                await awake.wait()


class Sandbox:
    """Does in this process what a sandbox does in a child: thousands of children would take most of the time."""

    async def run(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        return function(*args, **named)

    async def run_each(self, calls: Sequence[SandboxCall]) -> list[Answer]:
        return [Answer(None, await self.run(function, *args, **named), 0.0, 0.0) for function, args, named in calls]

    async def aclose(self) -> None:
        """Nothing to end."""


def acknowledge(conn: psycopg.Connection, job: int) -> None:
    """End a job as procrastinate does, which refuses a row that was ended meanwhile."""
    conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s AND status = 'doing'", [job])


class Workers:
    """The workers of one event loop, over an empty database. `using`: the pool as they use it."""

    def __init__(self, conninfo: str, settings: Settings, danger: Danger, using: Callable[[Pool], Any] = lambda pool: pool) -> None:
        self.conninfo, self.settings, self.danger, self.policy = conninfo, settings, danger, "reuse"
        self.sandbox = Sandbox()
        self.tasks: set[asyncio.Task[None]] = set()
        self.tx: psycopg.Connection[Any] | None = None
        """Somebody's open transaction, for which they may wait."""
        self.loop = asyncio.Runner()
        self.conn = psycopg.connect(conninfo, autocommit=True)
        self.conn.execute(EMPTY)
        self.pool = self.loop.run(self._pool())
        # A lease keeper that never ticks: leases run out when a rule says so.
        leases = LeaseKeeper(settings.model_copy(update={"lease_seconds": 3600.0}), conninfo)
        self.bench = Bench(self.conn, using(self.pool), settings, leases)
        self.bench.also.update({name: partial(danger.meet, name) for name in STAGE_NAMES})

    async def _pool(self) -> Pool:
        pool = make_pool(self.settings, self.conninfo)
        await pool.open()
        return pool

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tx is not None:
            self.tx.close()
        self.bench.leases.close()
        self.loop.run(self.pool.close())
        self.loop.close()
        self.conn.close()

    def take(self, *named: str, which: int = 0, due: bool = False, **changes: Any) -> bool:
        """Do one of the jobs whose arguments name one of these, a `doc_id` or an `archive_id`; False if none waits.

        `due`: none that waits for its time. `changes`: settings that are others.
        """
        if found := self.conn.execute(WAITING, [list(named), not due]).fetchall():
            job, task, args = found[which % len(found)]
            self.conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE id = %s", [job])
            self.let(self._work(job, task, args, changes))
        self.danger.plan()
        return found != []

    async def _work(self, job: int, task: str, args: dict[str, Any], changes: dict[str, Any]) -> None:
        if task == "unpack":
            sandbox: Any = lambda _: self.sandbox  # noqa: E731
            unpacker = Unpacker(settings=self.settings, pool=self.bench.pool, sandbox=sandbox, stopping=lambda: False)
            await unpacker.run(args["archive_id"])
        else:
            await self.runner(**changes).run(Job(job, task, None), args["doc_id"])
        acknowledge(self.conn, job)

    def runner(self, **changes: Any) -> Runner:
        return self.bench.runner(**{"retry_base_delay_seconds": 0.0, "duplicate_policy": self.policy, **changes})

    def let(self, work: Awaitable[object]) -> None:
        """Let somebody work until they end, fall asleep, or wait for the open transaction."""

        async def begin() -> None:
            task = asyncio.current_task()
            assert task is not None
            _worker.set(task)
            with suppress(Killed):
                await work

        async def go() -> None:
            task = asyncio.get_running_loop().create_task(begin())
            self.tasks.add(task)
            await self._watch(task)

        self.loop.run(go())

    async def _watch(self, task: asyncio.Task[None]) -> None:
        until = time.monotonic() + (PATIENCE if self.tx is None else 0.2)
        while not task.done() and task not in self.danger.paused:
            if time.monotonic() > until:
                assert self.tx is not None, "somebody waits for nothing"
                break
            await asyncio.sleep(0)
        self.danger.plan()
        for ended in [task for task in self.tasks if task.done()]:
            self.tasks.discard(ended)
            ended.result()

    def wake(self, which: int, deed: str = "", after: int = 0) -> None:
        """Let one of those that are paused go on, if there is one."""
        if self.danger.paused:
            self.danger.plan(deed, after)
            task = list(self.danger.paused)[which % len(self.danger.paused)]
            self.danger.paused.pop(task).set()
            self.loop.run(self._watch(task))

    def repair(self, **limits: Any) -> None:
        """Have a reconciler that waits for no lease look once."""
        judging = self.settings.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 3600.0, **limits})
        self.let(Reconciler(judging, self.bench.pool).pass_once())

    def jobs_are_due(self) -> None:
        """Let leases run out, and what waits be due, but for what a transaction holds."""
        for table, change, which in (
            ("file_extractions", "not_before = NULL", "not_before IS NOT NULL"),
            ("file_extractions", "lease_until = now() - interval '1 s'", "state = 'working'"),
            ("procrastinate_jobs", "scheduled_at = NULL", "status = 'todo' AND scheduled_at IS NOT NULL"),
        ):
            self.conn.execute(f"UPDATE {table} SET {change} WHERE id IN (SELECT id FROM {table} WHERE {which} FOR UPDATE SKIP LOCKED)")

    def nobody_waits(self) -> None:
        self.conn.execute("UPDATE file_extractions SET not_before = NULL WHERE not_before IS NOT NULL")
