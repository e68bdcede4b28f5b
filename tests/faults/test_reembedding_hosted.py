"""Going over to a hosted model and back with real workers that die in mid-way of a service that fails now and then: what is paid twice."""

from __future__ import annotations

import json
import signal

from jobs.adapters.embedders import HashedWords
from tests.faults.harness import Arena, documents
from tests.faults.test_reembedding import LEFT, STATE, Searcher
from tests.servers import OpenAIServer
from tests.servers.faults import NAMED, Fault

TEXTS = 16
KILLS = (2, 5)
OUTAGE = range(8, 12)
"""Requests that are answered with 503."""
MODEL = "m@32"


def test_a_run_to_a_hosted_model_and_back_pays_each_text_once_but_for_one_request_a_kill_and_searches_never_miss_a_passage(
    arena: Arena,
) -> None:
    with OpenAIServer(dimensions=32) as server:
        arena.environment |= {
            "EMBEDDING_BASE_URL": server.url, "EMBEDDING_MODEL": "m", "EMBEDDING_DIMENSIONS": "32", "EMBEDDING_MAX_TEXTS": str(TEXTS),
            "BREAKER_FAILURES": "2", "BREAKER_OPEN_SECONDS": "0.5", "BREAKER_MAX_OPEN_SECONDS": "1",
        }  # fmt: skip
        arena.submit(documents(30))
        own = arena.worker()
        arena.settle()
        assert server.tally.requests == 0

        def failing(number: int, seconds: float) -> Fault | None:
            if number in KILLS:  # answered, paid for, and nobody hears it
                arena.fault()
                worker.signal(signal.SIGKILL)
            return NAMED["503"] if number in OUTAGE else None

        own.close()
        passages = arena.one("SELECT count(*) FROM document_chunks")
        texts = arena.one("SELECT count(DISTINCT content_sha256) FROM document_chunks")
        server.script(failing)
        searcher = Searcher(arena)
        searcher.start()
        arena.reconciler()
        arena.one("SELECT start_reembedding(%s)", MODEL)
        worker = arena.worker(restart=True, EMBEDDING_PROVIDER="openai")
        arena.wait(lambda: arena.one(STATE) == "complete", "the way there", 240)
        paid = dict(arena.all("SELECT outcome, count(*) FROM provider_usage GROUP BY 1"))
        line = {
            "scenario": "kill -9 in mid-reembedding", "mode": arena.mode, "passages": passages, "requests": server.tally.requests,
            "needed": -(-texts // TEXTS), "kills": len(KILLS), "paid_twice": server.tally.paid_twice(), "outcomes": paid,
        }  # fmt: skip
        print(f"\nfaults: {json.dumps(line)}", flush=True)
        assert len(server.tally.seen) == texts
        assert server.tally.paid_twice() <= TEXTS * len(KILLS)
        assert paid["unknown"] == len(KILLS)
        assert paid["failed"] == len(OUTAGE)
        named = arena.all("SELECT DISTINCT unnest(doc_ids) FROM provider_usage WHERE outcome = 'ok'")
        assert len(named) == 30
        assert arena.one("SELECT count(*) FROM provider_usage WHERE doc_ids = '{}'") == 0
        requests = server.tally.requests
        arena.one("SELECT start_reembedding(%s)", HashedWords(384).model)
        arena.wait(lambda: arena.one(STATE) == "complete", "the way back", 120)
        arena.wait(lambda: arena.one(LEFT) == 0, "the clean-up", 30)
        searcher.close()
        assert server.tally.requests == requests
        assert arena.all("SELECT embedding_model, count(*) FROM document_chunks GROUP BY 1") == [(HashedWords(384).model, passages)]
        assert searcher.wrong == []
        assert searcher.searches > 20
