"""What secrets and documents are exposed to on their way: connections in the clear, keys over plain HTTP, files that others can read.

Nothing is refused here: a network may be trusted, and a container's secrets are files of mode 0444. But nobody should find out late.
"""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from loguru import logger

from models.settings import Settings, secret_files

_SECRET_MOUNTS = (Path("/run/secrets"), Path("/var/run/secrets"))
"""Where Docker, Podman and Kubernetes put secrets, with modes that are not the operator's to choose."""


def is_loopback(host: str) -> bool:
    """Say whether what is sent to a name or address, or listens there, stays on this machine."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def clear_text(host: str, address: str, *, encrypted: bool, sslmode: str) -> str | None:
    """Return what to say of a connection to Postgres that everybody on the way can read; None for one that nobody can, or shall.

    `host` as it was given, `address` where it led to (empty for a socket file). libpq's default sslmode, prefer, goes on without
    encryption where the server offers none; `disable` is somebody's decision.
    """
    if encrypted or sslmode == "disable" or host.startswith(("/", "@")) or is_loopback(address or host):
        return None
    return (
        f"the connection to {host} is not encrypted, and sslmode={sslmode} allows that: set sslmode=verify-full in DATABASE_URL, "
        "or sslmode=disable if the whole way is yours"
    )


def clear_text_of(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> str | None:
    """Return what `clear_text` says of an open connection, by what libpq says of it, environment and service files included."""
    sslmode = next((part.val or b"" for part in conn.pgconn.info if part.keyword == b"sslmode"), b"").decode()
    return clear_text(conn.info.host, conn.info.hostaddr, encrypted=conn.pgconn.ssl_in_use, sslmode=sslmode)


def warn_of_clear_text(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Log it where a connection can be read on its way."""
    if found := clear_text_of(conn):
        logger.warning("Database: {}.", found)


def exposures(settings: Settings) -> Iterator[str]:
    """Yield a sentence for each secret that is sent over plain HTTP to another machine, or lies in a file that others can read."""
    keyed = {
        "EMBEDDING_API_KEY": (settings.embedding_provider == "openai" and settings.embedding_api_key, settings.embedding_base_url),
        "EXTRACTION_API_KEY": (settings.extraction_provider == "openai" and settings.extraction_api_key, settings.extraction_base_url),
        "LLAMAPARSE_API_KEY": (settings.parsing_provider == "llamaparse" and settings.llamaparse_api_key, settings.llamaparse_base_url),
        "ALERT_WEBHOOK_URL": (True, "" if settings.alert_webhook_url is None else settings.alert_webhook_url.get_secret_value()),
    }
    for name, (is_used, address) in keyed.items():
        parts = urlsplit(address)
        if is_used and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            yield f"{name} is sent to {parts.hostname} over plain HTTP: everybody on the way can read it."
    for variable, path in secret_files().items():
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # it has been read, so it is gone since: a container's start may remove its secrets
        if mode & stat.S_IROTH and not any(path.resolve().is_relative_to(mount) for mount in _SECRET_MOUNTS):
            yield f"{variable}: every user of this machine can read {str(path)!r}; `chmod 600` it."


def warn_of_exposures(settings: Settings) -> None:
    """Log what is exposed; asked once, when a worker or the dashboard starts."""
    for found in exposures(settings):
        logger.warning("{}", found)
