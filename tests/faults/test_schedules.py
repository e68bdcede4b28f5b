"""13: random schedules of submitting, running, crashing, stalling, retrying, cancelling, deleting and requeueing against the real schema.

In one process, with plain stages, so that hypothesis can try and shrink thousands of interleavings.
"""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.settings import Settings
from tests.faults.in_process import Danger, Workers, play
from tests.faults.invariant import ALWAYS, IN_THE_END, ask
from tests.integration.conftest import STAGE_NAMES

DOCUMENTS = ["a", "b", "c"]


class Schedule(Workers, RuleBasedStateMachine):
    """Three documents with two contents, any number of workers."""

    def __init__(self, conninfo: str, base: Settings) -> None:
        RuleBasedStateMachine.__init__(self)
        Workers.__init__(self, conninfo, base, Danger())
        self.submitted: dict[str, str] = {}

    @rule(doc_id=st.sampled_from(DOCUMENTS), content=st.sampled_from("12"))
    def submit(self, doc_id: str, content: str) -> None:
        self.bench.submit(doc_id, content)
        self.submitted[doc_id] = content

    @rule(
        stage=st.sampled_from(STAGE_NAMES),
        deed=st.sampled_from(["kill", "retry", "fail", "pause", "pause", "nothing"]),
        handoff=st.sampled_from(["inline", "queue"]),
        each=st.booleans(),
    )
    def work(self, stage: str, deed: str, handoff: str, each: bool) -> None:
        self.nobody_waits()
        self.danger.plan(in_stage=(stage, deed))
        self.take("doc_id", handoff=handoff, checkpoint_seconds=0.0 if each else 1000.0)

    @initialize(policy=st.sampled_from(["reuse", "skip", "process"]))
    def choose(self, policy: str) -> None:
        self.policy = policy

    @precondition(lambda self: bool(self.danger.paused))
    @rule(which=st.integers(0, 9))
    def wake_one(self, which: int) -> None:
        self.wake(which)

    @rule()
    def time_passes(self) -> None:
        self.jobs_are_due()

    @rule()
    def reconcile(self) -> None:
        self.repair(max_crashes=3, max_requeues=50)

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
        assert ask(self.conn, ALWAYS) == {}
        half = """SELECT d.doc_id FROM file_extractions d WHERE d.served_version IS NOT NULL
            AND 5 <> (SELECT count(*) FROM document_chunks c WHERE c.doc_id = d.doc_id AND c.version = d.served_version)"""
        assert self.conn.execute(half).fetchall() == []

    def teardown(self) -> None:
        try:
            self._end_everything()
        finally:
            self.close()

    def _end_everything(self) -> None:
        while self.danger.paused:
            self.wake(0)
        for _ in range(200):
            self.time_passes()
            self.reconcile()
            if self.take("doc_id", handoff="inline", checkpoint_seconds=1000.0):
                continue
            unfinished = "SELECT FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"
            if self.conn.execute(unfinished).fetchone() is None:
                break
        assert ask(self.conn, IN_THE_END) == {}
        there = self.conn.execute("SELECT doc_id, content_sha256 FROM file_extractions").fetchall()
        assert dict(there) == {doc_id: content * 64 for doc_id, content in self.submitted.items()}, (
            "what was deleted is gone, the rest is not"
        )
        for doc_id, version, title in self.conn.execute(
            "SELECT doc_id, served_version, raw_extraction->>'title' FROM file_extractions WHERE served_version IS NOT NULL"
        ).fetchall():
            assert title == f"text of {doc_id} version {version}"


def test_no_random_schedule_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    play(lambda: Schedule(database, settings), 25, 25)


@pytest.mark.long
def test_no_long_random_schedule_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    play(lambda: Schedule(database, settings), 1000, 50)
