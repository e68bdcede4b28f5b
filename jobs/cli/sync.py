"""`docmill sync`: bring what is stored of a folder in line with what lies there, once or for as long as the command runs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from jobs.cli.errors import ExitCode
from jobs.cli.ingest import Ingest, carry_out, check_options
from jobs.cli.ingest import Options as IngestOptions
from jobs.cli.output import aside, print_json, say, table
from jobs.cli.progress import Display
from jobs.cli.report import LONGEST_TABLE, Report, as_json
from jobs.cli.session import quiet_logs, run_async
from jobs.cli.waiting import LOOK_SECONDS, OwnWorker
from jobs.logs import configure_logging
from jobs.sync import SyncOptions, SyncResult
from jobs.sync.folder import FolderSync
from jobs.sync.plan import Kept
from jobs.sync.watch import summary, watch_folder
from models.errors import DocmillError
from models.settings import Settings, load_settings

MOVE_SECONDS = 60.0
"""How long the end of moves is waited for once all that was submitted has ended; a worker's reconciler sees to them in any case."""


@dataclass(frozen=True, slots=True)
class Options(IngestOptions):
    """The options of the command line."""

    dry_run: bool = False
    checksum: bool = False
    allow_empty: bool = False

    def for_sync(self) -> SyncOptions:
        """Return what the sync itself wants to know."""
        return SyncOptions(self.user, self.priority, None, self.checksum, self.allow_empty, self.dry_run)


@dataclass(slots=True)
class _Sync(Ingest):
    """One call of the command: an ingest of one folder, and what it does besides."""

    options: Options
    result: SyncResult | None = None
    sync: FolderSync | None = None

    async def submit(self) -> None:
        self.sync = FolderSync(self.settings, self.paths[0], self.options.for_sync(), on_file=self.submitted)
        self.result = await self.sync.run()
        if self.result.batch is not None:
            self.batches.append(self.result.batch)
            await self.start_for_archives()

    async def see_through(self) -> None:
        await Ingest.see_through(self)
        if self.sync is None or self.result is None:
            return
        end = time.monotonic() + MOVE_SECONDS
        while await self.sync.finish_moves(self.result) and time.monotonic() < end:
            # A document that was a duplicate of the moved one is being made one that stands by itself.
            if self.options.worker:
                self.worker.start()
                self.worker.check()
            await asyncio.sleep(LOOK_SECONDS)
        if self.result.plan.unpacking:  # what they no longer hold is known now
            await self._sync_again(self.result)

    async def _sync_again(self, result: SyncResult) -> None:
        try:
            again = await FolderSync(self.settings, self.paths[0], self.options.for_sync()).run()
        except DocmillError as error:  # another sync is at work, say: no reason to say nothing of all that was done
            result.kept += [Kept(name, f"what it no longer holds was not deleted: {error}") for name in result.plan.unpacking]
        else:
            result.deleted += again.deleted
            result.kept = again.kept

    def print(self, report: Report, *, queued: bool) -> ExitCode:
        assert self.result is not None
        if self.options.json:
            print_json({**as_json(report), "sync": _as_json(self.result)})
            code = report.exit_code(waited=self.options.wait)
        else:
            _print_changes(self.result)
            if self.result.batch is None:
                say(f"would be done: {summary(self.result)}")
                return ExitCode.OK
            code = Ingest.print(self, report, queued=queued)
        if self.result.batch is None:
            return ExitCode.OK
        return ExitCode.FAILED if self.result.kept and code is ExitCode.OK else code


def run(folder: Path, options: Options, *, watch: bool, poll: float | None) -> ExitCode:
    """Sync the folder as the options say."""
    if watch and (options.dry_run or options.json):
        raise typer.BadParameter("goes with neither --dry-run nor --json (LOG_FORMAT=json makes its log JSON).", param_hint="--watch")
    if poll is not None and not watch:
        raise typer.BadParameter("goes with --watch only.", param_hint="--poll")
    settings = load_settings()
    check_options([folder], options)
    if watch:
        configure_logging(settings, role="sync")
        return run_async(_watch(settings, folder, options, poll))
    quiet_logs(settings)
    return run_async(carry_out(lambda display: _make(settings, options, folder, display)))


def _make(settings: Settings, options: Options, folder: Path, display: Display) -> _Sync:
    return _Sync(settings, options, [folder], display, OwnWorker(settings))


async def _watch(settings: Settings, folder: Path, options: Options, poll: float | None) -> ExitCode:
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    try:
        await watch_folder(settings, folder, options.for_sync(), poll_seconds=poll)
    except asyncio.CancelledError:
        main.uncancel()
        say(f"Stopped watching {folder}.", console=aside())
    return ExitCode.OK


def _changes(result: SyncResult) -> Iterator[tuple[str, str, str]]:
    """Yield what changed, the file, and where to or why, in words."""
    plan, dry = result.plan, result.batch is None
    if dry:  # else the table of documents shows them
        yield from (("new", name, "") for name in plan.new if name not in {move.name for move in plan.moved})
        yield from (("changed", name, "") for name in plan.changed)
        yield from (("being written", name, "") for name in plan.busy)
    gone = {document.doc_id for document in result.deleted}
    moved = plan.moved if dry else result.moved
    yield from (("moved", move.old.shown, move.name) for move in moved)
    yield from (("vanished", document.shown, "") for document in (plan.vanished if dry else ()))
    moving = {move.old.doc_id for move in moved}
    yield from (("deleted", document.shown, "") for document in result.deleted if document.doc_id in gone - moving)
    yield from (("kept", kept.name, kept.reason) for kept in result.kept)


def _print_changes(result: SyncResult) -> None:
    rows = list(_changes(result))
    if len(rows) > LONGEST_TABLE:
        rows = [row for row in rows if row[0] == "kept"]
    if rows:
        table("", ["change", "file", "to, or why"], rows)


def _as_json(result: SyncResult) -> dict[str, Any]:
    plan = result.plan
    return {
        "folder": str(result.folder),
        "batch_id": result.batch_id,
        "dry_run": result.batch is None,
        "new": plan.new,
        "changed": plan.changed,
        "unchanged": len(plan.unchanged),
        "being_written": plan.busy,
        "moved": [
            {"from": move.old.shown, "to": move.name, "old_doc_id": move.old.doc_id, "doc_id": move.doc_id}
            for move in (plan.moved if result.batch is None else result.moved)
        ],
        "vanished": [document.shown for document in plan.vanished],
        "deleted": [{"file": document.shown, "doc_id": document.doc_id} for document in result.deleted],
        "kept": [{"file": kept.name, "reason": kept.reason} for kept in result.kept],
    }
