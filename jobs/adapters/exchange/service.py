"""A service behind one address: its key, its timeouts, and connections that are kept between exchanges."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakKeyDictionary

from pydantic import SecretStr

from jobs.adapters.exchange.clients import Unusable, make_client
from jobs.adapters.exchange.verdict import BRIEF_WAIT, clean, judge
from models.calls import CallPurpose, Reply
from models.errors import BadAnswer, ConfigurationError, DocmillError, FailedCall, RetryableError, ServiceUnavailable
from models.errors import TimeoutError as CallTimeout

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_LARGEST_REFUSAL = 65_536
_SHORTEST_KEY = 16
_REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-correlation-id")


class Direct:
    """A models.calls.Caller with nothing around the call; in a worker, jobs.services puts breaker, budget and ledger there."""

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Run `send` once."""
        return await send()


DIRECT = Direct()


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: to connect, between two pieces of an answer, and for the whole exchange."""

    connect: float = 10
    read: float = 60
    total: float = 120


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer, read whole."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    def reply(self, value: T, *, tokens_in: int | None = None, tokens_out: int | None = None, pages: int | None = None) -> Reply[T]:
        """Return what was made of this answer, with its status and headers."""
        request_id = next((self.headers[name][:200] for name in _REQUEST_IDS if name in self.headers), None)
        return Reply(value, tokens_in, tokens_out, pages, self.status, self.headers, request_id)


class Service:
    """One base address."""

    def __init__(self, name: str, base_url: str, key: SecretStr | None, timeouts: Timeouts | None = None) -> None:
        """`name` opens every message. A query in the address (Azure's api-version) goes with every request, and then the key does so
        in Azure's header. A key that cannot be sent, or an address that holds one, is a ConfigurationError."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ConfigurationError(f"{name}: the address must be http(s)://host[:port][/path], without a user or a key in it.")
        self.name = name
        self.host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
        self._parts = parts
        self._secret = key.get_secret_value() if key else ""
        if not (self._secret.isascii() and self._secret.isprintable()) or " " in self._secret:
            raise ConfigurationError(f"{name}: the key holds a blank, a line break or another character that no key has.")
        self._timeouts = timeouts or Timeouts()
        # Connections belong to the event loop that opened them, and a service may outlive a loop.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx2.AsyncClient] = WeakKeyDictionary()

    def _headers(self) -> dict[str, str]:
        if not self._secret:
            return {}
        return {"api-key": self._secret} if "api-version=" in self._parts.query else {"Authorization": f"Bearer {self._secret}"}

    def url(self, path: str, query: str = "") -> str:
        """Return the address of a path below the base address."""
        joined = self._parts.path.rstrip("/") + path
        queries = "&".join(part for part in (self._parts.query, query) if part)
        return urlunsplit((self._parts.scheme, self._parts.netloc, joined, queries, ""))

    async def exchange(self, method: str, path: str, *, limit: int, query: str = "", **content: Any) -> Answer:
        """Send one request and return its 2xx answer of at most `limit` bytes. `content` is httpx's `json`, or `files` and `data`.

        Raises CredentialRefused, RateLimitError, ServiceUnavailable, TimeoutError, RequestRefused, BadAnswer and RetryableError, each
        with `call` set.
        """
        client = await self._client()
        try:
            async with asyncio.timeout(self._timeouts.total):
                return await self._send(client, self._request(client, method, self.url(path, query), content), limit)
        except TimeoutError:
            late = f"{self._place()} did not finish its answer within {self._timeouts.total:g} s."
            raise self._failed(CallTimeout(late), sent=True) from None

    def _request(self, client: httpx2.AsyncClient, method: str, url: str, content: Mapping[str, Any]) -> httpx2.Request:
        import httpx2  # noqa: PLC0415 - loaded with the client, in a thread

        waits = httpx2.Timeout(self._timeouts.read, connect=self._timeouts.connect, pool=None)
        try:
            return client.build_request(method, url, headers=self._headers(), timeout=waits, **content)
        except httpx2.InvalidURL as error:
            raise self._unanswered(error) from None

    async def _send(self, client: httpx2.AsyncClient, request: httpx2.Request, limit: int) -> Answer:
        import httpx2  # noqa: PLC0415

        try:
            response = await client.send(request, stream=True)
            try:
                good = 200 <= response.status_code < 300
                body = await _read(response, limit if good else _LARGEST_REFUSAL, cut=not good)
            except httpx2.TransportError as error:
                if not good or isinstance(error, httpx2.TimeoutException):
                    raise
                # It had begun to answer, so that what it was asked for is made, and probably paid for.
                raise self.bad_answer(f"broke off its answer ({type(error).__name__}).") from None
            finally:
                await response.aclose()
        except _TooLarge:
            raise self._failed(BadAnswer(f"{self._place()} sent an answer of more than {limit:,} bytes."), sent=True) from None
        except (httpx2.HTTPError, httpx2.StreamError, OSError, ssl.SSLError) as error:
            raise self._unanswered(error) from None
        headers = {name.lower(): self._without_key(value.encode()).decode() for name, value in response.headers.items()}
        body = self._without_key(body)
        if not good:
            raise judge(self.name, self.host, status=response.status_code, headers=headers, body=body, secret=self._secret)
        return Answer(response.status_code, headers, body)

    def _without_key(self, told: bytes) -> bytes:
        """Return what a service said without the key, should it quote it. A shorter one could be part of anything, of vectors even."""
        return told.replace(self._secret.encode(), b"***") if len(self._secret) >= _SHORTEST_KEY else told

    def _unanswered(self, error: Exception) -> DocmillError:
        """Return the error for an exchange without a whole answer. The foreign message is dropped: it may hold a header or an address."""
        import httpx2  # noqa: PLC0415

        kind = type(error).__name__
        if isinstance(error, httpx2.ConnectTimeout):
            return self._failed(
                ServiceUnavailable(f"{self._place()} could not be reached within {self._timeouts.connect:g} s.", BRIEF_WAIT), sent=False
            )
        if isinstance(error, httpx2.TimeoutException):
            return self._failed(CallTimeout(f"{self._place()} was silent for {self._timeouts.read:g} s ({kind})."), sent=True)
        if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
            why = " [its certificate is not trusted; SSL_CERT_FILE names a CA of one's own]" if _is_certificate(error) else ""
            return self._failed(ServiceUnavailable(f"{self._place()} could not be reached ({kind}).{why}", BRIEF_WAIT), sent=False)
        if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            return self._failed(ConfigurationError(f"{self.name}: the address or the key cannot be used ({kind})."), sent=False)
        if isinstance(error, httpx2.DecodingError):
            return self._failed(BadAnswer(f"{self._place()} sent an answer that cannot be unpacked."), sent=True)
        return self._failed(RetryableError(f"{self._place()} broke off the exchange ({kind})."), sent=True)

    def bad_answer(self, what: str, *, tokens_in: int | None = None, tokens_out: int | None = None) -> BadAnswer:
        """Return the error for an answer whose content cannot be used, with the tokens that it cost as far as known."""
        error = BadAnswer(f"{self._place()} {what}", tokens_in=tokens_in, tokens_out=tokens_out)
        error.call = FailedCall(self.host, sent=True, status=200, tokens_in=tokens_in, tokens_out=tokens_out)
        return error

    def clean(self, words: str) -> str:
        """Return words of the service fit for a message: one line, bounded, without the key."""
        return clean(words, self._secret)

    def _place(self) -> str:
        return f"{self.name} at {self.host}"

    def _failed(self, error: _E, *, sent: bool) -> _E:
        error.call = FailedCall(self.host, sent=sent)
        return error

    async def _client(self) -> httpx2.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            try:
                made = await make_client()
            except Unusable as error:
                told = f"{self._place()} cannot be called: {error}"
                raise self._failed(ServiceUnavailable(told, BRIEF_WAIT), sent=False) from None
            self._clients.setdefault(loop, made)
        return self._clients[loop]

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


_E = TypeVar("_E", bound=DocmillError)


class _TooLarge(Exception):
    """A body is larger than allowed."""


class _NotANumber(ValueError):
    """NaN or Infinity stands where JSON has a number."""


def _refuse_constant(constant: str) -> float:
    raise _NotANumber(constant)


def read_json(service: Service, answer: Answer) -> Any:
    """Return the JSON of an answer; BadAnswer for anything else. NaN and Infinity, which Python would take, are no JSON."""
    try:
        return json.loads(answer.body, parse_constant=_refuse_constant)
    except _NotANumber:
        problem = "sent NaN or infinity, which are no JSON."
    except (ValueError, RecursionError):
        problem = "sent an answer that is cut off or no JSON."
    raise service.bad_answer(problem)


async def _read(response: httpx2.Response, limit: int, *, cut: bool) -> bytes:
    """Read a body up to a limit in bytes, unpacked; what is over it is dropped (`cut`) or raises _TooLarge."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > limit:
            if cut:
                break
            raise _TooLarge
    return b"".join(parts)[:limit]


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
