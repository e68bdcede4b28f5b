"""A parser and an embedder of this process that tell who is asked again for what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from jobs.adapters.embedders import HashedWords
from jobs.adapters.parsers import parse_file
from models.errors import ParseError
from tests.faults.folders import BAD
from tests.faults.in_process import Sandbox


class Thrift:
    """Looks what is known when something is parsed or embedded."""

    def __init__(self, conn: psycopg.Connection) -> None:
        self.conn, self.policy = conn, "reuse"
        self.problems: list[str] = []

    def parsed(self, data: bytes, mime_type: str) -> None:
        known = """SELECT FROM file_extractions
            WHERE content_sha256 = encode(sha256(%s), 'hex') AND state = 'complete' AND mime_type = %s"""
        if self.policy != "process" and self.conn.execute(known, [data, mime_type]).fetchone() is not None:
            self.problems.append(f"{data!r} was parsed again under {self.policy}")

    def embedded(self, texts: Sequence[str]) -> None:
        if again := self.conn.execute("SELECT content FROM document_chunks WHERE content = ANY(%s)", [list(texts)]).fetchall():
            self.problems.append(f"{again} was embedded again")


class Reader(Sandbox):
    """Tells what it parses."""

    def __init__(self, thrift: Thrift) -> None:
        self._thrift = thrift

    async def run(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        if function is parse_file:
            self._thrift.parsed(args[0].read_bytes(), args[3])
            if args[0].read_bytes() == BAD.encode():
                raise ParseError("It cannot be read.")
        return await super().run(function, *args, **named)


class Embedder(HashedWords):
    """Tells which texts it is asked for, and is no company for other documents: whoever dies, dies alone."""

    quick = False

    def __init__(self, thrift: Thrift) -> None:
        super().__init__(8)
        self._thrift = thrift

    async def embed(self, texts: Sequence[str], kind: Any = "passage") -> Any:
        self._thrift.embedded(texts)
        return await super().embed(texts, kind)
