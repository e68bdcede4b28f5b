"""Whether each component is well: database, migrations, storage, workers, queues, outside services, indexes. Asks, and changes nothing.

The command `docmill health` prints it and containers and load balancers ask it every few seconds, so everything here is answered by indexes
and small tables, all of it takes no longer than LIMIT, and whatever goes wrong is an answer, not an exception.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row

from jobs.adapters.storage import LocalStorage
from jobs.database import conninfo_of
from jobs.patience import ImpatientConnection
from jobs.redaction import describe
from jobs.sessions import connect_options, pinned
from jobs.transport import clear_text_of
from models.errors import DocmillError
from models.settings import Settings
from sql import query
from sql.migrate import missing_migrations

Health = Literal["ok", "degraded", "down", "unknown"]
"""degraded: it works, and somebody should look. unknown: it could not be asked, because the database is away or the role may not."""
COMPONENTS = ("database", "migrations", "storage", "workers", "queues", "services", "indexes")
LIMIT = 10.0  # seconds for all of them
ENOUGH = 1.0  # second: who has not answered in less may be well
SCARCE = 0.05  # of the disk: what is left when storage is degraded
SCARCE_MB = 1000  # or so many MB of 1,000,000 bytes
CROWDED = 0.9  # of max_connections
_storage_asked_at: dict[Path, float] = {}
"""Since when an answer of a storage is waited for, by the monotonic clock."""
_Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Component:
    """How one component is: a message for people in one line, and facts for machines."""

    name: str
    health: Health
    message: str
    detail: dict[str, Any] = field(default_factory=dict)


async def check_health(settings: Settings, *, host: str | None = None, limit: float | None = None) -> list[Component]:
    """Return all components in the order of COMPONENTS, after `limit` seconds at most (LIMIT). `host`: only its workers count."""
    limit = LIMIT if limit is None else limit
    storage = asyncio.create_task(_told("storage", lambda: asyncio.wait_for(_storage(settings, limit), limit), limit))
    by_name = {found.name: found for found in await _of_database(settings, host, limit)}
    by_name["storage"] = await storage
    return [by_name[name] for name in COMPONENTS]


async def _told(name: str, check: Callable[[], Awaitable[Component]], seconds: float) -> Component:
    """Run a check; what it raises, or that it took longer than these seconds, is what is wrong with the component."""
    try:
        return await check()
    except (TimeoutError, psycopg.errors.QueryCanceled):
        # With so little time it says nothing: the others have used it up.
        health: Health = "down" if seconds >= ENOUGH else "unknown"
        return Component(name, health, f"gave no answer within {seconds:.3g} s")
    except psycopg.errors.InsufficientPrivilege:
        return Component(name, "unknown", "the role of DATABASE_URL may not see it")
    except (psycopg.Error, OSError, DocmillError) as error:
        return Component(name, "down", describe(error).strip() or type(error).__name__)


async def _of_database(settings: Settings, host: str | None, limit: float) -> list[Component]:
    """Check everything that the database can be asked about."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(limit):
            conninfo = await asyncio.to_thread(conninfo_of, settings)
            options = {**connect_options(settings), "connect_timeout": max(2, int(min(settings.database_timeout, limit / 2)))}
            new = await ImpatientConnection.connect(conninfo, **options, autocommit=True, row_factory=dict_row)
        # Outside: what psycopg does to end a question takes ten seconds more where nobody answers.
        new.patience = max(0.1, started + limit - time.monotonic() - 1)
        conn = await pinned(new, settings)
    except (TimeoutError, psycopg.Error, DocmillError) as error:
        message = f"gave no answer within {limit:g} s" if isinstance(error, TimeoutError) else describe(error).strip()
        others = [Component(name, "unknown", "the database is away") for name in COMPONENTS if name not in ("database", "storage")]
        return [Component("database", "down", message), *others]
    connected = time.monotonic() - started

    async def ask(name: str) -> Component:
        # Each has half of the time that is left: one that hangs leaves some for the others.
        conn.patience = max(0.1, (started + limit - time.monotonic()) / 2)
        return await _told(name, checks[name], conn.patience)

    async with conn:
        checks: dict[str, Callable[[], Awaitable[Component]]] = {
            "database": lambda: _database(conn, connected, to_read=settings.serve_read_only),
            "migrations": lambda: _migrations(conn),
            "workers": lambda: _workers(conn, host),
            "queues": lambda: _queues(conn),
            "services": lambda: _services(conn),
            "indexes": lambda: _indexes(conn),
        }
        found = [await ask(name) for name in ("database", "migrations")]
        rest = list(checks)[len(found) :]
        if found[-1].health == "down":
            return [*found, *(Component(name, "unknown", "the schema is not the present one") for name in rest)]
        return [*found, *[await ask(name) for name in rest]]


async def _rows(conn: ImpatientConnection, name: str, **params: Any) -> list[_Row]:
    async with conn.transaction():
        await conn.execute(query("limit_check"), {"statement_ms": f"{conn.patience * 1000:.0f}"})
        return await (await conn.execute(query(name), params)).fetchall()


async def _database(conn: ImpatientConnection, connected_seconds: float, *, to_read: bool) -> Component:
    """`to_read`: nobody wants to write, so that a replica will do."""
    facts = (await _rows(conn, "database_facts"))[0]
    facts["connected_ms"] = round(connected_seconds * 1000, 1)
    said = f"Postgres {facts['version'].split()[0]}, {facts['connections']} of {facts['max_connections']} connections in use"
    if facts["is_replica"]:
        age = facts["newest_change_seconds"]
        said += "; a replica" + ("" if age is None else f", whose newest change is {age:.0f} s old")
    if not to_read and (facts["is_replica"] or facts["is_read_only"]):
        return Component("database", "down", f"{said}; it takes no writes", facts)
    facts["encrypted"] = conn.pgconn.ssl_in_use
    exposed = clear_text_of(conn)
    crowded = facts["connections"] >= CROWDED * facts["max_connections"]
    return Component("database", "degraded" if crowded or exposed else "ok", f"{said}; {exposed}" if exposed else said, facts)


async def _migrations(conn: ImpatientConnection) -> Component:
    known = await _rows(conn, "migrations_table_exists")
    rows = await _rows(conn, "applied_migrations") if list(known[0].values()) == [True] else []
    applied = {(row["component"], row["name"]) for row in rows}
    missing = missing_migrations(applied)
    if missing:
        return Component("migrations", "down", f"{len(missing)} are missing: run `docmill migrate`", {"missing": missing})
    return Component("migrations", "ok", f"all {len(applied)} are there", {"missing": []})


async def _workers(conn: ImpatientConnection, host: str | None) -> Component:
    workers = [row for row in await _rows(conn, "workers_by_health") if host is None or row["host"] == host]
    counts = {word: sum(row["health"] == word for row in workers) for word in ("alive", "stopping", "silent", "dead")}
    where = "" if host is None else f" on {host}"
    said = f"{counts['alive']} alive{where}" + "".join(f", {n} {word}" for word, n in counts.items() if n and word != "alive")
    if not counts["alive"]:
        return Component("workers", "down", f"{said}: documents wait until one is started (docmill worker)", counts)
    return Component("workers", "degraded" if counts["silent"] else "ok", said, counts)


async def _queues(conn: ImpatientConnection) -> Component:
    unheard = [row["queue"] for row in await _rows(conn, "unheard_queues")]
    if unheard:
        return Component("queues", "down", f"jobs wait in {', '.join(unheard)} and no worker listens", {"unheard": unheard})
    return Component("queues", "ok", "every queue with jobs has a worker", {"unheard": []})


async def _services(conn: ImpatientConnection) -> Component:
    troubled = await _rows(conn, "troubled_services")
    if not troubled:
        return Component("services", "ok", "no outside service is in trouble", {"troubled": []})
    said = "; ".join(f"{row['service']} is {row['health']}: {row['reason'] or row['last_error'] or 'no reason given'}" for row in troubled)
    down = any(row["health"] in ("down", "refused") for row in troubled)
    return Component("services", "down" if down else "degraded", said, {"troubled": troubled})


async def _indexes(conn: ImpatientConnection) -> Component:
    invalid = await _rows(conn, "troubled_indexes")
    failing = await _rows(conn, "failing_embeddings")
    said = [f"{row['index_name']} is invalid: {row['what_to_do']}" for row in invalid]
    said += [
        f"{row['failing_documents']} documents cannot be embedded with {row['embedding_model']}: {row['error_message']}" for row in failing
    ]
    detail = {"invalid": invalid, "failing": failing}
    return Component("indexes", "degraded" if said else "ok", "; ".join(said) or "all can be used", detail)


async def _storage(settings: Settings, limit: float = LIMIT) -> Component:
    """Write and remove a small file. In a thread of its own that nobody waits for at the end: a dead network share hangs for ever."""
    base = settings.storage_base_path
    hung_since = _storage_asked_at.get(base)
    if hung_since is not None and time.monotonic() - hung_since > limit:
        # A server that is asked every few seconds would have thousands of threads after a day.
        return Component("storage", "down", f"{base} has not answered for {time.monotonic() - hung_since:.0f} s")
    _storage_asked_at[base] = time.monotonic()
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Component] = loop.create_future()

    def settle(found: Component | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        elif found is not None:
            answer.set_result(found)

    def run() -> None:
        found, trouble = None, None
        try:
            found = _try_storage(settings)
        except Exception as error:
            trouble = error
        _storage_asked_at.pop(base, None)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, found, trouble)

    threading.Thread(target=run, name="docmill-health-storage", daemon=True).start()
    return await answer


def _try_storage(settings: Settings) -> Component:
    storage = LocalStorage.from_settings(settings)
    folder = storage.ensure_directory(storage.temp_dir)
    probe = folder / f"health-{threading.get_ident()}-{time.time_ns()}"
    try:
        probe.write_bytes(b"docmill")
    finally:
        probe.unlink(missing_ok=True)
    disk = shutil.disk_usage(folder)
    free_mb = round(disk.free / 1e6)
    scarce = disk.free < disk.total * SCARCE or free_mb < SCARCE_MB
    said = f"{storage.base} can be written, {free_mb:,} MB are free" + (": that is little" if scarce else "")
    return Component("storage", "degraded" if scarce else "ok", said, {"free_mb": free_mb, "total_mb": round(disk.total / 1e6)})
