"""13: random schedules of submitting, running, crashing, stalling, retrying, cancelling, deleting and requeueing against the real schema.

In one process, with plain stages, so that hypothesis can try and shrink thousands of interleavings. A crash is an exception that nothing
catches: what the worker held stays as it lay, as after kill -9. Time passes only when a rule says so.
"""

from __future__ import annotations

import asyncio
from functools import partial

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from jobs.database import make_pool
from jobs.leases import LeaseKeeper
from jobs.pipeline.claiming import Job
from jobs.reconcile import Reconciler
from models.documents import Document
from models.errors import ParseError, RetryableError
from models.settings import Settings
from tests.faults.invariant import DOUBLED, LEFT, LOST
from tests.integration.conftest import STAGE_NAMES, Bench

DOCUMENTS = ["a", "b", "c"]
EMPTY = """SET docmill.prune = 'on';
TRUNCATE file_extractions, processing_jobs, document_markdown, document_chunks, chunk_buffer, vector_buffer,
    extraction_buffer, extraction_answers, hosted_jobs, document_events, dead_letters, run_summaries, alerts, worker_registry,
    files_to_remove,
    procrastinate_jobs, procrastinate_events, procrastinate_periodic_defers CASCADE"""


class Killed(BaseException):
    """The process is gone."""


class Schedule(RuleBasedStateMachine):
    """Three documents with two contents, any number of workers."""

    conninfo: str
    base: Settings

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.conn = psycopg.connect(self.conninfo, autocommit=True)
        self.conn.execute(EMPTY)
        self.paused: dict[int, tuple[asyncio.Task[None], asyncio.Event, Job]] = {}
        self.plan: tuple[str, str] | None = None
        self.submitted: dict[str, str] = {}
        self.policy = "reuse"
        self.runs: set[asyncio.Task[None]] = set()
        self.bench = self.loop.run(self._bench())

    async def _bench(self) -> Bench:
        pool = make_pool(self.base, self.conninfo)
        await pool.open()
        # A lease keeper that never ticks: leases run out when a rule says so.
        bench = Bench(self.conn, pool, self.base, LeaseKeeper(self.base.model_copy(update={"lease_seconds": 3600.0}), self.conninfo))
        bench.also.update({name: partial(self._meet, name) for name in STAGE_NAMES})
        return bench

    async def _meet(self, stage: str, document: Document) -> None:
        """Do in a stage what the plan says."""
        if self.plan is None or self.plan[0] != stage:
            return
        deed, self.plan = self.plan[1], None
        match deed:
            case "kill":
                raise Killed
            case "retry":
                raise RetryableError("busy")
            case "fail":
                raise ParseError("broken")
            case "stall":
                awake = asyncio.Event()
                task = asyncio.current_task()
                assert task is not None
                self.paused[id(task)] = (task, awake, Job(0, stage, None))
                await awake.wait()

    async def _run_job(self, job: Job, doc_id: str, handoff: str, checkpoint_seconds: float) -> None:
        runner = self.bench.runner(
            handoff=handoff, checkpoint_seconds=checkpoint_seconds, retry_base_delay_seconds=0.0, duplicate_policy=self.policy
        )
        try:
            await runner.run(job, doc_id)
        except Killed:
            return
        # Procrastinate's acknowledgement, which refuses a row that was ended meanwhile.
        self.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s AND status = 'doing'", [job.id])

    async def _step(self, task: asyncio.Task[None]) -> None:
        """Let a run go on until it ends or stalls."""
        while not task.done() and id(task) not in self.paused:  # noqa: ASYNC110 - either of the two may come
            await asyncio.sleep(0)

    @rule(doc_id=st.sampled_from(DOCUMENTS), content=st.sampled_from("12"))
    def submit(self, doc_id: str, content: str) -> None:
        self.bench.submit(doc_id, content)
        self.submitted[doc_id] = content

    @rule(
        stage=st.sampled_from(STAGE_NAMES),
        deed=st.sampled_from(["kill", "retry", "fail", "stall", "stall", "nothing"]),
        handoff=st.sampled_from(["inline", "queue"]),
        each=st.booleans(),
    )
    def work(self, stage: str, deed: str, handoff: str, each: bool) -> None:
        found = self.bench.fetch()
        if found is None:
            return
        self.plan = (stage, deed)

        async def go() -> None:
            task = asyncio.get_running_loop().create_task(self._run_job(*found, handoff, 0.0 if each else 1000.0))
            self.runs.add(task)
            await self._step(task)

        self.loop.run(go())
        self.plan = None

    @initialize(policy=st.sampled_from(["reuse", "skip", "process"]))
    def choose(self, policy: str) -> None:
        self.policy = policy

    @precondition(lambda self: bool(self.paused))
    @rule(which=st.integers(0, 9))
    def wake(self, which: int) -> None:
        key = list(self.paused)[which % len(self.paused)]
        task, awake, _ = self.paused.pop(key)
        awake.set()
        self.loop.run(self._step(task))

    @rule()
    def time_passes(self) -> None:
        self.conn.execute("UPDATE file_extractions SET lease_until = now() - interval '1 s' WHERE state = 'working'")
        self.conn.execute("UPDATE file_extractions SET not_before = NULL WHERE not_before IS NOT NULL")
        self.conn.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL WHERE status = 'todo'")

    @rule()
    def reconcile(self) -> None:
        judging = self.base.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 3600.0, "max_crashes": 3, "max_requeues": 50})
        self.loop.run(Reconciler(judging, self.bench.pool).pass_once())

    @rule(doc_id=st.sampled_from(DOCUMENTS))
    def cancel(self, doc_id: str) -> None:
        if self.conn.execute("SELECT FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone() is not None:
            self.conn.execute("SELECT cancel_document(%s)", [doc_id])

    @rule(doc_id=st.sampled_from(DOCUMENTS))
    def delete(self, doc_id: str) -> None:
        self.conn.execute("SELECT delete_document(%s)", [doc_id])
        self.submitted.pop(doc_id, None)

    @rule(doc_id=st.sampled_from(DOCUMENTS))
    def requeue(self, doc_id: str) -> None:
        if self.conn.execute("SELECT FROM file_extractions WHERE doc_id = %s AND state = 'failed'", [doc_id]).fetchone() is not None:
            self.conn.execute("SELECT requeue_document(%s)", [doc_id])

    @invariant()
    def readers_never_see_half_a_document_or_an_old_version(self) -> None:
        for words in ("has two passages in one place", "shows passages of a superseded version", "has two open dead letters"):
            assert self.conn.execute(DOUBLED[words]).fetchall() == [], words
        half = """SELECT d.doc_id FROM file_extractions d WHERE d.served_version IS NOT NULL
            AND 5 <> (SELECT count(*) FROM document_chunks c WHERE c.doc_id = d.doc_id AND c.version = d.served_version)"""
        assert self.conn.execute(half).fetchall() == []

    def teardown(self) -> None:
        try:
            self._end_everything()
        finally:
            for task in self.runs:
                task.cancel()
            self.bench.leases.close()
            self.loop.run(self.bench.pool.close())
            self.loop.close()
            self.conn.close()

    def _end_everything(self) -> None:
        while self.paused:
            self.wake(0)
        for _ in range(200):
            self.time_passes()
            self.reconcile()
            if (found := self.bench.fetch()) is not None:
                self.loop.run(self._run_job(*found, "inline", 1000.0))
                continue
            unfinished = "SELECT FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"
            if self.conn.execute(unfinished).fetchone() is None:
                break
        for words, statement in {**LOST, **DOUBLED, **LEFT}.items():
            assert self.conn.execute(statement).fetchall() == [], words
        there = self.conn.execute("SELECT doc_id, content_sha256 FROM file_extractions").fetchall()
        assert dict(there) == {doc_id: content * 64 for doc_id, content in self.submitted.items()}, (
            "what was deleted is gone, the rest is not"
        )
        for doc_id, version, title in self.conn.execute(
            "SELECT doc_id, served_version, raw_extraction->>'title' FROM file_extractions WHERE served_version IS NOT NULL"
        ).fetchall():
            assert title == f"text of {doc_id} version {version}"


def run(database: str, base: Settings, examples: int, steps: int) -> None:
    class OnThisDatabase(Schedule):
        conninfo = database

    OnThisDatabase.base = base
    run_state_machine_as_test(
        OnThisDatabase,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
        ),
    )


def test_no_random_schedule_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    run(database, settings, 25, 25)


@pytest.mark.long
def test_no_long_random_schedule_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    run(database, settings, 1000, 50)
