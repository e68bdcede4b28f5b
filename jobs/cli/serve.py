"""`docmill serve`: the dashboard, health and metrics over HTTP."""

from __future__ import annotations

from jobs.cli.errors import ExitCode
from jobs.logs import configure_logging
from jobs.serve.run import serve
from models.settings import load_settings


def run(host: str | None, port: int | None, *, read_only: bool) -> ExitCode:
    """Serve until a signal comes. Options win over settings."""
    settings = load_settings()
    given = {"serve_host": host, "serve_port": port, "serve_read_only": read_only or None}
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    configure_logging(settings, role="serve")
    serve(settings)
    return ExitCode.OK
