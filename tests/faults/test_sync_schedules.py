"""13: random schedules of what people do to a folder, of syncs that are killed at any statement, and of workers that die.

A plain model says what a search must find: in the end just what lies there, and at all times what lies there unchanged, or was moved.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs.front import close_async
from jobs.leftovers import remove_noted_files
from jobs.orphans import find_orphans
from jobs.retention import prune_rows
from models.settings import Settings
from tests.faults.folders import INNER, PLACES, TEXTS, same_time
from tests.faults.in_process import Danger
from tests.faults.seeded import Draws, Play, Step, play_all
from tests.faults.synced_folder import SyncedFolder

POLICIES = ["reuse", "reuse", "skip", "process"]
WHERE = ["", "", INNER]
ARCHIVES = ["z.zip", "d/z.zip", "x", "a.txt"]


class Schedule(Draws):
    """A source of steps."""

    def __iter__(self) -> Iterator[Step]:
        yield "choose", {"policy": self.pick(POLICIES), "full": self.chance(0.5)}
        for _ in range(self.pick([10, 20, 40])):
            yield self.step()

    def step(self) -> Step:
        place, two = {"place": self.pick(PLACES)}, {"place": self.pick(PLACES), "other": self.pick(PLACES)}
        which, where = {"which": self.random.randint(0, 9)}, {"where": self.pick(WHERE)}
        work = {**which, "handoff": self.pick(["inline", "queue"])}
        return self.weighted(
            {
                "write": (6, {**place, "text": self.pick(TEXTS)}),
                "pack": (4, {"place": self.pick(ARCHIVES), "content": self.archive()}),
                "write_without_a_trace": (1, {**place, "text": self.pick(TEXTS)}),
                "touch": (2, place),
                "delete": (3, place),
                "copy": (2, two),
                "move": (6, two),
                "swap": (1, two),
                "move_a_folder": (2, {"out": self.chance(0.5)}),
                "cancel_document": (2, which),
                "delete_document": (2, which),
                "requeue_document": (2, which),
                "cancel_batch": (1, where),
                "delete_batch": (1, where),
                "prune": (1, {}),
                "sync": (8, {**where, "checksum": self.chance(0.5)}),
                "kill_a_sync": (6, {**where, **self.statement(30)}),
                "work": (4, work),
                "kill_a_worker": (4, {**work, **self.statement(40)}),
                "drained": (3, {}),
                "jobs_are_due": (1, {}),
                "reconcile": (2, {}),
                "end_well": (2, {}),
            }
        )

    def statement(self, most: int) -> dict[str, Any]:
        return {"statements": self.random.randint(0, most), "after": self.chance(0.5)}

    def archive(self, inside: bool = False) -> Any:
        """The entries of a zip; None for one that is damaged."""
        if self.chance(0.25):
            return None
        names = ["one.txt", "three.txt"] if inside else ["one.txt", "in/two.txt"]
        made: dict[str, Any] = {name: self.pick(TEXTS) for name in names if self.chance(0.6)}
        if not inside and self.chance(0.5):
            made["deep.zip"] = self.archive(inside=True)
        if not inside and self.chance(0.3):
            made["damaged.txt"] = "text one.\n"
        return made


class Folder(SyncedFolder):
    """What people, operators, syncs and workers do."""

    # What people do.

    def write(self, place: str, text: str) -> None:
        self.overwritten(place)
        self.tree.put(place, text)

    def pack(self, place: str, content: Any) -> None:
        self.overwritten(place)
        self.tree.put(place, content)

    def write_without_a_trace(self, place: str, text: str) -> None:
        if place in self.tree.files():
            self.overwritten(place)
            same_time(self.place / place, lambda: (self.place / place).write_text(text))

    def touch(self, place: str) -> None:
        if place in self.tree.files():
            (self.place / place).touch()

    def delete(self, place: str) -> None:
        if place in self.tree.files():
            self.overwritten(place)
            (self.place / place).unlink()

    def copy(self, place: str, other: str) -> None:
        if place != other and place in self.tree.files():
            self.overwritten(other)
            (self.place / other).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(self.place / place, self.place / other)

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

    def swap(self, place: str, other: str) -> None:
        if place != other and {place, other} <= set(self.tree.files()):
            self.overwritten(place)
            self.overwritten(other)
            aside = self.place / ".aside"
            (self.place / place).replace(aside)
            (self.place / other).replace(self.place / place)
            aside.replace(self.place / other)

    def move_a_folder(self, out: bool) -> None:
        self.move(*(("d/e/b.txt", "e/b.txt") if out else ("e/b.txt", "d/e/b.txt")))

    # What operators do.

    def some(self, which: int) -> tuple[str, int, str | None] | None:
        rows = self.conn.execute("SELECT doc_id, id, content_sha256 FROM file_extractions ORDER BY doc_id").fetchall()
        return rows[which % len(rows)] if rows else None

    def cancel_document(self, which: int) -> None:
        if (found := self.some(which)) is not None:
            self.conn.execute("SELECT cancel_document(%s)", [found[0]])
            self.note_cancelled()

    def delete_document(self, which: int) -> None:
        if (found := self.some(which)) is not None:
            self.conn.execute("SELECT delete_document(%s)", [found[0]])
            self.covered, self.settled = {}, {}

    def requeue_document(self, which: int) -> None:
        rows = self.conn.execute("SELECT doc_id FROM file_extractions d WHERE state = 'failed' AND NOT is_refused_entry(d)").fetchall()
        if rows:
            self.conn.execute("SELECT requeue_document(%s)", rows[which % len(rows)])

    def cancel_batch(self, where: str) -> None:
        if self.conn.execute("SELECT FROM processing_jobs WHERE batch_id = %s", [self.batch(where)]).fetchone() is not None:
            self.conn.execute("SELECT cancel_batch(%s)", [self.batch(where)])
            self.note_cancelled()
            self.settled = {}

    def delete_batch(self, where: str) -> None:
        self.conn.execute("SELECT delete_batch(%s)", [self.batch(where)])
        self.covered, self.settled = {}, {}

    def prune(self) -> None:
        prune_rows(self.settings, self.conn)
        find_orphans(self.settings, self.conn, believe=True, now=time.time() + 1000 * 86400)
        while remove_noted_files(self.settings, self.conn):
            pass

    # What runs.

    def choose(self, policy: str, full: bool) -> None:
        self.policy = policy
        if full:
            self.tree.put("a.txt", TEXTS[0])
            self.tree.put("d/a.txt", TEXTS[1])
            self.tree.put("z.zip", {"one.txt": TEXTS[2], "deep.zip": {"three.txt": TEXTS[1]}})
            self.end_well()

    def sync(self, where: str, checksum: bool) -> None:
        before = self.written()
        shown = self.synced(where, dry_run=True, checksum=checksum)
        assert self.written() == before, "a dry run has written"
        assert shown is not None
        done = self.synced(where, checksum=checksum)
        assert done is not None
        self.agree(where, shown, done)

    def kill_a_sync(self, where: str, statements: int, after: bool) -> None:
        self.danger.plan("kill", 2 * statements + after)
        self.synced(where)
        self.danger.plan()

    def work(self, which: int, handoff: str) -> None:
        self.work_on_one(which, handoff)

    def kill_a_worker(self, which: int, handoff: str, statements: int, after: bool) -> None:
        self.danger.plan("kill", 2 * statements + after)
        self.work_on_one(which, handoff)

    def reconcile(self) -> None:
        self.repair(max_crashes=50, max_requeues=50)


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


@pytest.fixture
def play(database: str, settings: Settings, danger: Danger, tmp_path: Path) -> Play:
    def play_one(_: int, steps: list[Step]) -> Exception | None:
        folder = Folder(database, settings, danger, tmp_path / "documents")
        try:
            for name, how in steps:
                getattr(folder, name)(**how)
                folder.look()
            folder.end_well()
        except Exception as error:
            return error
        finally:
            folder.loop.run(close_async())
            folder.close()
        return None

    return play_one


def test_no_random_schedule_loses_or_keeps_what_it_should_not(play: Play) -> None:
    play_all(range(6), Schedule, play)


@pytest.mark.long
def test_no_schedule_among_many_loses_or_keeps_what_it_should_not(play: Play) -> None:
    start = int(os.environ.get("DOCMILL_FIRST_SCHEDULE", "6"))
    play_all(range(start, start + 200), Schedule, play)
