"""Makes HTTP clients. Proxies and a CA of one's own come from HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE, as everywhere."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2

_IDLE_SECONDS = 4.0  # shorter than servers keep a connection, so that none is used that is just being closed


class Unusable(Exception):
    """The environment names a proxy or a certificate authority that cannot be used."""


async def make_client() -> httpx2.AsyncClient:
    """Return a client that follows no redirect, which could carry key and content anywhere; Unusable where the environment forbids one."""
    # Loading the client and the system's certificates takes a quarter of a second, which no event loop should spend.
    return await asyncio.to_thread(_make)


def _make() -> httpx2.AsyncClient:
    import httpx2  # noqa: PLC0415

    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log addresses and headers
    # How many run at a time is decided by whoever calls: waiting for a connection would eat the exchange's own time.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=_IDLE_SECONDS)
    try:
        return httpx2.AsyncClient(follow_redirects=False, headers={"User-Agent": "docmill"}, limits=limits)
    except (httpx2.InvalidURL, ImportError, OSError, ValueError) as error:
        # Its message may hold the proxy's password.
        raise Unusable(f"HTTPS_PROXY, HTTP_PROXY, ALL_PROXY or SSL_CERT_FILE cannot be used ({type(error).__name__}).") from None
