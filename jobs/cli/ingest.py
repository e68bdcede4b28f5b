"""`docmill ingest`: submit files, folders and archives, see them through, and say what became of each."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from jobs.arguments import check_name
from jobs.batch import BatchSubmission, FileResult, is_folder, is_zip, submit_batch_async, submit_file, submit_folder
from jobs.cli.errors import ExitCode
from jobs.cli.output import aside, complain, print_json, say
from jobs.cli.progress import Display
from jobs.cli.report import Report, as_json, print_report
from jobs.cli.session import quiet_logs, rows, run_async
from jobs.cli.unpacked import documents_in_archives, open_archives
from jobs.cli.waiting import OwnWorker, wait_for_archives, wait_for_batches, wait_for_documents
from jobs.front import close_async
from models.errors import ConfigurationError, DocmillError, SubmitError
from models.settings import Settings, load_settings
from models.stages import UNFINISHED_STATES


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    user: str = "default"
    wait: bool = True
    worker: bool = True
    priority: int = 0
    batch_id: str | None = None
    json: bool = False


@dataclass(slots=True)
class Ingest:
    """One call of the command, from the first file to the end."""

    settings: Settings
    options: Options
    paths: Sequence[Path]
    display: Display
    worker: OwnWorker
    files: list[FileResult] = field(default_factory=list)
    batches: list[BatchSubmission] = field(default_factory=list)
    _collected: bool = False

    def submitted(self, result: FileResult) -> None:
        """Take note of a file; the first one that needs work starts the worker, so that it works while others are being submitted."""
        self.files.append(result)
        self.display.submitted_one()
        due = result.submission is not None and result.submission.state in UNFINISHED_STATES
        if due and self.options.wait and self.options.worker:
            self.worker.start()

    async def submit(self) -> None:
        """Submit everything."""
        for path in self.paths:
            try:
                if await asyncio.to_thread(is_folder, path):
                    await self._submit_folder(path)
                elif path.suffix.lower() == ".zip" or await asyncio.to_thread(is_zip, path):
                    await self._submit_zip(path)
                else:
                    self.submitted(await submit_file(self.settings, path, user_id=self.options.user, priority=self.options.priority))
            except ConfigurationError:
                raise
            except DocmillError as error:
                self.files.append(FileResult(str(path), error=error))
            await self.start_for_archives()

    async def start_for_archives(self) -> None:
        """Start the worker if there are archives to unpack."""
        if self.options.wait and self.options.worker and await open_archives(self.settings, self.batches):
            self.worker.start()

    async def _submit_folder(self, path: Path) -> None:
        options = self.options
        made = await submit_folder(
            self.settings, path, user_id=options.user, priority=options.priority, batch_id=options.batch_id, on_file=self.submitted
        )
        self.batches.append(made)

    async def _submit_zip(self, path: Path) -> None:
        options = self.options
        made = await submit_batch_async(path, batch_id=options.batch_id, user_id=options.user, priority=options.priority)
        self.batches.append(BatchSubmission(made.batch_id, None if made.outcome == "unchanged" else made.run_id, archives=[path.name]))

    def doc_ids(self) -> list[str]:
        """The documents, each once though it may have been named twice."""
        return list(dict.fromkeys(result.submission.doc_id for result in self.files if result.submission is not None))

    async def see_through(self) -> None:
        """Wait until every archive has been unpacked and every document has ended."""
        waits = await open_archives(self.settings, self.batches)
        worker = self.worker if self.options.worker else None
        if worker is None and (waits or self._unfinished()) and not (await rows(self.settings, "live_workers"))[0]["workers"]:
            complain("No worker is running: start one with `docmill worker`, or leave out --no-worker.", prefix="")
        if waits:
            await wait_for_archives(self.settings, self.batches, worker, self.display)
        await self.collect()
        if self._unfinished():
            if worker is not None:
                worker.start()
            archives = Counter(result.archive_state for result in self.files if result.archive_state is not None)
            await wait_for_documents(self.settings, self.doc_ids(), Counter[str](archives), worker, self.display)
        if worker is not None and worker.task is not None:
            await wait_for_batches(self.settings, self.batches)

    def _unfinished(self) -> bool:
        return any(result.submission is not None and result.submission.state in UNFINISHED_STATES for result in self.files)

    async def collect(self) -> None:
        """Take up, once, what has come out of the archives by now."""
        if self._collected:
            return
        self._collected = True
        self.files += await documents_in_archives(self.settings, self.batches, set(self.doc_ids()))

    def print(self, report: Report, *, queued: bool) -> ExitCode:
        """Print what became of the documents and return the exit code. `queued`: nobody waited, and there is something to wait for."""
        if self.options.json:
            print_json(as_json(report))
        else:
            print_report(report)
        if queued and not self.options.json:
            say("The documents are queued: `docmill worker` works on them, `docmill status` shows them.", console=aside())
        return report.exit_code(waited=self.options.wait)

    async def report(self, seconds: float) -> Report:
        """Return what became of the documents so far."""
        found = {row["doc_id"]: row for row in await rows(self.settings, "documents_by_id", doc_ids=self.doc_ids())}
        return Report(self.files, found, self.batches, seconds, await open_archives(self.settings, self.batches))


def run(paths: Sequence[Path], options: Options) -> ExitCode:
    """Submit the paths and do as the options say."""
    settings = load_settings()
    quiet_logs(settings)
    check_options(paths, options)
    return run_async(carry_out(lambda display: Ingest(settings, options, paths, display, OwnWorker(settings))))


def check_options(paths: Sequence[Path], options: Options) -> None:
    """Raise a usage error for what no document or batch can have."""
    try:
        check_name("user_id", options.user)
    except SubmitError as error:
        raise typer.BadParameter(str(error), param_hint="--user") from error
    if options.batch_id is not None:
        try:
            check_name("batch_id", options.batch_id)
        except SubmitError as error:
            raise typer.BadParameter(str(error), param_hint="--batch-id") from error
        if len(paths) != 1 or not _may_be_batch(paths[0]):
            raise typer.BadParameter("names the batch of one folder or zip; give just that one.", param_hint="--batch-id")
    if not -(2**31) <= options.priority < 2**31:
        raise typer.BadParameter("must be a whole number of 32 bits.", param_hint="--priority")


def _may_be_batch(path: Path) -> bool:
    """Say whether a path is a folder or zip, or nobody can say: submitting it tells why."""
    try:
        return path.suffix.lower() == ".zip" or is_folder(path) or is_zip(path)
    except DocmillError:
        return True


async def carry_out(make: Callable[[Display], Ingest]) -> ExitCode:
    """Submit, see through and report; a signal in between ends it well."""
    started = time.monotonic()
    main = asyncio.current_task()
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)  # SIGINT cancels the main task anyway
    with Display() as display:
        call = make(display)
        try:
            await call.submit()
            if call.options.wait:
                await call.see_through()
            else:
                await call.collect()
        except asyncio.CancelledError:
            main.uncancel()
            return await _interrupted(call)
        finally:
            await call.worker.stop()
        report = await call.report(time.monotonic() - started)
    queued = not call.options.wait and bool(report.unfinished() or report.packed)
    return call.print(report, queued=queued)


async def _interrupted(call: Ingest) -> ExitCode:
    if call.worker.task is not None:
        say("Stopping: work in hand comes to a good end first. Ctrl-C again leaves at once.", console=aside())
        await call.worker.stop()
    try:
        await call.collect()
        report = await call.report(0)
    except Exception as error:  # the database may be why somebody lost patience
        complain(f"Interrupted; the documents stay queued. The database cannot say how many: {error}", prefix="")
        return ExitCode.INTERRUPTED
    finally:
        await close_async()
    left = report.unfinished()
    if report.packed:
        text = (
            f"Interrupted. {report.packed} archives are still to be unpacked and {len(left)} documents stay queued; "
            "the same command or `docmill worker` goes on."
        )
    elif left:
        text = f"Interrupted. {len(left)} of {len(call.doc_ids())} documents stay queued; the same command or `docmill worker` goes on."
    else:
        text = "Interrupted. Nothing that was submitted is left to do; the same command submits the rest."
    say(text, console=aside())
    return ExitCode.INTERRUPTED
