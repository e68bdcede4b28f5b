"""Documents with vectors of small models, and a re-embedding that goes on one step at a time."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg_pool import AsyncConnectionPool

from jobs.adapters.embedders import HashedWords
from jobs.reembedding import Slice
from jobs.serving import embedder_of
from jobs.stages import Embedder
from models.settings import Settings

OLD, NEW = HashedWords(16), HashedWords(24)
MODELS: dict[str, HashedWords] = {OLD.model: OLD, NEW.model: NEW}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def vector(text: str, embedder: HashedWords) -> Any:
    return embedder._vector(text).astype("float32")


@dataclass
class Shelf:
    """Documents as finalize leaves them, and one worker's slices of re-embedding."""

    conn: psycopg.Connection
    pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]]
    settings: Settings
    embedded: list[str] = field(default_factory=list)
    """Texts that were given to an embedder, in order."""

    def put(
        self,
        doc_id: str,
        *texts: str,
        by: HashedWords = OLD,
        user_id: str = "default",
        conn: psycopg.Connection | None = None,
        at_once: int = 1000,
    ) -> None:
        """Swap a version of these passages in, `at_once` a statement, embedded by a worker of that model."""
        conn = conn or self.conn
        register_vector(conn)
        with conn.transaction():
            conn.execute(
                "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, file_type, correlation_id) "
                "VALUES (%s, %s, %s, 'p', 'text', 'c') ON CONFLICT DO NOTHING",
                [doc_id, user_id, f"{doc_id}.txt"],
            )
            row = conn.execute(
                "UPDATE file_extractions SET version = version + 1, claim = claim + 1 WHERE doc_id = %s RETURNING version", [doc_id]
            ).fetchone()
            assert row is not None
            conn.execute("DELETE FROM document_chunks WHERE doc_id = %s", [doc_id])
            columns = "id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, embedding, embedding_model"
            for first in range(0, len(texts), at_once):
                with conn.cursor().copy(f"COPY document_chunks ({columns}) FROM STDIN (FORMAT BINARY)".encode()) as copy:
                    copy.set_types(["uuid", "text", "text", "int4", "int4", "text", "text", "int4", "int4", "vector", "text"])
                    for index, text in enumerate(texts[first : first + at_once], first):
                        name = uuid.uuid5(uuid.NAMESPACE_URL, f"{doc_id} {index} {text}")
                        copy.write_row((name, doc_id, user_id, row[0], index, text, sha(text), 0, 1, vector(text, by), by.model))

    def delete(self, doc_id: str) -> None:
        self.conn.execute("DELETE FROM file_extractions WHERE doc_id = %s", [doc_id])

    def one(self, statement: str, *args: object) -> Any:
        row = self.conn.execute(statement.encode(), args).fetchone()
        return None if row is None else row[0] if len(row) == 1 else tuple(row)

    def all(self, statement: str, *args: object) -> list[Any]:
        return [row[0] if len(row) == 1 else tuple(row) for row in self.conn.execute(statement.encode(), args).fetchall()]

    def start(self, to: str = NEW.model, **more: str) -> int:
        return int(self.one("SELECT start_reembedding(%s, switch => %s)", to, more.get("switch", "auto")))

    def state(self) -> str:
        return str(self.one("SELECT state FROM reembeddings ORDER BY id DESC LIMIT 1"))

    def slice(self, worker: str = "test:1", find: Callable[[Settings, str], Embedder] | None = None) -> Slice:
        return Slice(self.settings, self.pool, worker=worker, stopping=lambda: False, find_embedder=find or self._watched)

    def _watched(self, settings: Settings, model: str) -> Embedder:
        made = embedder_of(settings, model)
        shelf = self

        class Watched:
            model, dimensions, quick = made.model, made.dimensions, made.quick

            async def embed(self, texts: Any, kind: Any = "passage") -> Any:
                shelf.embedded += texts
                return await made.embed(texts, kind)

        return Watched()

    async def step(self, slice: Slice | None = None) -> float | None:
        """Do one step, in a slice of its own unless one is given."""
        return await (slice or self.slice()).run(0)

    async def until(self, *states: str, limit: int = 300) -> None:
        """Go on step by step until the run is in one of the states."""
        slice = self.slice()
        for _ in range(limit):
            if self.state() in states:
                return
            if await self.step(slice):
                await asyncio.sleep(0.01)
        raise AssertionError(f"the run is {self.state()}, not {states}")

    async def finish(self, limit: int = 300) -> None:
        """Go on until nothing is left to do."""
        slice = self.slice()
        for _ in range(limit):
            if await self.step(slice) is None:
                return
        raise AssertionError(f"it never ends: {self.all('SELECT * FROM reembedding_steps()')}")

    def found(self, embedder: HashedWords, text: str = "pump", conn: psycopg.Connection | None = None) -> list[Any]:
        """Ids of all passages that a search with the model finds."""
        asked = "SELECT chunk_id FROM search_by_vector(%s, %s, limit_to => 1000)"
        conn = conn or self.conn
        register_vector(conn)
        return [row[0] for row in conn.execute(asked, [vector(text, embedder), embedder.model]).fetchall()]

    def check(self) -> None:
        """What is promised at every moment: with a wanted model every passage is found once, but for those of listed documents."""
        for model in self.all("SELECT wanted_embedding_models()"):
            if model == NEW.model and not self.one("SELECT bool_and(listed_at IS NOT NULL) FROM reembeddings WHERE to_model = %s", model):
                continue
            found = self.found(MODELS[model])
            assert len(found) == len(set(found)), "a passage was found twice"
            wanted = set(
                self.all(
                    "SELECT c.id FROM document_chunks c WHERE NOT EXISTS (SELECT FROM embeddings_to_make l "
                    "WHERE l.doc_id = c.doc_id AND l.embedding_model = %s AND (l.is_urgent OR l.embedding_model <> serving_model()))",
                    model,
                )
            )
            assert wanted <= set(found), f"{len(wanted - set(found))} passages cannot be found with {model}"

    def check_vectors(self) -> None:
        """Every stored vector is the one that its model makes of its passage."""
        rows = self.conn.execute(
            "SELECT content, embedding, embedding_model FROM document_chunks UNION ALL "
            "SELECT c.content, s.embedding, s.embedding_model FROM chunk_embeddings s JOIN document_chunks c ON c.id = s.chunk_id"
        ).fetchall()
        assert all((stored.to_numpy() == vector(content, MODELS[model])).all() for content, stored, model in rows)
