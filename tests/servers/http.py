"""An HTTP/1.1 server close enough to the socket to break it on purpose: h11 over asyncio, in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import h11

from tests.servers.faults import Fault, Script, from_json, never
from tests.servers.tally import Tally

_FOREVER = 3600.0
_Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Request:
    """A request, read whole."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body's JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """Return an answer in JSON."""
        return cls(status, json.dumps(data).encode(), {"content-type": "application/json", **(headers or {})})


class LocalServer:
    """Answers with `handle`, after `latency` seconds, unless the script says otherwise. A context manager, in a thread of its own.

    Entered again after its end it is back at its address, with all that it knew.
    """

    def __init__(self, *, port: int = 0, latency: float = 0.0, key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.latency = latency
        self.punctual = False
        """`latency` is all that an answer takes, its making included, as it is measured from outside; else it comes before."""
        self.key = key
        self.tally = Tally()
        self.log: deque[Request] = deque(maxlen=1000)
        """The last thousand requests."""
        self.drip_seconds = 0.2
        self._port = port
        self._tls = tls
        self._script: Script = never
        self._script_from = (0, 0.0)
        self._started = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()

    @property
    def root(self) -> str:
        """The base address."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """What the setting with the service's address is."""
        return self.root

    @property
    def clock(self) -> float:
        """Seconds since the server's start, as in the tally."""
        return time.monotonic() - self._started

    def script(self, script: Script) -> None:
        """Have requests from now on fail as the script says; it counts requests from 1 and seconds from 0."""
        self._script_from = (self.tally.requests, self.clock)
        self._script = script

    def reset(self) -> None:
        """Forget everything that was counted, and fail no more."""
        self.tally = Tally()
        self.log.clear()
        self.script(never)

    async def handle(self, request: Request, mangle: str) -> Response:
        """Answer one request; `mangle` names what is to be wrong with the answer, empty for nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._ready.clear()
        self._thread = threading.Thread(target=self._run, name="local-server", daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the local server did not start")
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._loop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self.serve())

    async def serve(self, *, announce: bool = False) -> None:
        """Serve until `__exit__`, or for ever; `announce` prints the address once it is known."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await self._connection(reader, writer)
            except (ConnectionError, ssl.SSLError, h11.RemoteProtocolError, asyncio.CancelledError):
                pass  # the client went away, or the server stops
            finally:
                connections.discard(task)
                writer.transport.abort()

        accepted = connected if self._tls is None else _handshake_first(self, self._tls, connected)
        server = await asyncio.start_server(accepted, "127.0.0.1", self._port, limit=1 << 20, backlog=1024)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        if announce:
            print(f"{type(self).__name__} at {self.url}", flush=True)
        await self._stop.wait()
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def next_is(self, kind: str) -> bool:
        """Say whether the next request would meet this failure; for failures that come before there is a request."""
        fault = self._script(self.tally.requests - self._script_from[0] + 1, self.clock - self._script_from[1])
        return fault is not None and fault.kind == kind

    def count_fault(self, name: str) -> None:
        """Count a failure before there is a request."""
        self.tally.requests += 1
        self.tally.at.append(self.clock)
        self.tally.faults[name] += 1

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tally.connections += 1
        parser = h11.Connection(h11.SERVER)
        while True:
            request = await _read_request(parser, reader, writer)
            if request is None:
                return
            response, fault = await self._answer(request)
            if not await self._write(parser, writer, response, fault):
                return
            if parser.our_state is not h11.DONE or parser.their_state is not h11.DONE:
                return
            parser.start_next_cycle()

    async def _answer(self, request: Request) -> tuple[Response, Fault | None]:
        if request.path.startswith("/_"):
            return self._control(request), None
        tally = self.tally
        tally.requests += 1
        tally.at.append(self.clock)
        self.log.append(request)
        tally.in_flight += 1
        tally.most_in_flight = max(tally.most_in_flight, tally.in_flight)
        try:
            fault = self._script(tally.requests - self._script_from[0], self.clock - self._script_from[1])
            if fault is not None:
                tally.faults[fault.name] += 1
            if fault is not None and fault.kind in ("status", "hang_in_headers", "hang_in_handshake", "reset", "garbage", "redirect"):
                return Response(fault.status, fault.body.encode(), fault.headers), fault
            due = time.monotonic() + self.latency
            if not self.punctual:
                await asyncio.sleep(self.latency)
            if self.key is not None and self.key not in (request.headers.get("api-key"), request.headers.get("authorization", "")[7:]):
                error = {
                    "message": f"Incorrect API key provided: {request.headers.get('authorization', '')[7:]}",
                    "code": "invalid_api_key",
                }
                return Response.of({"error": error}, 401), None
            response = await self.handle(request, fault.mangle if fault is not None else "")
            if self.punctual:
                await asyncio.sleep(due - time.monotonic())
            return response, fault
        finally:
            tally.in_flight -= 1

    def _control(self, request: Request) -> Response:
        if request.path == "/_script":
            self.script(from_json(request.json()))
        elif request.path == "/_reset":
            self.reset()
        elif request.path == "/_latency":
            self.latency = float(request.json()["seconds"])
        return Response.of({**self.tally.as_json(), "clock": self.clock})

    async def _write(self, parser: h11.Connection, writer: asyncio.StreamWriter, response: Response, fault: Fault | None) -> bool:
        """Write the answer, or what the fault makes of it; False where the connection is over."""
        kind = fault.kind if fault is not None else ""
        if kind in ("hang_in_headers", "hang_in_handshake"):
            await asyncio.sleep(_FOREVER)
        if kind == "reset":
            return _reset(writer)
        if kind == "garbage":
            writer.write(b"\x00\xffSSH-2.0-not-http\r\n\r\n")
            await writer.drain()
            return False
        body, headers = response.body, dict(response.headers)
        if kind == "truncated":
            body = body[: len(body) // 2]
        if kind == "redirect":
            headers["location"] = "/elsewhere"
        if kind == "oversized":
            headers["content-length"] = str(1 << 40)
        headers.setdefault("content-length", str(len(body)))
        head = h11.Response(status_code=response.status, headers=list(headers.items()))
        writer.write(parser.send(head) or b"")
        half = len(body) // 2
        if kind in ("hang_in_body", "cut_off", "reset_in_body"):
            writer.write(body[:half])
            await writer.drain()
            if kind == "hang_in_body":
                await asyncio.sleep(_FOREVER)
            await asyncio.sleep(0.05)  # what is written first arrives first
            return _reset(writer) if kind == "reset_in_body" else False
        if kind == "oversized":
            while True:
                writer.write(b" " * 65_536)
                await writer.drain()
        if kind == "drip":
            for at in range(0, len(body), 16):
                writer.write(body[at : at + 16])
                await writer.drain()
                await asyncio.sleep(self.drip_seconds)
        else:
            writer.write(body)
        parser.send(h11.Data(data=body))
        parser.send(h11.EndOfMessage())
        await writer.drain()
        return True


def _handshake_first(server: LocalServer, context: ssl.SSLContext, connected: _Connected) -> _Connected:
    """Return what accepts connections and starts TLS by hand, so that it can be left undone."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if server.next_is("hang_in_handshake"):
                server.count_fault("hang_in_handshake")
                while await reader.read(65_536):
                    pass  # listens, says nothing, until the client gives up
                writer.transport.abort()
                return
            await writer.start_tls(context)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        await connected(reader, writer)

    return accepted


def _reset(writer: asyncio.StreamWriter) -> bool:
    """Close with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def _read_request(parser: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """Read one request whole; None where the client has gone."""
    head: h11.Request | None = None
    parts: list[bytes] = []
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            if parser.they_are_waiting_for_100_continue:
                writer.write(parser.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            parser.receive_data(await reader.read(1 << 18))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            target = urlsplit(head.target.decode())
            headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
            return Request(head.method.decode(), target.path, parse_qs(target.query), headers, b"".join(parts))
        else:
            return None
