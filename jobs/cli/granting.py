"""`docmill roles`: what its commands do."""

from __future__ import annotations

from dataclasses import asdict

from jobs import roles
from jobs.cli.errors import ExitCode
from jobs.cli.output import print_json, say, table
from jobs.cli.session import quiet_logs
from models.settings import Settings, load_settings


def _settings() -> Settings:
    settings = load_settings()
    quiet_logs(settings)
    return settings


def make(*, json: bool) -> ExitCode:
    """Make the roles, secure the database, and say what was new."""
    made, secured = roles.create_roles(_settings())
    if json:
        print_json({"created": made, "secured": secured})
        return ExitCode.OK
    for name in made:
        say("created", name)
    for name in secured:
        say("secured", name)
    if not made and not secured:
        say("The roles are there and everything is secured.")
    return ExitCode.OK


def give(login: str, user: str | None, kind: str | None, *, indexes: bool) -> ExitCode:
    """Grant a login a role and, if it is a person's, its user."""
    if user is not None:
        roles.grant_to_person(_settings(), login, user)
        say(f'{login} sees the rows of "{user}" and nothing else.')
    else:
        roles.grant_as(_settings(), login, str(kind), indexes=indexes)
        say(f"{login} is {'an' if kind in ('operator', 'app', 'owner') else 'a'} {kind}{' that may build indexes' if indexes else ''}.")
    return ExitCode.OK


def take(login: str) -> ExitCode:
    """Take all of docmill's roles from a login."""
    had = roles.revoke(_settings(), login)
    say(f"{login} has none of docmill's roles any more." if had else f"{login} had none of docmill's roles.")
    return ExitCode.OK


def show(*, json: bool) -> ExitCode:
    """List who has what."""
    found = roles.list_logins(_settings())
    if json:
        print_json([asdict(login) for login in found])
        return ExitCode.OK
    if not found:
        say("No login has one of docmill's roles: `docmill roles grant` gives them.")
        return ExitCode.OK
    cells = [[one.login, ", ".join(one.roles), one.user_id, None if one.exists else "has been dropped: revoke it"] for one in found]
    table("Logins", ["login", "roles", "user", ""], cells)
    return ExitCode.OK
