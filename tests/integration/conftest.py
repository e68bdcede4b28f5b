"""A runner over the test's database, with stages that are plain functions, for what the runner itself promises."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from jobs.adapters.embedders import HashedWords
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Limits
from jobs.adapters.storage import LocalStorage
from jobs.database import make_pool
from jobs.front import close_async
from jobs.leases import LeaseKeeper
from jobs.pipeline.claiming import Job
from jobs.pipeline.claims import Connection
from jobs.pipeline.copying import Copier
from jobs.pipeline.reading import Reading
from jobs.pipeline.runner import Runner
from jobs.pipeline.running import StageFunction
from jobs.places import Lend, not_lent
from jobs.retry import StageRetry
from jobs.stages import Tools
from models.chunks import Chunk
from models.documents import Document, FileType
from models.settings import Settings
from models.stages import STAGE_BY_NAME, STAGES
from tests.servers import OpenAIServer
from tests.walls import PEOPLE, Walls, fill

if TYPE_CHECKING:
    from tests.integration.outside import Outside


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def made_by(stage: str, document: Document) -> Document:
    """What the plain stages make: small, but everything that finalize and the checkpoint ask for."""
    text = f"text of {document.doc_id} version {document.version}"
    match stage:
        case "validate":
            return replace(document, file_size=1, content_sha256=document.content_sha256, file_type=FileType.TEXT, mime_type="text/plain")
        case "parse":
            return replace(document, markdown=text, parser="plain 1")
        case "check":
            return replace(document, markdown_sha256=sha(text))
        case "chunk":
            words = text.split()
            made = [Chunk(uuid5(NAMESPACE_URL, f"{document.doc_id}{i}{w}"), i, w, sha(w)) for i, w in enumerate(words)]
            return replace(document, chunks=tuple(made))
        case "embed":
            vectors = np.eye(8, dtype=np.float32)[: len(document.chunks or ())]
            return replace(document, vectors=vectors, embedding_model="eye", embedded_count=len(vectors))
        case "extract":
            return replace(document, raw_extraction={"title": text, "language": {"code": "en"}})
        case _:
            return document


@dataclass
class Bench:
    """One worker's runner, what its stages were called with, and what they should do besides."""

    conn: psycopg.Connection
    pool: AsyncConnectionPool[Connection]
    settings: Settings
    leases: LeaseKeeper
    calls: list[str] = field(default_factory=list)
    also: dict[str, Callable[[Document], Awaitable[None]]] = field(default_factory=dict)
    stopping: bool = False
    copier: Copier | None = None

    def runner(
        self,
        worker: str = "test:1",
        *,
        given: Mapping[str, Any] | None = None,
        stages: Mapping[str, StageFunction] | None = None,
        lent_place: Lend | None = None,
        **changes: Any,
    ) -> Runner:
        """Return one with plain stages but for `stages`, and own tools but for those `given`; `changes`: settings that are others."""
        settings = self.settings.model_copy(update=changes)

        def stage(name: str) -> Callable[[Document, Tools], Awaitable[Document]]:
            async def run(document: Document, tools: Tools) -> Document:
                self.calls.append(name)
                if name in self.also:
                    await self.also[name](document)
                return made_by(name, document)

            return run

        reading = Reading(self.pool)
        nothing: Any = None
        tools = Tools(
            settings, LocalStorage.from_settings(settings), nothing, HashedWords(), reading.known_vectors, reading.find_original,
            reading.original_text, reading.original_extraction,
        )  # fmt: skip
        return Runner(
            settings=settings,
            pool=self.pool,
            tools=replace(tools, **(given or {})),
            leases=self.leases,
            retry=StageRetry(max_attempts=settings.max_retry_attempts, base=settings.retry_base_delay_seconds, max_delay=300),
            worker=worker,
            stopping=lambda: self.stopping,
            finished_jobs=set(),
            lent_place=lent_place or not_lent,
            copier=self.copier,
            stages={s.name: stage(s.name) for s in STAGES} | dict(stages or {}),
        )

    def submit(self, doc_id: str = "a", content: str | None = None, user_id: str = "default") -> None:
        """Submit content of the document's own, or what a hexadecimal digit stands for."""
        sha256 = sha(doc_id) if content is None else content * 64
        statement = "SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => %s, user_id => %s)"
        self.conn.execute(statement, [doc_id, sha256, user_id])

    def fetch(self) -> tuple[Job, str] | None:
        """Take the next waiting job as procrastinate's worker does, as if it were due already."""
        self.conn.execute("UPDATE file_extractions SET not_before = NULL WHERE not_before IS NOT NULL")
        row = self.conn.execute(
            """UPDATE procrastinate_jobs SET status = 'doing' WHERE id = (
                SELECT id FROM procrastinate_jobs WHERE status = 'todo' AND args ? 'doc_id' ORDER BY id LIMIT 1
            ) RETURNING id, task_name, args"""
        ).fetchone()
        return None if row is None else (Job(row[0], row[1], None), row[2]["doc_id"])

    async def drain(self, **changes: Any) -> int:
        """Run all waiting jobs, also those scheduled for later, and return how many there were."""
        runner, count = self.runner(**changes), 0
        while found := self.fetch():
            await runner.run(*found)
            self.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0].id])
            count += 1
        return count

    def one(self, statement: str, *args: object) -> tuple[Any, ...]:
        row = self.conn.execute(statement, args).fetchone()
        assert row is not None
        return tuple(row)

    def all(self, statement: str, *args: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in self.conn.execute(statement, args).fetchall()]

    async def until(self, statement: str, *row: object) -> None:
        """Wait until that is the statement's first row."""
        async with asyncio.timeout(30):
            while self.one(statement) != row:  # noqa: ASYNC110 - the database is asked, which sets no event
                await asyncio.sleep(0.05)

    def cut_connections(self) -> None:
        """End all sessions of the database but this one."""
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        self.conn.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

    @asynccontextmanager
    async def held_from(self, stage: str, run: Callable[[Bench], Coroutine[Any, Any, None]]) -> AsyncIterator[psycopg.Connection]:
        """Run jobs whose document d05 is held from a stage on, by the transaction that is yielded, until the block ends."""
        with psycopg.connect(self.conn.info.dsn) as other:

            async def hold(document: Document) -> None:
                if document.doc_id == "d05":
                    other.execute("SELECT FROM file_extractions WHERE doc_id = 'd05' FOR UPDATE")

            self.also[stage] = hold
            running = asyncio.create_task(run(self))
            try:
                yield other
            finally:
                other.rollback()
                async with asyncio.timeout(30):
                    await running


@pytest.fixture
async def bench(settings: Settings, database: str, conn: psycopg.Connection) -> AsyncIterator[Bench]:
    pool = make_pool(settings, database)
    await pool.open()
    leases = LeaseKeeper(settings.model_copy(update={"lease_seconds": 2.0}), database)
    try:
        yield Bench(conn, pool, settings, leases)
    finally:
        leases.close()
        await pool.close()


@pytest.fixture
async def front(bench: Bench) -> AsyncIterator[Bench]:
    """A bench beside which the front door is used."""
    yield bench
    await close_async()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three small files, as it was an hour ago."""
    from tests.integration.syncing import put

    made = tmp_path / "documents"
    (made / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        put(made / name, f"text of {name}")
    return made


@pytest.fixture
def endpoint() -> Iterator[OpenAIServer]:
    """A service for embeddings and chats behind a socket."""
    with OpenAIServer(dimensions=32) as running:
        yield running


@pytest.fixture
async def sandbox() -> AsyncIterator[ProcessSandbox]:
    """One child for parsing and local extraction."""
    made = ProcessSandbox(children=1, limits=Limits(timeout=60, memory_mb=4096, max_output_mb=256))
    yield made
    await made.aclose()


STAGE_NAMES = [stage.name for stage in STAGES]
assert list(STAGE_BY_NAME) == STAGE_NAMES


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    """Makes runners that share the test's database and outside services."""
    from tests.integration.outside import Outside

    made = Outside(bench)
    yield made
    await made.aclose()


@pytest.fixture(scope="session")
def walls() -> Iterator[Walls]:
    """A server with a database in which alice and bob have a row each in every table. Tests leave it as it is."""
    made = Walls()
    try:
        made.new_database()
        made.raise_walls()
        with made.as_login("postgres") as conn:
            for user in PEOPLE:
                fill(conn, user)
            # A call that both shared.
            conn.execute(
                "INSERT INTO provider_usage (id, service, kind, doc_ids, batch_ids, user_ids, shares, cost, "
                "outcome, give_up_at, finished_at) "
                "SELECT gen_random_uuid(), 's', 'embedding', ARRAY['alice-doc', 'bob-doc'], ARRAY['alice-batch', 'bob-batch'], "
                "ARRAY['alice', 'bob'], ARRAY[0.5, 0.5], 2, 'ok', now(), now()"
            )
            conn.execute("ANALYZE")
        with made.as_login("bob"):  # whose session is there to be looked at
            yield made
    finally:
        made.close()


@pytest.fixture
def alice(walls: Walls) -> Iterator[psycopg.Connection[Any]]:
    """The connection of a person."""
    with walls.as_login("alice") as conn:
        yield conn
