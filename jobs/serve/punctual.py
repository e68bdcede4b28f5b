"""HTTP for those who ask for something: a connection that does not is closed, or some hundred of them would keep everybody else out."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""Within which a request must have come whole, from when its connection stands or its first byte is there."""


class PunctualProtocol(H11Protocol):
    """uvicorn's own, which sets a limit only between two requests."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._set_limit()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of a request that has begun."""
        super().data_received(data)
        self._set_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        self._lift_limit()

    def _set_limit(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._lift_limit()
        elif self._due is None:
            self._due = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _lift_limit(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
