"""Documents that would cost more than their limit, run by the real runner against services behind sockets."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from jobs.stages import embed, extract, parse
from models.chunks import Chunk
from models.documents import Document, FileType
from tests.integration.conftest import sha
from tests.integration.outside import Outside
from tests.servers import LlamaParseServer, OpenAIServer


def embedding(outside: Outside, endpoint: OpenAIServer, **limits: Decimal) -> Any:
    outside.terms = dict(limits)
    return outside.runner({"embed": embed.run}, embedder=outside.embedder(endpoint.url))


def letters(outside: Outside) -> list[tuple[Any, ...]]:
    return outside.bench.all("SELECT doc_id, stage, error_type, error_message FROM dead_letters WHERE resolved_at IS NULL ORDER BY doc_id")


def renamed(chunk: Chunk, text: str) -> Chunk:
    return replace(chunk, content=text, content_sha256=sha(text))


def one_request(outside: Outside) -> Decimal:
    """What the dearest request has been estimated at."""
    cost: Decimal = outside.bench.one("SELECT max(estimated_cost) FROM provider_usage")[0]
    return cost


async def test_a_document_over_its_limit_is_a_dead_letter_and_pays_for_the_rest_once_it_may(
    outside: Outside, endpoint: OpenAIServer
) -> None:
    outside.bench.submit("before")
    await outside.work(embedding(outside, endpoint))
    estimate, requests = one_request(outside), endpoint.tally.answered
    outside.bench.submit()
    await outside.work(embedding(outside, endpoint, max_cost_per_document=estimate))
    ((doc_id, stage, kind, message),) = letters(outside)
    assert (doc_id, stage, kind) == ("a", "embed", "PERMANENT")
    assert 'The document "a" has cost ' in message and "MAX_COST_PER_DOCUMENT" in message
    assert outside.state() == ("chunks_stored", "failed", 0)
    assert 0 < endpoint.tally.answered - requests < 3
    outside.bench.conn.execute("SELECT requeue_document('a')")
    await outside.work(embedding(outside, endpoint, max_cost_per_document=estimate * 10))
    assert outside.state() == ("complete", "complete", 0)
    assert (endpoint.tally.answered - requests, endpoint.tally.paid_twice()) == (3, 0)


async def test_documents_of_a_batch_over_its_limit_that_cost_nothing_still_complete(outside: Outside, endpoint: OpenAIServer) -> None:
    outside.bench.submit("before")
    await outside.work(embedding(outside, endpoint))
    estimate = one_request(outside)
    conn = outside.bench.conn
    conn.execute("INSERT INTO processing_jobs (batch_id, correlation_id, total_files) VALUES ('b', 'c', 3)")
    for doc_id in ("a", "known", "z"):
        outside.bench.submit(doc_id)
    conn.execute("UPDATE file_extractions SET batch_id = 'b' WHERE doc_id <> 'before'")
    runner = embedding(outside, endpoint, max_cost_per_batch=estimate)
    chunk = runner._runs._stages["chunk"]

    async def known(document: Document, tools: Any) -> Document:
        made: Document = await chunk(document, tools)
        texts = [each.content.replace(" of known", " of before") for each in made.chunks or ()]
        return replace(made, chunks=tuple(map(renamed, made.chunks or (), texts)))

    runner._runs._stages["chunk"] = known
    await outside.work(runner)
    assert [row[0] for row in letters(outside)] == ["a", "z"]
    assert all('The batch "b"' in row[3] and "MAX_COST_PER_BATCH" in row[3] for row in letters(outside))
    assert outside.state("known") == ("complete", "complete", 0)


@pytest.mark.parametrize("required", [False, True])
async def test_a_document_whose_extraction_may_not_be_paid_for_stays_searchable_unless_it_is_required(
    outside: Outside, endpoint: OpenAIServer, sandbox: Any, required: bool
) -> None:
    outside.terms = {"max_cost_per_document": Decimal("0.000001")}
    outside.passages = 2
    tools = {"sandbox": sandbox, "extractor": outside.extractor(endpoint.url)}
    outside.bench.submit()
    await outside.work(outside.runner({"extract": extract.run}, settings={"extraction_required": required}, **tools))
    assert endpoint.tally.answered == 0
    if required:
        assert [(row[1], row[2]) for row in letters(outside)] == [("extract", "PERMANENT")]
        return
    assert outside.state() == ("complete", "complete", 0)
    failure = outside.bench.one("SELECT raw_extraction->'failure' FROM file_extractions")[0]
    assert failure["error_type"] == "PERMANENT" and "MAX_COST_PER_DOCUMENT" in failure["error_message"]


async def test_a_file_whose_parsing_may_not_be_paid_for_is_not_sent(outside: Outside, sandbox: Any) -> None:
    stored = Path(outside.bench.settings.storage_base_path) / "uploads" / "a"
    stored.parent.mkdir(parents=True)
    stored.write_text("<p>one</p>", encoding="utf-8")
    outside.terms = {"max_cost_per_document": Decimal("0.001")}
    with LlamaParseServer() as server:
        outside.bench.submit()
        runner = outside.runner({"parse": parse.run}, sandbox=sandbox, hosted_parser=outside.parser(server.url))
        validate = runner._runs._stages["validate"]

        async def html(document: Document, tools: Any) -> Document:
            return replace(await validate(document, tools), file_size=10, file_type=FileType.HTML, mime_type="text/html")

        runner._runs._stages["validate"] = html
        await outside.work(runner)
        assert [(row[1], row[2]) for row in letters(outside)] == [("parse", "PERMANENT")]
        assert server.tally.uploads == 0
