"""What the random schedules of syncs work on: a folder with its syncs, a worker, and the plain model of what must come of it."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jobs.arguments import path_doc_id
from jobs.pipeline.runner import Runner
from jobs.pipeline.running import STAGE_FUNCTIONS
from jobs.retention import prune_rows
from jobs.sync.folder import FolderSync
from jobs.sync.result import SyncOptions, SyncResult
from models.settings import Settings
from tests.faults.folders import BAD, DAMAGED, INNER, Tree
from tests.faults.in_process import Danger, Killed, Workers
from tests.faults.invariant import ALWAYS, IN_THE_END, ask
from tests.faults.thrift import Embedder, Reader, Thrift

TABLES = (
    "processing_jobs",
    "batch_archives",
    "file_extractions",
    "document_events",
    "procrastinate_jobs",
    "document_chunks",
    "folder_files",
)


class SyncedFolder(Workers):
    """A folder with another one inside that is synced by itself too, and two files that stay; one worker at a time."""

    def __init__(self, conninfo: str, settings: Settings, danger: Danger, place: Path) -> None:
        super().__init__(conninfo, settings, danger)
        self.place = place
        shutil.rmtree(self.place, ignore_errors=True)
        for kept in (settings.storage_base_path / settings.storage_uploads_dir).glob("*"):
            shutil.rmtree(kept)
        self.tree = Tree(self.place)
        self.tree.put("keep.txt", "stays.\n")
        self.tree.put(f"{INNER}/keep.txt", "stays too.\n")
        self.thrift = Thrift(self.conn)
        self.sandbox, self.roots = Reader(self.thrift), [""]
        self.covered: dict[str, dict[tuple[str, str], tuple[str, bool]]] = {}
        """place -> path inside and text -> where the document is that answers for it, and whether the outer sync has seen it here."""
        self.fresh: set[str] = set()
        """What was written since the last outer sync: a changed archive that is moved before one is not known again."""
        self.cancelled: dict[int, str | None] = {}
        self.settled: dict[str, dict[str, Any]] = {}
        self.synced("", dry_run=True)  # opens the front door: a death while it opens would be felt for as long as all wait for a connection

    def look(self) -> None:
        """Search for all that lies there, and note what is answered for from now on."""
        served: dict[str, set[str]] = {}
        for doc_id, text in self.conn.execute(
            """SELECT d.doc_id, (SELECT string_agg(c.content, '' ORDER BY c.chunk_index) FROM document_chunks c
                WHERE c.doc_id = d.doc_id AND c.version = d.served_version) FROM file_extractions d WHERE d.served_version IS NOT NULL"""
        ).fetchall():
            served.setdefault(f"{text}\n", set()).add(doc_id)
        assert self.thrift.problems == []
        for place in self.tree.files():
            covers = self.covered.get(place, {})
            now = {(inside, text) for inside, text in self.tree.parts(place).items() if text}
            for (inside, text), (home, _) in list(covers.items()):
                assert text in served, f"nobody answers for {text!r} of {place}{inside}, whose document is that of {home}"
                theirs = {doc_id for there in (home, place) for doc_id in self.tree.doc_ids(there, inside, self.roots)}
                if not theirs & served[text]:
                    del covers[inside, text]  # somebody else answers for it
            for inside, text in now:
                if set(self.tree.doc_ids(place, inside, self.roots)) & served.get(str(text), set()):
                    covers[inside, str(text)] = place, True
            self.covered[place] = covers
        assert ask(self.conn, ALWAYS) == {}

    def overwritten(self, place: str) -> None:
        """What lay at a place is searched for no longer, nor what was moved away and whose document was still the one of this place."""
        self.covered.pop(place, None)
        for other, covers in self.covered.items():
            self.covered[other] = {key: cover for key, cover in covers.items() if cover[0] != place}
        self.settled.pop(place, None)
        self.fresh.add(place)

    def batch(self, where: str) -> str:
        return path_doc_id("default", self.place / where)

    def note_cancelled(self) -> None:
        self.cancelled |= dict(self.conn.execute("SELECT id, content_sha256 FROM file_extractions WHERE state = 'cancelled'").fetchall())

    def runner(self, **changes: Any) -> Runner:
        self.thrift.policy = self.policy
        return super().runner(given={"sandbox": self.sandbox, "embedder": Embedder(self.thrift)}, stages=STAGE_FUNCTIONS, **changes)

    def work_on_one(self, which: int, handoff: str) -> bool:
        """Do one of the jobs that are due; False if there is none."""
        self.nobody_waits()
        return self.take("doc_id", "archive_id", which=which, due=True, handoff=handoff)

    def drained(self) -> bool:
        """Work on all that waits; say whether there was anything."""
        done = 0
        while self.work_on_one(0, "inline"):
            done += 1
        return done > 0

    def synced(self, where: str, **options: Any) -> SyncResult | None:
        """Sync; None if that was killed."""
        sync = FolderSync(self.settings, self.place / where, SyncOptions(**options))
        try:
            result = self.loop.run(sync.run())
        except Killed:
            result = None
        if not options.get("dry_run"):
            self.fresh -= self.fresh if where == "" and result is not None else set()
            self.roots += [where] if where not in self.roots else []
            for place, covers in self.covered.items():
                if where == "" and result is not None:
                    self.covered[place] = {key: (home, True) for key, (home, _) in covers.items()}
                elif where:
                    left = {
                        key for key, (home, seen) in covers.items() if not seen and home.startswith(where) and not place.startswith(where)
                    }
                    self.covered[place] = {key: cover for key, cover in covers.items() if key not in left}
        return result

    def agree(self, where: str, shown: SyncResult, done: SyncResult) -> None:
        """A dry run says what the run then does, and the numbers add up."""
        for kind in ("new", "changed", "unchanged", "busy", "waiting", "moved_out", "restored"):
            assert getattr(shown.plan, kind) == getattr(done.plan, kind), kind
        assert [(move.old.doc_id, move.doc_id) for move in shown.plan.moved] == [(move.old.doc_id, move.doc_id) for move in done.moved]
        assert [document.doc_id for document in shown.plan.vanished] == [document.doc_id for document in done.deleted]
        assert shown.kept == done.kept
        plan = done.plan
        listed = Counter(name.removeprefix(f"{where}/") for name in self.tree.files() if name.startswith(where))
        assert Counter([*plan.new, *plan.changed, *plan.unchanged, *plan.busy]) == listed

    def written(self) -> dict[str, list[Any]]:
        return {t: self.conn.execute(f"SELECT t.xmin::text, t.ctid::text, t.* FROM {t} AS t ORDER BY 1, 2").fetchall() for t in TABLES}

    def end_well(self) -> None:
        """Sync and work until nothing is left to do, and compare all that is stored with all that lies there."""
        cancelled = "SELECT b.batch_id FROM processing_jobs b JOIN batch_archives a ON a.run_id = b.run_id AND a.state = 'cancelled'"
        for root in self.roots:
            if (self.batch(root),) in self.conn.execute(cancelled).fetchall():
                self.tree.put(f"{root}/again.txt" if root else "again.txt", f"again {time.time()}.\n")
        results: dict[str, SyncResult] = {}
        for _ in range(12):
            busy = False
            for root in self.roots:
                done = self.synced(root)
                assert done is not None
                results[root] = done
                busy |= done.did_something()
            for _ in range(60):
                self.jobs_are_due()
                busy |= self.drained()
                self.repair(max_crashes=50, max_requeues=50)
                waiting = """SELECT FROM procrastinate_jobs
                    WHERE status IN ('todo', 'doing') AND (args ? 'doc_id' OR task_name = 'unpack')"""
                if self.conn.execute(waiting).fetchone() is None:
                    break
                busy = True
            else:
                raise AssertionError("there is always something left to work on")
            if not busy:
                break
        else:
            raise AssertionError("there is always something left to sync")
        time.sleep(0.06)  # from now on all files are remembered as they look
        for root in self.roots:
            self.synced(root)
        before = self.written()
        for root in self.roots:
            self.synced(root)
        assert self.written() == before, "a sync of what has not changed has written"
        self.compare(results)
        assert ask(self.conn, IN_THE_END) == {}
        prune_rows(self.settings, self.conn)
        self.look()

    def compare(self, results: dict[str, SyncResult]) -> None:
        stored = {
            row[0]: row[1:]
            for row in self.conn.execute(
                """SELECT d.doc_id, d.id, d.version, d.state::text, m.markdown || E'\\n', d.source_path, d.replaced_by, d.content_sha256
                    FROM file_extractions d LEFT JOIN document_markdown m ON m.doc_id = d.doc_id AND m.version = d.served_version"""
            ).fetchall()
        }
        expected: dict[str, str] = {}
        now: dict[str, dict[str, Any]] = {}
        unsure: set[str] = set()
        for place in self.tree.files():
            for inside, text in self.tree.parts(place).items():
                if text is None:
                    unsure.add(f"{self.place}/{place}{inside}")
                else:
                    for doc_id in self.tree.doc_ids(place, inside, self.roots):
                        expected[doc_id] = text
                        assert doc_id in stored, f"{place}{inside} has no document"
                        self.judge(place, inside, text, stored[doc_id], stored)
                        now.setdefault(place, {})[doc_id] = stored[doc_id][:2]
        for place, documents in now.items():
            for doc_id, row in self.settled.get(place, {}).items():
                assert documents.get(doc_id) == row, f"{place} has not changed and was worked on again"
        self.settled = now
        for doc_id in set(stored) - set(expected):
            self.explain(doc_id, stored, unsure, results)
        for doc_id, row_id, state, sha256 in self.conn.execute("SELECT doc_id, id, state, content_sha256 FROM file_extractions").fetchall():
            if row_id in self.cancelled and self.cancelled[row_id] == sha256:
                assert state == "cancelled", f"{doc_id} was cancelled and is {state}"

    def judge(self, place: str, inside: str, text: str, row: Any, stored: dict[str, Any]) -> None:
        row_id, _, state, served, _, _, _ = row
        name = f"{place}{inside}"
        if state == "cancelled":
            assert row_id in self.cancelled, name
        elif text in (BAD, DAMAGED) or text.startswith("PK") or (not inside and place.endswith(".zip")):
            assert state == "failed", f"{name} is {state}"
        elif state == "duplicate":
            assert self.policy == "skip", name
        else:
            assert (state, served) == ("complete", text), name

    def explain(self, doc_id: str, stored: dict[str, Any], unsure: set[str], results: dict[str, SyncResult]) -> None:
        """A document whose file is gone stays only for a reason that is told."""
        _, _, state, _, source, replaced_by, sha256 = stored[doc_id]
        kept = {f"{self.place / root}/{kept.name}" for root, result in results.items() for kept in result.kept}
        moved = {f"{self.place / root}/{move.old.shown}" for root, result in results.items() for move in result.moved}
        successor = stored.get(replaced_by)
        if any(source == place or source.startswith(f"{place}/") for place in unsure):
            assert source in kept, f"{source} stays, and nobody says so: {results}"
        elif successor is not None and successor[6] == sha256 and successor[2] in ("failed", "cancelled"):
            assert source in kept | moved, source
        elif source in kept:
            pass
        else:
            # Where an archive was lies a document that has failed, or was cancelled.
            name = str(Path(source).relative_to(self.place))
            above = [place for place in self.tree.files() if name.startswith(f"{place}/")]
            own = [stored.get(path_doc_id("default", self.place / place)) for place in above]
            assert any(row is not None and row[2] in ("failed", "cancelled") for row in own), f"{source} ({state}) stays: {results}"
