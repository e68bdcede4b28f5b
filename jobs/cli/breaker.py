"""The arguments and help of `docmill breaker`. What the commands do is imported when they run, so that `docmill --help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.commands import EXIT_CODES, Json, name

breaker = typer.Typer(
    help="Look at the outside services that are called, and have one that was down called again at once.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@breaker.command("list", epilog=EXIT_CODES)
def list_breakers(*, json: Json = False) -> None:
    """List the services with the state of their circuit breaker and what is left of their budget."""
    from jobs.cli.breakers import show_list  # noqa: PLC0415

    raise typer.Exit(show_list(json=json))


@breaker.command(epilog=EXIT_CODES)
def reset(
    service: Annotated[
        list[str], typer.Argument(parser=name, metavar="SERVICE", help="Names of services as `docmill breaker list` shows them.")
    ],
    *,
    json: Json = False,
) -> None:
    """Close breakers at once and forget what slowed their budgets down. Documents that wait for them go on within seconds."""
    from jobs.cli.breakers import reset_some  # noqa: PLC0415

    raise typer.Exit(reset_some(service, json=json))
