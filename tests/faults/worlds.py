"""Workers that are killed, frozen and woken within one process, on a clock that goes on when it is told to.

A worker is an event loop of its own which is run until it has nothing to do but wait. One that is killed is never run again, and Postgres
ends its sessions; one that is frozen is run again later. An hour passes by moving what the database knows of times, and all clocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from jobs import clock, faults
from jobs.adapters import exchange
from jobs.adapters.llamaparse import client
from jobs.database import make_pool
from jobs.leases import LeaseKeeper
from jobs.pipeline.claiming import Job
from jobs.pipeline.runner import Runner
from jobs.services import Service as Front
from jobs.services.ledger import Entry
from models.calls import CallPurpose
from models.settings import Settings
from sql import query
from tests.faults.fated import Fated
from tests.faults.in_process import acknowledge
from tests.integration.conftest import Bench

_CALL: ContextVar[str] = ContextVar("call", default="")
_QUIET = 3  # looks in a row at which nobody did anything
_PATIENCE = 5.0  # seconds of real time
_TIMES = {
    "file_extractions": ("lease_until", "not_before", "waiting_since", "updated_at"),
    "procrastinate_jobs": ("scheduled_at",),
    "circuit_breakers": ("try_at", "passes_from", "closed_at", "changed_at"),
    "provider_budgets": ("share_at", "limited_at", "paused_until", "last_send_at", "next_request_at", "next_token_at", "overflow_at"),
    "provider_usage": ("started_at", "give_up_at", "finished_at"),
    "hosted_jobs": ("started_at",),
}


class World:
    """The clock, and whose turn it is."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.offset, self.activity = 0.0, 0
        self.running: Worker | None = None
        real = clock.seconds
        patch.setattr(clock, "seconds", lambda: real() + self.offset)
        patch.setattr(client, "time", SimpleNamespace(monotonic=self.now))
        patch.setattr(faults, "at", self._at)

    def now(self) -> float:
        return time.monotonic() + self.offset

    def shift(self, conn: psycopg.Connection, seconds: int) -> None:
        """Let so many seconds pass."""
        self.offset += seconds
        moves = [f"UPDATE {table} SET {', '.join(f'{name} = {name} - passed' for name in columns)};" for table, columns in _TIMES.items()]
        by = f"DECLARE passed CONSTANT interval := '{seconds} s'; BEGIN"
        conn.execute(f"DO $$ {by} {' '.join(moves)} UPDATE provider_budgets SET slot = greatest(0, slot - {seconds}); END $$".encode())

    async def _at(self, point: str, doc_id: str = "") -> None:
        self.activity += 1
        worker = self.running
        if worker is not None and worker.trap is not None and fnmatchcase(point, worker.trap):
            worker.trap, worker.trapped = None, point
            await worker.released.wait()


class Numbered(Front):
    """Has each request say which call it is."""

    async def _enter(self, purpose: CallPurpose) -> Entry:
        entry = await super()._enter(purpose)
        _CALL.set(str(entry.id))
        return entry


class Telling(exchange.Service):
    def _headers(self) -> dict[str, str]:
        return {**super()._headers(), "x-call": _CALL.get()}


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__()

    def time(self) -> float:
        return super().time() + self._world.offset


class _Threads(ThreadPoolExecutor):
    pending = 0

    def submit(self, *given: Any, **more: Any) -> Future[Any]:
        self.pending += 1
        future = super().submit(*given, **more)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        self.pending -= 1


class _Once:
    """Lets the thread that renews leases look once."""

    def __init__(self) -> None:
        self.left = 1

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0

    def wait(self, _: float) -> None: ...


class _Leases(LeaseKeeper):
    """Renews when it is told to."""

    def start(self) -> None: ...

    def tick(self) -> None:
        self._stop = _Once()  # type: ignore[assignment]
        self._run()


@dataclass(eq=False)
class Worker:
    """One worker. `make` gets its bench and makes its runner, and the ways to services."""

    world: World
    name: str
    conn: psycopg.Connection
    settings: Settings
    conninfo: str
    servers: list[Fated]
    make: Callable[[Worker], tuple[Runner, list[Front]]]
    trap: str | None = None
    """A point at which it stops in mid-step."""
    trapped: str | None = None
    frozen: bool = False
    dead: bool = False
    tasks: dict[asyncio.Task[None], tuple[Job, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop, self.threads = _Loop(self.world), _Threads(4)
        self.loop.set_default_executor(self.threads)
        self.released = asyncio.Event()
        self.pool = make_pool(self.settings, self.conninfo)
        self.pool.kwargs["application_name"] = self.name  # type: ignore[index]
        self.leases = _Leases(self.settings, self.conninfo)
        self.bench = Bench(self.conn, self.pool, self.settings, self.leases)
        self.wait_for(self.pool.open())
        self.runner, self.fronts = self.make(self)

    @property
    def stopping(self) -> bool:
        return self.bench.stopping

    def wait_for(self, coroutine: Any) -> Any:
        before, self.world.running = self.world.running, self
        try:
            return self.loop.run_until_complete(coroutine)
        finally:
            self.world.running = before

    @property
    def in_hand(self) -> set[str]:
        return {doc_id for _, doc_id in self.tasks.values()} | set(self.leases.held())

    def take(self, count: int) -> None:
        """Fetch jobs that are due, and begin."""
        for _ in range(count):
            given = {"queues": None, "worker_id": None, "after_user": "", "others_first": True, "max_documents": 0}
            row = self.conn.execute(query("fetch_job"), given).fetchone()
            if row is None or row[0] is None:
                break
            job, doc_id = Job(row[0], row[2], None), row[6]["doc_id"]
            self.tasks[self.loop.create_task(self.runner.run(job, doc_id))] = (job, doc_id)
        self.step()

    def step(self) -> None:
        """Run until there is nothing to do but wait, or the trap is reached."""
        if self.dead or self.frozen:
            return
        self.wait_for(self._settle())
        for task in [task for task in self.tasks if task.done()]:
            job, _ = self.tasks.pop(task)
            if not task.cancelled():
                task.result()
            acknowledge(self.conn, job.id)

    async def _settle(self) -> None:
        quiet, end = 0, time.monotonic() + _PATIENCE
        while quiet < _QUIET and time.monotonic() < end and self.trapped is None:
            before = self.world.activity
            await asyncio.sleep(0.002 if quiet else 0)
            stats = self.pool.get_stats()
            busy = self.threads.pending or stats["pool_size"] != stats["pool_available"] or any(server.busy() for server in self.servers)
            quiet = 0 if busy or self.world.activity != before else quiet + 1

    def wake(self, *, leases_first: bool) -> None:
        self.frozen, self.trapped = False, None
        self.released.set()
        self.released = asyncio.Event()
        if leases_first:
            self.leases.tick()
        self.step()
        self.leases.tick()
        self.step()

    def kill(self) -> None:
        self.dead = True
        self.leases._drop_connection()
        self.conn.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s", [self.name])

    def stop(self, *, at_once: bool) -> None:
        """Ask it to stop; `at_once`: its grace is over."""
        self.bench.stopping = True
        if at_once:
            for task in self.tasks:
                task.cancel()
            end = time.monotonic() + 20
            while self.tasks and time.monotonic() < end and self.trapped is None:
                self.step()
        self.step()

    def bury(self) -> None:
        """End what is left of it, without a database."""
        self.bench.stopping = True
        self.trap = None
        self.wait_for(self._end())
        self.leases._drop_connection()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def _end(self) -> None:
        if not self.dead:
            for front in self.fronts:
                await front.aclose()
        await self.pool.close_cancelled()
        here = asyncio.current_task()
        for _ in range(5):
            if not (left := [task for task in asyncio.all_tasks() if task is not here]):
                break
            for task in left:
                task.cancel()
            with suppress(TimeoutError):
                await asyncio.wait(left, timeout=2)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.exception()
