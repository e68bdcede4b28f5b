"""Four batches of two users and an application with a transaction: what may be done to them, and what is then expected."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

import jobs
from models.errors import NotFound, OperationRefused, SubmitConflict
from models.settings import Settings
from tests.faults.batch_world import FicklePool, FickleSandbox, Source, Wanted, sha
from tests.faults.in_process import Danger, Workers

REFUSED = (OperationRefused, NotFound, psycopg.errors.NoDataFound, psycopg.errors.ObjectNotInPrerequisiteState)
HELD = (SubmitConflict, psycopg.errors.LockNotAvailable)
LONGEST = 4.5
"""Seconds that anything may take that meets somebody's lock: less than the 5 that are promised, which are made shorter for the test."""
SHIFTS = """SELECT format('UPDATE %I SET %s', c.table_name, string_agg(format('%1$I = %1$I - $1::interval', c.column_name), ', '))
    FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)
    WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE' AND c.data_type = 'timestamp with time zone'
        AND c.is_generated = 'NEVER' AND c.table_name NOT LIKE 'docmill%' GROUP BY c.table_name"""


class Play(Workers):
    """What is done over one connection, and what must come of it."""

    def __init__(self, conninfo: str, settings: Settings, danger: Danger, policy: str) -> None:
        super().__init__(conninfo, settings, danger, using=partial(FicklePool, danger=danger))
        self.policy, self.sandbox = policy, FickleSandbox(danger)
        self.storage, self.sources = settings.storage_base_path.absolute(), Path("sources").absolute()
        for place in (self.storage, self.sources):
            shutil.rmtree(place, ignore_errors=True)
            (place / "uploads").mkdir(parents=True)
        self.pending: list[tuple[Set[str], Callable[[], None]]] = []
        self.touched: set[str] = set()
        """Documents and batches that were changed outside of the transaction since it began."""
        self.wanted: dict[str, Wanted] = {}
        self.runs: dict[str, dict[str, str]] = {}
        """By batch what was submitted last: doc_id -> content."""
        self.specs: dict[str, Any] = {}
        self.stopped: set[str] = set()
        """Batches that were cancelled or failed as such since they were submitted."""
        self.gone: set[str] = set()
        self.vague: set[str] = set()
        """Batches of whose last submission a part may have been done."""
        self.metadata: dict[str, int | None] = {}
        self.pruned = False
        self.time_out = 3600.0

    # What the application and operators do

    def over(self, way: str) -> psycopg.Connection[Any]:
        """The connection over which something is done, or looked at."""
        return self.tx if way == "in the transaction" and self.tx is not None else self.conn

    def do(self, way: str, python: Callable[..., Any], statement: str, *args: Any) -> tuple[Any, bool]:
        """Return the answer and True; None and False where it is refused, "held" and False where the transaction is in its way."""
        connection, began = self.over(way), time.monotonic()
        try:
            if way == "sql":
                row = connection.execute(statement, args).fetchone()
                return row and row[0], True
            if connection is self.conn:
                return python(*args), True
            with connection.transaction():
                return python(*args, connection=connection), True
        except HELD as error:
            assert self.tx not in (None, connection), f"nobody holds anything: {error}"
            return "held", False
        except REFUSED:
            return None, False
        finally:
            assert time.monotonic() - began < LONGEST, f"{statement} waited"

    def expect(self, way: str, keys: Set[str], effect: Callable[[], None]) -> None:
        """Change what is expected: now, or when the transaction is committed."""
        if self.over(way) is self.tx:
            self.pending.append((keys, effect))
        else:
            self.touched |= keys
            effect()

    def submit(self, source: Source, spec: Any, way: str) -> None:
        batch, place = source.batch_id, self.storage / "inbox" if source.kind == "sql" else self.sources
        documents, files = source.documents(spec, place), source.write(spec, place)
        refused: set[str] = set()
        if source.kind == "sql":
            statement = "SELECT submit_batch('inbox/sq/in.zip', batch_id => %s, user_id => %s)"
            run, connection = self._run_of(batch, way), self.over(way)
            way = "sql" if connection is self.conn else way
            _, done = self.do(way, lambda *args, connection: connection.execute(statement, args), statement, batch, source.user_id)
            outcome = "unchanged" if run is not None and run == self._run_of(batch, way) else "new_run"
        else:
            python = partial(jobs.submit_batch, files, batch_id=batch, user_id=source.user_id)
            answer, done = self.do(way if way != "sql" else "alone", python, "submit_batch")
            outcome = answer.outcome if done else ""
            refused = {name for name, _ in answer.refused} if done else set()
            assert not refused or self.tx is not None
        if done and outcome != "unchanged":
            self.expect(way, {batch, *documents}, partial(self._submitted, batch, spec, documents, bool(refused)))
        elif done:
            if not refused and self.over(way) is self.conn:
                self._is_whole(batch, spec, documents)
        elif source.kind != "zip":  # a part of a list may have been submitted, and the application's own file has changed
            self.lose_sight(batch, documents)

    def _run_of(self, batch: str, way: str) -> Any:
        return self.over(way).execute("SELECT max(run_id::text) FROM processing_jobs WHERE batch_id = %s", [batch]).fetchone()[0]  # type: ignore[index]

    def lose_sight(self, batch: str, documents: Any = ()) -> None:
        """Expect nothing of a batch until it is submitted again."""
        self.vague.add(batch)
        for doc_id in {*documents, *self.runs.get(batch, {})}:
            self._forget(doc_id)
        self.touched.add(batch)

    def _forget(self, doc_id: str) -> None:
        self.wanted[doc_id], self.metadata[doc_id] = Wanted(None, "maybe", "maybe"), None
        self.touched.add(doc_id)

    def _is_whole(self, batch: str, spec: Any, documents: dict[str, str]) -> None:
        """Fail unless nothing was to be done to submit this."""
        if batch not in self.vague:
            assert batch not in self.gone and self.specs[batch] == spec
            lacking = [doc_id for doc_id in documents if self.wanted[doc_id].there == "no" or self.wanted[doc_id].cancelled == "yes"]
            assert lacking == [], "unchanged, although it lacks something"

    def _submitted(self, batch: str, spec: Any, documents: dict[str, str], in_part: bool) -> None:
        for pile in (self.stopped, self.gone, self.vague):
            pile.discard(batch)
        for doc_id in self.runs.get(batch, {}).keys() - documents.keys():
            self.wanted.pop(doc_id, None)
        self.runs[batch], self.specs[batch] = documents, spec
        self.wanted |= {doc_id: Wanted(content) for doc_id, content in documents.items()}
        if in_part:
            self.lose_sight(batch)

    def _pick(self, which: int) -> str:
        return list(self.wanted)[which % len(self.wanted)] if self.wanted else ""

    def _mark(self, doc_id: str, **changes: Any) -> None:
        if doc_id in self.wanted and self.wanted[doc_id].content is not None:
            self.wanted[doc_id] = replace(self.wanted[doc_id], **changes)

    def cancel(self, which: int, way: str) -> None:
        doc_id = self._pick(which)
        look = "SELECT state IN ('queued', 'working', 'retrying'), content_sha256 FROM file_extractions WHERE doc_id = %s"
        before = self.over(way).execute(look, [doc_id]).fetchone()
        state, done = self.do(way, jobs.cancel_document, "SELECT cancel_document(%s)", doc_id)
        if done and before is not None and before[0]:
            assert state == "cancelled"
            self.expect(way, {doc_id}, partial(self._cancelled, doc_id, before[1]))

    def _cancelled(self, doc_id: str, content_sha256: str | None) -> None:
        # Other content, which still lies in its archive, goes on.
        if doc_id in self.wanted:
            self._mark(doc_id, cancelled="yes" if content_sha256 == sha(self.wanted[doc_id].content or "") else "maybe")

    def delete(self, which: int, way: str) -> None:
        doc_id = self._pick(which)
        if self.do(way, jobs.delete_document, "SELECT delete_document(%s)", doc_id)[0] is True:
            self.expect(way, {doc_id}, partial(self._deleted, doc_id))

    def _deleted(self, doc_id: str) -> None:
        self._mark(doc_id, there="no", cancelled="no")
        self.metadata.pop(doc_id, None)

    def update(self, which: int, way: str, value: int) -> None:
        doc_id = self._pick(which)
        python = partial(jobs.update_document, metadata={"x": value}, priority=value)
        if self.do(way, python, f"SELECT update_document(%s, '{{\"x\": {value}}}', {value})", doc_id)[1]:
            self.expect(way, {doc_id}, partial(self.metadata.update, {doc_id: value}))

    def decide(self, which: int, way: str, what: str) -> None:
        doc_id = self._pick(which)
        match what:
            case "retry":
                self.do(way, jobs.retry_document, "SELECT requeue_document(%s)", doc_id)
            case "fail":
                self.do(way, partial(jobs.fail_document, reason="no"), "SELECT fail_document_by_operator(%s, 'no')", doc_id)
            case "extract":
                self.do(way, jobs.retry_extraction, "SELECT requeue_extraction(%s)", doc_id)
            case _:
                self.do("sql", str, "SELECT discard_dead_letter((SELECT max(id) FROM dead_letters WHERE doc_id = %s))", doc_id)

    def cancel_batch(self, source: Source, way: str) -> None:
        batch = source.batch_id
        count, done = self.do(way, jobs.cancel_batch, "SELECT cancel_batch(%s)", batch)
        is_cancelled = "SELECT FROM processing_jobs WHERE batch_id = %s AND status = 'cancelled'"
        if done and self.over(way).execute(is_cancelled, [batch]).fetchone() is not None:
            self.expect(way, {batch, *self.runs.get(batch, {})}, partial(self._stop, batch))
        else:
            assert not done or count == 0

    def _stop(self, batch: str) -> None:
        self.stopped.add(batch)
        for doc_id in self.runs.get(batch, {}):
            self._mark(doc_id, cancelled="maybe", there="no" if self.wanted[doc_id].there == "no" else "maybe")

    def fail_batch(self, source: Source, way: str) -> None:
        if self.do(way, partial(jobs.fail_batch, reason="no"), "SELECT fail_batch(%s, 'no')", source.batch_id)[1]:
            self.expect(way, {source.batch_id}, partial(self.stopped.add, source.batch_id))

    def delete_batch(self, source: Source, way: str) -> None:
        batch = source.batch_id
        count, done = self.do(way, jobs.delete_batch, "SELECT delete_batch(%s)", batch)
        if done and count is not None:
            self.expect(way, {batch, *self.runs.get(batch, {})}, partial(self._batch_deleted, batch))
        elif not done and way == "alone":  # what was deleted until it met the transaction stays deleted
            self.lose_sight(batch)
            self.stopped.add(batch)

    def _batch_deleted(self, batch: str) -> None:
        self.gone.add(batch)
        for doc_id in self.runs.get(batch, {}):
            self._deleted(doc_id)

    def change_batch(self, source: Source, way: str) -> None:
        self.do(way, partial(jobs.update_batch, metadata={"y": 1}), "SELECT update_batch(%s, '{\"y\": 1}')", source.batch_id)

    def begin(self) -> None:
        if self.tx is None:
            self.tx = psycopg.connect(self.conninfo)
            self.tx.execute("SELECT")
            self.pending, self.touched = [], set()

    def end(self, commit: bool) -> None:
        if self.tx is None:
            return
        self.tx.commit() if commit else self.tx.rollback()
        self.tx.close()
        self.tx = None
        for keys, effect in self.pending if commit else ():
            mixed = keys & self.touched
            effect()
            for key in mixed:  # nobody can say who was first
                self._forget(key) if key in self.wanted else self.lose_sight(key)
        if not commit and self.pending:
            self.lose_sight("sq")
        self.pending = []
