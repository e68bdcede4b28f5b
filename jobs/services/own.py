"""The services of one worker: one of each kind, made when it is first called, closed when the worker stops."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

from jobs.services.front import Service
from jobs.services.state import Pool
from jobs.services.terms import Kind, terms_of
from models.calls import Caller, CallPurpose, Reply
from models.settings import Settings

T = TypeVar("T")


def service_id(kind: str, base_url: str, key: SecretStr | None) -> str:
    """Return the name under which all workers share what they know of a service: kind, address and a fingerprint of the key."""
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    print_ = "none" if key is None else hashlib.sha256(key.get_secret_value().encode()).hexdigest()[:12]
    return f"{kind} {parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')} key:{print_}"


def service_name(settings: Settings, kind: Kind) -> str:
    """Return the name of the service that the settings name for a kind."""
    base, key = {
        "embedding": (settings.embedding_base_url, settings.embedding_api_key),
        "extraction": (settings.extraction_base_url, settings.extraction_api_key),
        "parse": (settings.llamaparse_base_url, settings.llamaparse_api_key),
    }[kind]
    return service_id(kind, base, key)


class OwnServices:
    """Gives adapters their callers. A caller stays the same object for as long as the process lives, whichever worker runs in it."""

    def __init__(
        self,
        settings: Settings,
        *,
        pool: Callable[[], Pool],
        worker: str,
        stopping: Callable[[], bool],
        at_close: list[Callable[[], Awaitable[None]]],
    ) -> None:
        """`pool` is asked when a service is first called: before, there may be none. `at_close` is told then how to close them."""
        self._settings = settings
        self._pool, self._worker, self._stopping, self._at_close = pool, worker, stopping, at_close
        self._made: dict[Kind, Service] = {}
        kinds: tuple[Kind, ...] = ("embedding", "extraction", "parse")
        self._callers = {kind: _LazyCaller(self, kind) for kind in kinds}

    def caller(self, kind: Kind) -> Caller:
        """Return the way to the service of a kind."""
        return self._callers[kind]

    def service(self, kind: Kind) -> Service:
        """Return the service of a kind, made now if it is not there yet."""
        if kind not in self._made:
            if not self._made:
                self._at_close.append(self.aclose)
            terms = terms_of(self._settings, kind, service_name(self._settings, kind))
            self._made[kind] = Service(self._pool(), terms, worker=self._worker, stopping=self._stopping)
        return self._made[kind]

    async def aclose(self) -> None:
        """Close what was made; a later call makes it anew."""
        made, self._made = self._made, {}
        for service in made.values():
            await service.aclose()


class _LazyCaller:
    def __init__(self, services: OwnServices, kind: Kind) -> None:
        self._services, self._kind = services, kind

    async def call(self, send: Callable[[], Awaitable[Reply[T]]], purpose: CallPurpose) -> Reply[T]:
        """Make a call over the worker's service."""
        return await self._services.service(self._kind).call(send, purpose)
