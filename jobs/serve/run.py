"""Starting the server: what it may listen to, and uvicorn around it."""

from __future__ import annotations

import signal
import socket

import uvicorn
from loguru import logger

from jobs.serve.app import make_app
from jobs.serve.punctual import PunctualProtocol
from jobs.transport import is_loopback, warn_of_exposures
from models.errors import ConfigurationError
from models.settings import Settings


def check_place(settings: Settings) -> None:
    """Raise a ConfigurationError where other machines could come in and nobody would ask them who they are."""
    if settings.serve_token is None and not is_loopback(settings.serve_host):
        raise ConfigurationError(
            f"SERVE_HOST={settings.serve_host!r} lets other machines in, and SERVE_TOKEN is not set: everybody could read all documents. "
            "Set SERVE_TOKEN (or SERVE_TOKEN_FILE), for example to what `openssl rand -hex 32` prints, or listen on 127.0.0.1."
        )


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. ConfigurationError: the place is not safe, or taken."""
    check_place(settings)
    warn_of_exposures(settings)
    listening = _listen(settings.serve_host, settings.serve_port)
    config = uvicorn.Config(
        make_app(settings),
        http=PunctualProtocol,
        log_config=None,  # what it logs goes where all logs go
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        limit_concurrency=200,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        ws="none",
    )
    host, port = listening.getsockname()[:2]
    logger.info(
        "Serving on http://{}:{}/{}", f"[{host}]" if ":" in host else host, port, " (read-only)" if settings.serve_read_only else ""
    )
    # When it has ended, uvicorn sends itself the signal again, which would keep this process from ending well.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigurationError(f"SERVE_HOST={host}, SERVE_PORT={port}: cannot listen there: {error.strerror or error}") from error
    listening.listen(128)
    listening.setblocking(False)
    return listening
