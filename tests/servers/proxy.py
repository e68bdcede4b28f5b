"""Servers that lead connections on to another port: a proxy that opens tunnels (CONNECT), or refuses to, and TLS in front of Postgres."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import struct
import threading
from typing import Self

_SSL_REQUEST, _GSS_REQUEST = struct.pack("!II", 8, 80877103), struct.pack("!II", 8, 80877104)
"""What a Postgres client sends first where it would like encryption."""


class Front:
    """Something before one port of this machine; a context manager, in a thread of its own."""

    def __init__(self, to_port: int) -> None:
        self.port = 0
        self._to_port = to_port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="front", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the front did not start")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._handle(reader, writer)
        writer.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    async def _lead_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes = b"") -> None:
        """Pass on what both sides say until both have said all; `first` is said to the inner side."""
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        inner_writer.write(first)
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))


class TunnelProxy(Front):
    """Leads any host to one port. With `user` and `password` it wants them."""

    def __init__(self, to_port: int, *, user: str = "", password: str = "", refusal: str = "") -> None:
        """`refusal` is the status line's end of what every CONNECT is answered with, such as `502 Bad Gateway`."""
        super().__init__(to_port)
        self.opened: list[str] = []
        """Each host and port that a tunnel was opened to."""
        self.asked = 0
        self._refusal = refusal
        self._credentials = f"{user}:{password}@" if user else ""
        self._wanted = base64.b64encode(f"{user}:{password}".encode()) if user else b""

    @property
    def url(self) -> str:
        """The address for HTTPS_PROXY, with the credentials."""
        return f"http://{self._credentials}127.0.0.1:{self.port}"

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        refusal = self._refusal or ("407 Proxy Authentication Required" if self._wanted not in head else "")
        if refusal:
            # Some quote what they were sent.
            writer.write(f"HTTP/1.1 {refusal}\r\nContent-Length: {len(head)}\r\n\r\n".encode() + head)
            await writer.drain()
            return
        self.opened.append(head.split()[1].decode())
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await self._lead_on(reader, writer)


class PostgresTls(Front):
    """TLS for a Postgres server that was built without: agrees to it as a server does, and leads the inside on.

    `context=None` is a server that offers none. One that has TLS lets nobody in without (`hostssl` alone).
    """

    def __init__(self, to_port: int, context: ssl.SSLContext | None) -> None:
        super().__init__(to_port)
        self.peers: list[str | None] = []
        """The name in the client's certificate of each connection over TLS; None for one without."""
        self.in_the_clear = 0
        """Connections that did not ask for TLS, or went on without."""
        self._context = context

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(8)
        while first == _GSS_REQUEST or (first == _SSL_REQUEST and self._context is None):
            writer.write(b"N")
            first = await reader.readexactly(8)
        if first != _SSL_REQUEST or self._context is None:
            self.in_the_clear += 1
            if self._context is None:
                await self._lead_on(reader, writer, first)
            return
        writer.write(b"S")
        await writer.drain()
        await writer.start_tls(self._context)
        certificate = writer.get_extra_info("peercert") or {}
        names = [value for parts in certificate.get("subject", ()) for key, value in parts if key == "commonName"]
        self.peers.append(names[0] if names else None)
        await self._lead_on(reader, writer)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()
