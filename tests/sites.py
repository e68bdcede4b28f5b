"""Rows that fill every page of the dashboard, with hostile text wherever somebody else can put text; and what to do with pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import httpx2
import psycopg

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}\u202e%00&lt;"
"""Opens a tag from inside of text, of an attribute with either quotes, and of a template."""
WORDS = "javascript:alert(1)//\r\nSet-Cookie: a=b\r\n\x1b]0;owned\x07" + EVIL
"""The same as free text, where control characters can stand too: for addresses, headers, lines and terminals."""
MARK = "alert(1)"
ROWS = """
INSERT INTO processing_jobs (batch_id, user_id, source_path, total_files, status, error_message, correlation_id, sealed_at, completed_at)
VALUES (%(evil)s, %(evil)s, %(words)s, 3, 'failed', %(words)s, %(evil)s, now(), now());
"""
DOCUMENTS = """
INSERT INTO file_extractions (doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, correlation_id, metadata, mime_type)
SELECT %(evil)s || n, b.batch_id, b.run_id, b.user_id, %(words)s, 'uploads/x', %(words)s, %(evil)s,
    jsonb_build_object(%(words)s::text, %(words)s::text), %(words)s
FROM processing_jobs AS b, generate_series(1, 3) AS n
"""
WORKING = """
UPDATE file_extractions SET state = 'working', lease_until = now() + interval '1 hour', claimed_by = %(evil)s, claim = 1
WHERE doc_id = %(evil)s || 2
"""
FAILED = """
UPDATE file_extractions
SET state = 'failed', error_type = 'PERMANENT', error_message = %(words)s, processing_completed_at = now(),
    raw_extraction = jsonb_build_object(%(words)s::text, %(words)s::text)
WHERE doc_id = %(evil)s || 3
"""
PARSED = """
INSERT INTO document_markdown (doc_id, version, markdown, parser, parse_metadata)
VALUES (%(evil)s || 3, 1, %(words)s, %(words)s, jsonb_build_object(%(words)s::text, %(words)s::text))
"""
SERVED = "UPDATE file_extractions SET served_version = 1 WHERE doc_id = %(evil)s || 3"
PASSAGES = """
INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, char_start, char_end,
    embedding, embedding_model)
SELECT gen_random_uuid(), %(evil)s || 3, %(evil)s, 1, n, 'pressure ' || %(words)s, repeat('a', 64), ARRAY[%(words)s], 0, 1, '[1,0]',
    %(evil)s
FROM generate_series(0, 24) AS n
"""
EVENTS = """
INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, stage, event, worker, detail)
SELECT d.doc_id, 1, d.batch_id, d.user_id, d.correlation_id, %(evil)s, e.event, %(evil)s,
    jsonb_build_object('error_message', %(words)s::text, 'error_type', %(words)s::text, 'file_name', %(words)s::text,
        'reason', %(words)s::text)
FROM file_extractions AS d, unnest(ARRAY['submitted', 'failed', 'handed_on', %(evil)s]) AS e (event)
"""
LETTERS = """
INSERT INTO dead_letters (doc_id, version, batch_id, user_id, correlation_id, stage, error_type, error_message, traceback, context)
VALUES (%(evil)s || 3, 1, %(evil)s, %(evil)s, %(evil)s, 'parse', 'PERMANENT', %(words)s, %(words)s,
    jsonb_build_object(%(words)s::text, %(words)s::text))
"""
WORKERS = """
INSERT INTO worker_registry (worker, host, pid, queues, concurrency, active_jobs, documents, memory_mb, cpu_seconds, version)
VALUES (%(evil)s, %(evil)s, 7, ARRAY[%(evil)s], 4, '{1}', ARRAY[%(evil)s || 2], 120.5, 3.5, %(evil)s)
"""
SERVICES = """
INSERT INTO circuit_breakers (service, state, reason, try_at) VALUES (%(evil)s, 'open', %(words)s, now() + interval '1 minute')
"""
CALLS = """
INSERT INTO provider_usage (id, service, kind, model, stage, doc_ids, batch_ids, user_ids, shares, outcome, error_message, request_id, cost,
    give_up_at, finished_at, latency_ms)
VALUES (gen_random_uuid(), %(evil)s, %(evil)s, %(evil)s, %(evil)s, ARRAY[%(evil)s || 3], ARRAY[%(evil)s], ARRAY[%(evil)s], '{1}', 'failed',
    %(words)s, %(words)s, 0.5, now(), now(), 12)
"""
QUEUED = (
    "SELECT procrastinate_defer_jobs_v1(ARRAY[ROW(left(%(evil)s, 30), %(evil)s, 0, NULL, NULL, '{}', NULL)::procrastinate_job_to_defer_v1])"
)
ALERTS = """
INSERT INTO alert_conditions (rule, subject, message, detail, first_seen_at, last_seen_at, opened_at)
SELECT r.rule, %(evil)s, %(words)s, jsonb_build_object(%(words)s::text, %(words)s::text), now(), now(), now() FROM alert_rules AS r
"""
ARCHIVES = """
INSERT INTO batch_archives (batch_id, run_id, user_id, entry_path, source_prefix, file_path, state, error_message, ended_at)
SELECT b.batch_id, b.run_id, b.user_id, %(words)s, %(words)s, 'uploads/x', 'failed', %(words)s, now() FROM processing_jobs AS b
"""
REEMBEDDING = """
INSERT INTO reembeddings (from_model, from_dimensions, to_model, error_message, worker)
VALUES (%(evil)s, 2, %(evil)s || 2, %(words)s, %(evil)s)
"""
LACKING = """
INSERT INTO embeddings_to_make (embedding_model, doc_id, passages, is_urgent, attempts, error_message)
VALUES (%(evil)s || 2, %(evil)s || 3, 25, TRUE, 1, %(words)s)
ON CONFLICT (embedding_model, doc_id) DO UPDATE SET error_message = EXCLUDED.error_message
"""


STATEMENTS = (
    ROWS, DOCUMENTS, WORKING, FAILED, PARSED, SERVED, PASSAGES, EVENTS, LETTERS, WORKERS, SERVICES, CALLS, QUEUED, ALERTS, ARCHIVES,
    REEMBEDDING, LACKING,
)  # fmt: skip


def fill_with(conn: psycopg.Connection, evil: str = EVIL, words: str | None = None) -> None:
    """Put rows into every table that a page or a command shows: ids and names of things are `evil`, which may hold no control
    characters, and what is free text `words`."""
    for statement in STATEMENTS:
        conn.execute(statement.encode(), {"evil": evil, "words": words or evil})


def every_page(conn: psycopg.Connection) -> list[str]:
    """Return an address of every kind of page, those of single things for each of the things that are there."""
    pages = [
        "/",
        "/queues",
        "/queues?span=7d",
        "/batches",
        "/documents",
        "/documents?state=failed",
        "/dead-letters",
        "/workers",
        "/providers",
    ]
    pages += ["/search?q=pressure", "/search", "/nowhere", "/login"]
    for path, statement in (
        ("/batch?id=", "SELECT batch_id FROM processing_jobs"),
        ("/document?id=", "SELECT doc_id FROM file_extractions"),
        ("/dead-letter?id=", "SELECT id::text FROM dead_letters"),
    ):
        pages += [path + quote(row[0], safe="") for row in conn.execute(statement.encode())]
    return pages


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def dangers(html: str) -> list[str]:
    """Return what in a page would run, load or send something that is not the server's own."""
    found = []
    for tag, attributes in Page(html).elements:
        if tag in {"img", "iframe", "object", "embed", "base", "style"} or (tag == "script" and attributes.get("src") != "/static/live.js"):
            found.append(tag)
        for name, value in attributes.items():
            address = name in {"href", "src", "action", "formaction", "xlink:href"}
            if (
                name.startswith("on")
                or name in {"style", "srcdoc"}
                or (address and not (value or "").startswith(("/", "#")))
                or "//" in (value or "")[:2]
            ):
                found.append(f"{tag} {name}={value}")
    return found


def form_token(html: str) -> str:
    """Return what the forms of a page bring back."""
    return next(str(attributes["value"]) for tag, attributes in Page(html).elements if tag == "input" and attributes.get("name") == "csrf")


def client(address: str, **options: Any) -> httpx2.Client:
    """Return a client that keeps cookies and follows nothing by itself."""
    return httpx2.Client(base_url=address, timeout=60, trust_env=False, **options)


def links(html: str, rel: str) -> list[str]:
    """Return the addresses of the links of a kind."""
    return [str(a["href"]) for tag, a in Page(html).elements if tag == "a" and a.get("rel") == rel]


def letters_on(html: str) -> list[str]:
    """Return the numbers that the check boxes of a page name."""
    return re.findall(r'name="id" value="(\d+)"', html)


def failed_document(conn: psycopg.Connection, doc_id: str) -> int:
    """Submit a document and fail it; return the number of its dead letter."""
    conn.execute("SELECT submit_document('uploads/' || %s::text, doc_id => %s)", [doc_id, doc_id])
    conn.execute("SELECT fail_document_by_operator(%s, 'cannot be read')", [doc_id])
    row = conn.execute("SELECT max(id) FROM dead_letters WHERE doc_id = %s AND resolved_at IS NULL", [doc_id]).fetchone()
    assert row is not None
    return int(row[0])
