"""Our procrastinate App: opens the pool, checks the database, and gives the tasks of this worker what they share."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.worker import Worker
from psycopg_pool import AsyncConnectionPool

from jobs.database import connect_options, conninfo_of, make_pool, prepare_database
from jobs.leases import LeaseKeeper
from models.settings import Settings


class DocmillConnector(PsycopgConnector):
    """Procrastinate's connector over our own pool; LISTEN goes around a transaction pooler."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    async def _create_pool(self, pool_args: dict[str, Any]) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        # Procrastinate would have the pool check each connection at each checkout: a round trip for every query.
        conninfo = await prepare_database(self._settings)
        return make_pool(self._settings, conninfo)

    @asynccontextmanager
    async def _get_standalone_connection(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        # The listener's: LISTEN does not work through a transaction pooler.
        conninfo = await asyncio.to_thread(conninfo_of, self._settings, direct=True)
        async with await psycopg.AsyncConnection.connect(conninfo, **connect_options(self._settings), autocommit=True) as connection:
            yield connection


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
        self.settings = settings
        self.worker_name = f"{socket.gethostname()}:{os.getpid()}"
        self.leases: LeaseKeeper | None = None
        self.at_close: list[Callable[[], Awaitable[None]]] = []
        """What tasks opened for this worker and wants closing when it stops."""
        self._running: Worker | None = None

    @property
    def pool(self) -> AsyncConnectionPool[psycopg.AsyncConnection[Any]]:
        """The pool of the open app."""
        connector = self.connector
        assert isinstance(connector, DocmillConnector)
        return connector.pool

    def stopping(self) -> bool:
        """Say whether this worker has been asked to stop."""
        return self._running is not None and self._running._stop_event.is_set()

    def _worker(self, **kwargs: Any) -> Worker:
        self._running = super()._worker(**kwargs)
        return self._running

    async def run_worker_async(self, **kwargs: Any) -> None:
        """Run a worker until it is asked to stop, then close what its tasks opened."""
        self.leases = LeaseKeeper(self.settings, self.pool.conninfo if isinstance(self.pool.conninfo, str) else "")
        try:
            await super().run_worker_async(**kwargs)
        finally:
            for close in self.at_close:
                await close()
            self.at_close.clear()
            await asyncio.to_thread(self.leases.close)
            self.leases = None
