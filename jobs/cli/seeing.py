"""The arguments and help of the commands that show what goes on. What they do is imported when they run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.cli.commands import EXIT_CODES, Json, app, name

Id = Annotated[str, typer.Argument(parser=name, metavar="ID", help="A doc_id, the beginning of one, or a file name.")]


class ComponentName(StrEnum):
    """What can be asked about; jobs.health says how each is checked."""

    DATABASE = "database"
    MIGRATIONS = "migrations"
    STORAGE = "storage"
    WORKERS = "workers"
    QUEUES = "queues"
    SERVICES = "services"
    INDEXES = "indexes"


@app.command(epilog=EXIT_CODES)
def explain(id: Id, *, json: Json = False) -> None:
    """Tell the story of one document: what happened to it, where it stands, and what comes next and when."""
    from jobs.cli.explain import run  # noqa: PLC0415

    raise typer.Exit(run(id, json=json))


@app.command(epilog=EXIT_CODES)
def logs(
    id: Id,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on showing what comes, until interrupted.")] = False,
    files: Annotated[bool, typer.Option("--files/--no-files", help="Also look through the log files in reach.")] = True,
    json: Json = False,
) -> None:
    """Show a document's events from the database, and what the log files in reach say of it, in the order of time.

    With --json it is one object a line.
    """
    from jobs.cli.logs import run  # noqa: PLC0415

    raise typer.Exit(run(id, follow=follow, files=files, json=json))


@app.command(epilog=EXIT_CODES)
def watch(
    *,
    every: Annotated[
        float, typer.Option("--every", min=0.2, metavar="SECONDS", help="Between two looks; more if a look takes long.")
    ] = 2.0,
    times: Annotated[int | None, typer.Option("--times", min=1, metavar="N", help="End after so many looks.")] = None,
    json: Json = False,
) -> None:
    """Watch queues, stages, rates, batches, workers and failures live. Where the output is no terminal, a line a look."""
    from jobs.cli.watch import run  # noqa: PLC0415

    raise typer.Exit(run(every=every, times=times, json=json))


@app.command(
    epilog="""\b
Exit codes:
  0    everything asked for is well, or degraded
  1    something is down, or could not be asked
  2    the command line or a setting is wrong
"""
)
def health(
    *,
    only: Annotated[list[ComponentName] | None, typer.Option("--only", help="Ask about this component alone. Repeatable.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Only count workers on this host, as a worker's container does.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 also for what is degraded.")] = False,
    json: Json = False,
) -> None:
    """Say how each component is: database, migrations, storage, workers, queues, services and indexes.

    As a container's health check: `docmill health --only database --only workers --here`.
    """
    from jobs.cli.health import run  # noqa: PLC0415

    raise typer.Exit(run([str(name) for name in only or ()], here=here, strict=strict, json=json))
