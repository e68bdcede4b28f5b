"""The stage extract with a language model behind a socket, run by the real runner: merged, waited for, and done without."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from jobs.adapters.sandbox import ProcessSandbox
from jobs.pipeline.runner import Runner
from jobs.stages import extract
from models.documents import Document
from tests.integration.conftest import Bench, sha
from tests.integration.outside import Outside
from tests.servers import OpenAIServer, faults
from tests.servers.openai import document_of

LONG = "".join(f"Clause {number}: the tenant pays on the first day of the month.\n\n" for number in range(200))
THREE = {"max_tokens": 2600}


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    made = Outside(bench, passages=2)
    yield made
    await made.aclose()


def runner(
    outside: Outside,
    endpoint: OpenAIServer,
    sandbox: ProcessSandbox,
    key: str | None = None,
    parts: Mapping[str, Any] = {},
    **settings: Any,
) -> Runner:
    """`parts` are a schema and limits of the extractor; with them the text is one that takes three requests."""
    extractor = outside.extractor(endpoint.url, key, **parts)
    made = outside.runner({"extract": extract.run}, settings=settings, sandbox=sandbox, extractor=extractor)
    if parts:

        async def check(document: Document, _: Any) -> Document:
            return replace(document, markdown=LONG, markdown_sha256=sha(LONG))

        made._runs._stages["check"] = check

    async def embed(document: Any, _: Any) -> Any:
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


class Totals(BaseModel):
    """A caller's model that lets NaN in, as pydantic does by itself."""

    total: float


async def test_a_number_that_no_database_can_hold_is_repaired(outside: Outside, endpoint: OpenAIServer, sandbox: Any) -> None:
    endpoint.say.extend([{"total": "NaN"}, {"total": "12.5"}])
    outside.bench.submit()
    model = {"schema": "tests.integration.test_extract_stage:Totals"}
    await outside.work(runner(outside, endpoint, sandbox, parts=model))
    assert outside.state() == ("complete", "complete", 0)
    assert extraction(outside)["model_extraction"]["data"] == {"total": 12.5}
    assert "$: a number is not finite" in endpoint.log[1].json()["messages"][3]["content"]


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
        original = await worker._runs._tools.find_original(document)
        return replace(document, markdown="The same.", markdown_sha256="5" * 64, duplicate_of=original)

    worker._runs._stages["check"] = check
    for doc_id in ("a", "b"):
        outside.bench.submit(doc_id, content="7")
        await outside.work(worker)
    assert endpoint.tally.answered == 1
    assert extraction(outside, "b")["model_extraction"] == extraction(outside, "a")["model_extraction"]


@pytest.mark.parametrize("lacks", ["raw_extraction - 'model_extraction'", """raw_extraction || '{"failure": {}}'"""])
async def test_what_one_of_several_equals_paid_for_is_paid_for_once(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any, lacks: str
) -> None:
    """The first of them was extracted before there was a model, or while it was away."""
    worker = runner(outside, endpoint, sandbox)

    async def check(document: Any, _: Any) -> Any:
        original = await worker._runs._tools.find_original(document)
        return replace(document, markdown="The same.", markdown_sha256="5" * 64, duplicate_of=original)

    worker._runs._stages["check"] = check
    outside.bench.submit("a", content="7")
    await outside.work(worker)
    outside.bench.conn.execute(f"UPDATE file_extractions SET raw_extraction = {lacks}")
    for doc_id in ("b", "c", "d"):
        outside.bench.submit(doc_id, content="7")
        await outside.work(worker)
    assert endpoint.tally.answered == 2
    assert extraction(outside, "d")["model_extraction"] == extraction(outside, "b")["model_extraction"]


def asked(endpoint: OpenAIServer) -> list[str]:
    """The first words of the parts that were asked about."""
    return [document_of(request.json())[:9] for request in endpoint.log]


async def test_a_limit_at_a_later_part_does_not_have_earlier_parts_paid_again(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any
) -> None:
    endpoint.script(faults.sequence(None, None, faults.rate_limited("0.1")))
    outside.bench.submit()
    worker = runner(outside, endpoint, sandbox, parts=THREE)
    await outside.work(
        worker, until=lambda: outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled'") > (0,)
    )
    kept = outside.bench.all("SELECT part, model, repairs, tokens_in > 0, data->>'title' FROM extraction_answers ORDER BY part")
    assert [row[:4] for row in kept] == [(1, "m-2026-01-01", 0, True), (2, "m-2026-01-01", 0, True)]
    assert kept[0][4].startswith("Clause 0:")
    await outside.work(worker)
    assert outside.state() == ("complete", "complete", 0)
    times = Counter(asked(endpoint))
    assert sorted(times.values()) == [1, 1, 2]
    assert times[asked(endpoint)[-1]] == 2
    found = extraction(outside)["model_extraction"]
    assert (found["parts"], found["data"]["title"]) == (3, kept[0][4])
    assert found["tokens_in"] == outside.bench.one("SELECT sum(tokens_in) FROM provider_usage WHERE outcome = 'ok'")[0]
    assert outside.bench.one("SELECT count(*) FROM extraction_answers") == (0,)


async def test_a_requeued_document_pays_for_the_missing_parts_alone(outside: Outside, endpoint: OpenAIServer, sandbox: Any) -> None:
    endpoint.script(lambda number, _: faults.NAMED["length"] if number >= 2 else None)
    outside.bench.submit()
    worker = runner(outside, endpoint, sandbox, parts=THREE, extraction_required=True)
    await outside.work(worker)
    assert outside.state()[1] == "failed"
    endpoint.script(faults.never)
    before = len(endpoint.log)
    outside.bench.conn.execute("SELECT requeue_document('a')")
    await outside.work(worker)
    assert outside.state()[1] == "complete"
    assert asked(endpoint)[:1] + asked(endpoint)[before:] == list(dict.fromkeys(asked(endpoint)))


@pytest.mark.parametrize("change", ["UPDATE extraction_answers SET asked_sha256 = 'of another schema'", "the content"])
async def test_an_answer_to_another_question_is_not_taken(outside: Outside, endpoint: OpenAIServer, sandbox: Any, change: str) -> None:
    endpoint.script(faults.sequence(None, faults.rate_limited("0.1")))
    outside.bench.submit()
    worker = runner(outside, endpoint, sandbox, parts=THREE)
    await outside.work(
        worker, until=lambda: outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled'") > (0,)
    )
    assert outside.bench.one("SELECT count(*) FROM extraction_answers") == (1,)
    if change == "the content":
        outside.bench.submit(content="8")
        assert outside.bench.one("SELECT count(*) FROM extraction_answers") == (0,)
    else:
        outside.bench.conn.execute(change)
    await outside.work(worker)
    assert outside.state()[1] == "complete"
    assert list(Counter(asked(endpoint)).values()) == [2, 2, 1]


async def test_answers_that_do_not_fit_together_are_asked_for_again(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any, tmp_path: Path
) -> None:
    schema = tmp_path / "one.json"
    schema.write_text(json.dumps({"type": "object", "maxProperties": 1, "additionalProperties": {"type": "string"}}), "utf-8")
    endpoint.say.extend([{"a": "1"}, {"b": "2"}, {"a": "1"}, {"a": "1"}, {"a": "1"}, {"a": "1"}])
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, parts={**THREE, "schema": str(schema)}))
    assert outside.state()[1] == "complete"
    assert extraction(outside)["model_extraction"]["data"] == {"a": "1"}
    assert list(Counter(asked(endpoint)).values()) == [2, 2, 2]
