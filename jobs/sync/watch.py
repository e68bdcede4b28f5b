"""Keeping a folder in sync for as long as the process runs: events wake it up, and it always looks at the whole folder.

Events say only that something has changed; what, the next listing says. So an overflow of the kernel's queue, a folder that was watched a
moment too late, and a share that sends no events cost at most the time until the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import psycopg
from loguru import logger

from jobs.adapters.folders import is_hidden, storage_folders
from jobs.outages import DATABASE_ERRORS
from jobs.redaction import describe
from jobs.sync.folder import FolderSync
from jobs.sync.looking import Look, folder_identity
from jobs.sync.result import SyncOptions, SyncResult
from models.errors import ConfigurationError, DocmillError
from models.settings import Settings

RETRY_SECONDS = 5.0
"""After an outage of the database, or while the folder is away."""
_PAUSE = 0.3
"""Seconds between two passes at least: a steady trickle of events is taken in portions."""


class Settling:
    """Remembers since when each file has looked as it does, so that one that is being written is left alone until it is whole."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._before: dict[str, tuple[Look | None, float]] = {}
        self._now: dict[str, tuple[Look | None, float]] = {}

    def begin(self) -> None:
        """Begin a pass; what the last one did not ask about is forgotten."""
        self._before, self._now = self._now, {}

    def __call__(self, name: str, look: Look | None) -> bool:
        """Say whether a file has looked like this, or been missing, for long enough."""
        known, since = self._before.get(name, (None, 0.0))
        if name not in self._before or known != look:
            since = time.monotonic()
        self._now[name] = look, since
        if look is not None and time.time_ns() - look.changed_ns > self._seconds * 1e9:
            return True
        return time.monotonic() - since >= self._seconds


class _Ears:
    """Listens to a folder and rings a bell; begins anew when the folder is replaced or the listening fails."""

    def __init__(self, root: Path, leave_out: Iterable[Path], bell: asyncio.Event) -> None:
        self._root, self._bell = root, bell
        # A folder that lies in the storage, as one for files that are submitted in SQL does, is listened to all the same.
        self._leave_out = [path for each in leave_out for path in (each, each.resolve()) if not root.is_relative_to(path)]
        self._identity: tuple[int, int] | None = None
        self._task: asyncio.Task[None] | None = None
        self._complaints: set[str] = set()

    async def attach(self) -> None:
        """See to it that the folder that is there now is listened to before it is listed; without a folder there is nothing to hear."""
        try:
            identity = await asyncio.to_thread(folder_identity, self._root)
        except DocmillError:
            identity = None
        if identity == self._identity and (self._task is None or not self._task.done()):
            return
        await self.detach()
        self._identity = identity
        if identity is not None:
            self._task = asyncio.create_task(self._listen(), name="folder events")
            await asyncio.sleep(0)  # lets it begin, and its first step sets the watches

    async def detach(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _listen(self) -> None:
        from watchfiles import awatch  # noqa: PLC0415 - compiled, and only the watch needs it

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it would tell of every event
        try:
            async for _ in awatch(self._root, watch_filter=self._matters, ignore_permission_denied=True, force_polling=False):
                self._bell.set()
        except (OSError, RuntimeError) as error:
            # Most often the limit of watches (fs.inotify.max_user_watches).
            self._complain("Folder {} sends no events, so it is only looked at now and then: {}", error)
        except ExceptionGroup as group:
            # Most often a file whose name is not UTF-8. Listening begins anew before the next look, which finds what the events were about.
            self._complain("An event of folder {} cannot be read, so all of it is looked at: {}", group.exceptions[0])
            self._bell.set()

    def _complain(self, message: str, error: Exception) -> None:
        if message not in self._complaints:
            logger.warning(message, self._root, describe(error))
        self._complaints.add(message)

    def _matters(self, _: object, path: str) -> bool:
        """Say whether an event is about a file that a sync could take: not a hidden one, and not docmill's own storage."""
        where = Path(path)
        if any(where.is_relative_to(folder) for folder in self._leave_out):
            return False
        return not where.is_relative_to(self._root) or not any(is_hidden(part) for part in where.relative_to(self._root).parts)


async def watch_folder(
    settings: Settings,
    folder: Path,
    options: SyncOptions,
    *,
    poll_seconds: float | None = None,
) -> None:
    """Sync a folder now and whenever something in it changes, until cancelled. Waits for no document.

    `poll_seconds`: look at the folder this often and expect no events. What is wrong with the first pass is raised, as
    `FolderSync.run` does; later an outage of the database and a folder that is away are waited for, and nothing is deleted.
    """
    settling = Settling(settings.sync_settle_seconds)
    sync = FolderSync(settings, folder, options, is_settled=settling)
    bell = asyncio.Event()
    ears = None if poll_seconds is not None else _Ears(sync.root, storage_folders(settings), bell)
    told = _Told()
    rest = settings.sync_rescan_seconds if poll_seconds is None else poll_seconds
    try:
        while True:
            if ears is not None:
                await ears.attach()
            bell.clear()
            settling.begin()
            started = time.monotonic()
            try:
                result = await sync.run()
            except (DocmillError, *DATABASE_ERRORS) as error:
                if isinstance(error, ConfigurationError | psycopg.ProgrammingError) or not told.once:
                    raise
                told.trouble(sync.root, error)
                wait = min(rest, RETRY_SECONDS)
            else:
                told.well(result)
                # What was done may have been seen half; and files that are being written are looked at again soon.
                soon = result.is_unsettled() or result.did_something()
                wait = min(rest, settings.sync_settle_seconds + 0.05) if soon else rest
            # Never more than half of the time is spent on looking.
            await asyncio.sleep(max(_PAUSE, time.monotonic() - started))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await bell.wait()
    finally:
        if ears is not None:
            await ears.detach()


class _Told:
    """What the log has been told, so that it is told once."""

    def __init__(self) -> None:
        self.once = False
        self._trouble = ""
        self._complaints: set[tuple[str, str]] = set()

    def trouble(self, root: Path, error: BaseException) -> None:
        """A pass failed: said when it begins, not with every try."""
        message = describe(error)
        if message != self._trouble:
            logger.warning("Folder {} could not be synced, trying again every few seconds; nothing was deleted: {}", root, message)
        self._trouble = message

    def well(self, result: SyncResult) -> None:
        """A pass went well: one line if it did something, and one for each file that is new in trouble."""
        if self._trouble:
            logger.info("Folder {} can be synced again", result.folder)
        self._trouble = ""
        if result.did_something() or not self.once:
            logger.info("Folder {}: {}", result.folder, summary(result))
        self.once = True
        files = [] if result.batch is None else result.batch.files
        complaints = {(kept.name, kept.reason) for kept in result.kept} | {
            (file.name, str(file.error)) for file in files if file.error is not None and file.name not in result.plan.busy
        }
        for name, reason in sorted(complaints - self._complaints):
            logger.warning("Folder {}: {}: {}", result.folder, name, reason)
        self._complaints = complaints


def summary(result: SyncResult) -> str:
    """Say in a few words what a sync did, or would do."""
    plan = result.plan
    dry = result.batch is None
    moved = plan.moved if dry else result.moved
    parts = [
        (len(set(plan.new) - {move.name for move in moved}), "new"),
        (len(plan.changed), "changed"),
        (len(moved), "moved"),
        (len(plan.vanished), "vanished") if dry else (len(result.deleted), "deleted"),
        (len(plan.busy) + len(plan.waiting) + len(plan.moved_out), "left for the next time"),
        (len(result.kept), "kept though missing"),
        (len(plan.unchanged), "unchanged"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count) or "nothing in it"
