"""Keys stay where they are set: services that quote them, redirects, proxies and failures of every kind bring them nowhere else."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from jobs import submit_document
from jobs.front import close_sync
from models.settings import Settings, load_settings
from tests.running import docmill, process_list, wait_for, worker
from tests.servers import LocalServer, Request, Response

KEYS = {kind: f"sk-{kind}-Zq4tVb7Xw2LmNc9RfK3jHd8" for kind in ("EMBEDDING", "EXTRACTION", "LLAMAPARSE")}
PROXY_PASSWORD = "prx-Pw5TgYh2UjNm7Kd"  # of a proxy that is not there


class Parrot(LocalServer):
    """Says the key that it was sent in every way that it can, whole and in part, and fails at last for the document's fault."""

    async def handle(self, request: Request, mangle: str) -> Response:
        key = request.headers["authorization"].removeprefix("Bearer ")
        part = f"{key[:14]}***{key[-4:]}"
        words = f"Incorrect API key provided: {key}, {part}, Bearer {key}; see https://x.test/?api_key={urllib.parse.quote(key)}"
        error = {"error": {"message": words, "code": key, "type": key, "param": key}, "detail": words}
        quoting = {"x-request-id": key, "x-echo": f"Bearer {key}", "location": f"https://other.test/?key={key}"}
        answers = [
            Response.of(error, 500, quoting),
            Response.of(error, 401, quoting),
            Response(502, f"<html>{words}</html>".encode(), quoting),
            Response(307, b"", quoting),
            Response.of({"data": [{"index": 0, "embedding": words}], "model": key, "id": key, "choices": [words]}, 200, quoting),
            Response.of(error, 403, quoting),
        ]
        number = self.tally.requests - 1
        return answers[number] if number < len(answers) else Response.of(error, 400, quoting)


@pytest.fixture
def parrots() -> Iterator[dict[str, Parrot]]:
    with Parrot() as embedding, Parrot() as extraction, Parrot() as parsing:
        yield {"EMBEDDING": embedding, "EXTRACTION": extraction, "LLAMAPARSE": parsing}


@pytest.fixture
def hosted(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parrots: dict[str, Parrot]) -> Iterator[None]:
    """All providers are hosted, with keys from files."""
    for kind, key in KEYS.items():
        (tmp_path / kind).write_text(key + "\n")
        monkeypatch.setenv(f"{kind}_API_KEY_FILE", str(tmp_path / kind))
        monkeypatch.setenv(f"{kind}_BASE_URL", parrots[kind].root)
    for name, value in {
        "EMBEDDING_PROVIDER": "openai", "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32", "EXTRACTION_PROVIDER": "openai",
        "EXTRACTION_REQUIRED": "true", "PARSING_PROVIDER": "llamaparse", "BREAKER_OPEN_SECONDS": "0.2", "BREAKER_MAX_OPEN_SECONDS": "0.2",
        "RETRY_BASE_DELAY_SECONDS": "0.1", "RETRY_MAX_DELAY_SECONDS": "0.2", "RECONCILE_SECONDS": "0.2", "LEASE_SECONDS": "10",
        "WORKER_POLL_SECONDS": "0.1", "MAX_RETRY_ATTEMPTS": "3", "LOG_LEVEL": "TRACE", "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": f"http://ann:{PROXY_PASSWORD}@127.0.0.1:9",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


def everything_in(conn: psycopg.Connection) -> str:
    """All rows of all tables, the queue's too."""
    tables = conn.execute("SELECT format('%I', relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
    return "\n".join(str(conn.execute(f"SELECT to_jsonb(t) FROM {name} AS t").fetchall()) for (name,) in tables.fetchall())


def secrets() -> Iterator[str]:
    for key in KEYS.values():
        yield from (key, key[:14], key[8:24])
    yield PROXY_PASSWORD


def assert_clean(text: str, where: str) -> None:
    for secret in secrets():
        at = text.find(secret)
        assert at < 0, f"{where}: {text[max(0, at - 300) : at + 100]}"


@pytest.mark.usefixtures("hosted")
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_keys_that_services_quote_show_nowhere(
    conn: psycopg.Connection, tmp_path: Path, log_format: str, parrots: dict[str, Parrot], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {"repr of the settings": f"{load_settings()!r} {load_settings()} {load_settings().model_dump()}"}
    submit_document(b"%PDF-1.4 no more than this", file_name="a.pdf", doc_id="parse")
    submit_document(b"A text about pumps and valves.", file_name="b.txt", doc_id="embed")

    def ended(doc_id: str) -> bool:
        row = conn.execute("SELECT state FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone()
        return row is not None and row[0] in ("failed", "complete")

    log = tmp_path / "worker.log"
    with worker(log, LOG_FORMAT=log_format, LOG_FILE_PATH=str(tmp_path / "file.log")) as process:
        wait_for(lambda: ended("embed"), "the embedding to be refused", 90, process)
        wait_for(lambda: ended("parse"), "the parsing to be refused", 90, process)
        told["ps"] = process_list(process.pid)
    submit_document(b"Another text about seals.", file_name="c.txt", doc_id="extract")
    with worker(log, LOG_FORMAT=log_format, EMBEDDING_PROVIDER="hash") as process:
        wait_for(lambda: ended("extract"), "the extraction to be refused", 90, process)
    for doc_id, base in (("proxy", "https://localhost:4433"), ("dns", "http://no-such-host.invalid")):
        submit_document(f"A text behind the {doc_id}.".encode(), file_name="d.txt", doc_id=doc_id)
        with worker(log, LOG_FORMAT=log_format, EMBEDDING_BASE_URL=base) as process:
            state = f"SELECT state FROM file_extractions WHERE doc_id = '{doc_id}'"
            wait_for(lambda state=state: conn.execute(state).fetchone() == ("retrying",), "the outage", 60, process)  # type: ignore[misc]

    # A parser that refuses the key is replaced by the local one; the others hear everything.
    wanted = {"EMBEDDING": 7, "EXTRACTION": 7, "LLAMAPARSE": 2}
    assert all(parrots[kind].tally.requests >= least for kind, least in wanted.items())
    for kind, parrot in parrots.items():
        assert KEYS[kind] in str(parrot.log[0].headers)  # there was something to quote
    letters = conn.execute("SELECT doc_id, stage, traceback FROM dead_letters ORDER BY doc_id").fetchall()
    assert {row[:2] for row in letters} >= {("embed", "embed"), ("extract", "extract")}
    assert all(row[2] for row in letters)
    assert conn.execute("SELECT count(*) > 0 FROM alerts WHERE kind = 'service_refused'").fetchone() == (True,)
    files = [path for path in tmp_path.rglob("*.log*") if path.is_file() and path != log]
    assert files
    told |= {"log": log.read_text(), "log files": "".join(path.read_text() for path in files), "database": everything_in(conn)}
    assert "HTTP 401" in told["log"] and "HTTP 401" in told["database"]
    for arguments in (("dead", "list", "--json"), ("dead", "show", "embed"), ("breaker", "list"), ("status", "--json"), ("search", "x")):
        done = docmill(*arguments)
        told[f"docmill {' '.join(arguments)}"] = done.stdout + done.stderr
    for where, text in told.items():
        assert_clean(text, where)


@pytest.mark.usefixtures("hosted")
@pytest.mark.parametrize("address", ["https://ann:{}@host.test/v1", "https://host.test/v1?api_key={}"])
def test_an_address_with_a_key_in_it_is_refused_without_quoting_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_BASE_URL", address.format(KEYS["EMBEDDING"]))
    text = docmill("status").stderr
    assert "EMBEDDING_BASE_URL" in text
    assert_clean(text, "docmill status")
