"""`docmill ingest`: submit files and folders, see them through, and say what became of each."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from jobs.batch import BatchSubmission, FileResult, submit_file, submit_folder
from jobs.cli.errors import ExitCode
from jobs.cli.output import aside, complain, print_json, say
from jobs.cli.progress import Display
from jobs.cli.report import Report, as_json, print_report
from jobs.cli.session import quiet_logs, rows, run_async
from jobs.cli.waiting import OwnWorker, wait_for_documents
from jobs.front import close_async
from jobs.submit import check_name
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
            if not await asyncio.to_thread(path.is_dir):
                self.submitted(await submit_file(self.settings, path, user_id=self.options.user, priority=self.options.priority))
                continue
            try:
                made = await submit_folder(
                    self.settings, path, user_id=self.options.user, priority=self.options.priority, on_file=self.submitted
                )
            except ConfigurationError:
                raise
            except DocmillError as error:
                self.files.append(FileResult(str(path), error=error))
                continue
            self.batches.append(made)

    def doc_ids(self) -> list[str]:
        """The documents, each once though it may have been named twice."""
        return list(dict.fromkeys(result.submission.doc_id for result in self.files if result.submission is not None))

    async def see_through(self) -> None:
        """Wait until every document has ended."""
        doc_ids = self.doc_ids()
        if not any(result.submission is not None and result.submission.state in UNFINISHED_STATES for result in self.files):
            return
        if not self.options.worker and not (await rows(self.settings, "live_workers"))[0]["workers"]:
            complain("No worker is running: start one with `docmill worker`, or leave out --no-worker.", prefix="")
        await wait_for_documents(self.settings, doc_ids, self.worker if self.options.worker else None, self.display)

    def print(self, report: Report) -> ExitCode:
        """Print what became of the documents and return the exit code."""
        if self.options.json:
            print_json(as_json(report))
        else:
            print_report(report)
            self.point_out_workers(report)
        return report.exit_code(waited=self.options.wait)

    def point_out_workers(self, report: Report) -> None:
        """Say who works on documents that nobody waited for."""
        if not self.options.wait and report.unfinished():
            say("The documents are queued: `docmill worker` works on them, `docmill status` shows them.", console=aside())

    async def report(self, seconds: float) -> Report:
        """Return what became of the documents so far."""
        found = {row["doc_id"]: row for row in await rows(self.settings, "documents_by_id", doc_ids=self.doc_ids())}
        return Report(self.files, found, self.batches, seconds)


def run(paths: Sequence[Path], options: Options) -> ExitCode:
    """Submit the paths and do as the options say."""
    settings = load_settings()
    quiet_logs(settings)
    check_options(options)
    return run_async(carry_out(lambda display: Ingest(settings, options, paths, display, OwnWorker(settings))))


def check_options(options: Options) -> None:
    """Raise a usage error for a user or a priority that no document can have."""
    try:
        check_name("user_id", options.user)
    except SubmitError as error:
        raise typer.BadParameter(str(error), param_hint="--user") from error
    if not -(2**31) <= options.priority < 2**31:
        raise typer.BadParameter("must be a whole number of 32 bits.", param_hint="--priority")


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
        except asyncio.CancelledError:
            main.uncancel()
            return await _interrupted(call)
        finally:
            await call.worker.stop()
        report = await call.report(time.monotonic() - started)
    return call.print(report)


async def _interrupted(call: Ingest) -> ExitCode:
    if call.worker.task is not None:
        say("Stopping: work in hand comes to a good end first. Ctrl-C again leaves at once.", console=aside())
        await call.worker.stop()
    try:
        report = await call.report(0)
    except Exception as error:  # the database may be why somebody lost patience
        complain(f"Interrupted; the documents stay queued. The database cannot say how many: {error}", prefix="")
        return ExitCode.INTERRUPTED
    finally:
        await close_async()
    left = report.unfinished()
    if left:
        text = f"Interrupted. {len(left)} of {len(call.doc_ids())} documents stay queued; the same command or `docmill worker` goes on."
    else:
        text = "Interrupted. Nothing that was submitted is left to do; the same command submits the rest."
    say(text, console=aside())
    return ExitCode.INTERRUPTED
