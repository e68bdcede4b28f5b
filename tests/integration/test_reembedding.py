"""Searches miss nothing and see nothing twice while a database goes over to another model, whatever happens to its documents meanwhile."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from jobs.adapters.embedders import HashedWords
from jobs.cli.errors import ExitCode
from jobs.cli.index import _build
from jobs.database import make_pool
from jobs.front import close_async
from jobs.maintenance import index_name
from jobs.pipeline.company import Company
from jobs.reembedding import Slice
from jobs.stages import Embedder
from models.errors import ConfigurationError, PermanentError, ServiceUnavailable
from models.settings import Settings
from sql import migrate as migrations
from tests.fetching import in_parallel
from tests.integration.conftest import Bench
from tests.reembedding import NEW, OLD, Shelf, vector

INDEXES = "SELECT indexname FROM pg_indexes WHERE indexname LIKE '%%hnsw%%' ORDER BY 1"


@pytest.fixture
async def shelf(settings: Settings, database: str, conn: psycopg.Connection) -> AsyncIterator[Shelf]:
    pool = make_pool(settings, database)
    await pool.open()
    try:
        yield Shelf(conn, pool, settings)
    finally:
        await pool.close()


def fill(shelf: Shelf, count: int = 6, passages: int = 3) -> None:
    for number in range(count):
        shelf.put(f"d{number}", *(f"pump {number} {index}" for index in range(passages)))


async def eventually(shelf: Shelf, statement: str) -> None:
    for _ in range(500):
        if shelf.one(statement):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never: {statement}")


@pytest.mark.parametrize("seed", range(4))
async def test_every_passage_is_found_once_at_every_step_while_documents_come_change_and_go(shelf: Shelf, seed: int) -> None:
    chance = random.Random(seed)
    fill(shelf, 12)
    shelf.start()
    slice = shelf.slice()
    served = {OLD.model}
    for number in range(60):
        shelf.check()
        before = shelf.one("SELECT serving_model()")
        await shelf.step(slice)
        after = shelf.one("SELECT serving_model()")
        if before != after:
            served.add(after)
            assert shelf.one("SELECT count(*) FROM embeddings_to_make WHERE embedding_model = %s", after) == 0
            assert len(shelf.found(NEW)) == shelf.one("SELECT count(*) FROM document_chunks")
        shelf.check()
        name = f"d{chance.randrange(16)}"
        match chance.randrange(6):
            case 0:
                shelf.put(name, f"pump edition {number}", f"pump {number} more")
            case 1:
                shelf.put(name, f"pump edition {number}", by=NEW)
            case 2:
                shelf.delete(name)
    await shelf.finish()
    shelf.check()
    shelf.check_vectors()
    assert served == {OLD.model, NEW.model}
    assert shelf.state() == "complete"
    assert shelf.all("SELECT DISTINCT embedding_model FROM document_chunks") == [NEW.model]
    assert shelf.one("SELECT (SELECT count(*) FROM chunk_embeddings), (SELECT count(*) FROM embeddings_to_make)") == (0, 0)


async def test_each_text_of_a_user_is_embedded_once_and_known_vectors_are_used_again(shelf: Shelf) -> None:
    shelf.put("a", "pump", "valve", "pump")
    shelf.put("b", "valve", "seal")
    shelf.put("c", "valve", user_id="bob")
    shelf.start()
    await shelf.until("complete")
    assert sorted(shelf.embedded) == ["pump", "seal", "valve", "valve"]  # one of them bob's
    shelf.put("d", "seal", "oil", by=OLD)  # a worker that cannot make the serving model
    shelf.embedded.clear()
    await shelf.finish()
    assert shelf.embedded == ["oil"]
    assert shelf.all("SELECT DISTINCT embedding_model FROM document_chunks") == [NEW.model]
    shelf.check_vectors()


async def test_passages_that_have_the_new_model_already_are_not_embedded_again(shelf: Shelf) -> None:
    shelf.put("a", "pump")
    shelf.start(switch="manual")
    shelf.put("b", "valve", by=NEW)
    await shelf.until("ready")
    assert len(shelf.found(OLD)) == len(shelf.found(NEW)) == 2
    assert sorted(shelf.embedded) == ["pump", "valve"]  # the valve for the model that still serves
    shelf.one("SELECT switch_reembedding()")
    await shelf.until("complete")
    assert len(shelf.embedded) == 2
    assert shelf.one("SELECT done, total FROM reembedding_status") == (2, 2)


async def test_a_new_version_keeps_what_was_made_aside_for_passages_that_it_has_too(bench: Bench) -> None:
    shelf = Shelf(bench.conn, bench.pool, bench.settings)
    for doc_id in ("a", "b"):
        bench.submit(doc_id)
    await bench.drain()
    shelf.start(switch="manual")
    await shelf.until("ready")
    assert sorted(shelf.embedded) == ["1", "a", "b", "of", "text", "version"]
    for doc_id in ("a", "b"):
        bench.submit(doc_id, "c" if doc_id == "a" else "d")
    await bench.drain(small_documents_together=16)
    assert shelf.all("SELECT doc_id, passages FROM embeddings_to_make ORDER BY 1") == [("a", 1), ("b", 1)]
    shelf.embedded.clear()
    shelf.one("SELECT switch_reembedding()")
    await shelf.until("complete")
    assert shelf.embedded == ["2"]
    assert len(shelf.found(NEW)) == 10
    shelf.check_vectors()


async def test_several_workers_at_once_do_no_harm(shelf: Shelf) -> None:
    fill(shelf, 40)
    shelf.start()
    for _ in range(100):
        await asyncio.gather(*(shelf.step(shelf.slice(f"test:{number}")) for number in range(4)))
        if shelf.state() == "complete":
            break
    shelf.check()
    shelf.check_vectors()
    assert shelf.one("SELECT count(*), count(DISTINCT embedding_model) FROM document_chunks") == (120, 1)
    assert shelf.one("SELECT done, total FROM reembedding_status") == (120, 120)


async def test_a_large_document_is_done_in_parts(shelf: Shelf) -> None:
    shelf.put("large", *(f"pump {number}" for number in range(700)))
    shelf.put("small", "pump")
    shelf.start()
    slice = shelf.slice()
    await shelf.step(slice)
    await shelf.step(slice)
    assert shelf.one("SELECT done, lacking FROM reembedding_status") == (256, 445)
    await shelf.finish()
    assert shelf.one("SELECT count(*) FROM document_chunks WHERE embedding_model = %s", NEW.model) == 701
    shelf.check_vectors()


async def test_a_document_that_is_inserted_in_several_statements_is_counted_whole(shelf: Shelf) -> None:
    shelf.put("first", "pump")
    shelf.start(switch="manual")
    await shelf.until("ready")
    figures = "SELECT done, total, lacking FROM reembedding_status"
    shelf.put("large", *(f"pump {number}" for number in range(600)), at_once=256)
    assert shelf.one(figures) == (1, 601, 600)
    shelf.put("large", *(f"valve {number}" for number in range(400)), at_once=256)
    assert shelf.one(figures) == (1, 401, 400)
    shelf.conn.execute("UPDATE embeddings_to_make SET passages = 88")  # as a version of before counted
    await shelf.step()
    assert shelf.one(figures) == (1, 145, 144)
    await shelf.finish()
    assert shelf.one(figures) == (145, 145, 0)


async def test_a_run_that_was_ready_and_was_paused_tells_a_true_rate(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start(switch="manual")
    await shelf.until("ready")
    shelf.one("SELECT pause_reembedding()")
    shelf.put("late", *(f"pump late {number}" for number in range(300)))
    assert shelf.one("SELECT resume_reembedding()") == "running"
    await shelf.step()
    rate, left, since = shelf.one(
        "SELECT rate, seconds_left, extract(epoch FROM now() - resumed_at) FROM reembedding_status JOIN reembeddings USING (id)"
    )
    assert rate > 256 / float(since)
    assert left == pytest.approx(44 / rate)


async def test_a_pause_stops_after_the_batch_and_what_was_made_stays(shelf: Shelf) -> None:
    fill(shelf, 200)
    shelf.start()
    slice = shelf.slice()
    await shelf.step(slice)
    await shelf.step(slice)
    assert shelf.one("SELECT pause_reembedding()") == "paused"
    made = shelf.one("SELECT count(*) FROM chunk_embeddings")
    assert 0 < made < 600
    shelf.put("late", "pump late")
    assert await shelf.step(slice) is None
    assert shelf.one("SELECT queue_reembedding()") is None
    assert shelf.one("SELECT count(*) FROM chunk_embeddings") == made
    shelf.check()
    assert shelf.one("SELECT resume_reembedding()") == "running"
    await shelf.until("complete")
    assert len(shelf.embedded) == 601


async def test_a_pause_after_the_switch_stops_the_moving_and_nothing_is_missed(shelf: Shelf) -> None:
    fill(shelf, 200)
    shelf.start()
    await shelf.until("switched")
    await shelf.step()
    assert shelf.one("SELECT pause_reembedding()") == "paused"
    shelf.put("late", "pump late", by=OLD)
    await shelf.finish()
    assert shelf.one("SELECT count(DISTINCT embedding_model) FROM document_chunks") == 2
    assert len(set(shelf.found(NEW))) == 601
    shelf.check()
    assert shelf.one("SELECT resume_reembedding()") == "switched"
    await shelf.until("complete")


async def test_who_pauses_in_an_open_transaction_keeps_no_document_waiting(shelf: Shelf, database: str) -> None:
    fill(shelf)
    shelf.start()
    slice = shelf.slice()
    await shelf.step(slice)
    with psycopg.connect(database) as holder:
        holder.execute("SELECT pause_reembedding()")
        going = asyncio.ensure_future(shelf.step(slice))
        await eventually(shelf, "SELECT count(*) = 18 FROM chunk_embeddings")
        assert not going.done()
        shelf.conn.execute("SET lock_timeout = '1s'")
        shelf.put("d1", "pump again")
        shelf.check()
        holder.rollback()
    await going
    await shelf.until("complete")


@pytest.mark.parametrize("at", ["running", "ready", "paused"])
async def test_a_cancelled_run_leaves_nothing(shelf: Shelf, at: str) -> None:
    fill(shelf)
    settings = shelf.settings.model_copy(update={"vector_index_threshold": 1})
    shelf.settings = settings
    before = shelf.all("SELECT c::text FROM document_chunks c ORDER BY id")
    shelf.start(switch="manual")
    await (shelf.until("ready") if at == "ready" else shelf.step())
    await shelf.step()
    if at == "paused":
        shelf.one("SELECT pause_reembedding()")
    assert shelf.one("SELECT cancel_reembedding()") == "cancelled"
    await shelf.finish()
    assert shelf.one("SELECT (SELECT count(*) FROM chunk_embeddings), (SELECT count(*) FROM embeddings_to_make)") == (0, 0)
    assert shelf.all(INDEXES) == []
    assert shelf.all("SELECT c::text FROM document_chunks c ORDER BY id") == before
    assert shelf.one("SELECT state, ended_at IS NOT NULL FROM reembeddings") == ("cancelled", True)
    shelf.start()
    await shelf.until("complete")


async def test_the_new_sets_indexes_come_before_the_switch_and_the_old_ones_go_after_it(shelf: Shelf) -> None:
    shelf.settings = shelf.settings.model_copy(update={"vector_index_threshold": 10})
    fill(shelf, 10)
    shelf.conn.execute(
        f"CREATE INDEX {index_name(OLD.model, 16)} ON document_chunks USING hnsw ((embedding::vector(16)) vector_cosine_ops) "
        f"WHERE embedding_model = '{OLD.model}'".encode()
    )
    shelf.start(switch="manual")
    await shelf.until("ready")
    assert shelf.all(INDEXES) == [index_name(NEW.model, 24, "chunk_embeddings"), index_name(OLD.model, 16)]
    assert shelf.one("SELECT switch_reembedding()") == "switched"
    await shelf.until("complete")
    assert shelf.all(INDEXES) == [index_name(NEW.model, 24)]
    assert shelf.all("SELECT embedding_model, dimensions FROM serving_embeddings") == [(NEW.model, 24)]


async def test_a_set_that_grows_while_it_waits_for_the_switch_is_indexed_before_it(shelf: Shelf) -> None:
    shelf.settings = shelf.settings.model_copy(update={"vector_index_threshold": 50})
    fill(shelf)
    shelf.start(switch="manual")
    await shelf.until("ready")
    assert shelf.all(INDEXES) == []
    shelf.put("large", *(f"valve {number}" for number in range(100)))
    await shelf.finish()
    assert shelf.state() == "ready"
    assert shelf.all(INDEXES) == [index_name(NEW.model, 24, "chunk_embeddings")]
    shelf.put("late", "pump late")
    await shelf.step()
    assert shelf.one("SELECT switch_reembedding()") == "running"  # it may have to be indexed
    await shelf.until("switched")


async def test_the_command_builds_no_index_that_vectors_are_still_moved_into(shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    fill(shelf)
    settings = shelf.settings.model_copy(update={"vector_index_threshold": 1})
    shelf.start()
    await shelf.until("switched")
    await shelf.step()
    await shelf.step()
    assert shelf.one("SELECT count(*) FROM document_chunks WHERE embedding_model = %s", NEW.model) > 0
    try:
        assert await _build(settings) == ExitCode.OK
    finally:
        await close_async()
    assert "re-embedding" in capsys.readouterr().out
    assert shelf.all(INDEXES) == []
    await shelf.until("complete")


async def test_a_manual_switch_waits_until_it_is_told_and_both_models_serve_meanwhile(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start(switch="manual")
    await shelf.until("ready")
    shelf.put("late", "pump late")
    shelf.put("later", "pump later", by=NEW)
    await shelf.finish()
    assert shelf.state() == "ready"
    assert len(shelf.found(OLD)) == len(shelf.found(NEW)) == 20
    shelf.put("last", "pump last")
    assert shelf.one("SELECT switch_reembedding()") == "ready"  # one passage lacks its vector still
    await shelf.until("complete")


async def test_what_a_writer_inserts_in_an_open_transaction_is_missed_neither_by_the_listing_nor_by_the_switch(
    shelf: Shelf, database: str
) -> None:
    fill(shelf)
    with psycopg.connect(database) as writer:
        writer.execute("SELECT 1")  # begins its transaction
        shelf.put("slow", "pump slow", conn=writer)
        shelf.start()
        slice = shelf.slice()
        assert await shelf.step(slice)  # the listing waits for the writer
        assert shelf.one("SELECT listed_at FROM reembeddings") is None
        writer.commit()
        await shelf.until("ready")
        writer.execute("SELECT 1")
        shelf.put("slower", "pump slower", conn=writer)
        assert await shelf.step(slice)  # the switch waits for the writer
        assert shelf.state() == "ready"
        writer.commit()
    await shelf.until("switched")
    assert len(shelf.found(NEW)) == 20
    await shelf.until("complete")


async def test_a_document_that_somebody_holds_is_done_later_and_keeps_no_other(shelf: Shelf, database: str) -> None:
    fill(shelf)
    shelf.start()
    await shelf.step()
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'd2' FOR UPDATE")
        slice = shelf.slice()
        for _ in range(4):
            await shelf.step(slice)
        assert shelf.all("SELECT doc_id FROM embeddings_to_make") == ["d2"]
        holder.rollback()
        await shelf.until("switched")
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'd3' FOR UPDATE")
        for _ in range(4):
            await shelf.step(slice)
        assert shelf.all("SELECT doc_id FROM embeddings_to_make") == ["d3"]
        shelf.check()
        holder.execute("DELETE FROM file_extractions WHERE doc_id = 'd3'")
        holder.commit()
    await shelf.until("complete")
    assert len(shelf.embedded) == 18  # nothing was embedded in vain


class Failing:
    """Fails on some texts, or always, with an error of its own."""

    quick = True

    def __init__(self, error: Exception, on: str = "", by: HashedWords = NEW) -> None:
        self.error, self.on, self.by, self.calls = error, on, by, 0
        self.model, self.dimensions = by.model, by.dimensions
        self.made: list[str] = []

    async def embed(self, texts: Any, kind: Any = "passage") -> Any:
        self.calls += 1
        if any(self.on in text for text in texts):
            raise self.error
        self.made += texts
        return await self.by.embed(texts, kind)


async def test_an_outage_is_waited_out_and_loses_nothing(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start()
    await shelf.step()
    away = Failing(ServiceUnavailable("the service is away", retry_after=30.0))
    broken = Failing(TimeoutError())
    assert await shelf.step(shelf.slice(find=lambda *_: away)) == 30
    pauses = [await shelf.step(shelf.slice(find=lambda *_: broken)) for _ in range(8)]
    assert pauses[0] is not None
    assert pauses[-1] is not None
    assert pauses[-1] > 4 * pauses[0]
    assert (away.calls, broken.calls) == (1, 8)
    assert shelf.one("SELECT error_message IS NOT NULL, failing FROM reembedding_status") == (True, 6)
    await shelf.until("complete")
    assert shelf.one("SELECT error_message, failing FROM reembedding_status") == (None, 0)


async def test_trouble_with_the_serving_model_keeps_no_run_from_getting_on(shelf: Shelf) -> None:
    fill(shelf)
    shelf.put("late", "pump late", by=NEW)  # by a worker that cannot make the serving model
    shelf.start()
    away = Failing(ServiceUnavailable("the service is away", retry_after=30.0), by=OLD)
    slice = shelf.slice(find=lambda _, model: away if model == OLD.model else NEW)
    while shelf.state() != "switched":
        assert await slice.run(0) == 0
    assert away.calls == 1
    shelf.put("later", "pump later", by=OLD)
    away_too = Failing(ServiceUnavailable("the service is away", retry_after=30.0))
    slice = shelf.slice(find=lambda *_: away_too)
    while shelf.state() != "complete":
        assert await slice.run(0) == 0
    assert away_too.calls == 1
    assert shelf.all("SELECT doc_id FROM embeddings_to_make") == ["later"]
    assert await slice.run(0) == pytest.approx(30, abs=5)


async def test_a_document_that_somebody_holds_and_that_lacks_the_serving_models_vector_keeps_no_run_waiting(
    shelf: Shelf, database: str
) -> None:
    fill(shelf)
    shelf.put("late", "pump late", by=NEW)
    shelf.start()
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'late' FOR UPDATE")
        slice = shelf.slice()
        for _ in range(20):
            await slice.run(0)
        assert shelf.one("SELECT listed_at IS NOT NULL FROM reembeddings")
        assert shelf.all("SELECT DISTINCT doc_id FROM embeddings_to_make") == ["late"]
    await shelf.until("complete")


async def test_a_document_that_cannot_be_embedded_waits_alone_and_visibly(shelf: Shelf) -> None:
    fill(shelf)
    shelf.put("poison", "pump poison")
    shelf.start()
    await shelf.step()
    picky = Failing(PermanentError("a text is too long"), on="poison")
    slice = shelf.slice(find=lambda *_: picky)
    for _ in range(4):
        await shelf.step(slice)
    row = shelf.one("SELECT done, lacking, failing, error_message, state FROM reembedding_status")
    assert row == (18, 1, 1, "a text is too long", "running")
    assert shelf.one("SELECT switch_reembedding()") == "running"
    shelf.one("SELECT resume_reembedding()")  # tries it again at once
    await shelf.step(shelf.slice(find=lambda *_: picky))
    assert shelf.one("SELECT attempts FROM embeddings_to_make") == 2
    shelf.conn.execute("UPDATE reembeddings SET dimensions = 24")
    assert shelf.one("SELECT switch_reembedding(despite_lacking => TRUE)") == "switched"
    shelf.one("SELECT resume_reembedding()")
    await shelf.until("complete")


async def test_a_document_that_cannot_be_embedded_and_is_deleted_keeps_the_run_no_longer(shelf: Shelf) -> None:
    fill(shelf)
    shelf.put("poison", "pump poison")
    shelf.start()
    picky = Failing(PermanentError("a text is too long"), on="poison")
    slice = shelf.slice(find=lambda *_: picky)
    for _ in range(4):
        await shelf.step(slice)
    assert shelf.one("SELECT lacking, failing FROM reembedding_status") == (1, 1)
    shelf.delete("poison")
    while shelf.state() != "complete":
        assert await shelf.step(slice) == 0
    shelf.check_vectors()


async def test_what_a_late_document_has_is_served_after_the_move_though_one_of_its_passages_is_refused(shelf: Shelf) -> None:
    shelf.put("d", "pump d")
    shelf.start(switch="manual")
    await shelf.step()
    shelf.put("late", *(f"pump late {number}" for number in range(256)), "pump poison")
    picky = Failing(PermanentError("a text is refused"), on="poison")
    slice = shelf.slice(find=lambda *_: picky)
    for _ in range(6):
        await shelf.step(slice)
    found = len(shelf.found(NEW))
    assert found >= 256
    assert shelf.one("SELECT switch_reembedding(despite_lacking => TRUE)") == "switched"
    while shelf.state() != "complete":
        assert await shelf.step(slice) == 0
        assert len(shelf.found(NEW)) == found
    assert shelf.all("SELECT passages, is_urgent, error_message FROM embeddings_to_make") == [(258 - found, True, "a text is refused")]
    picky.on = "nothing"
    shelf.conn.execute("UPDATE embeddings_to_make SET not_before = NULL")
    await shelf.step(shelf.slice(find=lambda *_: picky))
    assert len(shelf.found(NEW)) == len(picky.made) == 258
    shelf.check_vectors()


async def test_a_document_that_arrives_between_the_switch_and_the_move_does_not_wait_for_the_move(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start()
    await shelf.until("switched")
    shelf.put("late", "pump late", by=OLD)
    shelf.conn.execute("SELECT list_documents_to_embed(id) FROM reembeddings")
    assert shelf.all("SELECT doc_id FROM embeddings_to_make WHERE is_urgent") == ["late"]
    await shelf.until("complete")


async def test_who_must_be_alone_in_the_worker_waits_for_nobodys_transaction(shelf: Shelf, database: str) -> None:
    fill(shelf)
    shelf.conn.execute(
        f"CREATE INDEX {index_name(OLD.model, 16)} ON document_chunks USING hnsw ((embedding::vector(16)) vector_cosine_ops) "
        f"WHERE embedding_model = '{OLD.model}'".encode()
    )
    company = Company()
    slice = Slice(shelf.settings, shelf.pool, worker="test:1", stopping=lambda: False, find_embedder=shelf._watched, company=company)

    async def alone() -> None:
        async with asyncio.timeout(10), company.alone():
            assert not going.done()

    shelf.start()
    await shelf.step()
    with psycopg.connect(database) as holder:
        holder.execute("SELECT pause_reembedding()")
        going = asyncio.ensure_future(shelf.step(slice))
        await eventually(shelf, "SELECT count(*) = 18 FROM chunk_embeddings")
        await alone()
        holder.rollback()
    await going
    await shelf.until("switched")
    with psycopg.connect(database) as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM document_chunks")
        going = asyncio.ensure_future(shelf.step(slice))
        waits = "query LIKE 'DROP INDEX%%' AND wait_event_type = 'Lock' AND datname = current_database()"
        await eventually(shelf, f"SELECT count(*) > 0 FROM pg_stat_activity WHERE {waits}")
        await alone()
        reader.rollback()
    await going
    await shelf.until("complete")


async def test_nothing_is_embedded_while_a_document_must_be_alone_in_the_worker(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start()
    await shelf.step()
    company = Company()
    slice = Slice(shelf.settings, shelf.pool, worker="test:1", stopping=lambda: False, find_embedder=shelf._watched, company=company)
    async with company.alone():
        going = asyncio.ensure_future(shelf.step(slice))
        await asyncio.sleep(0.3)
        assert shelf.embedded == []
    await going
    assert len(shelf.embedded) == 18


async def test_a_worker_that_cannot_make_the_model_leaves_it_to_others_and_says_so(shelf: Shelf) -> None:
    def cannot(settings: Settings, model: str) -> Embedder:
        if model == NEW.model:
            raise ConfigurationError("there is no such model here")
        return OLD

    fill(shelf)
    shelf.start()
    unable = shelf.slice("host:9", find=cannot)
    await shelf.step(unable)
    assert await shelf.step(unable) == 5.0
    assert "host:9 leaves it to others" in shelf.one("SELECT error_message FROM reembedding_status")
    shelf.put("late", "pump", by=NEW)
    await shelf.step(unable)  # what it can do it does: the serving model's vector
    assert len(shelf.found(OLD)) == 19
    await shelf.until("complete")


async def test_a_reader_with_rights_on_the_passages_alone_searches_throughout(shelf: Shelf) -> None:
    fill(shelf)
    role = sql.Identifier(f"reader_{uuid.uuid4().hex}")
    shelf.conn.execute(sql.SQL("CREATE ROLE {}").format(role))
    try:
        shelf.conn.execute(sql.SQL("GRANT SELECT ON document_chunks, file_extractions TO {}").format(role))
        shelf.start()
        slice = shelf.slice()
        for _ in range(30):
            await shelf.step(slice)
            serving = OLD if shelf.one("SELECT serving_model()") == OLD.model else NEW
            shelf.conn.execute(sql.SQL("SET ROLE {}").format(role))
            assert shelf.one("SELECT serving_model()") == serving.model
            assert len(shelf.found(serving)) == 18
            shelf.conn.execute("RESET ROLE")
        assert shelf.state() == "complete"
    finally:
        shelf.conn.execute("RESET ROLE")
        shelf.conn.execute(sql.SQL("DROP OWNED BY {}").format(role))
        shelf.conn.execute(sql.SQL("DROP ROLE {}").format(role))


async def test_filters_and_ranks_are_the_same_aside_and_at_home(shelf: Shelf) -> None:
    for number in range(20):
        text = " ".join(["pump"] * number + ["valve"] * (20 - number))  # no two are equally near
        shelf.put(f"d{number:02}", text, user_id="anna" if number % 2 else "bob")
    shelf.start()
    await shelf.until("switched")
    await shelf.step()
    shelf.conn.execute("SELECT move_embeddings('', 7)")
    assert shelf.one("SELECT count(*) FROM document_chunks WHERE embedding_model = %s", NEW.model) == 7
    asked = "SELECT doc_id, score FROM search_by_vector(%s, %s, user_id => %s, limit_to => 5)"
    query = vector("pump pump pump valve", NEW)
    split = [shelf.all(asked, query, NEW.model, user) for user in ("anna", None)]
    await shelf.until("complete")
    assert [shelf.all(asked, query, NEW.model, user) for user in ("anna", None)] == split
    assert len(split[0]) == 5


async def test_one_run_at_a_time_and_only_to_another_model(shelf: Shelf) -> None:
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no passages yet"):
        shelf.start()
    fill(shelf)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="serves searches already"):
        shelf.start(OLD.model)
    with pytest.raises(psycopg.errors.NoDataFound):
        shelf.one("SELECT pause_reembedding()")
    shelf.start()
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=r"must end first; cancel_reembedding\(\) ends it"):
        shelf.start("other@1")
    await shelf.until("switched")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=r"must end first\n"):
        shelf.start("other@1")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="start one back"):
        shelf.one("SELECT cancel_reembedding()")
    await shelf.until("complete")
    shelf.start(OLD.model)
    await shelf.until("complete")
    shelf.check_vectors()


def test_of_two_who_start_at_once_one_is_told_of_the_other(shelf: Shelf, database: str) -> None:
    fill(shelf, 1)

    def start(mine: psycopg.Connection) -> str:
        try:
            with mine.transaction():
                mine.execute("SELECT start_reembedding(%s)", [NEW.model])
                mine.execute("SELECT pg_sleep(0.2)")
        except psycopg.errors.ObjectNotInPrerequisiteState as error:
            return str(error)
        return "begun"

    told = sorted(in_parallel(database, 2, start))
    assert told[0] == "begun"
    assert "must end first" in told[1]


async def test_a_run_that_is_started_again_tries_at_once_what_had_failed(shelf: Shelf) -> None:
    fill(shelf, 1)
    shelf.start()
    await shelf.step()
    assert shelf.one("SELECT put_off_embeddings(%s, ARRAY['d0'], 'no', 3600)", NEW.model) == 1
    shelf.one("SELECT cancel_reembedding()")
    shelf.start()
    await shelf.until("complete")


async def test_there_is_one_job_at_a_time_and_a_lost_one_is_made_up_for(shelf: Shelf) -> None:
    assert shelf.one("SELECT queue_reembedding()") is None
    fill(shelf)
    shelf.start()
    jobs = "SELECT status::text, queue_name, priority FROM procrastinate_jobs WHERE task_name = 'reembed'"
    assert shelf.all(jobs) == [("todo", "embed", -10)]
    assert shelf.one("SELECT queue_reembedding()") is None
    shelf.conn.execute("DELETE FROM procrastinate_jobs WHERE task_name = 'reembed'")
    assert shelf.one("SELECT queue_reembedding()") is not None
    assert len(shelf.all(jobs)) == 1


async def test_what_people_order_is_begun_at_once_though_a_job_waits_out_an_outage(shelf: Shelf) -> None:
    fill(shelf)
    shelf.start(switch="manual")
    for order, state in [("resume", "running"), ("switch", "running"), ("cancel", "cancelled"), ("start", None)]:
        shelf.conn.execute("DELETE FROM procrastinate_jobs WHERE task_name = 'reembed'")
        assert shelf.one("SELECT queue_reembedding(300)") is not None
        assert shelf.one("SELECT queue_reembedding()") is None  # the reconciler's
        waits = "SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'reembed' AND status = 'todo' AND scheduled_at > now()"
        assert shelf.one(waits) == 1
        assert (shelf.start() if state is None else shelf.one(f"SELECT {order}_reembedding()")) == (state or 2)
        assert shelf.one(waits) == 0, order
        assert shelf.one("SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'reembed'") == 1


def test_a_database_from_before_is_served_by_its_commonest_model_and_the_rest_is_listed(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "_own", lambda: [path for path in own if path.name < "0010"])
            migrations.migrate(conn)
        shelf = Shelf(conn, None, None)  # type: ignore[arg-type]  # only writes documents
        shelf.put("a", "pump", "valve")
        shelf.put("b", "seal", by=NEW)
        migrations.migrate(conn)
        assert shelf.one("SELECT embedding_model, dimensions FROM serving_embeddings") == (OLD.model, 16)
        assert shelf.all("SELECT embedding_model, doc_id, passages FROM embeddings_to_make") == [(OLD.model, "b", 1)]
