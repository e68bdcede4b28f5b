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

from jobs.database import make_pool
from jobs.maintenance import index_name
from jobs.stages import Embedder
from models.errors import ConfigurationError, PermanentError, ServiceUnavailable
from models.settings import Settings
from sql import migrate as migrations
from tests.fetching import in_parallel
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
        for _ in range(200):
            await asyncio.sleep(0.02)
            if shelf.one("SELECT count(*) FROM chunk_embeddings") == 18:
                break
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

    model, dimensions, quick = NEW.model, NEW.dimensions, True

    def __init__(self, error: Exception, on: str = "") -> None:
        self.error, self.on, self.calls = error, on, 0

    async def embed(self, texts: Any, kind: Any = "passage") -> Any:
        self.calls += 1
        if any(self.on in text for text in texts):
            raise self.error
        return await NEW.embed(texts, kind)


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
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="must end first"):
        shelf.start("other@1")
    await shelf.until("switched")
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
