"""13: random schedules of submitting, running, crashing, pausing, retrying, cancelling, deleting and requeueing against the real schema.

In one process, with plain stages. Each schedule comes of its number; one that goes wrong is made shorter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import LiteralString

import pytest

from models.settings import Settings
from tests.faults.in_process import Danger, Workers
from tests.faults.invariant import ALWAYS, IN_THE_END, ask
from tests.faults.seeded import Draws, Step, play_all

DOCUMENTS = ["a", "b", "c"]
FATES = ["kill", "retry", "fail", "pause", "pause", "pause", "nothing"]
"""What becomes of whoever works, in one of the next stages."""
HALF = """SELECT d.doc_id FROM file_extractions d WHERE d.served_version IS NOT NULL
    AND 5 <> (SELECT count(*) FROM document_chunks c WHERE c.doc_id = d.doc_id AND c.version = d.served_version)"""


class Schedule(Draws):
    """Three documents with two contents, any number of workers."""

    def __iter__(self) -> Iterator[Step]:
        yield "submit", {"doc_id": "a", "content": "1"}
        for _ in range(self.pick([15, 30, 60])):
            document = {"doc_id": self.pick(DOCUMENTS)}
            fate = {"deed": self.pick(FATES), "after": self.pick([0, 0, 0, 1, 2, 4, 6])}
            work = {**fate, "handoff": self.pick(["inline", "inline", "queue"]), "each": self.chance(0.5)}
            yield self.weighted(
                {
                    "submit": (6, {**document, "content": self.pick("12")}),
                    "work": (8, work),
                    "wake": (5, {"which": self.random.randint(0, 9)}),
                    "take_over": (4, work),
                    "jobs_are_due": (2, {}),
                    "reconcile": (2, {}),
                    "cancel": (2, document),
                    "delete": (1, document),
                    "requeue": (3, document),
                }
            )


class Documents(Workers):
    """What is done, and what must come of it."""

    def __init__(self, conninfo: str, settings: Settings, policy: str) -> None:
        super().__init__(conninfo, settings, Danger())
        self.policy = policy
        self.submitted: dict[str, str] = {}

    def submit(self, doc_id: str, content: str) -> None:
        self.bench.submit(doc_id, content)
        self.submitted[doc_id] = content

    def work(self, deed: str, after: int, handoff: str, each: bool) -> None:
        self.nobody_waits()
        self.danger.plan(deed, after)
        self.take("doc_id", handoff=handoff, checkpoint_seconds=0.0 if each else 1000.0)

    def reconcile(self) -> None:
        self.repair(max_crashes=3, max_requeues=50)

    def take_over(self, deed: str, after: int, handoff: str, each: bool) -> None:
        """Work on what somebody who is paused had in hand, perhaps."""
        self.jobs_are_due()
        self.reconcile()
        self.work(deed, after, handoff, each)

    def cancel(self, doc_id: str) -> None:
        if self._state(doc_id) is not None:
            self.conn.execute("SELECT cancel_document(%s)", [doc_id])

    def delete(self, doc_id: str) -> None:
        self.conn.execute("SELECT delete_document(%s)", [doc_id])
        self.submitted.pop(doc_id, None)

    def requeue(self, doc_id: str) -> None:
        if self._state(doc_id) == "failed":
            self.conn.execute("SELECT requeue_document(%s)", [doc_id])

    def _state(self, doc_id: str) -> str | None:
        row = self.conn.execute("SELECT state FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone()
        return None if row is None else row[0]

    def readers_see_whole_documents_of_the_served_version(self) -> None:
        assert ask(self.conn, ALWAYS) == {}
        assert self.conn.execute(HALF).fetchall() == []

    def come_to_an_end(self) -> None:
        unfinished: LiteralString = "SELECT FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"
        while self.danger.paused:
            self.wake(0)
        for _ in range(200):
            self.jobs_are_due()
            self.reconcile()
            if not self.take("doc_id", handoff="inline", checkpoint_seconds=1000.0) and self.conn.execute(unfinished).fetchone() is None:
                break
        assert ask(self.conn, IN_THE_END) == {}
        there: dict[str, str] = dict(self.conn.execute("SELECT doc_id, content_sha256 FROM file_extractions").fetchall())
        assert there == {doc_id: content * 64 for doc_id, content in self.submitted.items()}, "what was deleted is gone, the rest is not"
        served = "SELECT doc_id, served_version, raw_extraction->>'title' FROM file_extractions WHERE served_version IS NOT NULL"
        for doc_id, version, title in self.conn.execute(served).fetchall():
            assert title == f"text of {doc_id} version {version}"


def run(database: str, settings: Settings, seeds: range) -> None:
    def play(seed: int, steps: list[Step]) -> Exception | None:
        documents = Documents(database, settings, ["reuse", "skip", "process"][seed % 3])
        try:
            for name, how in steps:
                getattr(documents, name)(**how)
                documents.readers_see_whole_documents_of_the_served_version()
            documents.come_to_an_end()
        except Exception as error:
            return error
        finally:
            documents.close()
        return None

    play_all(seeds, Schedule, play)


def test_no_random_schedule_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    run(database, settings, range(12))


@pytest.mark.long
def test_no_schedule_among_many_loses_or_doubles_anything(database: str, settings: Settings) -> None:
    start = int(os.environ.get("DOCMILL_FIRST_SCHEDULE", "12"))
    run(database, settings, range(start, start + 1000))
