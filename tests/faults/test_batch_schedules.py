"""13: random schedules of batches: zips, a list and a zip of the application's own, submitted again with other contents, unpacked, worked
on, cancelled, deleted, taken up again, and held by an open transaction, against the real schema.

As in test_schedules, in one process, with the real front door, unpacker, runner and reconciler. A crash is an exception that nothing
catches, at any statement; whoever is paused goes on after others have taken over. Each schedule comes of its number; one that goes wrong is
made shorter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from jobs import faults
from jobs.batch import acceptance, unpacking
from jobs.batch import archive as archive_module
from jobs.front import close_sync
from models.settings import Settings, load_settings
from tests.faults import batch_checks
from tests.faults.batch_workers import Batches
from tests.faults.batch_world import BAD, BROKEN, SOURCES, Source
from tests.faults.in_process import Danger
from tests.faults.seeded import Draws, Step, play_all
from tests.integration.conftest import STAGE_NAMES

FASTER = 25
"""By how much the times are shorter that somebody's lock is waited for."""
SHORTER = """SELECT replace(regexp_replace(pg_get_functiondef(p.oid), '(?n)^ SET lock_timeout TO .*$',
        CASE WHEN m.ms > 0 THEN format(' SET lock_timeout TO %L', greatest(10, m.ms / 25) || 'ms') ELSE ' SET lock_timeout TO ''0''' END),
        '5000', '200')
    FROM pg_proc AS p
    JOIN pg_language AS l ON l.oid = p.prolang
    LEFT JOIN LATERAL unnest(p.proconfig) AS c ON c LIKE 'lock_timeout=%'
    CROSS JOIN LATERAL (SELECT coalesce(extract(epoch FROM replace(c, 'lock_timeout=', '')::interval) * 1000, 0)::int AS ms) AS m
    WHERE p.pronamespace = 'public'::regnamespace AND l.lanname IN ('sql', 'plpgsql') AND p.prokind = 'f'
        AND (m.ms > 0 OR pg_get_functiondef(p.oid) ~ '\\m5000\\M')"""
TEXTS = ["one", "two", "three"]
WAYS = ["alone", "alone", "sql", "in the transaction"]


class Schedule(Draws):
    """A source of steps."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.sources = self.pick([[SOURCES[0]], [SOURCES[3]], [SOURCES[2]], SOURCES[:2], SOURCES])
        self.last: dict[str, Any] = {}

    def _zip(self, names: tuple[str, ...] = ("a.txt", "b.txt", "d/c.txt", "e.txt"), inside: bool = False) -> Any:
        if self.chance(0.15 if inside else 0.06):
            return BROKEN
        made: dict[str, Any] = {
            name: self.pick([*TEXTS, *TEXTS, BAD]) for name in self.random.sample(names, self.random.randint(1, len(names)))
        }
        if not inside and self.chance(0.35):
            made["in.zip"] = self._zip(("a.txt", "x.txt"), inside=True)
        return made

    def _list(self) -> Any:
        made: dict[str, Any] = {name: self.pick(TEXTS) for name in self.random.sample(["p.txt", "q.txt"], self.random.randint(1, 2))}
        return made | ({"z.zip": self._zip()} if self.chance(0.5) else {})

    def _changed(self, source: Source, spec: dict[str, Any]) -> dict[str, Any]:
        name = self.pick(list(spec))
        if len(spec) > 1 and self.chance(0.4):
            return {other: what for other, what in spec.items() if other != name}
        inner = self._zip() if source.kind == "list" else self._zip(("a.txt", "x.txt"), inside=True)
        return {**spec, name: self.pick(TEXTS) if isinstance(spec[name], str) else inner}

    def submission(self) -> dict[str, Any]:
        source = self.pick(self.sources)
        spec = self.last.get(source.batch_id)
        if spec is None or self.chance(0.25):
            spec = self._list() if source.kind == "list" else self._zip()
        elif isinstance(spec, dict) and self.chance(0.5):
            spec = self._changed(source, spec)
        self.last[source.batch_id] = spec
        return {"source": source, "spec": spec, "way": self.pick(WAYS)}

    def step(self) -> Step:
        some, which = self.random.randint, {"which": self.random.randint(0, 40)}
        way, source = {"way": self.pick(WAYS)}, {"source": self.pick(self.sources)}
        deed = {"deed": self.pick(["", "", "kill", "pause", "pause"]), "after": some(0, 30)}
        fault = (self.pick(STAGE_NAMES), self.pick(["retry", "fail", "fail"])) if self.chance(0.4) else None
        steps: dict[str, tuple[int, dict[str, Any]]] = {
            "submit": (10, {}),
            "unpack": (12, deed),
            "work": (14, {**deed, "handoff": self.pick(["inline", "queue"]), "each": self.chance(0.5), "fault": fault}),
            "work_on_all": (2, {}),
            "wake": (10, {**which, **deed}),
            "reconcile": (7, {**deed, "deed": self.pick(["", "", "", "kill"])}),
            "jobs_are_due": (3, {}),
            "cancel": (8, which | way),
            "delete": (6, which | way),
            "update": (2, which | way | {"value": some(0, 99)}),
            "decide": (7, which | way | {"what": self.pick(["retry", "retry", "retry", "fail", "discard", "extract"])}),
            "cancel_batch": (2, source | way),
            "fail_batch": (1, source | way),
            "delete_batch": (1, source | way),
            "change_batch": (1, source | way),
            "begin": (4, {}),
            "end": (4, {"commit": self.chance(0.6)}),
            "time_passes": (1, {"span": self.pick(["10 min", "10 min", "60 days", "400 days"])}),
            "prune": (1, {}),
            "remove_files": (3, {}),
            "settle": (1, source),
            "look": (1, {}),
        }
        name, how = self.weighted(steps)
        return (name, self.submission()) if name == "submit" else (name, how)

    def __iter__(self) -> Iterator[Step]:
        yield "submit", self.submission() | {"way": "alone"}
        if self.chance(0.5):
            yield "work_on_all", {}
        for _ in range(self.pick([15, 30, 50, 80])):
            yield self.step()


class Theatre:
    """Where schedules are played."""

    def __init__(self, database: str, settings: Settings) -> None:
        self.database, self.settings = database, settings
        self.danger = Danger()

    def play(self, seed: int, steps: list[Step]) -> Exception | None:
        """Return what went wrong."""
        self.danger = Danger()
        play = Batches(self.database, self.settings, self.danger, ["reuse", "skip", "process"][seed % 3])
        try:
            for name, how in steps:
                batch_checks.look(play) if name == "look" else getattr(play, name)(**how)
                batch_checks.at_any_time(play)
            play.come_to_an_end()
            batch_checks.look(play)
            batch_checks.at_the_end(play)
        except Exception as error:
            return error
        finally:
            play.close()
        return None


@pytest.fixture
def theatre(database: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Theatre]:
    monkeypatch.setattr(archive_module, "GROUP_ENTRIES", 2)
    for module, name in ((acceptance, "LOCK_MS"), (unpacking, "LOCK_MS"), (acceptance, "LOCK_ONE_MS")):
        monkeypatch.setattr(module, name, getattr(module, name) // FASTER)
    monkeypatch.setenv("SUBMIT_LOCK_TIMEOUT_SECONDS", str(5 / FASTER))
    monkeypatch.setenv("MAX_CRASHES", "50")
    load_settings.cache_clear()
    made = Theatre(database, load_settings())

    async def at(point: str, doc_id: str = "") -> None:
        await made.danger.step()

    monkeypatch.setattr(faults, "at", at)
    with psycopg.connect(database, autocommit=True) as conn:
        for (definition,) in conn.execute(SHORTER).fetchall():
            conn.execute(definition)
    yield made
    close_sync()
    load_settings.cache_clear()


def test_no_random_schedule_of_batches_loses_or_doubles_anything(theatre: Theatre) -> None:
    play_all(range(6), Schedule, theatre.play)


@pytest.mark.long
def test_no_schedule_of_batches_among_many_loses_or_doubles_anything(theatre: Theatre) -> None:
    start = int(os.environ.get("DOCMILL_FIRST_SCHEDULE", "6"))
    play_all(range(start, start + 150), Schedule, theatre.play)
