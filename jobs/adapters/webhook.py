"""Posts JSON to one address over HTTP. Answers and failures of the network become errors of models/errors.py."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from jobs.adapters.exchange.clients import Unusable, make_client
from models.errors import ConfigurationError, PermanentError, RateLimitError, RetryableError
from models.errors import TimeoutError as CallTimeout

if TYPE_CHECKING:
    import httpx2

_LATER = frozenset({408, 409, 423, 425})
"""Refusals that say nothing against the request itself, beside 429 and 5xx."""


def _wait_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After; its other form, a date, is not worth trusting two clocks for."""
    told = headers.get("retry-after", "")
    return float(told) if told.isascii() and told.isdigit() else None


class Webhook:
    """One address. No error names it: it may hold a token."""

    def __init__(self, url: SecretStr, *, timeout: float) -> None:
        """`timeout` in seconds, for the whole of one call."""
        self._url = url.get_secret_value()
        self._timeout = timeout
        self._client: httpx2.AsyncClient | None = None

    async def post(self, payload: Mapping[str, Any], *, idempotency_key: str) -> None:
        """Post and return if the answer is a 2xx. A redirect is not followed: it could carry the payload anywhere.

        Raises RateLimitError (429), TimeoutError, RetryableError (5xx, no connection, no client), ConfigurationError (no usable address)
        and PermanentError (any other answer).
        """
        if self._client is None:
            try:
                self._client = await make_client()
            except Unusable as error:
                raise RetryableError(f"The webhook cannot be called: {error}") from None
        import httpx2  # noqa: PLC0415 - loaded with the client, in a thread

        headers = {"Idempotency-Key": idempotency_key}
        try:
            async with asyncio.timeout(self._timeout):
                request = self._client.build_request("POST", self._url, json=payload, headers=headers, timeout=self._timeout)
                answer = await self._client.send(request, stream=True)
                await answer.aclose()  # its text, which may be of any length, is not wanted
        except (httpx2.TimeoutException, TimeoutError):
            raise CallTimeout(f"The webhook did not answer within {self._timeout:g} s.") from None
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol):
            raise ConfigurationError("The webhook's address cannot be used.") from None
        except (httpx2.HTTPError, OSError, ssl.SSLError) as error:
            raise RetryableError(f"The webhook could not be reached ({type(error).__name__}).") from None
        self._judge(answer.status_code, answer.headers)

    @staticmethod
    def _judge(status: int, headers: Mapping[str, str]) -> None:
        if 200 <= status < 300:
            return
        message = f"The webhook answered HTTP {status}."
        if status == 429:
            raise RateLimitError(message, _wait_of(headers))
        if status >= 500 or status in _LATER:
            raise RetryableError(message)
        raise PermanentError(message)

    async def aclose(self) -> None:
        """Close the connections that are kept open between calls."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
