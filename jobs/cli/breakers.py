"""`docmill breaker`: list and reset the circuit breakers of outside services."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, duration, moment, print_json, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from models.settings import Settings, load_settings


def show_list(*, json: bool) -> ExitCode:
    """Print all services that have been called."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_list(settings, json=json))


def reset_some(services: Sequence[str], *, json: bool) -> ExitCode:
    """Close the breakers of the services; one that is not known is reported and keeps no other from it."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_reset(settings, services, json=json))


async def _list(settings: Settings, *, json: bool) -> ExitCode:
    found = await rows(settings, "list_breakers")
    if json:
        print_json(found)
        return ExitCode.OK
    if not found:
        say("No outside service has been called yet.")
        return ExitCode.OK
    for row in found:
        say(row["service"], style="bold")
        say("  breaker:", _state(row), style="" if row["state"] == "closed" else "red")
        say("  last minute:", _use(row))
    return ExitCode.OK


def _state(row: Row) -> str:
    """Say how the breaker stands, for example `open since 2026-01-31 08:15:00, tries again in 42.0 s, 17 wait: HTTP 503`."""
    since = f"{row['state'].replace('_', '-')} since {moment(row['changed_at'])}"
    if row["state"] == "closed":
        return since
    again = f", tries again in {duration(row['try_in_seconds'])}" if row["state"] == "open" else ", one call probes"
    return f"{since}{again}, {row['waiting']} wait: {row['reason']}"


def _use(row: Row) -> str:
    """Say how much of its budget a service has used, for example `120 of 500 requests, paused`."""
    parts = []
    for what in ("requests", "tokens"):
        used, most = row[f"{what}_last_minute"] or 0, row[f"{what}_per_minute"] or 0
        parts.append(f"{used} of {most} {what}" if most else f"{what} without a limit")
    if row["share"] is not None and row["share"] < 1:
        parts.append(f"slowed to {row['share']:.0%}")
    if row["paused_until"]:
        parts.append(f"paused until {moment(row['paused_until'])}")
    return ", ".join(parts)


async def _reset(settings: Settings, services: Sequence[str], *, json: bool) -> ExitCode:
    unknown = []
    for service in services:
        answer = await rows(settings, "reset_breaker", service=service)
        if not answer[0]["known"]:
            unknown.append(service)
    if json:
        print_json({"reset": [service for service in services if service not in unknown], "unknown": unknown})
    else:
        for service in services:
            if service not in unknown:
                say("Closed:", service)
    for service in unknown:
        complain(f'There is no service "{service}": `docmill breaker list` shows their names.')
    return ExitCode.FAILED if unknown else ExitCode.OK
