"""Waiting for documents to end, with a worker in this process or with those that run elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import psycopg
from loguru import logger

from jobs.batch import BatchSubmission
from jobs.cli.errors import is_database_absent
from jobs.cli.progress import Display, Standing
from jobs.cli.session import Row, quiet_logs, rows, shows_details
from models.errors import DocmillError
from models.settings import Settings
from models.stages import STAGES, UNFINISHED_STATES, State

if TYPE_CHECKING:
    from jobs.worker import DocmillApp

LOOK_SECONDS = 0.25
"""Between two looks at the documents; large sets are looked at less often, so that looking costs little."""

SETTLE_SECONDS = 15.0
OPEN_ARCHIVE = frozenset({"waiting", "unpacking"})


class WorkerDied(DocmillError):
    """The worker in this process has stopped by itself."""


class OwnWorker:
    """The worker of `procrastinate --app=procrastinate_app.app worker`, as a task of this event loop. It listens to all queues."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start it unless it runs."""
        if self.task is None:
            self.task = asyncio.create_task(self._work(), name="docmill worker")

    async def _work(self) -> None:
        app = await asyncio.to_thread(self._load)
        async with app.open_async():
            await app.run_worker_async(install_signal_handlers=False)

    def _load(self) -> DocmillApp:
        from procrastinate_app import app  # noqa: PLC0415 - takes a second, and only those who work here need it

        quiet_logs(self._settings)  # importing the app has set up a worker's logging
        if self._settings.log_file_path is None and not shows_details(self._settings):
            for told in ("jobs.pipeline.endings", "jobs.batch.failure"):  # a line for each failure, which the table at the end says again
                logger.disable(told)
        return app

    async def stop(self) -> None:
        """Let the work in hand come to a good end: finished, or checkpointed and handed on."""
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self.task

    def check(self) -> None:
        """Raise if it has stopped by itself: the database if that is why, else WorkerDied."""
        if self.task is None or not self.task.done():
            return
        error = None if self.task.cancelled() else self.task.exception()
        if error is not None and (isinstance(error, DocmillError) or is_database_absent(error)):
            raise error
        why = "see the log above" if error is None else f"{type(error).__name__}: {error}"
        raise WorkerDied(f"The worker in this process has stopped ({why}). The documents stay queued; `docmill worker` goes on.") from error


async def wait_for_documents(
    settings: Settings, doc_ids: Collection[str], archives: Counter[str], worker: OwnWorker | None, display: Display
) -> None:
    """Return when all documents have ended. `archives`: how many failed or were cancelled; they are shown as files that have ended.

    Outages of the database shorter than DATABASE_TIMEOUT are sat out.

    Raises what `OwnWorker.check` raises, and the database's error after a longer outage.
    """
    unfinished = set(doc_ids)
    ended = archives.copy()
    reached = time.monotonic()
    while True:
        started = time.monotonic()
        try:
            found = {row["doc_id"]: row for row in await rows(settings, "look_at_progress", doc_ids=list(unfinished))}
        except psycopg.OperationalError:
            if time.monotonic() - reached > settings.database_timeout:
                raise
        else:
            reached = time.monotonic()
            for doc_id in list(unfinished):
                state = found[doc_id]["state"] if doc_id in found else State.CANCELLED  # deleted meanwhile
                if state not in UNFINISHED_STATES:
                    unfinished.discard(doc_id)
                    ended[state] += 1
            display.show(_standing(len(doc_ids) + archives.total(), ended, [found[doc_id] for doc_id in unfinished]))
            if not unfinished:
                return
        if worker is not None:
            worker.check()
        await asyncio.sleep(max(LOOK_SECONDS, 10 * (time.monotonic() - started)))


async def wait_for_archives(settings: Settings, batches: Sequence[BatchSubmission], worker: OwnWorker | None, display: Display) -> None:
    """Return when all archives of these batches have been unpacked, or failed. Outages and errors: as `wait_for_documents`."""
    reached = time.monotonic()
    while True:
        try:
            found = await rows(settings, "archives_of_batches", batch_ids=[batch.batch_id for batch in batches])
        except psycopg.OperationalError:
            if time.monotonic() - reached > settings.database_timeout:
                raise
        else:
            reached = time.monotonic()
            display.unpacking(sum(row["unpacked_count"] for row in found), sum(row["entry_count"] or 0 for row in found))
            if not any(row["state"] in OPEN_ARCHIVE for row in found):
                return
        if worker is not None:
            worker.check()
        await asyncio.sleep(LOOK_SECONDS)


async def wait_for_batches(settings: Settings, batches: Sequence[BatchSubmission]) -> None:
    """Return when these batches have ended. Their documents have, so it takes a moment; who holds a batch is not waited for."""
    end = time.monotonic() + SETTLE_SECONDS
    for batch in batches:
        while batch.run_id is not None and time.monotonic() < end:
            found = await rows(settings, "look_at_batch", batch_id=batch.batch_id, resume=False)
            if not found or found[0]["status"] not in {"pending", "processing"}:
                break
            await asyncio.sleep(LOOK_SECONDS)


def _standing(total: int, ended: Counter[str], unfinished: list[Row]) -> Standing:
    return Standing(
        total=total,
        done=ended.total(),
        failed=ended[State.FAILED],
        cancelled=ended[State.CANCELLED],
        states=Counter(row["state"] for row in unfinished),
        # The first checkpoint comes long after validate, so of those that have had none the stage is not known.
        stages=Counter(row["stage_due"] for row in unfinished if row["state"] == State.WORKING and row["stage_due"] != STAGES[0].name),
    )
