"""HTTP to a service over a real socket: every wait and every answer has a limit, and the key shows nowhere."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx2
import pytest
from pydantic import SecretStr

from jobs.adapters.http import HttpClient, HttpStatusError, Limits, service_id
from jobs.retry import classify_error
from models.errors import BadAnswer

KEY = SecretStr("sk-very-secret-0123456789")
QUICK = Limits(connect_seconds=0.5, read_seconds=0.3, total_seconds=1.0, max_answer_bytes=1000)
Respond = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(respond: Respond, limits: Limits = QUICK) -> AsyncIterator[tuple[HttpClient, list[bytes]]]:
    """A client of a server that answers each request as told; the list is the requests' heads, one list entry a request."""
    heads: list[bytes] = []
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
                await reader.readexactly(length)
                heads.append(head)
                await respond(head, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = HttpClient(
        f"http://127.0.0.1:{port}/v1/", headers={"Authorization": SecretStr(f"Bearer {KEY.get_secret_value()}")}, limits=limits
    )
    try:
        yield client, heads
    finally:
        await client.aclose()
        for writer in connections:
            writer.close()
        server.close()


def answer(status: str, body: bytes, **headers: str) -> Respond:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())

    async def respond(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body)

    return respond


async def test_a_good_answer_arrives_whole_and_connections_are_used_again() -> None:
    async with serving(answer("200 OK", b'{"a": 1}', X_Request_Id="r1")) as (client, heads):
        answers = [await client.request("POST", "/embeddings", json={"input": ["x"]}) for _ in range(3)]
    assert [(one.status, one.json(), one.request_id) for one in answers] == [(200, {"a": 1}, "r1")] * 3
    assert heads[0].startswith(b"POST /v1/embeddings HTTP/1.1") and f"Bearer {KEY.get_secret_value()}".encode() in heads[0]


@pytest.mark.parametrize(
    ("status", "body", "code", "shown"),
    [
        ("429 Too Many", b'{"error": {"code": "insufficient_quota", "message": "no money"}}', "insufficient_quota", "no money"),
        ("400 Bad", b'{"error": {"type": "invalid_request_error", "code": null, "message": "m"}}', "invalid_request_error", "m"),
        ("404 Not Found", b'{"error": "model not found"}', "", "model not found"),
        ("422 No", b'{"detail": "wrong"}', "", "wrong"),
        ("502 Bad Gateway", b"<html>upstream</html>", "", ""),
        ("503 Down", b"", "", ""),
        ("307 Elsewhere", b"", "", ""),
        ("401 No", b'{"error": {"code": "invalid_api_key", "message": "Incorrect API key: sk-very***789"}}', "invalid_api_key", ""),
        ("500 Odd", b"[" * 900, "", ""),
    ],
)
async def test_any_other_status_is_raised_with_its_code_and_without_the_key(status: str, body: bytes, code: str, shown: str) -> None:
    async with serving(answer(status, body, Retry_After="3")) as (client, _):
        with pytest.raises(HttpStatusError) as caught:
            await client.request("GET", "x")
    error = caught.value
    assert (error.status_code, error.code, error.headers["retry-after"]) == (int(status[:3]), code, "3")
    assert str(error) == f"HTTP {status[:3]}" + (f" ({': '.join(word for word in (code, shown) if word)})" if code or shown else "")


@pytest.mark.parametrize("body", [b'{"a": ', b"NaN", b'{"a": Infinity}', b"\xff", b"", b"[" * 999])
async def test_an_answer_that_is_no_json_is_a_bad_answer(body: bytes) -> None:
    async with serving(answer("200 OK", body)) as (client, _):
        with pytest.raises(BadAnswer, match="not JSON"):
            (await client.request("GET", "x")).json()


async def test_an_answer_that_is_too_large_is_cut_off() -> None:
    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"64\r\n" + b"x" * 100 + b"\r\n")
            await writer.drain()

    async with serving(endless) as (client, _):
        with pytest.raises(BadAnswer, match="larger than 1000 bytes"):
            await client.request("GET", "x")


async def silence(_: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def half(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await asyncio.sleep(5)


async def drip(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.1)


async def cut(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    ("respond", "kind"),
    [(silence, "TIMEOUT"), (half, "TIMEOUT"), (drip, "TIMEOUT"), (cut, "RETRYABLE")],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_service_that_hangs_drips_or_breaks_off_is_left(respond: Respond, kind: str) -> None:
    async with serving(respond) as (client, _):
        with pytest.raises((httpx2.HTTPError, TimeoutError)) as caught:
            await client.request("GET", "x")
    assert classify_error(caught.value) == kind
    assert KEY.get_secret_value() not in "".join(traceback.format_exception(caught.value))


async def test_no_repr_shows_the_key() -> None:
    async with serving(answer("200 OK", b"1")) as (client, _):
        await client.request("GET", "x")
        assert KEY.get_secret_value() not in f"{client!r} {vars(client)}"


def test_a_service_is_named_by_kind_address_and_a_fingerprint_and_by_no_secret() -> None:
    name = service_id("embedding", "https://ann:pass@Host.test:8443/v1/?token=hush", KEY)
    assert name.startswith("embedding https://host.test:8443/v1 key:") and len(name.rpartition(":")[2]) == 12
    assert not any(secret in name for secret in ("ann", "pass", "hush", "sk-"))
    assert service_id("embedding", "https://host.test:8443/v1", SecretStr("other")) != name
    assert service_id("embedding", "http://localhost:8080", None) == "embedding http://localhost:8080 key:none"
