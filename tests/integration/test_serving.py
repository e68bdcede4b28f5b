"""The database says which model serves: workers embed with it, queries are embedded with it, whatever EMBEDDING_PROVIDER says here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import faults
from jobs.cli import main
from jobs.cli.reembed import Provider
from jobs.pipeline.runner import Runner
from jobs.services import OwnServices
from jobs.serving import ServingEmbedder, embedder_of, own_embedder
from jobs.stages import embed
from models.documents import Document
from models.settings import Settings, allowed_values, load_settings
from tests.integration.conftest import Bench
from tests.reembedding import NEW, OLD, Shelf
from tests.servers import OpenAIServer


@pytest.fixture
async def shelf(bench: Bench) -> AsyncIterator[Shelf]:
    yield Shelf(bench.conn, bench.pool, bench.settings)


def runner(bench: Bench) -> Runner:
    """A worker that embeds as real ones do; its other stages are plain."""
    made = bench.runner()
    settings = bench.settings
    made._runs._tools = replace(
        made._runs._tools, embedder=own_embedder(settings), choose_embedder=ServingEmbedder(settings, bench.pool).choose
    )

    async def run(document: Document, tools: Any) -> Document:
        bench.calls.append("embed")
        return await embed.run(document, tools)

    made._runs._stages["embed"] = run
    return made


async def work(bench: Bench, worker: Runner) -> None:
    while True:
        bench.conn.execute("DELETE FROM procrastinate_jobs WHERE task_name = 'reembed' AND status = 'todo'")
        found = bench.fetch()
        if found is None:
            return
        await worker.run(*found)


async def test_a_worker_embeds_with_the_model_that_serves(bench: Bench, shelf: Shelf) -> None:
    shelf.put("before", "pump")
    bench.submit("a")
    await work(bench, runner(bench))
    assert bench.all("SELECT DISTINCT embedding_model FROM document_chunks") == [(OLD.model,)]
    assert bench.one("SELECT count(*) FROM embeddings_to_make") == (0,)


async def test_the_first_document_decides_by_embedding_provider(bench: Bench) -> None:
    bench.submit("a")
    await work(bench, runner(bench))
    assert bench.one("SELECT serving_model(), dimensions FROM serving_embeddings") == ("hashed-words-384@1", 384)


async def test_a_document_that_is_embedded_before_the_switch_and_complete_after_it_has_the_new_models_vectors(
    bench: Bench, shelf: Shelf
) -> None:
    shelf.put("before", "pump")

    async def switch(document: Document) -> None:
        shelf.start()
        await shelf.until("switched")

    bench.also["finalize"] = switch
    bench.submit("a")
    await work(bench, runner(bench))
    assert bench.calls.count("embed") == 2
    assert bench.one("SELECT state FROM file_extractions WHERE doc_id = 'a'") == ("complete",)
    assert bench.all("SELECT DISTINCT embedding_model FROM document_chunks WHERE doc_id = 'a'") == [(NEW.model,)]
    assert len(shelf.found(NEW)) == bench.one("SELECT count(*) FROM document_chunks")[0]
    stages = bench.all("SELECT stage FROM document_events WHERE doc_id = 'a' AND stage IS NOT NULL ORDER BY id")
    assert [stage for (stage,) in stages] == ["validate", "parse", "check", "chunk", "embed", "extract", "finalize"]
    await shelf.until("complete")
    shelf.check()


async def test_what_is_embedded_again_at_the_end_stands_in_the_ledger_and_a_worker_that_stops_meanwhile_leaves_nothing_mixed(
    bench: Bench, shelf: Shelf, endpoint: OpenAIServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endpoint.dimensions = 16
    settings = bench.settings.model_copy(
        update={
            "embedding_provider": "openai", "embedding_base_url": endpoint.url, "embedding_model": "m", "embedding_dimensions": 16,
            "embedding_max_texts": 2, "embedding_price_per_million_tokens": 2.0,
        }
    )  # fmt: skip
    at_close: list[Any] = []
    services = OwnServices(settings, pool=lambda: shelf.pool, worker="test:1", stopping=lambda: False, at_close=at_close)
    caller = services.caller("embedding")
    worker = runner(bench)
    worker._runs._tools = replace(worker._runs._tools, choose_embedder=ServingEmbedder(settings, bench.pool, caller).choose)
    shelf.put("before", "pump")

    async def switch(document: Document) -> None:
        if shelf.all("SELECT FROM reembeddings"):
            return
        shelf.start("m@16")
        made = shelf.slice(find=lambda _, model: embedder_of(settings, model, caller))
        while shelf.state() != "switched":
            await shelf.step(made)
        monkeypatch.setattr(faults, "_FAULTS", faults.parse(f"sleep:60@stage_done:embed;doc=a;once={tmp_path}/made"))

    bench.also["finalize"] = switch
    bench.submit("a")
    running = asyncio.create_task(work(bench, worker))
    while not running.done() and not await asyncio.to_thread((tmp_path / "made.0").exists):  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.01)
    assert shelf.one("SELECT count(DISTINCT embedding_model) FROM vector_buffer") == 1, "the old ones, until all new ones are there"
    running.cancel()
    await running
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'completed'") == (1,)
    assert bench.one("SELECT milestone::text, state::text FROM file_extractions WHERE doc_id = 'a'") == ("complete", "complete")
    assert bench.all("SELECT DISTINCT embedding_model FROM document_chunks WHERE doc_id = 'a'") == [("m@16",)]
    shares = bench.all("SELECT doc_ids, user_ids, shares FROM provider_usage WHERE outcome = 'ok' AND NOT 'before' = ANY(doc_ids)")
    assert shares == [(["a"], ["default"], [1.0])] * 6, "three requests, and once more for the worker that stopped"
    for close in at_close:
        await close()


async def test_a_worker_that_cannot_make_the_serving_model_completes_with_its_own_and_others_add_the_rest(
    bench: Bench, shelf: Shelf
) -> None:
    shelf.put("before", "pump")
    bench.conn.execute("UPDATE serving_embeddings SET embedding_model = 'unknown@1'")
    bench.submit("a")
    await work(bench, runner(bench))
    assert bench.calls.count("embed") == 1
    assert bench.one("SELECT state FROM file_extractions WHERE doc_id = 'a'") == ("complete",)
    assert bench.all("SELECT embedding_model, doc_id FROM embeddings_to_make WHERE doc_id = 'a'") == [("unknown@1", "a")]


def docmill(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    load_settings.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    load_settings.cache_clear()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


@pytest.fixture
def stocked(conn: psycopg.Connection, settings: Settings) -> Shelf:
    shelf = Shelf(conn, None, settings)  # type: ignore[arg-type]  # no slice is run
    shelf.put("a", "the pump stands still")
    shelf.put("b", "invoices are paid in March")
    return shelf


def test_a_query_is_embedded_with_the_serving_model_whatever_the_askers_settings_say(
    stocked: Shelf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for provider in ("hash", "fast"):
        monkeypatch.setenv("EMBEDDING_PROVIDER", provider)
        code, out, _ = docmill(capsys, "search", "--mode", "vector", "--limit", "1", "pump")
        assert (code, "a.txt" in out, "b.txt" in out) == (0, True, False)


def test_a_search_that_cannot_make_the_serving_model_says_so_and_words_still_find(
    stocked: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    stocked.conn.execute("UPDATE serving_embeddings SET embedding_model = 'unknown@1'")
    code, _, err = docmill(capsys, "search", "pump")
    assert code == 2
    assert '"unknown@1"' in err
    assert "--mode text" in err
    assert docmill(capsys, "search", "--mode", "text", "pump")[0] == 0


def test_the_command_starts_shows_and_steers_a_run(stocked: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*arguments: str, code: int = 0) -> str:
        ended, out, err = docmill(capsys, "reembed", *arguments)
        assert ended == code, out + err
        return out + err

    assert "no re-embedding is under way" in say("pause", code=1)
    assert "hashed-words-384@1 has begun" in say("start", "--switch", "manual", "--to", "hash")
    assert "must end first" in say("start", "--to", "fast", code=1)
    assert "is paused" in say("pause")
    shown = say("status")
    assert f"served by {OLD.model}" in shown
    assert "Re-embedding 1: paused" in shown
    assert "is running" in say("resume")
    assert "switches as soon as" in say("switch")
    assert '"serving_model": "hashed-words-16@1"' in say("status", "--json")
    assert "is cancelled" in say("cancel")


def test_a_priority_that_no_job_can_have_is_refused_as_such(stocked: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    for priority in ("3000000000", "99999999999999999999999", "-3000000000"):
        code, _, err = docmill(capsys, "reembed", "start", "--to", "hash", "--priority", priority)
        assert (code, "--priority" in err) == (2, True), err


def test_the_command_knows_every_provider() -> None:
    words: Callable[[str], str] = allowed_values
    assert " or ".join(Provider) == words("embedding_provider")
