"""Alerts reach the webhook, each at least once, whatever it does, and trouble with it reaches nobody else."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import alerts
from jobs.alerts import AlertForwarder
from models.settings import Settings
from tests.running import wait_for, worker

PATIENCE = 30  # seconds; only what hangs comes near
SECRET = "T0K3N-very-secret"


@dataclass
class Endpoint:
    """A web server on 127.0.0.1: what was posted to it, and what it answers to the next posts (200 once these are used up)."""

    port: int = 0
    posts: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    """Status lines with headers, or `hang`, or `drop`."""
    refuse: Callable[[dict[str, Any]], bool] = lambda _: False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            headers = {name.lower(): value for name, value in headers.items()}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            assert head.startswith(f"POST /hooks/{SECRET} ")
            self.posts.append(body)
            self.keys.append(headers["idempotency-key"])
            answer = self.answers.pop(0) if self.answers else "400 Bad Request" if self.refuse(body) else "200 OK"
            if answer == "hang":
                await asyncio.sleep(3600)
            if answer != "drop":
                writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                await writer.drain()
        finally:
            writer.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/{SECRET}"


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    made = Endpoint()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


@pytest.fixture
def configured(settings: Settings, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALERT_WEBHOOK_URL", endpoint.url)
    monkeypatch.setenv("ALERT_TIMEOUT_SECONDS", "0.5")
    return Settings()


@asynccontextmanager
async def forwarding(settings: Settings, *, look_seconds: float = 0.2) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(AlertForwarder(settings, look_seconds=look_seconds).run())
    try:
        yield task
        assert not task.done(), "a side task that ends stops the worker"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():  # the database is asked, which sets no event
        assert time.monotonic() < end, f"waited in vain for {what}"
        await asyncio.sleep(0.02)


def unforwarded(conn: psycopg.Connection) -> int:
    row = conn.execute("SELECT count(*) FROM alerts WHERE forwarded_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


def standing(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT message, attempts, forwarded_at IS NOT NULL, last_error FROM alerts ORDER BY id").fetchall()


async def test_what_was_raised_while_nobody_listened_and_what_is_raised_now_are_posted_once_each(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection
) -> None:
    conn.execute("SELECT alert('test', 'before', '{\"doc_id\": \"a\"}')")
    # Looking so seldom, only the notification can be what brings the second one in time.
    async with forwarding(configured, look_seconds=3600):
        await eventually(lambda: len(endpoint.posts) == 1 and not unforwarded(conn), "the first")
        waits = """SELECT count(*) > 0 FROM pg_stat_activity
            WHERE state = 'idle' AND query LIKE '%min(a.next_try_at)%' AND datname = current_database()"""
        await eventually(lambda: conn.execute(waits).fetchone() == (True,), "the forwarder to have nothing left but to listen")
        conn.execute("SELECT alert('test', 'now')")
        await eventually(lambda: unforwarded(conn) == 0, "the second")
    first, second = endpoint.posts
    assert (first["kind"], first["message"], first["detail"], second["message"]) == ("test", "before", {"doc_id": "a"}, "now")
    assert first["text"] == "docmill: test: before"
    assert {first["id"], second["id"]} == {1, 2}
    known = [(str(row[0]), row[1].isoformat()) for row in conn.execute("SELECT idempotency_key, at FROM alerts ORDER BY id")]
    assert [(post["idempotency_key"], post["at"]) for post in endpoint.posts] == known
    assert endpoint.keys == [key for key, _ in known]


@pytest.mark.parametrize(("variable", "value"), [("SSL_CERT_FILE", "/no/such/file"), ("http_proxy", "ftp://127.0.0.1:1")])
async def test_an_environment_that_no_client_can_be_made_in_is_said_of_the_webhook_and_not_of_the_database(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    conn.execute("SELECT alert('test', 'first')")
    async with forwarding(configured):
        await eventually(lambda: standing(conn)[0][1] == 1, "the failure to be noted")
        assert "SSL_CERT_FILE" in standing(conn)[0][3]
        monkeypatch.delenv(variable)
        await eventually(lambda: unforwarded(conn) == 0, "the alert")


async def test_an_alert_that_somebody_holds_is_waited_for_without_asking_all_the_time(
    configured: Settings, endpoint: Endpoint, database: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, look = [], AlertForwarder._drain

    async def noted(self: AlertForwarder, *given: Any) -> float:
        pauses.append(await look(self, *given))
        return pauses[-1]

    monkeypatch.setattr(AlertForwarder, "_drain", noted)
    monkeypatch.setattr(alerts, "_HELD_SECONDS", 1800.0)  # so that only the second alert's notification can bring the next look
    conn.execute("SELECT alert('test', 'held')")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM alerts FOR UPDATE")
        async with forwarding(configured, look_seconds=3600.0):
            await eventually(lambda: bool(pauses), "the first look")
            holder.rollback()
            conn.execute("SELECT alert('test', 'next')")
            await eventually(lambda: len(pauses) > 1 and unforwarded(conn) == 0, "both")
    assert (pauses, [post["message"] for post in endpoint.posts]) == ([1800.0, 3600.0], ["held", "next"])


async def test_an_alert_of_a_transaction_that_is_rolled_back_is_never_posted(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection
) -> None:
    async with forwarding(configured):
        with conn.transaction(force_rollback=True):
            conn.execute("SELECT alert('test', 'undone')")
        conn.execute("SELECT alert('test', 'done')")
        await eventually(lambda: bool(standing(conn)) and unforwarded(conn) == 0, "the other")
    assert [post["message"] for post in endpoint.posts] == ["done"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("500 Internal Server Error", "HTTP 500"), ("429 Too Many Requests\r\nRetry-After: 0", "HTTP 429"), ("404 Not Found", "HTTP 404"),
        ("302 Found\r\nLocation: http://127.0.0.1:1/", "HTTP 302"), ("hang", "within 0.5 s"), ("drop", "RemoteProtocolError"),
    ],
)  # fmt: skip
async def test_a_failing_webhook_gets_the_alert_again_with_the_same_key(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection, answer: str, error: str
) -> None:
    endpoint.answers = [answer]
    async with forwarding(configured):
        conn.execute("SELECT alert('test', 'x')")
        await eventually(lambda: [row[1] for row in standing(conn)] == [1], "the failure")
        ((_, _, sent, said),) = standing(conn)
        assert not sent
        assert error in said
        assert SECRET not in said
        await eventually(lambda: unforwarded(conn) == 0, "the second try")
    assert len(endpoint.posts) == 2
    assert len(set(endpoint.keys)) == 1
    assert standing(conn) == [("x", 1, True, None)]


async def test_a_webhook_that_is_not_there_is_waited_for(configured: Settings, endpoint: Endpoint, conn: psycopg.Connection) -> None:
    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    free = await asyncio.start_server(nobody, "127.0.0.1", 0)
    port = free.sockets[0].getsockname()[1]
    free.close()
    await free.wait_closed()
    away = type(configured)(alert_webhook_url=endpoint.url.replace(str(endpoint.port), str(port)))  # type: ignore[arg-type]
    async with forwarding(away):
        conn.execute("SELECT alert('test', 'x')")
        await eventually(lambda: standing(conn)[0][1] >= 1, "the failure")
        assert "ConnectError" in standing(conn)[0][3]
        back = await asyncio.start_server(endpoint.serve, "127.0.0.1", port)
        await eventually(lambda: unforwarded(conn) == 0, "the webhook to be back")
        back.close()
    assert len(endpoint.posts) == 1


async def test_an_alert_that_is_never_accepted_holds_up_no_other(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection
) -> None:
    endpoint.refuse = lambda post: post["message"] == "poison"
    conn.execute("SELECT alert('test', 'poison')")
    conn.execute("SELECT alert('test', 'good ' || n) FROM generate_series(1, 20) AS n")
    async with forwarding(configured):
        await eventually(lambda: unforwarded(conn) == 1, "the good ones")
    assert [row[0] for row in standing(conn) if not row[2]] == ["poison"]


async def test_of_several_forwarders_one_forwards_and_another_takes_over(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection
) -> None:
    holders = """SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE l.locktype = 'advisory' AND l.granted AND d.datname = current_database()"""
    async with forwarding(configured):
        await eventually(lambda: conn.execute(holders).fetchone() == (1,), "the first to lead")
        async with forwarding(configured), forwarding(configured):
            conn.execute("SELECT alert('test', n::text) FROM generate_series(1, 50) AS n")
            await eventually(lambda: unforwarded(conn) == 0, "all of them")
            assert [post["message"] for post in endpoint.posts] == [str(n) for n in range(1, 51)]
            assert conn.execute(holders).fetchone() == (1,)
    async with forwarding(configured):
        conn.execute("SELECT alert('test', 'last')")
        await eventually(lambda: unforwarded(conn) == 0, "the next one to lead")
    assert len(endpoint.posts) == 51


async def test_a_forwarder_outlives_the_loss_of_its_connection(configured: Settings, endpoint: Endpoint, conn: psycopg.Connection) -> None:
    async with forwarding(configured):
        for number in range(3):
            conn.execute("SELECT alert('test', %s)", [str(number)])
            await eventually(lambda: unforwarded(conn) == 0, "the alert")
            conn.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
    assert [post["message"] for post in endpoint.posts] == ["0", "1", "2"]


async def test_an_alert_of_a_forwarder_that_dies_while_it_posts_is_posted_again_with_the_same_key(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection
) -> None:
    endpoint.answers = ["hang"]
    conn.execute("SELECT alert('test', 'x')")
    async with forwarding(configured):
        await eventually(lambda: len(endpoint.posts) == 1, "the post")
    assert standing(conn) == [("x", 0, False, None)]
    async with forwarding(configured):
        await eventually(lambda: unforwarded(conn) == 0, "the second try")
    assert len(set(endpoint.keys)) == 1


async def test_what_is_older_than_a_week_is_not_posted(configured: Settings, endpoint: Endpoint, conn: psycopg.Connection) -> None:
    conn.execute("SELECT alert('test', 'old')")
    conn.execute("UPDATE alerts SET at = now() - interval '8 days', next_try_at = now() - interval '8 days'")
    conn.execute("SELECT alert('test', 'new')")
    async with forwarding(configured):
        await eventually(lambda: unforwarded(conn) == 1, "the new one")
    assert [post["message"] for post in endpoint.posts] == ["new"]


async def test_without_a_webhook_a_forwarder_waits_and_opens_no_connection(settings: Settings, conn: psycopg.Connection) -> None:
    conn.execute("SELECT alert('test', 'x')")
    async with forwarding(settings):
        await asyncio.sleep(0.3)
        assert conn.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()").fetchone() == (1,)
    assert unforwarded(conn) == 1


@pytest.mark.parametrize("message", ["\x01" * 5000, "😀" * 5000, '"\\' * 5000, ""])
def test_no_message_is_too_long_to_be_notified_and_it_is_kept_whole(conn: psycopg.Connection, message: str) -> None:
    conn.execute("LISTEN docmill_alerts")
    detail = json.dumps({"more": message})
    conn.execute("SELECT alert(%s, %s, %s::jsonb)", ["k" + message[:200], message, detail])
    (notice,) = conn.notifies(timeout=10, stop_after=1)
    told = json.loads(notice.payload)
    assert told["message"] == message[:1000]
    assert conn.execute("SELECT message, detail ->> 'more' FROM alerts WHERE id = %s", [told["id"]]).fetchone() == (message, message)


async def test_a_worker_forwards_its_dead_letters_whatever_the_webhook_does_and_never_tells_the_address(
    configured: Settings, endpoint: Endpoint, conn: psycopg.Connection, tmp_path: Path
) -> None:
    endpoint.answers = ["hang", "500 Oh"]
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("A passage about pumps.")
    bad.write_bytes(b"")

    def work() -> None:
        with worker(tmp_path / "log", LOG_LEVEL="TRACE") as process:
            subprocess.run(
                [sys.executable, "-m", "jobs.cli", "ingest", good, bad, "--no-worker"], check=False, capture_output=True, timeout=PATIENCE
            )
            wait_for(lambda: bool(standing(conn)) and unforwarded(conn) == 0, "the alert", process=process)

    await asyncio.to_thread(work)
    assert dict(conn.execute("SELECT file_name, state FROM file_extractions").fetchall()) == {"good.txt": "complete", "bad.txt": "failed"}
    detail = endpoint.posts[-1]["detail"]
    assert (endpoint.posts[-1]["kind"], detail["stage"], detail["error_type"]) == ("dead_letter", "validate", "PERMANENT")
    assert detail["dead_letter"] == 1
    log = (tmp_path / "log").read_text()
    assert log.count("was not forwarded") == 2
    assert SECRET not in log + repr(configured)
