"""Whether each part that documents need is well: database, migrations, storage, workers, outside services. Looked at anew each time."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import psycopg

from jobs.redaction import describe
from jobs.serve.reading import Database, DatabaseAway, Look, TooSlow
from models.settings import Settings
from sql.migrate import missing_migrations

Status = Literal["ok", "degraded", "failed", "unknown"]
_STORAGE_SECONDS = 5.0
_LEAST_FREE_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Component:
    """How one part is, in a word and in a sentence for people."""

    name: str
    status: Status
    message: str
    detail: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it as data."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


@dataclass(frozen=True, slots=True)
class Health:
    """All components. Ready unless one has failed; a degraded one still works."""

    components: tuple[Component, ...]

    @property
    def ready(self) -> bool:
        """Whether documents that are submitted now will be worked on."""
        return all(component.status in ("ok", "degraded") for component in self.components)

    @property
    def worst(self) -> Status:
        """The worst status of all, `failed` for one that could not be found out."""
        found = {component.status for component in self.components}
        return "failed" if found & {"failed", "unknown"} else "degraded" if "degraded" in found else "ok"


class Doctor:
    """Examines the installation from this process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._probe: asyncio.Task[Component] | None = None

    async def examine(self) -> Health:
        """Look at everything; takes some seconds at most, whatever hangs."""
        storage, others = await asyncio.gather(self._storage(), self._in_database())
        return Health((*others, storage))

    async def _in_database(self) -> tuple[Component, ...]:
        try:
            async with self._database.look(seconds=2) as look:
                facts = await look.row("health_facts") or {}
                database = _database(facts)
                migrations = await _migrations(look, facts)
                if migrations.status == "failed":
                    return database, migrations, _unknown("workers", "migrations"), _unknown("providers", "migrations")
                return database, migrations, await _workers(look), await _providers(look)
        except (DatabaseAway, TooSlow, psycopg.Error) as error:
            away = Component("database", "failed", describe(error))
            return away, *(_unknown(name, "database") for name in ("migrations", "workers", "providers"))

    async def _storage(self) -> Component:
        """Write and remove a small file. A file system that hangs keeps one thread, not one for each look."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(asyncio.to_thread(_try_storage, self._settings))
        done, _ = await asyncio.wait([self._probe], timeout=_STORAGE_SECONDS)
        if not done:
            where = self._settings.storage_base_path
            return Component("storage", "failed", f"{where} has not answered for {_STORAGE_SECONDS:.0f} s.")
        return self._probe.result()


def _unknown(name: str, blocked_by: str) -> Component:
    return Component(name, "unknown", f"Cannot be told while the {blocked_by} component has failed.")


def _database(facts: dict[str, Any]) -> Component:
    detail = {key: facts[key] for key in ("database", "version", "connections", "max_connections", "in_recovery")}
    if facts["in_recovery"]:
        return Component("database", "failed", "This is a standby: it takes no documents.", detail)
    if facts["connections"] > 0.9 * facts["max_connections"]:
        return Component("database", "degraded", f"{facts['connections']} of {facts['max_connections']} connections are taken.", detail)
    return Component("database", "ok", f'Database "{facts["database"]}" answers.', detail)


async def _migrations(look: Look, facts: dict[str, Any]) -> Component:
    applied: set[str] = set()
    if facts["migrations_table"]:
        applied = {row["name"] for row in await look.rows("applied_migrations", component="docmill")}
    missing = missing_migrations(applied)
    if missing:
        return Component("migrations", "failed", f"{len(missing)} missing: run `docmill migrate`.", {"missing": missing})
    return Component("migrations", "ok", f"All {len(applied)} are applied.", {"applied": len(applied)})


async def _workers(look: Look) -> Component:
    found = await look.row("health_workers") or {}
    detail = dict(found)
    live, silent, deaf = found["live"], found["silent"], found["queues_without_worker"]
    if deaf:
        names = ", ".join(deaf)
        return Component(
            "workers", "failed" if not live else "degraded", f"Jobs wait in queues that no live worker listens to: {names}.", detail
        )
    if not live:
        return Component("workers", "failed", "No worker runs: start one with `docmill worker`.", detail)
    if silent:
        return Component("workers", "degraded", f"{live} live; {silent} ended or hung without signing off within the last hour.", detail)
    return Component("workers", "ok", f"{live} live.", detail)


async def _providers(look: Look) -> Component:
    services = await look.rows("health_providers")
    down = [row for row in services if row["in_use"] and row["state"] != "closed"]
    detail = {"services": [{key: row[key] for key in ("service", "state", "reason", "try_at")} for row in services]}
    if down:
        first = down[0]
        more = f" and {len(down) - 1} more" if len(down) > 1 else ""
        return Component("providers", "failed", f"{first['service']}{more} is not called now: {first['reason']}", detail)
    return Component("providers", "ok", f"{len(services)} known, none is down." if services else "No outside service is in use.", detail)


def _try_storage(settings: Settings) -> Component:
    base = settings.storage_base_path
    try:
        if not base.is_dir():
            return Component("storage", "failed", f"{base} (STORAGE_BASE_PATH) is not there; is it mounted?")
        _write_and_remove(base / settings.storage_temp_dir if (base / settings.storage_temp_dir).is_dir() else base)
        usage = shutil.disk_usage(base)
    except OSError as error:
        return Component("storage", "failed", f"{base} cannot be written to: {error.strerror}")
    detail = {"path": str(base), "free_bytes": usage.free, "size_bytes": usage.total}
    if usage.free < _LEAST_FREE_BYTES:
        return Component("storage", "degraded", f"{base} has only {usage.free / 1e6:.0f} MB left.", detail)
    return Component("storage", "ok", f"{base} can be written to, {usage.free / 1e9:.1f} GB free.", detail)


def _write_and_remove(folder: Path) -> None:
    path = folder / f".probe-{uuid4().hex}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, b"docmill")
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
