"""The arguments and help of `docmill roles`. What the commands do is imported when they run, so that `docmill --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs.cli.commands import EXIT_CODES, Json, name

roles = typer.Typer(
    help="Keep users apart by row-level security, and say which login is which user.\n\nFor administrators: DATABASE_URL must name a "
    "superuser, or the owner of docmill's tables with CREATEROLE. Logins and passwords are made in Postgres: docs/row-security.md.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,
)

LoginName = Annotated[str, typer.Argument(parser=name, metavar="LOGIN", help="A role that can log in.")]


class Kind(StrEnum):
    """What a login that is no person can be."""

    WORKER = "worker"
    OPERATOR = "operator"
    APP = "app"
    OWNER = "owner"


@roles.command(epilog=EXIT_CODES)
def create(*, json: Json = False) -> None:
    """Make the roles docmill_owner, _worker, _operator, _reader and _app and switch row-level security on. Safe to run twice."""
    from jobs.cli.granting import make  # noqa: PLC0415

    raise typer.Exit(make(json=json))


@roles.command(epilog=EXIT_CODES)
def grant(
    login: LoginName,
    *,
    user: Annotated[str | None, typer.Option("--user", metavar="USER", help="The login is a person's, who sees this user's rows.")] = None,
    kind: Annotated[
        Kind | None,
        typer.Option(
            "--as",
            help="worker: works on all documents. operator: sees everything, changes nothing. app: names the user itself, by "
            "docmill.user_id. owner: may run `docmill migrate`.",
        ),
    ] = None,
    indexes: Annotated[bool, typer.Option("--indexes", help="With --as worker: may also build vector indexes, as the owner.")] = False,
) -> None:
    """Say what a login is: a person, or a worker, operator, application or owner."""
    from jobs.cli.granting import give  # noqa: PLC0415

    if (user is None) == (kind is None):
        raise typer.BadParameter("give either --user or --as.", param_hint="--user")
    if indexes and kind is not Kind.WORKER:
        raise typer.BadParameter("goes with --as worker only.", param_hint="--indexes")
    raise typer.Exit(give(login, user, None if kind is None else str(kind), indexes=indexes))


@roles.command(epilog=EXIT_CODES)
def revoke(login: LoginName) -> None:
    """Take everything that `grant` gave from a login. Do so before the role is dropped."""
    from jobs.cli.granting import take  # noqa: PLC0415

    raise typer.Exit(take(login))


@roles.command("list", epilog=EXIT_CODES)
def list_roles(*, json: Json = False) -> None:
    """List the logins that have a role, and which user each person is."""
    from jobs.cli.granting import show  # noqa: PLC0415

    raise typer.Exit(show(json=json))
