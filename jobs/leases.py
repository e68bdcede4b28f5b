"""Renews the leases of all documents that this worker has claimed, from a thread and connection of its own.

A thread, because neither a blocked event loop nor an exhausted pool may let a lease run out while the work goes on.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psycopg
from loguru import logger

from jobs import clock
from jobs.redaction import describe
from jobs.sessions import connect_options, pin_session
from models.settings import Settings
from sql import query


@dataclass(slots=True)
class Lease:
    """A claim on a document, renewed until released, lost, or past its deadline. Times are of `jobs.clock`, in seconds."""

    doc_id: str
    claim: int
    good_until: float
    deadline: float
    """Never renewed past this; the runner moves it on with each stage."""
    on_lost: Callable[[bool], None]
    """Called once, from the lease thread. True: the claim has gone to somebody else. False: it could not be renewed in time."""
    is_held: bool = False
    """At the last try to renew, another transaction held the document, so that the claim can neither be renewed nor taken. It is renewed
    once that has ended: until then nobody rescues what a worker that lives says it holds."""


def nobody_minds(superseded: bool) -> None:
    """For a lease whose end is no loss: where work is written for the last time, fencing decides."""


def no_lease() -> Lease:
    """Return what stands for the lease of work that nobody has begun on: it is no lease of any document, and nobody renews it."""
    return Lease("", 0, -math.inf, math.inf, nobody_minds)


@contextmanager
def cut_off(conn: psycopg.Connection, *, after: float) -> Iterator[None]:
    """Break the connection if what runs inside takes longer than `after` seconds, so that it raises there instead of hanging."""
    lock, over = threading.Lock(), threading.Event()

    def cut() -> None:
        with lock:
            if not over.is_set() and not conn.closed:
                with socket.socket(fileno=os.dup(conn.fileno())) as hung:
                    hung.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(after, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:  # after this the descriptor may be closed and given to something else
            over.set()


class LeaseKeeper:
    """Holds the leases of one worker process."""

    def __init__(self, settings: Settings, conninfo: str, on_tick: Callable[[psycopg.Connection], None] | None = None) -> None:
        """`on_tick` runs in the thread every few seconds, over its connection."""
        self.seconds = settings.lease_seconds
        """How long a claim holds without renewal."""
        self._tick_seconds = min(settings.lease_seconds / 4, settings.watchdog_seconds / 4, 5.0)  # the watchdog looks at each
        self._settings = settings
        self._conninfo, self._options = conninfo, connect_options(settings)
        self._on_tick = on_tick
        self._leases: dict[tuple[str, int], Lease] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._conn: psycopg.Connection | None = None

    def start(self) -> None:
        """Start the thread unless it runs."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()

    def held(self) -> list[str]:
        """Return the doc_ids of the leases that are held now."""
        with self._lock:
            return [doc_id for doc_id, _ in self._leases]

    def hold(self, doc_id: str, claim: int, *, claimed_at: float, on_lost: Callable[[bool], None]) -> Lease:
        """Begin to renew a claim that was made no earlier than `claimed_at`."""
        lease = Lease(doc_id, claim, claimed_at + self.seconds, math.inf, on_lost)
        with self._lock:
            self._leases[doc_id, claim] = lease
        self.start()
        return lease

    def release(self, lease: Lease) -> None:
        """Stop renewing; the checkpoint that ended the work has cleared the lease in the database."""
        with self._lock:
            self._leases.pop((lease.doc_id, lease.claim), None)

    def close(self, last: Callable[[psycopg.Connection], None] | None = None) -> None:
        """Stop the thread, run `last` over its connection if the database can be reached, and close it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if last is not None:
            self._options["connect_timeout"] = 2
            self._try("This worker could not sign off", last)
        self._drop_connection()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                leases = list(self._leases.values())
            now = clock.seconds()
            due = [e for e in leases if now < e.deadline and e.good_until - now < 0.8 * self.seconds]
            self._try("Leases were not renewed", partial(self._renew, leases=due))
            if self._on_tick is not None:
                self._try("The registry was not told of this worker", self._on_tick)
            now = clock.seconds()
            for lease in leases:
                if now >= lease.good_until and not (lease.is_held and now < lease.deadline):
                    self._lose(lease, superseded=False)
            self._stop.wait(self._tick_seconds)

    def _try(self, complaint: str, action: Callable[[psycopg.Connection], None]) -> None:
        """Run an action over the thread's connection. Whatever goes wrong, the thread goes on: all documents in hand hang on it."""
        try:
            conn = self._connection()
            with cut_off(conn, after=self.seconds / 2):
                action(conn)
        except Exception as error:
            logger.warning("{}: {}", complaint, describe(error))
            self._drop_connection()

    def _connection(self) -> psycopg.Connection:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(self._conninfo, **self._options, autocommit=True)
            with cut_off(self._conn, after=self.seconds / 2):
                pin_session(self._conn, self._settings)
        return self._conn

    def _drop_connection(self) -> None:
        if self._conn is not None:
            self._conn.close()
        self._conn = None

    def _renew(self, conn: psycopg.Connection, leases: list[Lease]) -> None:
        if not leases:
            return
        asked_at = clock.seconds()
        rows = conn.execute(
            query("renew_leases"),
            {
                "lease_seconds": self.seconds,
                "doc_ids": [lease.doc_id for lease in leases],
                "claims": [lease.claim for lease in leases],
            },
        ).fetchall()
        seen = {(doc_id, claim): (renewed, gone) for doc_id, claim, renewed, gone in rows}
        for lease in leases:
            renewed, gone = seen[lease.doc_id, lease.claim]
            lease.is_held = not renewed and not gone
            if gone:
                self._lose(lease, superseded=True)
            elif renewed:
                lease.good_until = asked_at + self.seconds

    def _lose(self, lease: Lease, *, superseded: bool) -> None:
        with self._lock:
            held = self._leases.pop((lease.doc_id, lease.claim), None)
        if held is not None:
            lease.on_lost(superseded)
