"""Outages of a service that speaks HTTP over a socket, seen by several workers: documents wait, none is given up, none comes in a crowd."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from jobs.adapters.exchange import Service as Outside
from jobs.adapters.exchange import Timeouts, read_json
from jobs.breaker import Rules
from jobs.database import make_pool
from jobs.retry import StageRetry
from jobs.services import Service, Terms
from jobs.services.own import service_id
from models.calls import CallPurpose, CallShare, Reply
from models.errors import DocmillError
from models.settings import Settings

RULES = Rules(failures=5, window_seconds=60, open_seconds=0.5, max_open_seconds=1.0, probe_seconds=5)
WORKERS = 4
DOCUMENTS = 60


@dataclass
class FlakyServer:
    """Answers each request with the status that `status` gives for its number and its time since the first one; notes when they came."""

    status: Callable[[int, float], int]
    headers: str = ""
    came: list[tuple[float, int]] = field(default_factory=list)
    begun: float = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.begun = self.begun or time.monotonic()
                at = time.monotonic() - self.begun
                status = self.status(len(self.came), at)
                self.came.append((at, status))
                await asyncio.sleep(0.005)
                body = b'{"ok": true}' if status == 200 else b"<html>no</html>"
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{self.headers}\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@dataclass
class Documents:
    """What became of documents that want one call each, deferred as the runner defers them."""

    retry: StageRetry = field(default_factory=lambda: StageRetry(max_attempts=3, base=0.1, max_delay=1))
    complete: int = 0
    dead: int = 0
    deferrals: list[int] = field(default_factory=list)

    async def work(self, service: Service, client: Outside, doc_id: str, places: asyncio.Semaphore) -> None:
        async def send() -> Reply[Any]:
            answer = await client.exchange("GET", "/embed", limit=1000)
            return answer.reply(read_json(client, answer), tokens_in=10)

        attempts = deferrals = 0
        await asyncio.sleep(random.Random(doc_id).uniform(0, 1))
        while True:
            try:
                async with places:
                    await service.call(send, CallPurpose("embed", (CallShare(doc_id),), tokens=10))
                self.complete += 1
                break
            except DocmillError as error:
                plan = self.retry.plan(error, attempts)
                if plan is None:
                    self.dead += 1
                    break
                attempts += plan.counts
                deferrals += not plan.counts
                await asyncio.sleep(plan.delay)
        self.deferrals.append(deferrals)


@asynccontextmanager
async def running(settings: Settings, database: str, server: FlakyServer) -> AsyncIterator[Documents]:
    """Run the documents on several workers, each with connections of its own, and yield what became of them."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    terms = Terms(service_id("embedding", url, None), "embedding", rules=RULES, total_seconds=40, patience_seconds=0.2)
    pools = [make_pool(settings, database, max_size=4) for _ in range(WORKERS)]
    clients = [Outside("The embedding service", url, None, Timeouts(20, 20, 30)) for _ in range(WORKERS)]
    for pool in pools:
        await pool.open()
    services = [Service(pool, terms, worker=f"test:{number}") for number, pool in enumerate(pools)]
    documents = Documents()
    try:
        places = [asyncio.Semaphore(4) for _ in range(WORKERS)]
        await asyncio.gather(
            *(documents.work(services[n % WORKERS], clients[n % WORKERS], f"d{n}", places[n % WORKERS]) for n in range(DOCUMENTS))
        )
        yield documents
    finally:
        for client in clients:
            await client.aclose()
        for service in services:
            await service.aclose()
        for pool in pools:
            await pool.close()
        listening.close()


def told(name: str, server: FlakyServer, documents: Documents) -> int:
    """Print the figures and return how many requests came in the first second after the first good answer that followed a failure."""
    bad = [at for at, status in server.came if status != 200]
    good = [at for at, status in server.came if status == 200 and bad and at > bad[-1]]
    first_second = sum(at < good[0] + 1 for at in good) if good else 0
    print(
        f"\n{name}: {documents.complete} of {DOCUMENTS} complete, {documents.dead} dead; calls {len(server.came)}, of which failed "
        f"{len(bad)}; deferrals per document at most {max(documents.deferrals)}; in the first second after the last failure {first_second}"
    )
    return first_second


async def test_an_outage_is_waited_out_without_a_dead_letter_or_a_stampede(
    settings: Settings, database: str, conn: psycopg.Connection
) -> None:
    server = FlakyServer(lambda _, at: 503 if at < 4 else 200)
    async with running(settings, database, server) as documents:
        first_second = told("outage of 4 s", server, documents)
    assert (documents.complete, documents.dead) == (DOCUMENTS, 0)
    failed = [at for at, status in server.came if status != 200]
    # What was under way when it opened, at most what the workers hold, and then one probe a period.
    assert len(failed) <= RULES.failures + WORKERS * 4 + 10
    assert first_second <= 5
    assert conn.execute("SELECT count(*), count(*) FILTER (WHERE outcome = 'unknown') FROM provider_usage").fetchone() == (
        len(server.came),
        0,
    )
    assert conn.execute("SELECT state, opened_count >= 1 FROM circuit_breakers").fetchone() == ("closed", True)


async def test_a_refused_key_costs_a_few_calls_and_no_document(settings: Settings, database: str, conn: psycopg.Connection) -> None:
    server = FlakyServer(lambda _, at: 401 if at < 3 else 200)
    async with running(settings, database, server) as documents:
        told("key refused for 3 s", server, documents)
    assert (documents.complete, documents.dead) == (DOCUMENTS, 0)
    assert sum(status == 401 for _, status in server.came) <= WORKERS * 4 + 10
    assert conn.execute("SELECT count(*) FROM alerts WHERE kind = 'service_refused'").fetchone() == (1,)


@pytest.mark.parametrize("headers", ["", "Retry-After: 1\r\n"])
async def test_a_service_that_limits_us_gets_fewer_calls_and_every_document_completes(
    settings: Settings, database: str, headers: str
) -> None:
    server = FlakyServer(lambda _, at: 429 if at < 3 else 200, headers)
    async with running(settings, database, server) as documents:
        told(f"429 for 3 s, {headers.strip() or 'no Retry-After'}", server, documents)
    assert (documents.complete, documents.dead) == (DOCUMENTS, 0)
    assert sum(status == 429 for _, status in server.came) <= WORKERS * 4 + 30


@pytest.mark.parametrize(("name", "good"), [("every fifth answered", lambda n: n % 5 == 4), ("flapping", lambda n: n // 8 % 2 == 0)])
async def test_a_service_that_answers_now_and_then_loses_no_document(
    settings: Settings, database: str, name: str, good: Callable[[int], bool]
) -> None:
    server = FlakyServer(lambda number, at: 200 if good(number) or at > 25 else 503)
    async with running(settings, database, server) as documents:
        told(name, server, documents)
    assert documents.complete + documents.dead == DOCUMENTS
    assert documents.dead <= DOCUMENTS * 0.1
