"""Going over to another model with real workers that die at every step, while documents come, change and go."""

from __future__ import annotations

import threading

import psycopg
import pytest
from pgvector.psycopg import register_vector

from jobs.adapters.embedders import HashedWords
from tests.faults.harness import Arena, documents

OLD, NEW = HashedWords(384), HashedWords(256)
STEPS = ["list", "fill", "embedded", "stored", "index", "switch", "move", "moved", "settle", "clear", "finish"]
STATE = "SELECT state FROM reembeddings ORDER BY id DESC LIMIT 1"
LEFT = """SELECT (SELECT count(*) FROM chunk_embeddings) + (SELECT count(*) FROM embeddings_to_make)
    + (SELECT count(*) FROM pg_indexes WHERE tablename = 'chunk_embeddings' AND indexname LIKE '%%hnsw%%')"""


def search(conn: psycopg.Connection) -> tuple[list[object], set[object]]:
    """Return the ids that a search with the serving model finds, and those of all passages but listed ones, at one moment."""
    register_vector(conn)
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        row = conn.execute("SELECT embedding_model, dimensions FROM serving_embeddings").fetchone()
        if row is None:
            return [], set()
        vector = HashedWords(row[1])._vector("pump valve pressure").astype("float32")
        found = conn.execute("SELECT chunk_id FROM search_by_vector(%s, %s, limit_to => 1000)", [vector, row[0]]).fetchall()
        wanted = conn.execute(
            "SELECT c.id FROM document_chunks c WHERE NOT EXISTS (SELECT FROM embeddings_to_make l WHERE l.doc_id = c.doc_id "
            "AND l.embedding_model = %s AND l.is_urgent)",
            [row[0]],
        ).fetchall()
    return [found_id for (found_id,) in found], {wanted_id for (wanted_id,) in wanted}


class Searcher(threading.Thread):
    """Searches all the time, and keeps what was missing or found twice."""

    def __init__(self, arena: Arena) -> None:
        super().__init__(daemon=True)
        self.arena, self.searches, self._stop_now = arena, 0, threading.Event()
        self.wrong: list[str] = []

    def run(self) -> None:
        with self.arena.connect() as conn:
            while not self._stop_now.wait(0.02):
                found, wanted = search(conn)
                self.searches += 1
                if len(found) != len(set(found)) or not wanted <= set(found):
                    self.wrong.append(f"{len(wanted - set(found))} missing, {len(found) - len(set(found))} twice")

    def close(self) -> None:
        self._stop_now.set()
        self.join()


def test_workers_killed_at_every_step_of_a_reembedding_lose_nothing_and_searches_never_miss_a_passage(arena: Arena) -> None:
    # A document may be alone with what dies here again and again: steps of a re-embedding that compute nothing wait for nobody.
    arena.environment["MAX_CRASHES"] = "20"
    first = documents(24)
    arena.submit(first)
    undisturbed = arena.worker("--concurrency", "2")
    arena.settle()
    undisturbed.close()
    searcher = Searcher(arena)
    searcher.start()
    arena.one("SELECT start_reembedding(%s)", NEW.model)
    arena.reconciler()
    faults = [f"kill@reembed:{step};once={arena.mark(step)}" for step in STEPS]
    for _ in range(2):
        arena.worker(faults=faults, restart=True, VECTOR_INDEX_THRESHOLD="20")
    arena.submit(documents(8, "late"))
    arena.submit(documents(6, "d", variant=1))
    with arena.connect() as conn:
        conn.execute("DELETE FROM file_extractions WHERE doc_id = 'd0023'")
    arena._accepted.pop("d0023")
    arena.wait(lambda: arena.one(STATE) == "complete", "the re-embedding", 300)
    arena.settle(90)
    searcher.close()
    arena.wait(lambda: arena.one(LEFT) == 0, "the clean-up", 30)
    killed = len(arena.marks())
    models = arena.all("SELECT embedding_model, count(*) FROM document_chunks GROUP BY 1")
    print(
        f"\nreembedding ({arena.mode}): {killed} of {len(STEPS)} kills, {searcher.searches} searches, {len(searcher.wrong)} wrong, {models}"
    )
    assert searcher.wrong == []
    assert searcher.searches > 20
    assert killed == len(STEPS)
    assert [model for model, _ in models] == [NEW.model]
    assert arena.all("SELECT doc_id, state, error_message FROM file_extractions WHERE state <> 'complete'") == []
    with arena.connect() as conn:
        register_vector(conn)
        rows = conn.execute("SELECT content, embedding FROM document_chunks").fetchall()
    assert all((stored.to_numpy() == NEW._vector(content).astype("float32")).all() for content, stored in rows)


@pytest.mark.parametrize("order", ["settings_first", "settings_last"])
def test_either_order_of_changing_the_setting_and_starting_the_run_is_safe(arena: Arena, order: str) -> None:
    arena.submit(documents(6))
    old = arena.worker()
    arena.settle()
    if order == "settings_first":
        old.close()
        arena.worker(EMBEDDING_PROVIDER="fast")
    arena.submit(documents(6, "mid"))
    arena.settle()
    models = "SELECT array_agg(DISTINCT embedding_model) FROM document_chunks"
    assert arena.one(models) == [OLD.model]
    searcher = Searcher(arena)
    searcher.start()
    fast = "wordllama-l2-supercat@64b47a2d"
    arena.one("SELECT start_reembedding(%s, switch => 'manual')", fast)
    arena.submit(documents(6, "late"))
    arena.settle()
    arena.wait(lambda: arena.one(STATE) == "ready", "the new set", 60)
    searcher.close()
    assert searcher.wrong == []
    assert arena.one("SELECT switch_reembedding()") in ("switched", "ready")
    arena.wait(lambda: arena.one(STATE) == "complete", "the re-embedding", 60)
    arena.submit(documents(6, "last"))
    arena.settle()
    assert arena.one(models) == [fast]
    print(f"\nreembedding ({arena.mode}): {order}, {searcher.searches} searches, none wrong")
