"""Workers that are killed while services behind sockets work for them: what is paid for twice."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest

from tests.faults.harness import Arena, text_document
from tests.faults.invariant import check_invariant
from tests.servers import LlamaParseServer, OpenAIServer
from tests.servers.faults import Fault
from tests.servers.openai import document_of

TEXTS = 16
KILLS = (3, 7, 8)


@pytest.mark.parametrize(
    ("passages", "texts", "kills", "lease"), [(80, TEXTS, (2, 4, 6), "2"), (5000, 256, (1, 4, 10, 11, 17, 23), "10")], ids=["80", "5000"]
)
def test_a_kill_in_mid_embed_pays_at_most_one_request_twice(
    arena: Arena, passages: int, texts: int, kills: tuple[int, ...], lease: str
) -> None:
    with OpenAIServer(dimensions=32) as server:
        arena.environment |= {
            "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": server.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32",
            "EMBEDDING_MAX_TEXTS": str(texts), "MAX_CRASHES": "20", "LEASE_SECONDS": lease,
        }  # fmt: skip

        def killing(number: int, seconds: float) -> Fault | None:
            # The request is answered, and paid for, and nobody is there to hear it.
            if number in kills:
                arena.fault()
                worker.signal(signal.SIGKILL)
            return None

        arena.submit({"long": text_document(1, paragraphs=passages)})
        server.script(killing)
        arena.reconciler()
        worker = arena.worker(restart=True)
        arena.settle(900)
        chunks = arena.one("SELECT chunk_count FROM file_extractions WHERE state = 'complete'")
        assert chunks >= passages
        needed = -(-len(server.tally.seen) // texts)
        line = {
            "scenario": "kill -9 in mid-embed", "mode": arena.mode, "passages": chunks, "requests": server.tally.requests,
            "needed": needed, "kills": len(kills), "paid_twice": server.tally.paid_twice(),
            "recovered_s": None if arena._recovered is None else round(arena._recovered, 1),
        }  # fmt: skip
        print(f"\nfaults: {json.dumps(line)}", flush=True)
        assert server.tally.requests <= needed + len(kills)
        assert arena.faults == len(kills)
        assert server.tally.paid_twice() <= texts * len(kills)
        with arena.connect() as conn:
            assert not check_invariant(conn, {"long"}, {})
        outcomes = dict(arena.all("SELECT outcome, count(*) FROM provider_usage GROUP BY 1"))
        assert outcomes == {"ok": needed, "unknown": len(kills)}


def test_a_kill_in_a_shared_request_pays_at_most_what_was_under_way_twice(arena: Arena) -> None:
    with OpenAIServer(dimensions=32, latency=0.05) as server:
        arena.environment |= {
            "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": server.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32",
            "EMBEDDING_MAX_TEXTS": "8", "EMBEDDING_CONCURRENT_REQUESTS": "2", "WORKER_CONCURRENCY": "6", "MAX_CRASHES": "20",
        }  # fmt: skip

        def killing(number: int, seconds: float) -> Fault | None:
            if number in KILLS:
                arena.fault()
                worker.signal(signal.SIGKILL)
            return None

        wanted = {f"d{number}": text_document(number, paragraphs=4) for number in range(24)}
        arena.submit(wanted)
        server.script(killing)
        arena.reconciler()
        worker = arena.worker(restart=True)
        arena.settle(240)
        assert server.tally.paid_twice() <= 2 * 8 * len(KILLS)
        assert arena.one("SELECT max(cardinality(doc_ids)) FROM provider_usage") > 1
        with arena.connect() as conn:
            assert not check_invariant(conn, set(wanted), {})
        assert arena.one("SELECT count(*) FROM provider_usage WHERE abs(1 - (SELECT sum(s) FROM unnest(shares) AS s)) > 1e-9") == 0


def test_a_kill_in_mid_extraction_pays_at_most_one_part_twice(arena: Arena) -> None:
    with OpenAIServer() as server:
        arena.environment |= {
            "EXTRACTION_PROVIDER": "openai", "EXTRACTION_BASE_URL": server.url, "EXTRACTION_MODEL": "m", "EXTRACTION_MAX_TOKENS": "1000",
            "MAX_CRASHES": "20",
        }  # fmt: skip

        def killing(number: int, seconds: float) -> Fault | None:
            if number in KILLS:
                arena.fault()
                worker.signal(signal.SIGKILL)
            return None

        arena.submit({"long": text_document(1, paragraphs=60)})
        server.script(killing)
        arena.reconciler()
        worker = arena.worker(restart=True)
        arena.settle(240)
        parts = arena.one("SELECT (raw_extraction->'model_extraction'->>'parts')::integer FROM file_extractions WHERE state = 'complete'")
        assert parts >= 4
        asked = Counter(document_of(request.json()) for request in server.log)
        assert (len(asked), arena.faults) == (parts, len(KILLS))
        assert asked.total() <= parts + len(KILLS)
        outcomes = dict(arena.all("SELECT outcome, count(*) FROM provider_usage GROUP BY 1"))
        assert outcomes == {"ok": parts, "unknown": len(KILLS)}
        with arena.connect() as conn:
            assert not check_invariant(conn, {"long"}, {})


def test_a_kill_while_the_service_parses_pays_no_page_twice(arena: Arena) -> None:
    html = b"\f".join(b"<p>Page %d of the report on pumps and valves.</p>" % number for number in range(5))
    with OpenAIServer(dimensions=32, key="sk-1") as models, LlamaParseServer(key="llx-1") as server:
        server.seconds = 3.0
        arena.environment |= {
            "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": models.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32",
            "EMBEDDING_API_KEY": "sk-1", "EXTRACTION_PROVIDER": "openai", "EXTRACTION_BASE_URL": models.url, "EXTRACTION_API_KEY": "sk-1",
            "PARSING_PROVIDER": "llamaparse", "LLAMAPARSE_BASE_URL": server.root, "LLAMAPARSE_API_KEY": "llx-1",
            "LLAMAPARSE_POLL_SECONDS": "0.1",
        }  # fmt: skip

        def killing(number: int, seconds: float) -> Fault | None:
            if number == 3:
                arena.fault()
                worker.signal(signal.SIGKILL)
            return None

        server.script(killing)
        arena.submit({"page.html": html})
        arena.reconciler()
        worker = arena.worker(restart=True)
        arena.settle(90)
        assert (server.tally.uploads, server.tally.texts, models.tally.paid_twice()) == (1, 5, 0)
        assert arena.one("SELECT parser FROM document_markdown").startswith("llamaparse ")
        assert arena.one("SELECT raw_extraction->'model_extraction'->>'model' FROM file_extractions").startswith("gpt-4.1-mini")
        assert dict(arena.all("SELECT kind, count(*) FROM provider_usage WHERE outcome = 'ok' GROUP BY 1")) == {
            "parse": 1, "embedding": 1, "extraction": 1,
        }  # fmt: skip
        with arena.connect() as conn:
            assert not check_invariant(conn, {"page.html"}, {})
            logs = "".join(path.read_text(encoding="utf-8") for path in arena.folder.glob("*.log"))
            stored = str(conn.execute("SELECT array_agg(to_jsonb(e)) FROM document_events AS e").fetchone())
        assert "sk-1" not in logs + stored
        assert "llx-1" not in logs + stored
