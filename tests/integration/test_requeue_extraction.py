"""A failed extraction that is tried again: nothing else is done again, and searches see the document all the while."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import psycopg
import pytest

from jobs import retry_extraction, retry_extraction_async
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Limits
from jobs.cli import main
from jobs.pipeline.runner import Runner
from jobs.reconcile import Reconciler
from jobs.stages import embed, extract
from models.errors import OperationRefused
from models.settings import load_settings
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.reembedding import NEW, OLD, Shelf, vector
from tests.servers import OpenAIServer, faults


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    made = Outside(bench, passages=2)
    load_settings.cache_clear()
    yield made
    load_settings.cache_clear()
    await made.aclose()


@pytest.fixture
async def worker(outside: Outside, endpoint: OpenAIServer) -> AsyncIterator[Runner]:
    """Its model refuses everything, until it is told otherwise; a stage that fails fails at once."""
    endpoint.script(faults.always(faults.NAMED["400"]))
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=60, memory_mb=4096, max_output_mb=256))
    made = outside.runner({"extract": extract.run}, sandbox=sandbox, extractor=outside.extractor(endpoint.url))

    async def embed(document: Any, _: Any) -> Any:
        outside.bench.calls.append("embed")
        return replace(document, vectors=np.eye(8, dtype=np.float32)[:2], embedding_model="eye", embedded_count=2)

    made._runs._stages["embed"] = embed
    yield made
    await sandbox.aclose()


async def failed(outside: Outside, worker: Runner, *doc_ids: str) -> None:
    for doc_id in doc_ids:
        outside.bench.submit(doc_id)
    await outside.work(worker)
    for doc_id in doc_ids:
        assert outside.state(doc_id) == ("complete", "complete", 0)
        assert extraction(outside, doc_id)["failure"]["error_type"] == "PERMANENT"
    outside.bench.calls.clear()


def extraction(outside: Outside, doc_id: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = outside.bench.one("SELECT raw_extraction FROM file_extractions WHERE doc_id = %s", doc_id)[0]
    return found


def served(outside: Outside) -> list[tuple[Any, ...]]:
    """What searches see, without the number of the version."""
    return outside.bench.all(
        """SELECT c.id, c.doc_id, c.chunk_index, c.content, c.heading_path, c.char_start, c.char_end, c.metadata, c.embedding::text,
            c.embedding_model, m.markdown, m.page_map
        FROM document_chunks AS c
        JOIN file_extractions AS d ON d.doc_id = c.doc_id AND d.served_version = c.version
        JOIN document_markdown AS m ON m.doc_id = c.doc_id AND m.version = c.version ORDER BY c.doc_id, c.chunk_index"""
    )


async def test_only_extract_and_finalize_run_again_and_searches_see_the_document_all_the_while(
    outside: Outside, worker: Runner, endpoint: OpenAIServer
) -> None:
    await failed(outside, worker, "a")
    before = served(outside)
    assert len(before) == 2
    endpoint.script(faults.never)
    assert retry_extraction("a") == "extract"
    assert served(outside) == before and "failure" in extraction(outside)
    assert await retry_extraction_async("a") == "extract"  # a replay does nothing
    assert outside.bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (1,)
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE event = 'requeued_by_operator'") == (1,)
    await outside.work(worker)
    assert outside.bench.calls == ["extract", "finalize"]
    found = extraction(outside)
    assert "failure" not in found and found["model_extraction"]["model"]
    assert served(outside) == before
    assert outside.bench.one("SELECT version, served_version, state::text, chunk_count FROM file_extractions") == (2, 2, "complete", 2)
    for table in ("chunk_buffer", "vector_buffer", "extraction_buffer"):
        assert outside.bench.one(f"SELECT count(*) FROM {table}") == (0,)
    with pytest.raises(OperationRefused, match='document "a" is complete and has no failed extraction'):
        retry_extraction("a")


async def test_one_that_fails_once_more_is_served_as_before_and_can_be_tried_again(
    outside: Outside, worker: Runner, endpoint: OpenAIServer
) -> None:
    await failed(outside, worker, "a")
    before = served(outside)
    for version in (2, 3):
        assert retry_extraction("a") == "extract"
        await outside.work(worker)
        assert served(outside) == before and "failure" in extraction(outside)
        assert outside.bench.one("SELECT version, served_version FROM file_extractions") == (version, version)
    worker._runs._settings = worker._settings.model_copy(update={"extraction_required": True})
    assert retry_extraction("a") == "extract"
    await outside.work(worker)
    assert outside.bench.one("SELECT state::text, version, served_version FROM file_extractions") == ("failed", 4, 3)
    assert served(outside) == before
    with pytest.raises(OperationRefused, match="requeue_document"):
        retry_extraction("a")


async def test_a_document_without_a_failed_extraction_is_refused(outside: Outside, worker: Runner, endpoint: OpenAIServer) -> None:
    endpoint.script(faults.never)
    outside.bench.submit("a")
    with pytest.raises(OperationRefused, match='document "a" is queued and has no failed extraction'):
        retry_extraction("a")
    await outside.work(worker)
    with pytest.raises(OperationRefused, match='document "a" is complete and has no failed extraction'):
        retry_extraction("a")
    with pytest.raises(OperationRefused, match='no document "b"'):
        retry_extraction("b")
    assert outside.bench.one("SELECT version, state::text FROM file_extractions") == (1, "complete")


async def test_of_two_who_requeue_at_once_one_does_and_a_rolled_back_one_leaves_nothing(
    outside: Outside, worker: Runner, database: str
) -> None:
    await failed(outside, worker, "a")
    with psycopg.connect(database) as other:
        other.execute("SELECT requeue_extraction('a')")
        waiting = asyncio.create_task(asyncio.to_thread(retry_extraction, "a"))
        await asyncio.sleep(0.3)
        other.rollback()
        assert await waiting == "extract"
    assert outside.bench.one("SELECT version, (SELECT count(*) FROM chunk_buffer) FROM file_extractions") == (2, 2)


async def test_the_command_takes_up_one_or_all_and_ends_although_they_fail_again(
    outside: Outside, worker: Runner, endpoint: OpenAIServer, capsys: pytest.CaptureFixture[str], database: str
) -> None:
    await failed(outside, worker, "a", "b", "c")

    def docmill(*arguments: str) -> tuple[int, Any]:
        with pytest.raises(SystemExit) as ended:
            main(("extract", *arguments, "--json"))
        return int(ended.value.code or 0), json.loads(capsys.readouterr().out)

    code, told = await asyncio.to_thread(docmill, "a", "nobody")
    assert code == 1 and told["requeued"] == [{"doc_id": "a", "stage": "extract"}]
    assert told["refused"][0]["doc_id"] == "nobody"
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'b' FOR UPDATE")
        assert await asyncio.to_thread(docmill, "--all", "--user", "default") == (0, {"requeued": 1})
    assert await asyncio.to_thread(docmill, "--all", "--batch", "none") == (0, {"requeued": 0})
    assert await asyncio.to_thread(docmill, "--all") == (0, {"requeued": 1})
    endpoint.script(faults.never)
    await outside.work(worker)
    assert outside.bench.calls == ["extract", "finalize"] * 3
    assert {("failure" in extraction(outside, doc_id)) for doc_id in "abc"} == {False}


async def test_a_skipped_duplicate_stays_one_while_its_originals_extraction_is_tried_again(outside: Outside, worker: Runner) -> None:
    bench = outside.bench
    worker._runs._settings = worker._settings.model_copy(update={"duplicate_policy": "skip"})
    worker._runs._tools = replace(worker._runs._tools, settings=worker._runs._settings)
    bench.submit("a", content="7")
    await outside.work(worker)
    bench.submit("b", content="7")
    await outside.work(worker)
    assert bench.one("SELECT state::text FROM file_extractions WHERE doc_id = 'b'") == ("duplicate",)
    assert retry_extraction("a") == "extract"
    assert "requeued" not in await Reconciler(bench.settings, bench.pool).pass_once()
    assert bench.one("SELECT state::text FROM file_extractions WHERE doc_id = 'b'") == ("duplicate",)


class Mirrored:
    """A model as wide as the old one, with vectors that point the other way."""

    model, dimensions, quick = "mirrored@1", OLD.dimensions, True

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> Any:
        return -np.stack([vector(text, OLD) for text in texts])


@pytest.mark.parametrize("to", [Mirrored(), NEW], ids=["as-wide", "wider"])
async def test_one_that_is_half_moved_to_another_model_comes_back_with_that_models_vectors_alone(
    outside: Outside, worker: Runner, endpoint: OpenAIServer, to: Any
) -> None:
    bench, made = outside.bench, {OLD.model: OLD, to.model: to}
    shelf = Shelf(bench.conn, bench.pool, bench.settings)
    shelf.put("before", "pump")

    async def choose(*, fresh: bool = False) -> Any:
        return made[shelf.one("SELECT serving_model()")]

    worker._runs._tools = replace(worker._runs._tools, choose_embedder=choose)
    worker._runs._stages["embed"] = embed.run
    outside.passages = 300  # more than one step moves
    await failed(outside, worker, "a")
    shelf.start(to.model)
    moving = shelf.slice(find=lambda _, model: made[model])
    while shelf.one("SELECT count(DISTINCT embedding_model) FROM document_chunks WHERE doc_id = 'a'") == 1:
        await shelf.step(moving)
    endpoint.script(faults.never)
    assert retry_extraction("a") == "embed"
    await outside.work(worker)
    assert outside.state("a") == ("complete", "complete", 0)
    assert bench.all("SELECT embedding_model, count(*) FROM document_chunks WHERE doc_id = 'a' GROUP BY 1") == [(to.model, 300)]
    stored = bench.all("SELECT content, embedding FROM document_chunks WHERE doc_id = 'a'")
    own = await to.embed([content for content, _ in stored])
    assert all((found.to_numpy() == right).all() for (_, found), right in zip(stored, own, strict=True))
    assert bench.all("SELECT detail ->> 'embedded' FROM document_events WHERE doc_id = 'a' AND version = 2 AND stage = 'embed'") == [("0",)]


async def test_vectors_of_two_models_that_an_older_version_left_in_the_buffer_are_made_anew(
    outside: Outside, worker: Runner, endpoint: OpenAIServer
) -> None:
    """As the version before migration 0038 copied them."""
    bench = outside.bench
    shelf = Shelf(bench.conn, bench.pool, bench.settings)
    shelf.put("before", "pump")

    async def choose(*, fresh: bool = False) -> Any:
        return OLD

    worker._runs._tools = replace(worker._runs._tools, choose_embedder=choose)
    worker._runs._stages["embed"] = embed.run
    await failed(outside, worker, "a")
    endpoint.script(faults.never)
    assert retry_extraction("a") == "extract"
    bench.conn.execute("UPDATE vector_buffer SET embedding_model = 'other@1' WHERE chunk_index = 0")
    await outside.work(worker)
    assert outside.state("a") == ("complete", "complete", 0)
    assert bench.all("SELECT DISTINCT embedding_model FROM document_chunks WHERE doc_id = 'a'") == [(OLD.model,)]
