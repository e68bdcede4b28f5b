"""What workers and time do to the batches of `batch_play`, and how all of it comes to an end."""

from __future__ import annotations

import os
import time

from jobs.leftovers import remove_noted_files
from jobs.orphans import find_orphans
from jobs.retention import prune_rows
from tests.faults.batch_play import SHIFTS, Play
from tests.faults.batch_world import Source

OTHERS_SECONDS = 60.0
"""How long files may stay noted: transactions that are open anywhere on the server, those of other tests too, keep them from going."""
OPEN = """SELECT doc_id FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')
    UNION ALL SELECT entry_path FROM batch_archives WHERE state IN ('waiting', 'unpacking')
    UNION ALL SELECT batch_id FROM processing_jobs WHERE settled_at IS NULL AND (sealed_at IS NOT NULL OR completed_at IS NULL)
    UNION ALL SELECT batch_id FROM summaries_to_renew"""


class Batches(Play):
    """Everybody who works, and the clock."""

    def unpack(self, deed: str = "", after: int = 0) -> bool:
        self.danger.plan(deed, after)
        return self.take("archive_id")

    def work(
        self, deed: str = "", after: int = 0, handoff: str = "inline", each: bool = False, fault: tuple[str, str] | None = None
    ) -> bool:
        self.danger.plan(deed, after, fault)
        return self.take("doc_id", handoff=handoff, checkpoint_seconds=0.0 if each else 1000.0)

    def work_on_all(self) -> None:
        for _ in range(60):
            if not (self.unpack() or self.work()):
                break

    def reconcile(self, deed: str = "", after: int = 0) -> None:
        self.danger.plan(deed, after)
        self.repair(max_crashes=5, max_requeues=500, batch_processing_timeout=self.time_out)

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
