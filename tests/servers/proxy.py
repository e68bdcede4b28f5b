"""A proxy that opens tunnels (CONNECT), or refuses to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from typing import Self


class TunnelProxy:
    """Leads any host to one port of this machine. With `user` and `password` it wants them; a context manager, in a thread of its own."""

    def __init__(self, to_port: int, *, user: str = "", password: str = "", refusal: str = "") -> None:
        """`refusal` is the status line's end of what every CONNECT is answered with, such as `502 Bad Gateway`."""
        self.opened: list[str] = []
        """Each host and port that a tunnel was opened to."""
        self.asked = 0
        self._to_port, self._refusal = to_port, refusal
        self._credentials = f"{user}:{password}@" if user else ""
        self._wanted = base64.b64encode(f"{user}:{password}".encode()) if user else b""
        self._port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)

    @property
    def url(self) -> str:
        """The address for HTTPS_PROXY, with the credentials."""
        return f"http://{self._credentials}127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._tunnel, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            refusal = self._refusal or ("407 Proxy Authentication Required" if self._wanted not in head else "")
            if refusal:
                # Some quote what they were sent.
                writer.write(f"HTTP/1.1 {refusal}\r\nContent-Length: {len(head)}\r\n\r\n".encode() + head)
                await writer.drain()
                writer.close()
                return
            self.opened.append(head.split()[1].decode())
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()
