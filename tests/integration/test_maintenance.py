"""The vector index of a model comes when it pays, is whole, and serves the search."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector.psycopg import register_vector

from jobs import maintenance
from jobs.maintenance import MOST_DIMENSIONS, index_name, look_after_index
from models.settings import Settings

MODEL = "it's a 'model'"


@pytest.fixture
def passages(conn: psycopg.Connection) -> psycopg.Connection:
    """300 passages of 8 dimensions."""
    register_vector(conn)
    conn.execute("SELECT submit_document('uploads/a', doc_id => 'a', content_sha256 => repeat('1', 64))")
    add_passages(conn, 0, 300)
    return conn


def add_passages(conn: psycopg.Connection, first: int, count: int) -> None:
    rng = np.random.default_rng(first)
    with conn.cursor() as cursor:
        cursor.executemany(
            """INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end,
                embedding, embedding_model) VALUES (gen_random_uuid(), 'a', 'default', 1, %s, 'x', repeat('1', 64), 0, 1, %s, %s)""",
            [(i, rng.normal(size=8).astype(np.float32), MODEL) for i in range(first, first + count)],
        )


def valid(conn: psycopg.Connection) -> bool | None:
    row = conn.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)", [index_name(MODEL, 8)]).fetchone()
    return None if row is None else bool(row[0])


async def test_a_small_table_needs_no_index_and_a_large_one_gets_one_once(passages: psycopg.Connection, settings: Settings) -> None:
    small = settings.model_copy(update={"vector_index_threshold": 301})
    assert await look_after_index(small, MODEL, 8) == "not needed"
    large = settings.model_copy(update={"vector_index_threshold": 300})
    assert await look_after_index(large, "another model", 8) == "not needed"
    assert await look_after_index(large, MODEL, 8) == "built"
    assert valid(passages) is True
    assert await look_after_index(large, MODEL, 8) == "ready"


async def test_the_search_uses_it_and_finds_what_the_exact_one_finds(passages: psycopg.Connection, settings: Settings) -> None:
    add_passages(passages, 300, 3000)  # a search through fewer is exact in any case
    probe = np.random.default_rng(2).normal(size=8).astype(np.float32)
    find = "SELECT chunk_id FROM search_by_vector(%s, %s, limit_to => 5)"
    exact = passages.execute(find, [probe, MODEL]).fetchall()
    await look_after_index(settings.model_copy(update={"vector_index_threshold": 1}), MODEL, 8)
    used = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s"
    passages.execute("ANALYZE document_chunks")
    passages.execute("SET enable_seqscan = off")
    assert passages.execute(find, [probe, MODEL]).fetchall() == exact
    passages.execute("SELECT pg_stat_force_next_flush()")
    scans = passages.execute(used, [index_name(MODEL, 8)]).fetchone()
    assert scans is not None
    assert scans[0] > 0


async def test_a_build_takes_more_than_one_process_though_the_tables_own_pages_are_few(
    passages: psycopg.Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages.execute(f'ALTER DATABASE "{passages.info.dbname}" SET client_min_messages = debug1'.encode())
    connect, told = psycopg.AsyncConnection.connect, []

    async def listened_to(*args: Any, **kwargs: Any) -> Any:
        conn = await connect(*args, **kwargs)
        conn.add_notice_handler(lambda notice: told.append(notice.message_primary or ""))
        return conn

    monkeypatch.setattr(psycopg.AsyncConnection, "connect", listened_to)
    assert await look_after_index(settings.model_copy(update={"vector_index_threshold": 300}), MODEL, 8) == "built"
    assert [words for words in told if words.startswith("using ") and "parallel workers" in words] != []


async def test_vectors_that_are_too_wide_for_an_index_are_told_of_and_do_without(passages: psycopg.Connection, settings: Settings) -> None:
    large = settings.model_copy(update={"vector_index_threshold": 1})
    assert await look_after_index(large, MODEL, MOST_DIMENSIONS + 1, even_under_load=True) == "too wide"
    wide = np.ones(MOST_DIMENSIONS + 1, dtype=np.float32)
    with pytest.raises(psycopg.errors.ProgramLimitExceeded):
        passages.execute(f"CREATE INDEX ON document_chunks USING hnsw ((embedding::vector({len(wide)})) vector_cosine_ops)".encode())


async def test_a_build_that_was_cut_off_is_done_again(passages: psycopg.Connection, settings: Settings) -> None:
    large = settings.model_copy(update={"vector_index_threshold": 1})
    await look_after_index(large, MODEL, 8)
    passages.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)", [index_name(MODEL, 8)])
    assert await look_after_index(large, MODEL, 8) == "built"
    assert valid(passages) is True


@pytest.mark.parametrize("limit", ["statement_timeout", "lock_timeout", "transaction_timeout"])
async def test_a_limit_of_the_database_for_other_sessions_cuts_off_no_build(
    passages: psycopg.Connection, settings: Settings, database: str, limit: str
) -> None:
    passages.execute(f'ALTER DATABASE "{passages.info.dbname}" SET {limit} = 1000'.encode())
    with psycopg.connect(database, options="-c transaction_timeout=0") as writer:
        writer.execute("LOCK document_chunks IN ROW EXCLUSIVE MODE")  # a build waits for the end of whoever writes
        building = asyncio.create_task(look_after_index(settings.model_copy(update={"vector_index_threshold": 1}), MODEL, 8))
        await asyncio.wait([building], timeout=2.5)
        writer.commit()
    assert await building == "built"
    assert valid(passages) is True


async def test_what_a_build_that_was_cut_off_has_left_goes_also_where_no_index_is_needed_any_more(
    passages: psycopg.Connection, settings: Settings
) -> None:
    await look_after_index(settings.model_copy(update={"vector_index_threshold": 1}), MODEL, 8)
    small = settings.model_copy(update={"vector_index_threshold": 301})
    assert await look_after_index(small, MODEL, 8) == "ready"
    passages.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = to_regclass(%s)", [index_name(MODEL, 8)])
    assert await look_after_index(small, MODEL, 8) == "not needed"
    assert valid(passages) is None


async def test_it_waits_while_a_bulk_load_is_under_way(
    passages: psycopg.Connection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "BUSY", 1)
    assert await look_after_index(settings.model_copy(update={"vector_index_threshold": 1}), MODEL, 8) == "waiting"
    assert valid(passages) is None


async def test_two_at_once_build_it_once(passages: psycopg.Connection, settings: Settings) -> None:
    large = settings.model_copy(update={"vector_index_threshold": 1})
    outcomes = await asyncio.gather(*(look_after_index(large, MODEL, 8) for _ in range(4)))
    assert outcomes.count("built") == 1
    assert set(outcomes) <= {"built", "busy elsewhere", "ready"}
