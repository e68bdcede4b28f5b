"""Passwords and tokens, while all that holds them is at work and some of it fails, show in no process list and in nothing that is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx2
import psycopg
import pytest
from psycopg.sql import SQL, Literal

from jobs import submit_document
from jobs.front import close_sync
from models.settings import load_settings
from tests.acceptance.test_secrets import everything_in
from tests.faults.cluster import Cluster
from tests.running import REPOSITORY, database_shell, descendants, docmill, process_list, served, wait_for, worker
from tests.servers import LocalServer, Request, Response

PASSWORD = "q%7/@Kw 3:zR'tüx"  # of `mill`, percent-encoded in DATABASE_URL
OTHER = "Vn8pgpassTq2xLw"  # of `direct`, in PGPASSWORD
TOKEN = "serve-Jk3LmPq9WzXv7Bn2"
HOOK = "T0k3nInThePathYh6Gf"
KEY = "sk-key-in-a-file-8Hj2Kd"
SECRETS = {PASSWORD, OTHER, TOKEN, HOOK, KEY}


class Chatty(LocalServer):
    """A webhook that refuses what it gets and says its own address in doing so."""

    async def handle(self, request: Request, mangle: str) -> Response:
        return Response.of({"error": f"no such hook {request.path}?{request.query}"}, 500, {"x-path": request.path})


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection]:
    """A superuser's connection to a database that docmill reaches over TCP, by passwords alone, and all secrets where they belong."""
    cluster = Cluster()
    try:
        cluster.secure(mill=PASSWORD, direct=OTHER)
        name = cluster.create_database("template1", "mill")
        at = f"127.0.0.1:{cluster.port}/{name}"
        (tmp_path / "key").write_text(KEY + "\n")
        (tmp_path / "key").chmod(0o644)
        for variable, value in {
            "DATABASE_URL": f"postgresql://mill:{quote(PASSWORD, safe='')}@{at}", "DATABASE_URL_DIRECT": f"postgresql://direct@{at}",
            "PGPASSWORD": OTHER, "SERVE_TOKEN": TOKEN, "LLAMAPARSE_API_KEY_FILE": str(tmp_path / "key"), "EMBEDDING_PROVIDER": "hash",
            "STORAGE_BASE_PATH": str(tmp_path / "storage"), "LOG_LEVEL": "TRACE", "LOG_FILE_PATH": "docmill.log", "LEASE_SECONDS": "4",
            "RECONCILE_SECONDS": "0.2", "WORKER_POLL_SECONDS": "0.1",
        }.items():  # fmt: skip
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(tmp_path)
        load_settings.cache_clear()
        with psycopg.connect(cluster.conninfo(name), autocommit=True) as conn:
            conn.execute("CREATE EXTENSION vector")
            conn.execute("GRANT mill TO direct")
            conn.execute("ALTER ROLE direct SET role = mill")
            yield conn
    finally:
        close_sync()
        load_settings.cache_clear()
        cluster.close()


def assert_clean(text: str, where: str) -> None:
    for secret in SECRETS:
        for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1], secret[:8], quote(secret, safe="")[:12]):
            at = text.find(form)
            assert at < 0, f"{where} shows a secret: {text[max(0, at - 300) : at + 100]}"


def parser_environments(pid: int) -> list[str]:
    """Return what is in the environments of a worker's children, but for the one that only keeps count of multiprocessing's things."""
    children = [each for each in descendants(pid)[1:] if "resource_tracker" not in Path(f"/proc/{each}/cmdline").read_text()]
    return [Path(f"/proc/{each}/environ").read_text() for each in children]


def test_no_password_or_token_shows_anywhere(database: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    def count(statement: str) -> int:
        row = database.execute(statement.encode()).fetchone()
        return 0 if row is None else int(row[0])

    with Chatty() as hook:
        monkeypatch.setenv("ALERT_WEBHOOK_URL", f"{hook.root}/{HOOK}?sig={HOOK}")
        load_settings.cache_clear()
        told["settings"] = f"{load_settings()!r} {load_settings()} {load_settings().model_dump()}"
        migrated = docmill("migrate")
        assert migrated.returncode == 0, migrated.stderr
        log = tmp_path / "worker.log"
        with worker(log, LOG_FORMAT="json") as process:
            submit_document(REPOSITORY / "samples" / "supply-contract.pdf", doc_id="good")
            submit_document(b"", file_name="empty.txt", doc_id="bad")
            ended = "SELECT count(*) FROM file_extractions WHERE state IN ('complete', 'failed')"
            wait_for(lambda: count(ended) == 2, "both documents to end", 120, process)
            wait_for(lambda: count("SELECT count(*) FROM alerts WHERE attempts > 0") > 0, "the webhook to refuse", 60, process)
            assert HOOK in hook.log[0].path + str(hook.log[0].query)  # there was something to quote
            told["ps of a worker"] = process_list(process.pid)
            environments = parser_environments(process.pid)
            told["environment of the parsers"] = "".join(environments)
            assert environments and not any("postgresql:" in one for one in environments)
            with database_shell() as shell:
                shell.stdin.write("SELECT 'it is ' || 'open';\n")  # type: ignore[union-attr]
                shell.stdin.flush()  # type: ignore[union-attr]
                wait_for(lambda: any("psql" in process_list(each) for each in descendants(shell.pid)), "psql to run", 60)
                told["ps of make db"] = process_list(shell.pid)
                out, err = shell.communicate(timeout=60)
                assert "it is open" in out, err
            with served(tmp_path / "serve.log", LOG_FORMAT="text") as address, httpx2.Client(base_url=address, trust_env=False) as visitor:
                told["pages"] = "".join(visitor.get(path, timeout=60).text for path in ("/", "/login", "/documents", "/metrics", "/readyz"))
                signed = {"Authorization": f"Bearer {TOKEN}"}
                told["metrics"] = "".join(visitor.get(path, headers=signed, timeout=60).text for path in ("/metrics", "/readyz"))
            # Nobody can get in any more, nor is anybody left in.
            database.execute(SQL("ALTER ROLE mill PASSWORD {}").format(Literal("another")))
            database.execute(SQL("ALTER ROLE direct PASSWORD {}").format(Literal("another")))
            database.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename IN ('mill', 'direct')")
            wait_for(lambda: log.read_text().count("password authentication failed") >= 3, "the worker to be refused", 60, process)
            for command in ("status", "health"):
                done = docmill(*command.split(), LOG_FILE_PATH="", DATABASE_TIMEOUT="2")
                assert "password authentication failed" in done.stdout + done.stderr
                told[f"docmill {command}, refused"] = done.stdout + done.stderr
            database.execute(SQL("ALTER ROLE mill PASSWORD {}").format(Literal(PASSWORD)))
            database.execute(SQL("ALTER ROLE direct PASSWORD {}").format(Literal(OTHER)))
    for command in ("status --json", "dead show bad", "logs bad"):
        done = docmill(*command.split())
        told[f"docmill {command}"] = done.stdout + done.stderr
    told |= {"worker's log": log.read_text(), "log of serve": (tmp_path / "serve.log").read_text(), "database": everything_in(database)}
    assert "every user of this machine can read" in told["worker's log"]
    stored = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in stored) and len(stored) > 3
    told["storage"] = b"\n".join(path.read_bytes() for path in stored).decode("utf-8", "replace")
    for where, text in told.items():
        assert_clean(text, where)
