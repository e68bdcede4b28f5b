"""The `docmill` command. Parses arguments and prints; what it does is done by the modules that it calls."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import jobs.cli.seeing  # noqa: F401  # adds its commands to the app
from jobs.cli.breaker import breaker
from jobs.cli.commands import app
from jobs.cli.dead import dead
from jobs.cli.reembed import reembed
from jobs.cli.roles import roles

app.add_typer(dead, name="dead")
app.add_typer(reembed, name="reembed")
app.add_typer(breaker, name="breaker")
app.add_typer(roles, name="roles")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave the process with its exit code. No error of ours ends in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a letter is no reason to end in the middle of a table
            stream.reconfigure(errors="replace")
    before = signal.signal(signal.SIGTERM, _leave) if threading.current_thread() is threading.main_thread() else None
    try:
        app(arguments, prog_name="docmill")
    except Exception as error:
        from jobs.cli.errors import report  # noqa: PLC0415 - only where there is an error to report

        sys.exit(report(error))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End as after an error, so that what this process holds is let go: the embedded server would go on without it."""
    sys.exit(128 + number)
