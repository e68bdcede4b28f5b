"""HTTP to one outside service: connections that are used again, a limit on every wait and on the size of an answer, the key in one place.

Proxies and certificate authorities come from the usual variables (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE). What goes wrong without an answer
is raised as httpx2 raises it; an answer that is no 2xx is an HttpStatusError, one that cannot be used a BadAnswer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from models.errors import BadAnswer

if TYPE_CHECKING:
    import httpx2

_LONGEST_CODE = 100
_LONGEST_MESSAGE = 300
_QUOTES_KEY = frozenset({401, 403, 407})  # answers whose text may quote the key
_REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-correlation-id")


class HttpStatusError(Exception):
    """A service answered, but not with a 2xx. `code` is its own word for why, lower case, or empty."""

    def __init__(self, status_code: int, headers: Mapping[str, str], code: str = "", message: str = "") -> None:
        told = ": ".join(part for part in (code, message) if part)
        super().__init__(f"HTTP {status_code}" + (f" ({told})" if told else ""))
        self.status_code = status_code
        self.headers = headers
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """Longest waits in seconds, and the largest answer in bytes after decompression."""

    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    total_seconds: float = 120.0
    max_answer_bytes: int = 64_000_000
    connections: int = 100


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole 2xx answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def request_id(self) -> str | None:
        """The service's own name for the call."""
        return next((self.headers[name][:200] for name in _REQUEST_IDS if name in self.headers), None)

    def json(self) -> Any:
        """Return the body as JSON. BadAnswer if it is none, or holds NaN or Infinity."""

        def refuse(constant: str) -> Any:
            raise ValueError(constant)

        try:
            return json.loads(self.body, parse_constant=refuse)
        except (ValueError, RecursionError):
            raise BadAnswer(f"The service answered HTTP {self.status} with {len(self.body)} bytes that are not JSON.") from None


def service_id(kind: str, base_url: str, key: SecretStr | None) -> str:
    """Return the name under which all workers share what they know of a service: kind, address and a fingerprint of the key."""
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    print_ = "none" if key is None else hashlib.sha256(key.get_secret_value().encode()).hexdigest()[:12]
    return f"{kind} {parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')} key:{print_}"


class HttpClient:
    """Calls one service. No repr, error or log names the key."""

    def __init__(self, base_url: str, *, headers: Mapping[str, SecretStr | str] | None = None, limits: Limits | None = None) -> None:
        """`headers` go with every call, such as `Authorization`."""
        self._base_url = base_url.rstrip("/") + "/"
        self._headers = dict(headers or {})
        self._limits = limits or Limits()
        self._client: httpx2.AsyncClient | None = None
        self._making = asyncio.Lock()

    async def request(self, method: str, path: str, **content: Any) -> Answer:
        """Send one request (`json=`, `content=`, `data=`, `files=`, `params=`) to a path below the base URL. A redirect is not followed.

        Raises HttpStatusError, BadAnswer, TimeoutError for the total, and httpx2's errors.
        """
        async with self._making:
            if self._client is None:
                self._client = await asyncio.to_thread(self._make_client)
        client = self._client
        async with asyncio.timeout(self._limits.total_seconds):
            request = client.build_request(method, self._base_url + path.lstrip("/"), **content)
            response = await client.send(request, stream=True)
            try:
                headers = {name.lower(): value for name, value in response.headers.items()}
                body = await self._read(response)
            finally:
                await response.aclose()
        if not 200 <= response.status_code < 300:
            code, message = _complaint(body)
            if response.status_code in _QUOTES_KEY:
                message = ""
            raise HttpStatusError(response.status_code, headers, code, message)
        return Answer(response.status_code, headers, body)

    async def _read(self, response: httpx2.Response) -> bytes:
        most = self._limits.max_answer_bytes
        body = bytearray()
        async for part in response.aiter_bytes():
            body += part
            if len(body) > most:
                raise BadAnswer(f"The service's answer is larger than {most} bytes.")
        return bytes(body)

    def _make_client(self) -> httpx2.AsyncClient:
        # Loading the client and the system's certificates takes a quarter of a second, which no event loop should spend.
        import httpx2  # noqa: PLC0415

        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log addresses and headers
        limits = self._limits
        revealed = {name: value if isinstance(value, str) else value.get_secret_value() for name, value in self._headers.items()}
        return httpx2.AsyncClient(
            headers={"User-Agent": "docmill", **revealed},
            timeout=httpx2.Timeout(limits.read_seconds, connect=limits.connect_seconds, pool=limits.total_seconds),
            limits=httpx2.Limits(max_connections=limits.connections, max_keepalive_connections=limits.connections),
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        """Close the connections that are kept open between calls."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _complaint(body: bytes) -> tuple[str, str]:
    """Return the code and the message of an error's body as OpenAI and most others write it; empty where it is something else, say HTML."""
    try:
        told = json.loads(body[:100_000])
    except (ValueError, RecursionError):
        return "", ""
    error = told.get("error", told) if isinstance(told, dict) else None
    if isinstance(error, str):
        return "", error[:_LONGEST_MESSAGE]
    if not isinstance(error, dict):
        return "", ""
    words = [error.get("code"), error.get("type")]
    code = next((word for word in words if isinstance(word, str) and word), "")
    message = next((error[name] for name in ("message", "detail") if isinstance(error.get(name), str)), "")
    return code.lower()[:_LONGEST_CODE], message[:_LONGEST_MESSAGE]
