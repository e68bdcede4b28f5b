"""Our procrastinate App and its worker: opens the pool, shares one set of leases, and outlives outages of Postgres.

Procrastinate's own worker ends, or lives on half deaf, when the database goes away: its fetch, heartbeat, listener and acknowledgement
each raise once and take the worker or a job with them. Here each of them waits with backoff and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psycopg
from loguru import logger
from procrastinate import App, exceptions
from procrastinate.worker import Worker
from psycopg_pool import AsyncConnectionPool

from jobs import faults
from jobs.alerts import AlertForwarder
from jobs.connector import DocmillConnector
from jobs.database import conninfo_of
from jobs.fetching import DocmillJobManager
from jobs.leases import LeaseKeeper
from jobs.outages import DATABASE_ERRORS, outlive
from jobs.places import Places
from jobs.reconcile import Reconciler
from jobs.redaction import describe
from jobs.registry import Pulse, Registry
from jobs.sessions import connect, process_name
from jobs.tracing import start_tracing
from jobs.transport import warn_of_exposures
from models.errors import DocmillError
from models.settings import Settings
from sql import query

_LAST_SECONDS = 3.0  # that a worker which stops waits for an answer of the database
_MOST_WAITING = 512
"""Documents that wait for the embedding service beside those in work, unless their texts fill all requests: as many as two requests hold,
one under way and one that fills meanwhile. With fewer a worker stands still until the first is answered; each of them runs alone once if
it dies."""


def _leave_at_once(number: int) -> None:
    logger.warning("A second signal: this worker leaves at once; what it holds is taken up when its leases run out")
    os._exit(128 + number)


class DocmillWorker(Worker):
    """Procrastinate's worker, made to outlive outages. Only what would end it, or leave a job without an outcome, is changed."""

    app: DocmillApp
    places: Places
    _worked = False
    _leaving: asyncio.Task[None] | None = None

    def has_worked(self) -> bool:
        """Say whether a job has ended here."""
        return self._worked

    def leave(self) -> None:
        """Take no more jobs, finish those in hand as if nothing were, then stop. A signal meanwhile is answered as ever.

        What has merely waited for LEASE_SECONDS, for a service or for somebody's transaction, has the grace of a stop left.
        """
        self._leaving = asyncio.create_task(self._stop_when_idle(), name="leave")

    async def _stop_when_idle(self) -> None:
        await self.places.close(self.app.settings.lease_seconds)
        self.stop()

    def _log_extra(self, action: str, context: Any, job_result: Any, **kwargs: Any) -> dict[str, Any]:
        # The rest describes the job anew for each line, also for those that no level lets through, and docmill logs none of it.
        return {"action": action}

    def stopping(self) -> bool:
        """Say whether this worker has been asked to stop."""
        return self._stop_event.is_set()

    async def _fetch_and_process_jobs(self) -> None:
        await outlive("Fetching jobs", self._fetch_while_registered, until=self.stopping)

    async def _fetch_while_registered(self) -> None:
        fetch: Callable[[], Awaitable[None]] = super()._fetch_and_process_jobs
        try:
            await fetch()
        except exceptions.ConnectorException as error:
            if not isinstance(error.__cause__, psycopg.errors.ForeignKeyViolation):
                raise
            # Another worker took this one for dead and removed its row, which the rows of fetched jobs refer to.
            self.worker_id = await self.app.job_manager.register_worker()

    async def _handle_notification(self, *, channel: str, notification: Any) -> None:
        self.app.job_manager.wake()
        if notification["type"] == "abort_job_requested":
            # Whoever may connect may notify. What is to be aborted stands in the jobs' rows, which are looked at every few seconds anyway.
            with contextlib.suppress(*DATABASE_ERRORS):
                self._handle_abort_jobs_requested(await self.app.job_manager.list_jobs_to_abort_async())
            return
        handle: Callable[..., Awaitable[None]] = super()._handle_notification
        await handle(channel=channel, notification=notification)

    async def _update_heartbeat(self) -> None:
        await outlive("The heartbeat", self._beat)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.update_heartbeat_interval)
            assert self.worker_id is not None
            await self.app.job_manager.update_heartbeat(self.worker_id)

    async def _periodic_deferrer(self) -> None:
        await outlive("Deferring periodic tasks", super()._periodic_deferrer)

    async def _persist_job_status(self, job: Any, *args: Any, **kwargs: Any) -> None:
        try:
            await self._acknowledge(job, *args, **kwargs)
        finally:
            self._worked = True
            if self.app.settings.max_documents_per_user:
                # A user who was at the limit no longer is, and of that no notification tells.
                self.app.job_manager.wake()
                self._new_job_event.set()

    async def _acknowledge(self, job: Any, *args: Any, **kwargs: Any) -> None:
        await faults.at("before_acknowledge", str(job.task_kwargs.get("doc_id", "")))
        if job.id in self.app.finished_jobs:
            # The last checkpoint has finished the job in its own transaction.
            self.app.finished_jobs.discard(job.id)
            return
        persist = super()._persist_job_status
        acknowledging = asyncio.ensure_future(outlive("Acknowledging a job", lambda: persist(job, *args, **kwargs), until=self.stopping))
        stopped = asyncio.ensure_future(self._stop_event.wait())
        await asyncio.wait([acknowledging, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not (await asyncio.wait([acknowledging], timeout=_LAST_SECONDS))[0]:
            acknowledging.cancel()
            logger.warning("Job {} was not acknowledged: the database is away, and this worker must stop; the others put it right", job.id)
        elif error := acknowledging.exception():
            # Somebody has ended this job's row meanwhile: a rescue, because this worker had been silent for too long.
            logger.warning("Job {} was no longer this worker's to acknowledge: {}", job.id, describe(error.__cause__ or error))

    def stop(self) -> None:
        """Finish what is in hand; a second signal leaves at once."""
        stop: Callable[[], None] = super().stop
        stop()
        if self.install_signal_handlers and self._loop is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, _leave_at_once, number)

    def job_ids(self) -> list[int]:
        """Return the ids of the jobs in hand. Called from the lease thread, hence the copy."""
        return [context.job.id for context in list(self._running_jobs.values()) if context.job.id is not None]

    def _start_side_tasks(self) -> list[asyncio.Task[Any]]:
        # Procrastinate has just made a semaphore for this run, where it takes and leaves places.
        self.places = Places(
            self.concurrency,
            most_documents=_MOST_WAITING,
            most_requests=self.app.settings.embedding_concurrent_requests,
        )
        setattr(self, "_job_semaphore", self.places)  # noqa: B010 - not part of its typed surface
        reconciler = Reconciler(self.app.settings, self.app.pool)
        forwarder = AlertForwarder(self.app.settings)
        return [
            *super()._start_side_tasks(),
            asyncio.create_task(reconciler.run(), name="reconciler"),
            asyncio.create_task(forwarder.run(), name="alert forwarder"),
        ]

    async def _shutdown(self, side_tasks: list[asyncio.Task[Any]]) -> None:
        try:
            await super()._shutdown(side_tasks)
        except DATABASE_ERRORS as error:
            logger.warning("This worker could not sign off: {}", describe(error))


class DocmillApp(App):
    """The App that `procrastinate --app=procrastinate_app.app` runs."""

    def __init__(self, settings: Settings, *, import_paths: list[str]) -> None:
        super().__init__(
            connector=DocmillConnector(settings),
            import_paths=import_paths,
            worker_defaults={
                "concurrency": settings.worker_concurrency,
                "fetch_job_polling_interval": settings.worker_poll_seconds,
                "shutdown_graceful_timeout": settings.shutdown_grace_seconds,
                "delete_jobs": "never",
            },
        )
        self.job_manager: DocmillJobManager = DocmillJobManager(self.connector, max_documents_per_user=settings.max_documents_per_user)
        self.settings = settings
        self.worker_name = process_name()
        self.leases: LeaseKeeper | None = None
        self.finished_jobs: set[int] = set()
        """Ids of jobs whose row a checkpoint has finished already."""
        self.at_close: list[Callable[[], Awaitable[None]]] = []
        """What tasks opened for this worker and wants closing when it stops."""
        self._running: DocmillWorker | None = None

    @property
    def pool(self) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        """The pool of the open app."""
        return self._connector().pool

    def _connector(self) -> DocmillConnector:
        assert isinstance(self.connector, DocmillConnector)
        return self.connector

    def stopping(self) -> bool:
        """Say whether this worker has been asked to stop."""
        return self._running is not None and self._running.stopping()

    def lent_place(self, documents: int, requests: float) -> AbstractContextManager[None]:
        """Lend the place of documents that only wait to others; see jobs.places."""
        return nullcontext() if self._running is None else self._running.places.lent(documents, requests)

    def _worker(self, **kwargs: Any) -> DocmillWorker:
        self._running = DocmillWorker(app=self, **{**self.worker_defaults, **kwargs})
        return self._running

    def _check_providers(self) -> None:
        from jobs.adapters.providers import check_providers  # noqa: PLC0415 - only a worker needs it

        check_providers(self.settings)

    def _prepare_storage(self, conninfo: str) -> None:
        """Make the storage where there is none yet; one whose files documents need has been unmounted, and they wait for it."""
        from jobs.adapters.storage import LocalStorage  # noqa: PLC0415 - only a worker needs it

        try:
            if LocalStorage.from_settings(self.settings).is_away() and self._has_documents(conninfo):
                logger.warning("The storage at {} (STORAGE_BASE_PATH) is not there: is it mounted?", self.settings.storage_base_path)
            else:
                LocalStorage.prepared(self.settings)
        except (DocmillError, OSError, psycopg.Error) as error:  # documents wait for it
            logger.warning("{}", describe(error))

    def _has_documents(self, conninfo: str) -> bool:
        with connect(self.settings, conninfo) as conn:
            found = conn.execute(query("has_documents")).fetchone()
        return found is not None and bool(found[0])

    async def run_worker_async(self, **kwargs: Any) -> None:
        """Run a worker until it is asked to stop, then close what its tasks opened.

        ConfigurationError: the settings of a provider are not enough to work with.
        """
        conninfo = await asyncio.to_thread(conninfo_of, self.settings)
        self._check_providers()
        await asyncio.to_thread(self._prepare_storage, conninfo)
        warn_of_exposures(self.settings)
        import_tasks: Callable[[], None] = self.perform_import_paths
        import_tasks()
        stop_tracing = start_tracing(self.worker_name)
        worker = self._worker(**kwargs)
        pulse = Pulse(
            worker=self.worker_name,
            queues=list(worker.queues) if worker.queues else None,
            concurrency=worker.concurrency,
            jobs=worker.job_ids,
            documents=lambda: [] if self.leases is None else self.leases.held(),
            stopping=worker.stopping,
            has_worked=worker.has_worked,
            leave=worker.leave,
            oldest_query_at=self._connector().oldest_query_at,
        )
        registry = Registry(self.settings, pulse, asyncio.get_running_loop())
        self.leases = leases = LeaseKeeper(self.settings, conninfo, registry.tick)
        leases.start()
        try:
            run: Callable[[], Awaitable[None]] = worker.run
            await run()
        finally:
            for close in self.at_close:
                await close()
            self.at_close.clear()
            await asyncio.to_thread(leases.close, registry.sign_off)
            self.leases = None
            await asyncio.to_thread(stop_tracing)
