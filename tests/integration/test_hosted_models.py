"""Embedding models of outside services as models like any other: named, found again, asked by searches, refused in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from jobs.adapters.embedders import HashedWords, HostedEmbedder, make_embedder_of
from jobs.cli import main
from jobs.services import OwnServices, service_name
from jobs.worker import DocmillApp
from models.calls import CallPurpose, Reply
from models.errors import ConfigurationError
from models.settings import Settings, load_settings
from tests.reembedding import Shelf
from tests.servers import OpenAIServer


@pytest.fixture
def endpoint() -> Iterator[OpenAIServer]:
    with OpenAIServer(dimensions=16, key="sk-right") as running:
        yield running


@pytest.fixture
def hosted(endpoint: OpenAIServer, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {
        "EMBEDDING_PROVIDER": "openai", "EMBEDDING_BASE_URL": endpoint.url, "EMBEDDING_API_KEY": "sk-right", "EMBEDDING_MODEL": "m",
        "EMBEDDING_DIMENSIONS": "16",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.mark.parametrize(("model", "asked"), [("other@24", True), ("text-embedding-3-small@1536", False), ("m@16", True)])
def test_the_model_that_serves_is_made_by_its_name_whatever_embedding_model_says(hosted: Settings, model: str, asked: bool) -> None:
    made = make_embedder_of(hosted, model)
    assert isinstance(made, HostedEmbedder)
    assert (made.model, made._dialects[0].dimensions) == (model, asked)


def test_a_local_model_is_no_hosted_one_and_none_is_asked_of_a_service_that_nobody_named(hosted: Settings, settings: Settings) -> None:
    assert isinstance(make_embedder_of(hosted, "hashed-words-16@1"), HashedWords)
    with pytest.raises(ConfigurationError, match="EMBEDDING_BASE_URL"):
        make_embedder_of(settings, "other@24")
    named = settings.model_copy(update={"embedding_base_url": hosted.embedding_base_url})
    assert isinstance(make_embedder_of(named, "other@24"), HostedEmbedder)


def test_a_query_is_embedded_by_the_service_and_its_connection_is_closed(
    hosted: Settings, endpoint: OpenAIServer, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(conn, None, hosted)  # type: ignore[arg-type]  # no slice is run
    shelf.put("a", "the pump stands still")
    shelf.put("b", "invoices are paid in March")
    conn.execute("UPDATE document_chunks SET embedding_model = 'm@16'")
    conn.execute("UPDATE serving_embeddings SET embedding_model = 'm@16'")
    load_settings.cache_clear()
    with pytest.raises(SystemExit) as ended:
        main(("search", "--mode", "vector", "--limit", "1", "pump"))
    load_settings.cache_clear()
    out = capsys.readouterr().out
    assert (ended.value.code or 0, "a.txt" in out, "b.txt" in out) == (0, True, False)
    assert endpoint.tally.answered == 1


async def test_a_worker_does_not_start_with_a_provider_that_cannot_work(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_PROVIDER", "openai")
    monkeypatch.setenv("EMBEDDING_MAX_TEXT_TOKENS", "9000")
    monkeypatch.setenv("EMBEDDING_MAX_TOKENS", "8000")
    app = DocmillApp(Settings(), import_paths=[])
    async with app.open_async():
        with pytest.raises(ConfigurationError, match="EMBEDDING_API_KEY") as caught:
            await app.run_worker_async(wait=False)
    assert "EMBEDDING_MAX_TEXT_TOKENS=9000" in str(caught.value)


async def test_a_workers_services_are_made_when_called_and_closed_with_it(
    hosted: Settings, database: str, conn: psycopg.Connection
) -> None:
    from jobs.database import make_pool

    at_close: list[object] = []
    async with make_pool(hosted, database) as pool:
        services = OwnServices(hosted, pool=lambda: pool, worker="w:1", stopping=lambda: False, at_close=at_close)  # type: ignore[arg-type]
        caller = services.caller("embedding")
        assert at_close == []

        async def send() -> Reply[int]:
            return Reply(1)

        assert (await caller.call(send, CallPurpose("embed", ()))).value == 1
        assert len(at_close) == 1
        made = services.service("embedding")
        await services.aclose()
        assert services.caller("embedding") is caller
        assert services.service("embedding") is not made
    assert conn.execute("SELECT service, worker, outcome FROM provider_usage").fetchall() == [
        (service_name(hosted, "embedding"), "w:1", "ok")
    ]
    assert "sk-right" not in service_name(hosted, "embedding")


def test_an_embedder_that_is_closed_opens_its_connections_again_in_the_next_event_loop(hosted: Settings, endpoint: OpenAIServer) -> None:
    made = make_embedder_of(hosted, "m@16")
    assert isinstance(made, HostedEmbedder)
    for _ in range(2):

        async def once() -> None:
            await made.embed(["pump"])
            await made.aclose()

        asyncio.run(once())
    assert endpoint.tally.answered == 2
