"""Whether all is right after a service has failed: documents, results, the ledger beside what the server saw, and the key nowhere."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping

import numpy as np

from jobs.adapters.embedders.hashed import HashedWords
from tests.faults.invariant import check_invariant
from tests.faults.services import DIMENSIONS, KEY, Service

EVERYTHING = """SELECT string_agg(to_jsonb(t)::text, ' ') FROM (
    SELECT to_jsonb(e) FROM document_events AS e UNION ALL SELECT to_jsonb(l) FROM dead_letters AS l
    UNION ALL SELECT to_jsonb(a) FROM alerts AS a UNION ALL SELECT to_jsonb(u) FROM provider_usage AS u
    UNION ALL SELECT to_jsonb(c) FROM circuit_breakers AS c UNION ALL SELECT to_jsonb(f) FROM file_extractions AS f
) AS t"""


def check_all_right(outside: Service, states: Mapping[str, int] | None = None) -> None:
    """Hold everything that was done against the promise: nothing lost or doubled, results right, books complete, the key nowhere."""
    arena = outside.arena
    with arena.connect() as conn:
        findings = check_invariant(conn, set(outside.documents), {})
    assert not findings, findings
    found = dict(arena.all("SELECT state::text, count(*) FROM file_extractions GROUP BY 1"))
    failures = arena.all("SELECT doc_id, error_type::text, error_message FROM file_extractions WHERE state <> 'complete'")
    assert found == (states or {"complete": len(outside.documents)}), failures
    {"embedding": _check_vectors, "extraction": _check_extractions, "parse": _check_texts}[outside.kind](outside)
    logs = "".join(path.read_text(encoding="utf-8", errors="replace") for path in arena.folder.glob("*.log"))
    assert KEY not in logs
    assert KEY not in arena.one(EVERYTHING)


def check_books(outside: Service, word: str, *, unheard: bool = False) -> None:
    """Hold the ledger against what the server saw: a row for each request, the failed ones as `word`.

    `unheard`: the failed calls never reached the server.
    """
    tally, calls = outside.server.tally, outside.calls()
    bad = sum(count for name, count in tally.faults.items() if name != "permuted")
    assert calls["unknown"] == 0, calls
    if unheard:
        assert calls[word] > 0, calls
        good = tally.uploads if outside.kind == "parse" else tally.requests
        assert calls == Counter({"ok": good, word: calls[word]})
        return
    if outside.kind == "parse":
        # Polls that were answered cost nothing and are left out.
        assert calls[word] == bad or (calls[word] > bad and word == "timeout"), (calls, tally.faults)
        assert outside.parsed_there() <= calls["ok"] <= tally.uploads
        assert set(calls) <= {"ok", word}
        return
    if word == "timeout":
        # On a busy machine a call may run out of time before it is sent, or its good answer come too late.
        assert sum(calls.values()) >= tally.requests, (calls, tally.faults, tally.requests)
        assert bad <= calls[word] and calls["ok"] <= tally.requests - bad and set(calls) <= {"ok", word}, (calls, tally.faults)
        return
    assert sum(calls.values()) == tally.requests, (calls, tally.faults, tally.requests)
    assert calls == Counter({"ok": tally.requests - bad, **({word: bad} if bad else {})}), (calls, tally.faults)


def _check_vectors(outside: Service) -> None:
    """Every passage has the vector that the server's model gives for it, whatever order it was sent in."""
    rows = outside.arena.all("SELECT content, embedding::text, embedding_model FROM document_chunks")
    assert {row[2] for row in rows} == {f"m@{DIMENSIONS}"}
    model = HashedWords(DIMENSIONS)
    for content, written, _ in rows:
        expected = asyncio.run(model.embed([content]))[0]
        assert np.allclose(np.array(json.loads(written)), expected, atol=1e-5), content[:80]


def _check_extractions(outside: Service) -> None:
    """Every document has what the model says of it, and of no other."""
    rows = outside.arena.all("SELECT doc_id, raw_extraction FROM file_extractions WHERE state = 'complete'")
    for doc_id, found in rows:
        words = " ".join(outside.documents[doc_id].decode().split()[:8])
        assert found["model_extraction"]["data"]["title"] == words, (doc_id, found)
        assert "failure" not in found, (doc_id, found)


def _check_texts(outside: Service) -> None:
    """Every document has its pages; one that was parsed here instead says so."""
    rows = outside.arena.all("SELECT doc_id, markdown, parser, parse_metadata FROM document_markdown")
    for doc_id, markdown, parser, metadata in rows:
        number = int(doc_id[1:5])
        assert all(f"Page {page} of report {number} on" in markdown for page in range(3)), (doc_id, markdown)
        assert parser.startswith("llamaparse ") != ("parsed_locally" in (metadata or {})), (doc_id, parser, metadata)
