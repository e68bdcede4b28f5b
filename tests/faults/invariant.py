"""The promise in SQL: nothing lost, nothing doubled. Asked of the database after every scenario."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import psycopg

ENDED = "('complete', 'duplicate', 'cancelled', 'failed')"

LOST = {
    "has not ended": f"SELECT doc_id FROM file_extractions WHERE state NOT IN {ENDED}",
    "failed without a dead letter that says why": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'failed' AND NOT EXISTS (
        SELECT FROM dead_letters l WHERE l.doc_id = d.doc_id AND l.version = d.version AND l.error_message <> ''
            AND (l.resolved_at IS NULL OR l.resolution = 'discarded'))""",
    "has an open dead letter without having failed": """SELECT l.doc_id FROM dead_letters l JOIN file_extractions d USING (doc_id)
        WHERE l.resolved_at IS NULL AND d.state <> 'failed'""",
    "is complete without all of its passages": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'complete' AND (
        d.served_version IS DISTINCT FROM d.version OR d.raw_extraction IS NULL OR d.chunk_count IS DISTINCT FROM (
            SELECT count(*) FROM document_chunks c WHERE c.doc_id = d.doc_id AND c.version = d.version)
        OR d.chunk_count - 1 IS DISTINCT FROM (SELECT max(chunk_index) FROM document_chunks c WHERE c.doc_id = d.doc_id))""",
    "is complete without its markdown": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'complete' AND 1 <> (
        SELECT count(*) FROM document_markdown m WHERE m.doc_id = d.doc_id AND m.version = d.version)""",
    "is complete but a stage left no event": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'complete' AND 7 <> (
        SELECT count(DISTINCT e.stage) FROM document_events e
        WHERE e.doc_id = d.doc_id AND e.version = d.version AND e.event IN ('stage_completed', 'completed'))""",
    "is a duplicate of nothing that is complete": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'duplicate' AND NOT EXISTS (
        SELECT FROM file_extractions o WHERE o.doc_id = d.duplicate_of AND o.state = 'complete' AND o.user_id = d.user_id
            AND o.content_sha256 = d.content_sha256)""",
    "was cancelled, and no event says so": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'cancelled' AND NOT EXISTS (
        SELECT FROM document_events e WHERE e.doc_id = d.doc_id AND e.version = d.version AND e.event = 'cancelled')""",
}
DOUBLED = {
    "has two passages in one place": """SELECT doc_id FROM document_chunks GROUP BY doc_id, version, chunk_index HAVING count(*) > 1""",
    "shows passages of a superseded version": """SELECT DISTINCT c.doc_id FROM document_chunks c JOIN file_extractions d USING (doc_id)
        WHERE c.version IS DISTINCT FROM d.served_version""",
    "keeps markdown of a superseded version": """SELECT m.doc_id FROM document_markdown m JOIN file_extractions d USING (doc_id)
        WHERE m.version <> d.version AND m.version IS DISTINCT FROM d.served_version""",
    "ran a stage again whose result had been checkpointed": """SELECT DISTINCT doc_id FROM document_events
        WHERE event IN ('stage_completed', 'completed') AND id > coalesce((
            SELECT max(x.id) FROM document_events x WHERE x.doc_id = document_events.doc_id AND x.event = 'deleted'), 0)
        GROUP BY doc_id, version, stage HAVING count(*) > 1""",
    "is a duplicate and has rows of its own": """SELECT d.doc_id FROM file_extractions d WHERE d.state = 'duplicate' AND (
        d.served_version IS NOT NULL OR EXISTS (SELECT FROM document_chunks c WHERE c.doc_id = d.doc_id)
        OR EXISTS (SELECT FROM document_markdown m WHERE m.doc_id = d.doc_id))""",
    "has two open dead letters": "SELECT doc_id FROM dead_letters WHERE resolved_at IS NULL GROUP BY doc_id HAVING count(*) > 1",
}
ALWAYS = {
    words: DOUBLED[words]
    for words in ("has two passages in one place", "shows passages of a superseded version", "has two open dead letters")
}
"""What a reader sees holds at any time, not in the end alone."""
OWNERLESS = """SELECT j.id::text FROM procrastinate_jobs j WHERE j.status = 'doing' AND NOT EXISTS (
    SELECT FROM worker_registry w WHERE j.id = ANY(w.active_jobs) AND w.heartbeat_at > now() - interval '1 min')"""
LEFT = {
    "a waiting job of a document that has ended": f"""SELECT j.id::text FROM procrastinate_jobs j JOIN file_extractions d
        ON d.doc_id = j.args->>'doc_id' WHERE j.status = 'todo' AND d.state IN {ENDED}""",
    "a job of a document that is gone": """SELECT j.id::text FROM procrastinate_jobs j WHERE j.status IN ('todo', 'doing')
        AND stage_queue(j.task_name) IS NOT NULL AND NOT EXISTS (SELECT FROM file_extractions d WHERE d.doc_id = j.args->>'doc_id')""",
    "a buffered passage": """SELECT DISTINCT b.doc_id FROM chunk_buffer b JOIN file_extractions d USING (doc_id)
        WHERE d.state NOT IN ('failed', 'cancelled') OR b.version <> d.version""",
    "a buffered vector": """SELECT DISTINCT b.doc_id FROM vector_buffer b JOIN file_extractions d USING (doc_id)
        WHERE d.state NOT IN ('failed', 'cancelled') OR b.version <> d.version""",
    "a hosted job": """SELECT DISTINCT b.doc_id FROM hosted_jobs b JOIN file_extractions d USING (doc_id)
        WHERE d.state NOT IN ('failed', 'cancelled') OR b.version <> d.version""",
    "an answer for a part": """SELECT DISTINCT b.doc_id FROM extraction_answers b JOIN file_extractions d USING (doc_id)
        WHERE d.state NOT IN ('failed', 'cancelled') OR b.version <> d.version""",
    "a buffered extraction": """SELECT DISTINCT b.doc_id FROM extraction_buffer b JOIN file_extractions d USING (doc_id)
        WHERE d.state NOT IN ('failed', 'cancelled') OR b.version <> d.version""",
}
IN_THE_END = {**LOST, **DOUBLED, **LEFT}

PASSAGES = """SELECT d.doc_id, d.content_sha256, c.chunk_index, c.id, c.content, c.content_sha256, c.heading_path, c.page_start, c.page_end,
    c.char_start, c.char_end, c.language, c.metadata, c.embedding::text, c.embedding_model, d.raw_extraction, m.markdown_sha256
    FROM file_extractions d JOIN document_chunks c ON c.doc_id = d.doc_id AND c.version = d.served_version
    JOIN document_markdown m ON m.doc_id = d.doc_id AND m.version = d.served_version
    WHERE d.state = 'complete' ORDER BY d.doc_id, c.chunk_index"""

Rows = dict[tuple[str, str], list[tuple[Any, ...]]]


def passages(conn: psycopg.Connection) -> Rows:
    """All that a reader sees of complete documents, by doc_id and SHA-256 of the content."""
    found: Rows = {}
    for row in conn.execute(PASSAGES).fetchall():
        found.setdefault((row[0], row[1]), []).append(tuple(row[2:]))
    return found


@dataclass
class Findings:
    """What is wrong: a line of words and the ids that it is true of."""

    lost: dict[str, list[str]] = field(default_factory=dict)
    doubled: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.left)


def ask(conn: psycopg.Connection, questions: dict[str, str]) -> dict[str, list[str]]:
    """Return what is wrong."""
    answers = {words: [row[0] for row in conn.execute(statement).fetchall()] for words, statement in questions.items()}
    return {words: ids for words, ids in answers.items() if ids}


def _ownerless(conn: psycopg.Connection) -> list[str]:
    """Return fetched jobs that no heartbeat names, nor does the next one: that of a job which was fetched just now comes later."""
    found = {row[0] for row in conn.execute(OWNERLESS).fetchall()}
    until = time.monotonic() + 5
    while found and time.monotonic() < until:
        time.sleep(0.1)
        found &= {row[0] for row in conn.execute(OWNERLESS).fetchall()}
    return sorted(found)


def check_invariant(conn: psycopg.Connection, accepted: set[str], reference: Rows) -> Findings:
    """Return what is broken: of the accepted documents, and against the rows of an uninterrupted run."""
    findings = Findings(ask(conn, LOST), ask(conn, DOUBLED), ask(conn, LEFT))
    if ownerless := _ownerless(conn):
        findings.left["a fetched job without a live owner"] = ownerless
    known = {row[0] for row in conn.execute("SELECT doc_id FROM file_extractions").fetchall()}
    if missing := sorted(accepted - known):
        findings.lost["was accepted and is gone"] = missing
    for key, rows in passages(conn).items():
        if key in reference and rows != reference[key]:
            kind = findings.doubled if len(rows) > len(reference[key]) else findings.lost
            kind.setdefault("differs from an uninterrupted run", []).append(key[0])
    return findings
