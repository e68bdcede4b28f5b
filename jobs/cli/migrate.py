"""`docmill migrate`."""

from __future__ import annotations

from jobs.cli.errors import ExitCode
from jobs.cli.output import say
from jobs.cli.session import quiet_logs
from jobs.database import run_migrations
from models.settings import load_settings


def run() -> ExitCode:
    """Apply what is missing and print what that was."""
    settings = load_settings()
    quiet_logs(settings)
    applied = run_migrations(settings)
    for name in applied:
        say("applied", name)
    if not applied:
        say("The schema is current.")
    return ExitCode.OK
