"""13: random schedules of what people do to a folder, of syncs that are killed at any statement, and of workers that die.

A plain model says what a search must find: in the end just what lies there, and at all times what lies there unchanged, or was moved.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jobs.front import close_async
from jobs.leftovers import remove_noted_files
from jobs.orphans import find_orphans
from jobs.retention import prune_rows
from models.settings import Settings
from tests.faults.folders import INNER, PLACES, TEXTS, same_time
from tests.faults.in_process import Danger, play
from tests.faults.synced_folder import SyncedFolder

POLICIES = ["reuse", "reuse", "skip", "process"]
WHERE = ["", "", INNER]
places = st.sampled_from(PLACES)
texts = st.sampled_from(TEXTS)
entries = st.fixed_dictionaries(
    {},
    optional={
        "one.txt": texts,
        "in/two.txt": texts,
        "deep.zip": st.one_of(st.none(), st.fixed_dictionaries({}, optional={"one.txt": texts, "three.txt": texts})),
        "damaged.txt": st.just("text one.\n"),
    },
)
archives = st.one_of(st.none(), entries, entries, entries)


class Folder(SyncedFolder, RuleBasedStateMachine):
    """What people, operators, syncs and workers do."""

    def __init__(self, conninfo: str, settings: Settings, danger: Danger, place: Path) -> None:
        RuleBasedStateMachine.__init__(self)
        SyncedFolder.__init__(self, conninfo, settings, danger, place)

    # What people do.

    @rule(place=places, text=texts)
    def write(self, place: str, text: str) -> None:
        self.overwritten(place)
        self.tree.put(place, text)

    @rule(place=st.sampled_from(["z.zip", "d/z.zip", "x", "a.txt"]), content=archives)
    def pack(self, place: str, content: Any) -> None:
        self.overwritten(place)
        self.tree.put(place, content)

    @rule(place=places, text=texts)
    def write_without_a_trace(self, place: str, text: str) -> None:
        if place in self.tree.files():
            self.overwritten(place)
            same_time(self.place / place, lambda: (self.place / place).write_text(text))

    @rule(place=places)
    def touch(self, place: str) -> None:
        if place in self.tree.files():
            (self.place / place).touch()

    @rule(place=places)
    def delete(self, place: str) -> None:
        if place in self.tree.files():
            self.overwritten(place)
            (self.place / place).unlink()

    @rule(place=places, other=places)
    def copy(self, place: str, other: str) -> None:
        if place != other and place in self.tree.files():
            self.overwritten(other)
            (self.place / other).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(self.place / place, self.place / other)

    @rule(place=places, other=places)
    def move(self, place: str, other: str) -> None:
        if place != other and place in self.tree.files():
            fresh = place in self.fresh
            if fresh and self.tree.is_archive(place):
                self.covered.pop(place, None)
            taken = {key: (home, False) for key, (home, _) in self.covered.pop(place, {}).items()}
            self.overwritten(other)
            self.fresh -= set() if fresh else {other}
            (self.place / other).parent.mkdir(exist_ok=True, parents=True)
            (self.place / place).replace(self.place / other)
            self.covered[other] = {key: cover for key, cover in taken.items() if cover[0] != other}
            self.settled.pop(place, None)

    @rule(place=places, other=places)
    def swap(self, place: str, other: str) -> None:
        if place != other and {place, other} <= set(self.tree.files()):
            self.overwritten(place)
            self.overwritten(other)
            aside = self.place / ".aside"
            (self.place / place).replace(aside)
            (self.place / other).replace(self.place / place)
            aside.replace(self.place / other)

    @rule(out=st.booleans())
    def move_a_folder(self, out: bool) -> None:
        self.move(*(("d/e/b.txt", "e/b.txt") if out else ("e/b.txt", "d/e/b.txt")))

    # What operators do.

    def some(self, which: int) -> tuple[str, int, str | None] | None:
        rows = self.conn.execute("SELECT doc_id, id, content_sha256 FROM file_extractions ORDER BY doc_id").fetchall()
        return rows[which % len(rows)] if rows else None

    @rule(which=st.integers(0, 9))
    def cancel_document(self, which: int) -> None:
        if (found := self.some(which)) is not None:
            self.conn.execute("SELECT cancel_document(%s)", [found[0]])
            self.note_cancelled()

    @rule(which=st.integers(0, 9))
    def delete_document(self, which: int) -> None:
        if (found := self.some(which)) is not None:
            self.conn.execute("SELECT delete_document(%s)", [found[0]])
            self.covered, self.settled = {}, {}

    @rule(which=st.integers(0, 9))
    def requeue_document(self, which: int) -> None:
        rows = self.conn.execute("SELECT doc_id FROM file_extractions d WHERE state = 'failed' AND NOT is_refused_entry(d)").fetchall()
        if rows:
            self.conn.execute("SELECT requeue_document(%s)", rows[which % len(rows)])

    @rule(where=st.sampled_from(WHERE))
    def cancel_batch(self, where: str) -> None:
        if self.conn.execute("SELECT FROM processing_jobs WHERE batch_id = %s", [self.batch(where)]).fetchone() is not None:
            self.conn.execute("SELECT cancel_batch(%s)", [self.batch(where)])
            self.note_cancelled()
            self.settled = {}

    @rule(where=st.sampled_from(WHERE))
    def delete_batch(self, where: str) -> None:
        self.conn.execute("SELECT delete_batch(%s)", [self.batch(where)])
        self.covered, self.settled = {}, {}

    @rule()
    def prune(self) -> None:
        prune_rows(self.settings, self.conn)
        find_orphans(self.settings, self.conn, believe=True, now=time.time() + 1000 * 86400)
        while remove_noted_files(self.settings, self.conn):
            pass

    # What runs.

    @initialize(policy=st.sampled_from(POLICIES), full=st.booleans())
    def choose(self, policy: str, full: bool) -> None:
        self.policy = policy
        if full:
            self.tree.put("a.txt", TEXTS[0])
            self.tree.put("d/a.txt", TEXTS[1])
            self.tree.put("z.zip", {"one.txt": TEXTS[2], "deep.zip": {"three.txt": TEXTS[1]}})
            self.settle()

    @rule(where=st.sampled_from(WHERE), checksum=st.booleans())
    def sync(self, where: str, checksum: bool) -> None:
        before = self.written()
        shown = self.synced(where, dry_run=True, checksum=checksum)
        assert self.written() == before, "a dry run has written"
        assert shown is not None
        done = self.synced(where, checksum=checksum)
        assert done is not None
        self.agree(where, shown, done)

    @rule(where=st.sampled_from(WHERE), statements=st.integers(0, 30), after=st.booleans())
    def kill_a_sync(self, where: str, statements: int, after: bool) -> None:
        self.danger.plan("kill", 2 * statements + after)
        self.synced(where)
        self.danger.plan()

    @rule(which=st.integers(0, 5), handoff=st.sampled_from(["inline", "inline", "queue"]))
    def work(self, which: int, handoff: str) -> None:
        self.work_on_one(which, handoff)

    @rule(which=st.integers(0, 5), handoff=st.sampled_from(["inline", "queue"]), statements=st.integers(0, 40), after=st.booleans())
    def kill_a_worker(self, which: int, handoff: str, statements: int, after: bool) -> None:
        self.danger.plan("kill", 2 * statements + after)
        self.work_on_one(which, handoff)

    @rule()
    def drain(self) -> None:
        self.drained()

    @rule()
    def time_passes(self) -> None:
        self.jobs_are_due()

    @rule()
    def reconcile(self) -> None:
        self.repair(max_crashes=50, max_requeues=50)

    # What must be so.

    @invariant()
    def a_search_misses_nothing_that_lies_there_unchanged_or_moved(self) -> None:
        self.look()

    @rule()
    def settle(self) -> None:
        self.end_well()

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.loop.run(close_async())
            self.close()


@pytest.fixture
def danger(monkeypatch: pytest.MonkeyPatch) -> Danger:
    """A danger before and after each statement."""
    made, execute = Danger(), psycopg.AsyncCursor.execute

    async def in_danger(cursor: Any, *args: Any, **named: Any) -> Any:
        await made.step()
        try:
            return await execute(cursor, *args, **named)
        finally:
            await made.step()

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", in_danger)
    return made


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed 50 ms ago has changed long ago; a clock of the kernel ticks every 4 ms."""
    monkeypatch.setattr("jobs.sync.looking.RACY_NS", 50_000_000)


def test_no_random_schedule_loses_or_keeps_what_it_should_not(database: str, settings: Settings, danger: Danger, tmp_path: Path) -> None:
    play(lambda: Folder(database, settings, danger, tmp_path / "documents"), 7, 15)


@pytest.mark.long
def test_no_long_random_schedule_loses_or_keeps_what_it_should_not(
    database: str, settings: Settings, danger: Danger, tmp_path: Path
) -> None:
    play(lambda: Folder(database, settings, danger, tmp_path / "documents"), 200, 40)
