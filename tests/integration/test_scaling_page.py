"""The SQL of docs/scaling.md runs as it stands there."""

from __future__ import annotations

import re

import psycopg
import pytest
from pgvector.psycopg import register_vector

from tests.running import REPOSITORY

BLOCKS = re.findall(r"```sql\n(.*?)```", (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8"), re.DOTALL)
ADD = """
    INSERT INTO document_chunks
        (id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, embedding, embedding_model)
    SELECT gen_random_uuid(), 'd' || n, 'u' || n, 1, 0, 'seals', repeat('0', 64), 0, 5, '[1,2,3]', 'eye'
    FROM generate_series(%s::int, %s) AS n"""
FOUND = """
    SELECT c.user_id FROM search_by_vector('[1,2,3]'::vector, 'eye', limit_to => 100) JOIN document_chunks AS c ON c.id = chunk_id
    ORDER BY 1"""


def test_every_question_is_answered_and_partitioning_loses_no_passage(conn: psycopg.Connection) -> None:
    register_vector(conn)
    conn.execute(
        "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, file_type, correlation_id) "
        "SELECT 'd' || n, 'u' || n, 'd', 'd', 'text', 'c' FROM generate_series(1, 40) AS n"
    )
    conn.execute(ADD, [1, 20])
    before = conn.execute(FOUND).fetchall()
    assert len(before) == 20
    for block in BLOCKS:
        conn.execute(block.encode())
    assert conn.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'document_chunks'::regclass").fetchone() == (8,)
    assert conn.execute(FOUND).fetchall() == before
    conn.execute(ADD, [21, 40])
    assert len(conn.execute(FOUND).fetchall()) == 40
    assert conn.execute("SELECT count(DISTINCT tableoid) FROM document_chunks").fetchone() != (1,)
    conn.execute("DELETE FROM file_extractions WHERE doc_id <> 'd1'")
    assert conn.execute("SELECT doc_id FROM document_chunks").fetchall() == [("d1",)]
    conn.execute("SELECT * FROM embedding_coverage")
    with pytest.raises(psycopg.errors.FeatureNotSupported):  # the page says so of docmill's care for the vector index
        conn.execute("CREATE INDEX CONCURRENTLY ON document_chunks (language)")
