"""Keeps a migration from standing in the way: one that waits for a lock is cancelled, because whoever comes after it waits behind it.

Not by lock_timeout: a function that is created with `SET lock_timeout FROM CURRENT` would keep the migration's. And only waiting ends, not
work: a migration may build an index for as long as that takes.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType

import psycopg
from loguru import logger

from sql import query

PATIENCE_SECONDS = 2.0
"""How long a lock is waited for: longer than deadlock_timeout, so that Postgres has sent an autovacuum away before, and shorter than a
submission waits (SUBMIT_LOCK_TIMEOUT_SECONDS)."""
_LOOKS = 8
"""How often in that time the watcher looks."""


class Watcher:
    """Watches one session over a connection of its own, from a thread."""

    def __init__(self, conn: psycopg.Connection) -> None:
        """Take the session that is watched. It ends by itself, within a second, when its process is killed while it waits."""
        self._watched = conn.info.backend_pid
        self._where, self._password = conn.info.dsn, conn.info.password
        with suppress(psycopg.errors.InvalidParameterValue):  # a server on Windows cannot
            conn.execute(query("notice_lost_client"))
        self._conn = self._connect()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="migration watcher", daemon=True)
        self._hindrance: str | None = None
        self._blind = False

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._conn.close()

    def take_hindrance(self) -> str | None:
        """Return what was in the way when this watcher cancelled, in words, and forget it; None: it has not cancelled anything."""
        hindrance, self._hindrance = self._hindrance, None
        return hindrance

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self._where, password=self._password or None, autocommit=True)

    def _run(self) -> None:
        while not self._over.wait(PATIENCE_SECONDS / _LOOKS):
            try:
                if self._conn.closed:
                    self._conn = self._connect()
                self._look()
            except psycopg.Error as error:
                if not self._blind:
                    logger.warning("Nobody sees for now whether the migration waits for a lock: {}", str(error).strip())
                self._blind = True
                self._conn.close()
            else:
                self._blind = False

    def _look(self) -> None:
        found = self._conn.execute(query("who_is_in_the_way"), {"pid": self._watched, "seconds": PATIENCE_SECONDS}).fetchone()
        if found is None:
            return
        # Before the session can have noticed.
        self._hindrance = str(found[0])
        if self._conn.execute(query("cancel_waiting"), {"pid": self._watched}).fetchone() is None:
            self._hindrance = None
