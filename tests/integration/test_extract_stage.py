"""The stage extract with a language model behind a socket, run by the real runner: merged, waited for, and done without."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from jobs.adapters.sandbox import ProcessSandbox
from jobs.pipeline.runner import Runner
from jobs.stages import extract
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.servers import OpenAIServer, faults


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    made = Outside(bench, passages=2)
    yield made
    await made.aclose()


def runner(outside: Outside, endpoint: OpenAIServer, sandbox: ProcessSandbox, key: str | None = None, **settings: Any) -> Runner:
    made = outside.runner({"extract": extract.run}, settings=settings, sandbox=sandbox, extractor=outside.extractor(endpoint.url, key))

    async def embed(document: Any, _: Any) -> Any:
        from dataclasses import replace

        import numpy as np

        return replace(document, vectors=np.eye(8, dtype=np.float32)[:2], embedding_model="eye", embedded_count=2)

    made._runs._stages["embed"] = embed
    return made


def extraction(outside: Outside, doc_id: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = outside.bench.one("SELECT raw_extraction FROM file_extractions WHERE doc_id = %s", doc_id)[0]
    return found


async def test_what_the_model_found_stands_beside_what_was_read_off(outside: Outside, endpoint: OpenAIServer, sandbox: Any) -> None:
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    found = extraction(outside)
    assert found["extractor"]["name"] == "docmill-local"
    assert found["model_extraction"]["model"] == "m-2026-01-01"
    told = outside.bench.all("SELECT doc_ids, stage, kind, outcome, cost > 0 FROM provider_usage")
    assert told == [(["a"], "extract", "extraction", "ok", True)]


@pytest.mark.parametrize("script", [faults.sequence(faults.rate_limited("0.3")), faults.outage(0, 1.0, faults.NAMED["502_html"])])
async def test_limits_and_outages_are_waited_out_whether_extraction_is_required_or_not(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any, script: faults.Script
) -> None:
    endpoint.script(script)
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert "model_extraction" in extraction(outside)
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == (0,)


async def test_a_refused_key_keeps_documents_waiting_until_it_is_right(outside: Outside, endpoint: OpenAIServer, sandbox: Any) -> None:
    endpoint.key = "new"
    outside.bench.submit()
    worker = runner(outside, endpoint, sandbox, key="old")
    await outside.work(worker, until=lambda: len(outside.calls()) >= 2)
    assert outside.state() == ("embeddings_stored", "retrying", 0)
    assert outside.bench.one("SELECT count(*) FROM alerts") == (1,)
    endpoint.key = "old"
    await outside.work(worker)
    assert "model_extraction" in extraction(outside)


@pytest.mark.parametrize(("required", "ends"), [(False, "complete"), (True, "failed")])
async def test_an_extraction_that_fails_for_good_fails_the_document_only_where_it_is_required(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any, required: bool, ends: str
) -> None:
    endpoint.script(faults.always(faults.NAMED["length"]))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, extraction_required=required))
    assert outside.state()[1] == ends
    assert outside.calls() == ["rejected"] * 4  # a first try and three retries
    assert outside.bench.one("SELECT count(*) FROM dead_letters") == (int(required),)
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'extraction_failed'") == (int(not required),)
    if not required:
        found = extraction(outside)
        assert found["extractor"]["name"] == "docmill-local"
        assert found["failure"]["error_type"] == "LLM_ERROR"
        assert "model_extraction" not in found


async def test_a_duplicate_takes_over_what_its_original_paid_for(outside: Outside, endpoint: OpenAIServer, sandbox: Any) -> None:
    worker = runner(outside, endpoint, sandbox)
    same = outside.bench.settings  # the plain parse writes the doc_id into the text, so the text is given
    assert same.duplicate_policy == "reuse"

    async def check(document: Any, _: Any) -> Any:
        from dataclasses import replace

        original = await worker._runs._tools.find_original(document)
        return replace(document, markdown="The same.", markdown_sha256="5" * 64, duplicate_of=original)

    worker._runs._stages["check"] = check
    for doc_id in ("a", "b"):
        outside.bench.submit(doc_id, content="7")
        await outside.work(worker)
    assert endpoint.tally.answered == 1
    assert extraction(outside, "b")["model_extraction"] == extraction(outside, "a")["model_extraction"]
