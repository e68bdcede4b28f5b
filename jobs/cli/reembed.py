"""The arguments and help of `docmill reembed`. What the commands do is imported when they run, so that `docmill --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.cli.commands import EXIT_CODES, Json

reembed = typer.Typer(
    help="Go over to another embedding model without parsing again and without downtime.\n\nThe old vectors serve searches until the new "
    "ones and their index are complete. Workers do it beside their other work; a run survives whatever happens to them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Provider(StrEnum):
    """What EMBEDDING_PROVIDER may be."""

    LOCAL = "local"
    FAST = "fast"
    HASH = "hash"
    OPENAI = "openai"


class Switch(StrEnum):
    """When searches go over to the new model."""

    AUTO = "auto"
    MANUAL = "manual"


@reembed.command(epilog=EXIT_CODES)
def start(
    *,
    to: Annotated[
        Provider | None, typer.Option("--to", help="The new model, named as EMBEDDING_PROVIDER does. Default: that setting.")
    ] = None,
    switch: Annotated[
        Switch, typer.Option(help="Go over as soon as all is ready, or when told by `docmill reembed switch`.")
    ] = Switch.AUTO,
    priority: Annotated[
        int, typer.Option(metavar="N", min=-(2**31), max=2**31 - 1, help="Below 0: waiting documents go first. 0: takes turns with them.")
    ] = -10,
    json: Json = False,
) -> None:
    """Begin to make the vectors of another model."""
    from jobs.cli.reembedding import begin  # noqa: PLC0415

    raise typer.Exit(begin(None if to is None else str(to), str(switch), priority, json=json))


@reembed.command(epilog=EXIT_CODES)
def status(*, json: Json = False) -> None:
    """Show which model serves, and the newest runs with their progress."""
    from jobs.cli.reembedding import show  # noqa: PLC0415

    raise typer.Exit(show(json=json))


@reembed.command(epilog=EXIT_CODES)
def pause() -> None:
    """Stop after the batch in hand. Searches go on as they are, and what was made is kept."""
    from jobs.cli.reembedding import order  # noqa: PLC0415

    raise typer.Exit(order("pause_reembedding"))


@reembed.command(epilog=EXIT_CODES)
def resume() -> None:
    """Go on, and try again at once what had failed."""
    from jobs.cli.reembedding import order  # noqa: PLC0415

    raise typer.Exit(order("resume_reembedding"))


@reembed.command(epilog=EXIT_CODES)
def switch(
    *,
    despite_lacking: Annotated[
        bool, typer.Option("--despite-lacking", help="Now, although passages still lack a vector; searches by meaning miss those.")
    ] = False,
) -> None:
    """Let the new vectors serve: at once if they are complete, else as soon as they are."""
    from jobs.cli.reembedding import order  # noqa: PLC0415

    raise typer.Exit(order("switch_reembedding", despite_lacking=despite_lacking))


@reembed.command(epilog=EXIT_CODES)
def cancel() -> None:
    """Give up before the switch. A worker removes what was made."""
    from jobs.cli.reembedding import order  # noqa: PLC0415

    raise typer.Exit(order("cancel_reembedding"))
