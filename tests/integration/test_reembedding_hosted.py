"""Going over to a model that is paid for: each finished request is kept, stands in the ledger, and obeys breaker and budget."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable

import psycopg
import pytest

from jobs import filling
from jobs.cli import main
from jobs.database import make_pool
from jobs.reembedding import Slice
from jobs.services import OwnServices
from jobs.serving import embedder_of
from models.settings import Settings, load_settings
from tests.reembedding import NEW, OLD, Shelf
from tests.servers import OpenAIServer
from tests.servers.faults import NAMED, Fault

MODEL = "m@16"
AT_ONCE = 4


class Paid:
    """A shelf whose documents go over to a model of a local server, four texts a request."""

    def __init__(self, shelf: Shelf, server: OpenAIServer, settings: Settings) -> None:
        self.shelf, self.server, self.settings = shelf, server, settings
        self._close: list[Callable[[], object]] = []

    def slice(self, **changes: object) -> Slice:
        own = {
            "embedding_provider": "openai", "embedding_base_url": self.server.url, "embedding_model": "m", "embedding_dimensions": 16,
            "embedding_max_texts": AT_ONCE, "embedding_price_per_million_tokens": 2.0, "retry_base_delay_seconds": 0.01,
            "breaker_failures": 2, "breaker_open_seconds": 30, **changes,
        }  # fmt: skip
        settings = self.settings.model_copy(update=own)
        services = OwnServices(settings, pool=lambda: self.shelf.pool, worker="test:1", stopping=lambda: False, at_close=[])
        return self.shelf.slice(find=lambda _, model: embedder_of(settings, model, services.caller("embedding")))

    async def until(self, *states: str, limit: int = 100) -> None:
        """Go on until the run is in one of the states, in slices of one step."""
        made = self.slice()
        for _ in range(limit):
            if self.shelf.state() in states:
                return
            assert not await made.run(0), self.shelf.one("SELECT error_message FROM reembedding_status")
        raise AssertionError(f"the run is {self.shelf.state()}, not {states}")

    def outcomes(self) -> dict[str, int]:
        return dict(self.shelf.all("SELECT outcome, count(*) FROM provider_usage GROUP BY 1"))


@pytest.fixture
async def paid(settings: Settings, database: str, conn: psycopg.Connection) -> AsyncIterator[Paid]:
    pool = make_pool(settings, database)
    await pool.open()
    try:
        with OpenAIServer(dimensions=16) as server:
            yield Paid(Shelf(conn, pool, settings), server, settings)
    finally:
        await pool.close()


def fill(shelf: Shelf, count: int = 4, passages: int = 5) -> None:
    for number in range(count):
        shelf.put(f"d{number}", *(f"pump {number} {index}" for index in range(passages)))


async def test_each_text_is_paid_for_once_in_full_requests_and_the_ledger_names_its_documents(paid: Paid) -> None:
    shelf = paid.shelf
    fill(shelf)
    shelf.put("e", "pump 0 0", "pump of e")  # the first stands in d0 as well
    shelf.start(MODEL)
    await paid.until("complete")
    assert (paid.server.tally.requests, paid.server.tally.paid_twice()) == (-(-21 // AT_ONCE), 0)
    assert shelf.all("SELECT DISTINCT embedding_model FROM document_chunks") == [MODEL]
    entries = shelf.all("SELECT doc_ids, shares, outcome, cost > 0, batch_ids FROM provider_usage ORDER BY started_at")
    assert all(outcome == "ok" and paid_for and set(batches) == {None} for _, _, outcome, paid_for, batches in entries)
    assert all(sum(shares) == pytest.approx(1) for _, shares, *_ in entries)
    assert {name for names, *_ in entries for name in names} == {"d0", "d1", "d2", "d3", "e"}
    assert shelf.one("SELECT sum(cost) FROM cost_by_document") == shelf.one("SELECT sum(cost) FROM provider_usage")


async def test_what_a_request_brought_is_kept_before_the_next_one_begins_and_an_outage_is_waited_out(paid: Paid) -> None:
    fill(paid.shelf)
    paid.server.script(lambda number, seconds: NAMED["503"] if number >= 3 else None)
    paid.shelf.start(MODEL, switch="manual")
    made = paid.slice()
    await made.run(0)
    assert await made.run(0)
    stored = paid.shelf.one("SELECT count(*) FROM chunk_embeddings")
    assert stored == paid.server.tally.texts == 2 * AT_ONCE
    for _ in range(5):  # whoever comes by asks the breaker, and the service is left alone
        wait = await paid.slice().run(0)
    assert wait is not None
    assert wait > 10
    assert paid.server.tally.requests <= 2 + 2
    assert "503" in paid.shelf.one("SELECT error_message FROM provider_usage WHERE outcome = 'failed' LIMIT 1")
    assert paid.shelf.one("SELECT state, failing > 0, error_message IS NOT NULL FROM reembedding_status") == ("running", True, True)
    assert len(paid.shelf.found(OLD)) == 20  # searches go on
    paid.server.script(lambda number, seconds: None)
    paid.shelf.one("SELECT reset_breaker(service) FROM circuit_breakers")
    await paid.until("ready")
    assert paid.server.tally.paid_twice() == 0
    assert paid.shelf.one("SELECT failing, error_message FROM reembedding_status") == (0, None)


async def test_the_budget_is_waited_for(paid: Paid) -> None:
    fill(paid.shelf)
    paid.shelf.start(MODEL)
    made = paid.slice(embedding_requests_per_minute=2)
    await made.run(0)
    wait = await made.run(0)
    assert wait is not None
    assert wait > 5
    assert paid.server.tally.requests <= 2
    assert paid.shelf.one("SELECT count(*) FROM chunk_embeddings") == paid.server.tally.texts > 0


async def test_a_document_that_somebody_holds_for_a_moment_is_not_paid_for_again(
    paid: Paid, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_KEEP_SECONDS", [0.05] * 400)
    fill(paid.shelf, 1, AT_ONCE)
    paid.shelf.start(MODEL, switch="manual")
    with psycopg.connect(database) as holder:

        def hold(number: int, seconds: float) -> Fault | None:
            holder.execute("SELECT FROM file_extractions FOR UPDATE")
            threading.Timer(0.3, holder.rollback).start()
            return None

        paid.server.script(hold)
        await paid.until("ready")
    assert (paid.server.tally.requests, paid.server.tally.paid_twice()) == (1, 0)


async def test_a_text_that_the_service_refuses_keeps_no_other_document_waiting(paid: Paid) -> None:
    fill(paid.shelf, 3, 2)
    paid.shelf.put("bad", "pump poison", "pump after")
    paid.server.poison = "poison"
    paid.shelf.start(MODEL, switch="manual")
    made = paid.slice()
    for _ in range(6):
        await made.run(0)
    assert paid.shelf.all("SELECT doc_id FROM embeddings_to_make WHERE error_message IS NOT NULL") == ["bad"]
    assert paid.shelf.one("SELECT count(DISTINCT doc_id) FROM chunk_embeddings WHERE doc_id <> 'bad'") == 3
    assert paid.server.tally.paid_twice() == 0
    assert paid.shelf.state() == "running"


async def test_passages_that_a_service_refuses_keep_nothing_else_waiting_and_multiply_no_requests(paid: Paid) -> None:
    for number in range(20):
        paid.shelf.put(f"a{number:02}", f"pump poison {number}")
    paid.shelf.put("large", "pump poison", *(f"pump {index}" for index in range(600)))
    fill(paid.shelf, 20, 1)
    paid.server.poison = "poison"
    paid.shelf.start(MODEL, switch="manual")
    made = paid.slice(embedding_max_texts=256)
    waited = 0.0
    while paid.shelf.one("SELECT count(*) FROM chunk_embeddings") < 620 and waited < 120:
        waited += await made.run(0) or 0
    assert waited < 60
    assert paid.server.tally.requests < 100
    assert paid.server.tally.paid_twice() == 0
    assert paid.shelf.one("SELECT count(*), sum(passages) FROM embeddings_to_make WHERE attempts > 0") == (21, 21)


async def test_a_service_that_refuses_everything_is_left_alone_for_a_while(paid: Paid) -> None:
    fill(paid.shelf, 100, 2)
    paid.server.poison = "pump"
    paid.shelf.start(MODEL, switch="manual")
    made = paid.slice(embedding_max_texts=256)
    while not await made.run(0):
        assert paid.server.tally.requests < 100
    assert paid.server.tally.requests < 100


@pytest.mark.parametrize("over", [1, 12])
async def test_documents_that_may_not_cost_so_much_leave_the_others_their_one_request(paid: Paid, over: int) -> None:
    for number in range(30):
        paid.shelf.put(f"d{number:02}", ("pump " * 400 if number < over else "pump ") + str(number))
    paid.shelf.start(MODEL, switch="manual")
    made = paid.slice(embedding_max_texts=256, embedding_price_per_million_tokens=1000.0, max_cost_per_document=0.05)
    while paid.shelf.one("SELECT count(*) FROM chunk_embeddings") == 0:
        assert not await made.run(0)
    assert paid.shelf.one("SELECT count(*) FROM chunk_embeddings") == 30 - over
    assert paid.server.tally.requests == 1
    listed = paid.shelf.all("SELECT doc_id, error_message LIKE '%%MAX_COST_PER_DOCUMENT%%' FROM embeddings_to_make ORDER BY doc_id")
    assert listed == [(f"d{number:02}", True) for number in range(over)]


async def test_from_a_hosted_model_back_to_one_of_ones_own_nothing_is_paid(paid: Paid) -> None:
    fill(paid.shelf)
    paid.shelf.start(MODEL)
    await paid.until("complete")
    paid.server.reset()
    paid.shelf.start(NEW.model)
    await paid.until("complete")
    assert paid.server.tally.requests == 0
    assert len(paid.shelf.found(NEW)) == 20
    paid.shelf.check_vectors()


def test_a_run_that_no_worker_has_listed_yet_shows_no_count_of_passages(
    settings: Settings, conn: psycopg.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        load_settings.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main(("reembed", "status"))
        load_settings.cache_clear()
        assert not ended.value.code
        return capsys.readouterr().out

    shelf = Shelf(conn, None, settings)  # type: ignore[arg-type]  # no slice is run
    fill(shelf)
    shelf.start()
    assert "being listed" in (out := shown())
    assert "0 of 0" not in out
    conn.execute("UPDATE reembeddings SET listed_at = now()")
    assert "0 of 0 passages" in shown()
