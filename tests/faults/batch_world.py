"""What the random test of batches is played with: sources, expectations, and a pool and a sandbox at which workers come to harm."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.arguments import derive_doc_id, path_doc_id
from jobs.database import Pool
from tests.archives import Raw, raw_zip
from tests.faults.in_process import Danger, Sandbox

BAD = "bad"
"""The content of an entry whose checksum is another."""
BROKEN = b"PK\x03\x04 no directory"
Spec = Mapping[str, Any]
"""What a zip holds: name -> content, a Spec of its own for a zip inside, or bytes for a zip that is broken."""


def zip_of(spec: Spec | bytes) -> bytes:
    """The same bytes each time."""
    if isinstance(spec, bytes):
        return spec
    return raw_zip(
        Raw(name.encode(), zip_of(what)) if not isinstance(what, str) else Raw(name.encode(), what.encode(), crc=1 if what == BAD else None)
        for name, what in spec.items()
    )


def entries(spec: Spec | bytes, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The documents of a zip: path in the batch, content."""
    for name, what in {} if isinstance(spec, bytes) else spec.items():
        if isinstance(what, str):
            yield f"{prefix}{name}", what
        else:
            yield from entries(what, f"{prefix}{name}/")


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A batch, whose it is and how it comes in."""

    batch_id: str
    user_id: str
    kind: Literal["zip", "list", "sql"]

    def documents(self, spec: Spec | bytes, folder: Path) -> dict[str, str]:
        """doc_id -> content of what has been submitted."""
        if self.kind != "list":
            return {derive_doc_id(self.user_id, f"{self.batch_id}\n{path}"): content for path, content in entries(spec)}
        assert not isinstance(spec, bytes)
        made = {}
        for name, what in spec.items():
            path = folder / self.batch_id / name
            if isinstance(what, str):
                made[path_doc_id(self.user_id, path)] = what
            else:
                inside = entries(what, f"{path}/")
                made |= {derive_doc_id(self.user_id, f"{self.batch_id}\n{name}"): content for name, content in inside}
        return made

    def write(self, spec: Spec | bytes, folder: Path) -> Path | list[Path]:
        """Put the files where the submitter has them."""
        place = folder / self.batch_id
        place.mkdir(parents=True, exist_ok=True)
        if self.kind != "list":
            (place / "in.zip").write_bytes(zip_of(spec))
            return place / "in.zip"
        assert not isinstance(spec, bytes)
        for name, what in spec.items():
            (place / name).write_bytes(what.encode() if isinstance(what, str) else zip_of(what))
        return [place / name for name in spec]


SOURCES = [Source("za", "ann", "zip"), Source("zb", "ann", "zip"), Source("li", "ann", "list"), Source("sq", "bob", "sql")]
Answer = Literal["yes", "no", "maybe"]


@dataclass
class Wanted:
    """What must become of a document."""

    content: str | None
    """None: nobody can say."""
    there: Answer = "yes"
    cancelled: Answer = "no"


class FicklePool:
    """A pool whose user may die or fall asleep before it has a connection, and after its transaction has been committed."""

    def __init__(self, pool: Pool, danger: Danger) -> None:
        self._pool, self._danger = pool, danger
        self.timeout = pool.timeout

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[Any]:  # noqa: ASYNC109 - as the pool has it
        await self._danger.step()
        async with self._pool.connection(timeout=timeout) as conn:
            self._danger.holding += 1
            try:
                yield conn
            finally:
                self._danger.holding -= 1
        await self._danger.step()


class FickleSandbox(Sandbox):
    """A sandbox whose user may die or fall asleep before and after a call."""

    def __init__(self, danger: Danger) -> None:
        self._danger = danger

    async def run(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        await self._danger.step()
        made = await super().run(function, *args, **named)
        await self._danger.step()
        return made
