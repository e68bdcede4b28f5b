"""The settings of `docmill serve`: the dashboard, health and metrics over HTTP."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval
from pydantic import AfterValidator, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import Words

SHORTEST_TOKEN = 16


def _host(value: str) -> str:
    """Accept a name or address to listen on; brackets around an IPv6 address are taken off."""
    value = value.strip().removeprefix("[").removesuffix("]")
    if not value or not value.isascii() or not all(letter.isalnum() or letter in "-._:%" for letter in value):
        raise ValueError("is neither a host name nor an address")
    return value


def _host_names(value: str | None) -> str | None:
    """Accept host names separated by commas, as browsers send them: without scheme, port and path."""
    if value is None:
        return None
    names = [name.strip().lower() for name in value.split(",") if name.strip()]
    if any("/" in name or " " in name or not name.isprintable() for name in names):
        raise ValueError("is not a list of host names: no scheme, no path")
    return ",".join(names)


def _token(value: SecretStr | None) -> SecretStr | None:
    """Accept a token that can stand in a header and cannot be guessed soon. No error quotes it."""
    if value is None:
        return None
    text = value.get_secret_value()
    if len(text) < SHORTEST_TOKEN:
        raise ValueError(f"is shorter than {SHORTEST_TOKEN} characters")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("holds a blank, a line break or another character that no header can carry")
    return value


class ServingSettings(BaseSettings):
    """Part of `Settings`."""

    model_config = SettingsConfigDict(defer_build=True)

    # docmill serve
    serve_host: Annotated[str, AfterValidator(_host), Words(allowed="a host name or address")] = "127.0.0.1"
    """Where `docmill serve` listens. Anything but this machine itself needs SERVE_TOKEN."""
    serve_port: Annotated[int, Interval(ge=0, le=65_535)] = 8700
    """Port of `docmill serve`; 0 for any that is free."""
    serve_token: Annotated[
        SecretStr | None,
        AfterValidator(_token),
        Words(allowed="16 or more printable characters, for example from `openssl rand -hex 32`", default="unset"),
    ] = None
    """What people type to sign in, and what `Authorization: Bearer` of a metrics scraper holds. Unset: no sign-in, on this machine only."""
    serve_read_only: Annotated[bool, Words(allowed="true or false")] = False
    """true: the dashboard only shows; nothing can be requeued or discarded, and an embedded server is not migrated."""
    serve_allowed_hosts: Annotated[
        str | None, AfterValidator(_host_names), Words(allowed="host names separated by commas", default="unset")
    ] = None
    """Names that requests may use for this server, such as those that a reverse proxy passes on. Unset: on this machine its own names;
    elsewhere any."""
    serve_session_hours: Annotated[float, Interval(ge=0.01, le=720)] = 12
    """Hours after which a person signs in again."""
    serve_connections: Annotated[int, Interval(ge=1, le=100)] = 3
    """Most database connections of `docmill serve`."""
    serve_query_seconds: Annotated[float, Interval(ge=0.1, le=300)] = 5
    """Seconds after which a question of the dashboard to the database is given up, so that watching never hurts the work."""
