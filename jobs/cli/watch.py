"""`docmill watch`: what the database says, again and again: a full screen on a terminal, a line a look elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any

import psycopg
from rich.live import Live

from jobs.cli.errors import ExitCode, is_database_absent
from jobs.cli.output import out, print_json_line, say
from jobs.cli.screen import screen, summary_line
from jobs.cli.session import Row, quiet_logs, rows, run_async
from models.settings import Settings, load_settings

_SHARE = 4  # a look that takes a second is followed by at least so many seconds of rest: watching must not be the load
_SLOW_EVERY = 15.0  # seconds between two looks at what costs more: stuck documents and batches
_SLOW = {"batches": ("latest_batches", {"limit": 5}), "stuck": ("stuck_causes", {})}
_QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "queues": ("watch_queues", {}),
    "stages": ("watch_stages", {}),
    "rates": ("watch_rates", {}),
    "workers": ("watch_workers", {}),
    "services": ("watch_services", {}),
    "dead_letters": ("open_dead_letters", {"limit": 5}),
}


class Looks:
    """Takes looks at the database. What costs more is looked at less often, and shown as it was."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slow: dict[str, Any] = {}
        self._slow_due = 0.0

    async def take(self) -> dict[str, Any]:
        """Return everything that is shown, with the time of the look and, if the database is away, only `trouble`."""
        try:
            found = {part: await self._look(name, params) for part, (name, params) in _QUICK.items()}
            if time.monotonic() >= self._slow_due:
                self._slow = {part: await self._look(name, params) for part, (name, params) in _SLOW.items()}
                self._slow_due = time.monotonic() + _SLOW_EVERY
        except Exception as error:
            if not is_database_absent(error):
                raise
            return {"at": datetime.now().astimezone(), "trouble": "The database cannot be reached; trying again."}
        return {"at": datetime.now().astimezone(), **found, **self._slow}

    async def _look(self, name: str, params: dict[str, Any]) -> list[Row]:
        try:
            return await rows(self._settings, name, **params)
        except psycopg.errors.InsufficientPrivilege:
            return []  # a person's role is not shown outside services


def run(*, every: float, times: int | None, json: bool) -> ExitCode:
    """Look every so many seconds until interrupted, or so many times."""
    settings = load_settings()
    quiet_logs(settings)
    try:
        return run_async(_watch(settings, every=every, times=times, json=json))
    except KeyboardInterrupt:  # the usual end of watching
        return ExitCode.OK


async def _watch(settings: Settings, *, every: float, times: int | None, json: bool) -> ExitCode:
    looks = Looks(settings)
    console = out()
    if json or not console.is_terminal:
        async for found in _again(looks, every, times):
            _print_plain(found, json=json)
        return ExitCode.OK
    with Live(console=console, screen=True, auto_refresh=False) as live:
        async for found in _again(looks, every, times):
            live.update(screen(found, console.height), refresh=True)
    return ExitCode.OK


async def _again(looks: Looks, every: float, times: int | None) -> AsyncIterator[dict[str, Any]]:
    """Yield one look after another."""
    count = 0
    while True:
        started = time.monotonic()
        found = await looks.take()
        took = time.monotonic() - started
        yield found
        count += 1
        if times is not None and count >= times:
            return
        await asyncio.sleep(max(every - took, _SHARE * took))


def _print_plain(found: Mapping[str, Any], *, json: bool) -> None:
    if json:
        print_json_line(found)
    else:
        say(summary_line(found))
