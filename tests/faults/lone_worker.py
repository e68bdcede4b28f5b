"""A worker in this process that takes one job at a time, with docmill's own stages, and may die at any statement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from jobs.adapters.embedders import HashedWords
from jobs.adapters.parsers import parse_file
from jobs.adapters.sandbox_child import Answer
from jobs.adapters.storage import LocalStorage
from jobs.batch.unpacking import Unpacker
from jobs.leases import LeaseKeeper
from jobs.pipeline.claiming import Job
from jobs.pipeline.reading import Reading
from jobs.pipeline.runner import Runner
from jobs.retry import StageRetry
from jobs.stages import SandboxCall, Tools
from models.errors import ParseError
from models.settings import Settings
from tests.faults.folders import BAD


class Killed(BaseException):
    """The process is gone."""


class Fuse:
    """Kills whoever runs the statement at which it burns out, before or after that has been carried out."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.after = False
        self._execute = psycopg.AsyncCursor.execute

    async def execute(self, cursor: Any, *args: Any, **named: Any) -> Any:
        burns = self.left == 0
        self.left = None if burns or self.left is None else self.left - 1
        if burns and not self.after:
            raise Killed
        done = await self._execute(cursor, *args, **named)
        if burns:
            raise Killed
        return done

    @contextmanager
    def lit(self, statements: int | None, *, after: bool) -> Any:
        self.left, self.after = statements, after
        fuse = self

        async def execute(cursor: Any, *args: Any, **named: Any) -> Any:
            return await fuse.execute(cursor, *args, **named)

        psycopg.AsyncCursor.execute = execute  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            self.left = None
            psycopg.AsyncCursor.execute = self._execute  # type: ignore[method-assign]


class Here:
    """Runs what a sandbox's child would, in this process."""

    def __init__(self, told: Callable[[Any, Any], None] = lambda *_: None) -> None:
        self._told = told

    async def run(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        if function is parse_file:
            self._told(args[0].read_bytes(), args[3])
            if args[0].read_bytes() == BAD.encode():
                raise ParseError("It cannot be read.")
        return function(*args, **named)

    async def run_each(self, calls: Sequence[SandboxCall]) -> list[Answer]:
        return [Answer(None, await self.run(function, *args, **named), 0.0, 0.0) for function, args, named in calls]

    async def aclose(self) -> None:
        """Nothing to end."""


class Embedder(HashedWords):
    """Tells which texts it is asked for, and is no company for other documents: whoever dies, dies alone."""

    quick = False

    def __init__(self, told: Callable[[Sequence[str]], None]) -> None:
        super().__init__(8)
        self._told = told

    async def embed(self, texts: Sequence[str], kind: Any = "passage") -> Any:
        self._told(texts)
        return await super().embed(texts, kind)


@dataclass
class Worker:
    """A worker with docmill's own stages, which takes one job at a time."""

    conn: psycopg.Connection
    pool: Any
    settings: Settings
    leases: LeaseKeeper
    fuse: Fuse
    problems: list[str] = field(default_factory=list)

    def _parsed(self, policy: str, data: bytes, mime_type: str) -> None:
        known = """SELECT FROM file_extractions
            WHERE content_sha256 = encode(sha256(%s), 'hex') AND state = 'complete' AND mime_type = %s"""
        if policy != "process" and self.conn.execute(known, [data, mime_type]).fetchone() is not None:
            self.problems.append(f"{data!r} was parsed again under {policy}")

    def _embedded(self, texts: Sequence[str]) -> None:
        if again := self.conn.execute("SELECT content FROM document_chunks WHERE content = ANY(%s)", [list(texts)]).fetchall():
            self.problems.append(f"{again} was embedded again")

    def runner(self, policy: str, handoff: str) -> Runner:
        settings = self.settings.model_copy(update={"duplicate_policy": policy, "handoff": handoff, "retry_base_delay_seconds": 0.0})
        reading = Reading(self.pool)
        tools = Tools(
            settings, LocalStorage.from_settings(settings), Here(lambda data, mime: self._parsed(policy, data, mime)),
            Embedder(self._embedded), reading.known_vectors, reading.find_original, reading.original_text, reading.original_extraction,
        )  # fmt: skip
        return Runner(
            settings=settings, pool=self.pool, tools=tools, leases=self.leases, retry=StageRetry(max_attempts=3, base=0.0, max_delay=300),
            worker="test:1", stopping=lambda: False, finished_jobs=set(),
        )  # fmt: skip

    async def work(self, which: int, policy: str, handoff: str, *, dies_at: int | None = None, after: bool = False) -> bool:
        """Take one of the jobs that are due; False if there is none."""
        due = """SELECT id, task_name, args FROM procrastinate_jobs WHERE status = 'todo' AND coalesce(scheduled_at, now()) <= now()
            AND (args ? 'doc_id' OR task_name = 'unpack') ORDER BY id"""
        found = self.conn.execute(due).fetchall()
        if not found:
            return False
        job_id, task, args = found[which % len(found)]
        self.conn.execute("UPDATE procrastinate_jobs SET status = 'doing' WHERE id = %s", [job_id])
        self.conn.execute("UPDATE file_extractions SET not_before = NULL WHERE not_before IS NOT NULL")
        try:
            with self.fuse.lit(dies_at, after=after):
                if task == "unpack":
                    await self._unpacker().run(args["archive_id"])
                else:
                    await self.runner(policy, handoff).run(Job(job_id, task, None), args["doc_id"])
        except Killed:
            return True
        self.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s AND status = 'doing'", [job_id])
        return True

    def _unpacker(self) -> Unpacker:
        return Unpacker(settings=self.settings, pool=self.pool, sandbox=lambda _: Here(), stopping=lambda: False)
