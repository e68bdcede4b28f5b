"""Whether all is right after a random schedule: results, dead letters, and the ledger beside what the services saw of each call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import psycopg

from jobs.adapters.embedders import HashedWords
from tests.faults.fated import Seen
from tests.faults.invariant import DOUBLED, LEFT, LOST
from tests.faults.paid import PASSAGES, Schedule, markdown_of, texts_of
from tests.servers.openai import document_of

OUTCOMES = {
    "right": "ok", "429": "rate_limited", "429_later": "rate_limited", "401": "refused", "400": "rejected", "500": "failed",
    "503": "failed", "reset": "failed", "cut_off": "bad_answer", "reset_in_body": "bad_answer", "truncated": "bad_answer",
}  # fmt: skip
"""How a request that is answered so is entered."""
OF_VECTORS = {"wrong_count": "bad_answer", "wrong_dimension": "bad_answer", "nan": "bad_answer"}
OF_CHATS = {"length": "rejected", "refusal": "rejected", "unlisted": "bad_answer", "prose": "ok", "wrong_shape": "ok"}
SERVED = """SELECT c.content, c.embedding::text, c.chunk_index, left(d.content_sha256, 1) FROM document_chunks c
    JOIN file_extractions d USING (doc_id) WHERE d.served_version = d.version"""
LETTERS = """SELECT d.doc_id, left(d.content_sha256, 1), l.error_type::text, l.error_message, (l.context->>'attempt')::integer
    FROM dead_letters l JOIN file_extractions d USING (doc_id) WHERE l.resolved_at IS NULL"""
LEDGER = "SELECT id::text, kind, outcome, worker, doc_ids, shares, coalesce(cost, estimated_cost) FROM provider_usage"
COSTS = """SELECT d.doc_id, cost_of_document(d.doc_id), (SELECT sum(v.cost) FROM cost_by_document v WHERE v.doc_id = d.doc_id)
    FROM (SELECT DISTINCT unnest(doc_ids) AS doc_id FROM provider_usage WHERE outcome <> 'not_sent') AS d"""


def first_of(content: str) -> bytes:
    return markdown_of(content).split("\n\n")[0].encode()


@dataclass(frozen=True, slots=True)
class Row:
    """A call in the ledger; the cost of one whose outcome is unknown is the estimate."""

    kind: str
    outcome: str
    worker: str
    doc_ids: list[str]
    shares: list[float]
    cost: Decimal


def check_all(schedule: Schedule) -> None:
    """Hold everything against the promise."""
    conn = schedule.conn
    for words, statement in {**LOST, **DOUBLED, **LEFT}.items():
        assert conn.execute(statement).fetchall() == [], words
    there = conn.execute("SELECT doc_id, left(content_sha256, 1) FROM file_extractions").fetchall()
    assert dict(there) == schedule.submitted
    _check_vectors(schedule)
    _check_letters(conn)
    ledger = {call: Row(*rest) for call, *rest in conn.execute(LEDGER).fetchall()}
    asked = _check_entries(schedule, ledger)
    _check_nothing_is_paid_twice(schedule, ledger, asked)
    _check_costs(conn, ledger, schedule.most)
    for kind in ("embedding", "extraction", "parse"):
        # Where jobs are asked for by the way, these requests are counted too, and stand in no ledger.
        times = sorted(note.at for call, note in asked.items() if ledger[call].kind == kind)
        for first, moment in enumerate(times if schedule.limit else []):
            assert sum(at < moment + 60 for at in times[first:]) <= schedule.limit, kind


def _check_vectors(schedule: Schedule) -> None:
    """Every passage has the vector that the service's model gives for its text."""
    for content, written, index, digit in schedule.conn.execute(SERVED).fetchall():
        assert content == texts_of(digit)[index]
        expected = schedule.keeper.wait_for(HashedWords(32).embed([content]))[0]
        assert np.allclose([float(number) for number in written[1:-1].split(",")], expected, atol=1e-5), content


def _check_letters(conn: psycopg.Connection) -> None:
    """No document is a dead letter because of an outage, or of what another one's text does."""
    for doc_id, content, kind, message, attempt in conn.execute(LETTERS).fetchall():
        if kind == "PERMANENT":
            assert content == "5" or "MAX_COST_PER_DOCUMENT" in message or "answered HTTP 400" in message, (doc_id, message)
        elif kind == "UNKNOWN":
            assert "MAX_CRASHES" in message, (doc_id, message)
        else:
            assert kind in ("RETRYABLE", "TIMEOUT", "LLM_ERROR") and attempt >= 3, (doc_id, kind, message, attempt)


def _check_entries(schedule: Schedule, ledger: Mapping[str, Row]) -> dict[str, Seen]:
    """Each request has its one row, which says what became of it, and each such row has its request. Returns them by their calls."""
    asked: dict[str, Seen] = {}
    for note in [*schedule.models.seen, *schedule.pages.seen]:
        if note.path.startswith("/api/v2/parse/") and not note.path.endswith("/upload"):
            continue  # asking costs nothing
        assert note.call not in asked, note
        asked[note.call] = note
        row = ledger[note.call]
        if row.outcome == "unknown":
            lost = any(doc_id in row.doc_ids for _, doc_id, _ in schedule.losses)
            assert row.worker in schedule.cut_short or lost or note.held, (row, note)
        elif row.outcome == "timeout":
            assert note.held, (row, note)
        else:
            assert row.outcome == _outcome(note), (row, note)
    for call, row in ledger.items():
        assert call in asked or row.outcome in ("not_sent", "unknown", "timeout") or row.kind == "parse", row
    return asked


def _outcome(note: Seen) -> str:
    if note.path.endswith("/embeddings"):
        if any("poison" in text for text in note.body["input"]):
            if note.fate in ("cut_off", "reset_in_body"):
                return "failed"
            if note.fate in ("right", "truncated") or note.fate not in OUTCOMES:
                return "rejected"
        return {**OUTCOMES, **OF_VECTORS}.get(note.fate, "ok")
    if note.path.endswith("/completions"):
        return {**OUTCOMES, **OF_CHATS}.get(note.fate, "ok")
    return OUTCOMES.get(note.fate, "ok")


def _check_nothing_is_paid_twice(schedule: Schedule, ledger: Mapping[str, Row], asked: Mapping[str, Seen]) -> None:
    """Whatever was answered is not asked for again, but for what was under way last when a worker, a version or a document was lost."""
    happened: dict[str, list[tuple[float, str, set[str]]]] = {}
    for at, doc_id, everything in schedule.losses:
        happened.setdefault(doc_id, []).append((at, "lost" if everything else "cut", set()))
    for call, note in asked.items():
        row = ledger[call]
        if row.outcome != "ok" or (row.kind == "extraction" and note.fate in OF_CHATS):
            continue
        for doc_id in row.doc_ids:
            if row.kind == "embedding":
                bought = set(note.body["input"]) & set(texts_of(note.contents[doc_id])) if doc_id in note.contents else set()
            else:
                # A worker that has not heard of the new content yet may still pay for the old.
                bought = (
                    {document_of(note.body)} if row.kind == "extraction" else {name for name in PASSAGES if first_of(name) in note.body}
                )
            happened.setdefault(doc_id, []).append((note.at, "paid", {f"{row.kind}: {text}" for text in bought}))
    for doc_id, events in happened.items():
        paid: set[str] = set()
        last: set[str] = set()
        for at, what, bought in sorted(events, key=lambda event: event[0]):
            assert not paid & bought, (doc_id, at, paid & bought)
            paid = set() if what == "lost" else paid - last if what == "cut" else paid | bought
            last = bought or last


def _check_costs(conn: psycopg.Connection, ledger: Mapping[str, Row], most: Decimal) -> None:
    """Totals and views are the ledger's, and nobody has cost more than allowed."""
    costs: dict[str, Decimal] = {}
    for row in ledger.values():
        for doc_id, share in zip(row.doc_ids, row.shares, strict=True):
            costs[doc_id] = costs.get(doc_id, Decimal(0)) + row.cost * Decimal(str(share))
    assert not most or max(costs.values(), default=most) <= most, costs
    for doc_id, total, viewed in conn.execute(COSTS).fetchall():
        assert abs(total - costs[doc_id]) < Decimal("1e-6") and abs(viewed - costs[doc_id]) < Decimal("1e-6"), (doc_id, total, viewed)
