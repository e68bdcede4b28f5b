"""`docmill health`: how each component is, as lines or JSON, and as an exit code for container health checks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from jobs.cli.errors import ExitCode
from jobs.cli.output import out, print_json, printable
from jobs.cli.session import quiet_logs
from jobs.health import COMPONENTS, Component, check_health
from models.settings import load_settings

STYLES = {"ok": "green", "degraded": "yellow", "down": "bold red", "unknown": "dim"}


def run(only: Sequence[str], *, here: bool, strict: bool, json: bool) -> ExitCode:
    """Print the components asked for (all, if none is named); FAILED if one is down or unknown, or with `strict` degraded."""
    settings = load_settings()
    quiet_logs(settings)
    found = asyncio.run(check_health(settings, host=socket.gethostname() if here else None))
    shown = [component for component in found if not only or component.name in only]
    good = {"ok"} if strict else {"ok", "degraded"}
    healthy = all(component.health in good for component in shown)
    if json:
        print_json({"healthy": healthy, "components": [asdict(component) for component in shown]})
    else:
        _print(shown)
    return ExitCode.OK if healthy else ExitCode.FAILED


def _print(components: Sequence[Component]) -> None:
    width = max(map(len, COMPONENTS))
    for component in components:
        words = Text(f"{component.health:<9}", style=STYLES[component.health]) + Text(f"{component.name:<{width}}  ", style="bold")
        out().print(words + Text(printable(component.message)), soft_wrap=True)
