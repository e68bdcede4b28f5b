"""The arguments and help of `docmill dead`. What the commands do is imported when they run, so that `docmill --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.cli.commands import EXIT_CODES, Json, name
from models.errors import ErrorType
from models.stages import STAGES

dead = typer.Typer(
    help="Look at documents that failed for good, take them up again, or put them away.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)

StageName = StrEnum("StageName", {stage.name: stage.name for stage in STAGES})  # type: ignore[misc]  # the members come from the pipeline

Words = Annotated[list[str], typer.Argument(parser=name, metavar="ID", help="Numbers of dead letters, or doc_ids.")]
OfType = Annotated[ErrorType | None, typer.Option("--error-type", case_sensitive=False, help="Only this kind of failure.")]
OfStage = Annotated[StageName | None, typer.Option("--stage", help="Only failures of this stage.")]
OfBatch = Annotated[str | None, typer.Option("--batch", parser=name, metavar="ID", help="Only documents of this batch.")]
OfUser = Annotated[str | None, typer.Option("--user", parser=name, metavar="USER", help="Only this user's documents.")]


@dead.command("list", epilog=EXIT_CODES)
def list_letters(
    *,
    error_type: OfType = None,
    stage: OfStage = None,
    batch: OfBatch = None,
    user: OfUser = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="Most dead letters to show.")] = 50,
    json: Json = False,
) -> None:
    """List the open dead letters, the newest first."""
    from jobs.cli.dead_letters import Filters, show_list  # noqa: PLC0415

    raise typer.Exit(show_list(Filters(error_type, stage, batch, user), limit, json=json))


@dead.command(epilog=EXIT_CODES)
def show(
    id: Annotated[str, typer.Argument(parser=name, metavar="ID", help="Number of a dead letter, or a doc_id.")], *, json: Json = False
) -> None:
    """Show one dead letter with its traceback and context; of a document it is the newest, open or not."""
    from jobs.cli.dead_letters import show_one  # noqa: PLC0415

    raise typer.Exit(show_one(id, json=json))


@dead.command(epilog=EXIT_CODES)
def requeue(
    id: Annotated[list[str] | None, typer.Argument(parser=name, metavar="ID", help="Numbers of dead letters, or doc_ids.")] = None,
    *,
    all: Annotated[bool, typer.Option("--all", help="All open dead letters, or those that the filters name.")] = False,
    error_type: OfType = None,
    stage: OfStage = None,
    batch: OfBatch = None,
    user: OfUser = None,
    priority: Annotated[
        int | None, typer.Option(metavar="N", min=-(2**31), max=2**31 - 1, help="Higher is worked on first. Default: as before.")
    ] = None,
    json: Json = False,
) -> None:
    """Take failed documents up again at the stage that failed. What was done before that stage is kept."""
    from jobs.cli.dead_letters import Filters, requeue_all, requeue_some  # noqa: PLC0415

    filters = Filters(error_type, stage, batch, user)
    if all == bool(id):
        raise typer.BadParameter("give either ids or --all.", param_hint="ID")
    if filters != Filters() and not all:
        raise typer.BadParameter("filters go with --all, not with ids.", param_hint="--all")
    raise typer.Exit(requeue_all(filters, priority=priority, json=json) if all else requeue_some(id or [], priority=priority, json=json))


@dead.command(epilog=EXIT_CODES)
def discard(id: Words, *, json: Json = False) -> None:
    """Put dead letters away. Their documents stay failed until new content is submitted."""
    from jobs.cli.dead_letters import discard_some  # noqa: PLC0415

    raise typer.Exit(discard_some(id, json=json))
