"""What the search functions promise to anybody who calls them from SQL."""

from __future__ import annotations

import hashlib
import random
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from pgvector.psycopg import register_vector
from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

MODEL = "model@1"
MODES = {
    "vector": "SELECT * FROM search_by_vector(query_vector => %(vector)s, embedding_model => %(model)s",
    "text": "SELECT * FROM search_by_text(query_text => %(text)s",
    "hybrid": "SELECT * FROM search_hybrid(query_text => %(text)s, query_vector => %(vector)s, embedding_model => %(model)s",
}
FILTERS = ", user_id => %(user_id)s, batch_id => %(batch_id)s, file_type => %(file_type)s, metadata => %(metadata)s, limit_to => %(limit)s)"


def axis(number: int, dimensions: int = 8) -> NDArray[np.float32]:
    """The unit vector along one axis."""
    vector = np.zeros(dimensions, dtype=np.float32)
    vector[number] = 1
    return vector


@pytest.fixture
def found(conn: psycopg.Connection) -> psycopg.Connection:
    """A connection that speaks vectors."""
    register_vector(conn)
    return conn


def add(
    conn: psycopg.Connection,
    doc_id: str,
    *passages: str,
    user_id: str = "default",
    batch_id: str | None = None,
    file_type: str = "text",
    metadata: dict[str, Any] | None = None,
    language: str | None = "en",
    headings: Sequence[str] = (),
    vectors: Sequence[NDArray[np.float32]] | None = None,
) -> None:
    """Store a complete document as finalize would."""
    if batch_id is not None:
        conn.execute("INSERT INTO processing_jobs (batch_id, user_id, correlation_id) VALUES (%s, %s, 'c')", [batch_id, user_id])
    conn.execute(
        "INSERT INTO file_extractions (doc_id, user_id, batch_id, file_name, file_path, file_type, metadata, correlation_id) "
        "VALUES (%s, %s, %s, %s, 'p', %s, %s, 'c')",
        [doc_id, user_id, batch_id, f"{doc_id}.txt", file_type, Jsonb(metadata or {})],
    )
    for index, passage in enumerate(passages):
        conn.execute(
            "INSERT INTO document_chunks (id, doc_id, user_id, version, chunk_index, content, content_sha256, heading_path, page_start, "
            "page_end, char_start, char_end, language, embedding, embedding_model) "
            "VALUES (%s, %s, %s, 1, %s, %s, %s, %s, 2, 3, 0, 1, %s, %s, %s)",
            [
                uuid.uuid5(uuid.NAMESPACE_URL, f"{doc_id} {index}"), doc_id, user_id, index, passage,
                hashlib.sha256(passage.encode()).hexdigest(), list(headings), language, vectors[index] if vectors else axis(0), MODEL,
            ],
        )  # fmt: skip


def search(
    conn: psycopg.Connection, mode: str, text: str = "", vector: Any = None, limit: int = 10, **filters: Any
) -> list[dict[str, Any]]:
    wanted = {"user_id": None, "batch_id": None, "file_type": None, "metadata": None, **filters}
    params = {"text": text, "vector": vector, "model": MODEL, "limit": limit, **wanted}
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute((MODES[mode] + FILTERS).encode(), params).fetchall()


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["doc_id"] for row in rows]


def test_a_result_says_where_it_stands(found: psycopg.Connection) -> None:
    add(found, "lease", "Intro.", "The lease ends in March.", headings=["Contract", "Term"], vectors=[axis(1), axis(2)])
    for mode, ranks in {"vector": (1, None), "text": (None, 1), "hybrid": (1, 1)}.items():
        row = search(found, mode, "when does the lease end", axis(2))[0]
        assert row["chunk_id"] == uuid.uuid5(uuid.NAMESPACE_URL, "lease 1")
        assert (row["doc_id"], row["file_name"], row["version"], row["chunk_index"]) == ("lease", "lease.txt", 1, 1)
        assert (row["content"], row["heading_path"]) == ("The lease ends in March.", ["Contract", "Term"])
        assert (row["page_start"], row["page_end"]) == (2, 3)
        assert (row["vector_rank"], row["text_rank"]) == ranks
        assert row["score"] > 0


def test_vectors_are_searched_by_cosine_within_their_model(found: psycopg.Connection) -> None:
    near = axis(0) * 0.9 + axis(1) * 0.1
    add(found, "a", "x", vectors=[axis(1)])
    add(found, "b", "x", vectors=[near * 7])
    add(found, "c", "x", vectors=[-axis(0)])
    add(found, "other", "x", vectors=[axis(0, 5)])
    found.execute("UPDATE document_chunks SET embedding_model = 'other@1' WHERE doc_id = 'other'")
    rows = search(found, "vector", vector=axis(0))
    assert names(rows) == ["b", "a", "c"]
    assert [row["score"] for row in rows] == pytest.approx([0.9 / np.hypot(0.9, 0.1), 0, -1], abs=1e-6)


def test_words_are_found_in_any_form_of_their_language(found: psycopg.Connection) -> None:
    add(found, "english", "The notice periods of all leases were extended.")
    add(found, "german", "Die Kündigungsfristen der Mietverträge wurden verlängert.", language="de")
    add(found, "unknown", "Notice mietvertrag", language=None)
    add(found, "unsupported", "Notitie huur", language="xx")
    assert names(search(found, "text", "extending a lease")) == ["english"]
    assert names(search(found, "text", "Verlängerung der Kündigungsfrist")) == ["german"]
    assert set(names(search(found, "text", "notice"))) == {"english", "unknown"}
    assert names(search(found, "text", "huur")) == ["unsupported"]


def test_stop_words_of_the_query_are_not_searched_in_other_languages(found: psycopg.Connection) -> None:
    add(found, "german", "die will so man in also the", language="de")
    add(found, "unknown", "what is the of and to", language=None)
    add(found, "english", "The pump stops at four bar.")
    assert names(search(found, "text", "what is the pressure of the pump and to what is it set")) == ["english"]


def test_words_of_a_heading_find_the_passages_under_it(found: psycopg.Connection) -> None:
    add(found, "manual", "Turn it off and wait.", headings=["Maintenance", "Replacing the filter"])
    assert names(search(found, "text", "how is a filter replaced")) == ["manual"]


def test_a_rare_word_outweighs_common_ones(found: psycopg.Connection) -> None:
    for number in range(30):
        add(found, f"common {number}", "The contract and the payment, the contract and the payment, contract payment.")
    add(found, "rare", "Arbitration takes place in Bern and under nothing else than its own rules and costs.")
    assert names(search(found, "text", "contract payment arbitration", limit=1)) == ["rare"]


def test_both_ways_together_rank_first_what_both_find(found: psycopg.Connection) -> None:
    add(found, "both", "Pressure valve", vectors=[axis(0) + axis(1) * 0.5])
    add(found, "by vector", "Nothing of the kind", vectors=[axis(0)])
    add(found, "by text", "valve valve valve")
    found.execute("UPDATE document_chunks SET embedding_model = 'other@1' WHERE doc_id = 'by text'")
    rows = search(found, "hybrid", "valve", axis(0))
    assert names(rows)[0] == "both"
    assert {row["doc_id"]: row["text_rank"] for row in rows}["by vector"] is None
    assert rows[0]["score"] == pytest.approx(1 / (60 + rows[0]["vector_rank"]) + 1 / (60 + rows[0]["text_rank"]))
    assert len(search(found, "hybrid", "valve", axis(0), limit=2)) == 2


@pytest.mark.parametrize("mode", MODES)
def test_filters_hold_alone_and_together(found: psycopg.Connection, mode: str) -> None:
    add(found, "a", "valve", user_id="anna", batch_id="one", file_type="pdf", metadata={"year": 2025, "tags": ["x", "y"]})
    add(found, "b", "valve", user_id="anna", batch_id="two", file_type="pdf", metadata={"year": 2026})
    add(found, "c", "valve", user_id="bob", batch_id="three", file_type="word", metadata={"year": 2026, "note": "it's \\ %s"})
    add(found, "d", "valve", user_id="bob", file_type="text")

    def ask(**filters: Any) -> set[str]:
        return set(names(search(found, mode, "valve", axis(0), **filters)))

    assert ask() == {"a", "b", "c", "d"}
    assert ask(user_id="anna") == {"a", "b"}
    assert ask(batch_id="one") == {"a"}
    assert ask(batch_id="three") == {"c"}
    assert ask(file_type="pdf") == {"a", "b"}
    assert ask(metadata=Jsonb({"year": 2026})) == {"b", "c"}
    assert ask(metadata=Jsonb({"tags": ["y"]})) == {"a"}
    assert ask(metadata=Jsonb({"note": "it's \\ %s"})) == {"c"}
    assert ask(metadata=Jsonb({})) == {"a", "b", "c", "d"}
    assert ask(user_id="anna", batch_id="one", file_type="pdf", metadata=Jsonb({"year": 2025})) == {"a"}
    assert ask(user_id="anna", file_type="word") == set()


HOSTILE = ("'; DROP TABLE document_chunks; --", "\\'; SELECT 1; --", "' OR 'x' = 'x", "%s %I %L $1", "$$", "anna' --")


@pytest.mark.parametrize("mode", MODES)
def test_hostile_filters_are_only_values(found: psycopg.Connection, mode: str) -> None:
    add(found, "a", "valve", user_id="anna")
    for text in HOSTILE:
        hostile: list[dict[str, Any]] = [{"user_id": text}, {"batch_id": text}, {"file_type": text}]
        for each in hostile:
            assert search(found, mode, "valve", axis(0), **each) == []
        assert search(found, mode, "valve", axis(0), metadata=Jsonb({text: text})) == []
    params = [axis(0), HOSTILE[0]]
    assert found.execute("SELECT * FROM search_by_vector(query_vector => %s, embedding_model => %s)", params).fetchall() == []
    assert names(search(found, mode, "valve", axis(0))) == ["a"]


def test_any_text_is_a_query(found: psycopg.Connection) -> None:
    add(found, "a", "A valve at https://example.org/a'b?x=1 or user@example.org, 1,000 foo-bar C:\\Temp\\x.txt")
    assert search(found, "text", "") == []
    assert search(found, "text", " \t\n") == []
    assert search(found, "text", "x" * 100_000) == []
    assert names(search(found, "text", "valve " * 20_000)) == ["a"]
    assert names(search(found, "text", "valve:* & !(valve <-> 'x' | \\")) == ["a"]
    assert names(search(found, "text", "https://example.org/a'b?x=1")) == ["a"]
    assert names(search(found, "text", "C:\\Temp\\x.txt")) == ["a"]
    seeded = random.Random(7)
    for _ in range(300):
        text = "".join(seeded.choice("ab '\"\\&|!():*<->-_./@#%$\n\tä字😀0.1\u202e\ud7ff") for _ in range(seeded.randrange(40)))
        search(found, "text", text)
        search(found, "text", text + " valve")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_limit_out_of_range_is_refused_by_name(found: psycopg.Connection, mode: str, limit: int) -> None:
    add(found, "a", "valve")
    with pytest.raises(errors.InvalidParameterValue, match=r"limit_to .* 1 to 1000"):
        search(found, mode, "valve", axis(0), limit=limit)


def test_without_a_vector_or_words_the_other_half_answers(found: psycopg.Connection) -> None:
    add(found, "a", "valve")
    assert names(search(found, "hybrid", "", axis(0))) == ["a"]
    assert names(search(found, "hybrid", "valve", None)) == ["a"]
    assert search(found, "vector", vector=None) == []
    assert search(found, "vector", vector=axis(0) * 0) == []
    assert search(found, "hybrid", "", None) == []


def test_a_search_leaves_the_session_as_it_was(found: psycopg.Connection) -> None:
    add(found, "a", "valve")
    found.execute("SELECT '[1]'::vector")
    names_of = ("hnsw.iterative_scan", "hnsw.ef_search", "enable_seqscan", "jit")
    before = [found.execute(sql.SQL("SHOW {}").format(sql.SQL(name))).fetchone() for name in names_of]
    with found.transaction():
        search(found, "hybrid", "valve", axis(0), limit=500)
        assert [found.execute(sql.SQL("SHOW {}").format(sql.SQL(name))).fetchone() for name in names_of] == before


def test_a_reader_can_search_and_nobody_else(found: psycopg.Connection, database: str) -> None:
    add(found, "a", "valve")
    role = f"reader_{uuid.uuid4().hex}"
    found.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        with found.transaction(), pytest.raises(errors.InsufficientPrivilege), found.transaction():
            found.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
            search(found, "hybrid", "valve", axis(0))
        found.execute(sql.SQL("GRANT SELECT ON document_chunks, file_extractions TO {}").format(sql.Identifier(role)))
        with found.transaction():
            found.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
            for mode in MODES:
                assert names(search(found, mode, "valve", axis(0))) == ["a"]
    finally:
        found.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        found.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def fill(conn: psycopg.Connection, documents: int, passages: int, dimensions: int) -> None:
    """Many passages of random vectors. All hold `common`, one in ten `often`, one `needle`; document d7 belongs to user `few`."""
    conn.execute(
        "INSERT INTO file_extractions (doc_id, user_id, file_name, file_path, correlation_id, metadata) "
        "SELECT 'd' || i, CASE i WHEN 7 THEN 'few' ELSE 'many' END, 'f', 'p', 'c', jsonb_build_object('number', i, 'third', i %% 3 = 0) "
        "FROM generate_series(1, %s) AS i",
        [documents],
    )
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((documents * passages, dimensions), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    columns = (
        "id, doc_id, user_id, version, chunk_index, content, content_sha256, char_start, char_end, language, embedding, embedding_model"
    )
    with conn.cursor().copy(f"COPY document_chunks ({columns}) FROM STDIN WITH (FORMAT binary)".encode()) as copy:
        copy.set_types(["uuid", "text", "text", "int4", "int4", "text", "text", "int4", "int4", "text", "vector", "text"])
        for row, vector in enumerate(vectors):
            number, index = divmod(row, passages)
            doc_id, user_id = f"d{number + 1}", "few" if number + 1 == 7 else "many"
            text = "common " + ("often " if row % 10 == 3 else "") + ("needle " if row == 777 else "") + f"w{row % 97}"
            copy.write_row((uuid.uuid5(uuid.NAMESPACE_URL, str(row)), doc_id, user_id, 1, index, text, "0" * 64, 0, 1, "en", vector, MODEL))
    conn.execute("ANALYZE document_chunks")
    conn.execute("ANALYZE file_extractions")


def index_scans(conn: psycopg.Connection, name: str) -> int:
    conn.execute("SELECT pg_stat_force_next_flush()")
    row = conn.execute("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s", [name]).fetchone()
    assert row is not None
    return int(row[0])


def test_the_vector_index_is_used_and_filters_do_not_thin_out_the_result(found: psycopg.Connection) -> None:
    fill(found, 500, 20, 32)
    query = np.random.default_rng(2).standard_normal(32, dtype=np.float32)
    filters: list[dict[str, Any]] = [{}, {"user_id": "few"}, {"metadata": Jsonb({"number": 9})}]
    exact = [names(search(found, "vector", vector=query, **each)) for each in filters]
    found.execute(
        "CREATE INDEX nearest ON document_chunks USING hnsw ((embedding::vector(32)) vector_cosine_ops) WHERE embedding_model = 'model@1'"
    )
    rows = search(found, "vector", vector=query)
    assert index_scans(found, "nearest") > 0
    assert len(set(names(rows)) & set(exact[0])) >= 9
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for each, wanted in zip(filters[1:], exact[1:], strict=True):
        assert names(search(found, "vector", vector=query, **each)) == wanted
    # An index scan that gives up early has met a third of what a filter of a third should find.
    for forced in ("enable_seqscan = off", "enable_sort = off", "hnsw.max_scan_tuples = 1"):
        found.execute(f"SET {forced}".encode())
    before = index_scans(found, "nearest")
    third = search(found, "vector", vector=query, metadata=Jsonb({"third": True}), limit=1000)
    assert index_scans(found, "nearest") > before
    assert len(third) == 1000


def test_a_filter_costs_little_recall_where_the_index_is_walked(found: psycopg.Connection) -> None:
    fill(found, 620, 100, 48)
    found.execute("UPDATE file_extractions SET metadata = jsonb_build_object('tenth', (metadata->>'number')::integer % 10 = 3)")
    queries = np.random.default_rng(2).standard_normal((20, 48), dtype=np.float32)

    def nearest(query: NDArray[np.float32]) -> set[Any]:
        return {row["chunk_id"] for row in search(found, "vector", vector=query, metadata=Jsonb({"tenth": True}))}

    exact = [nearest(query) for query in queries]
    found.execute(
        "CREATE INDEX nearest ON document_chunks USING hnsw ((embedding::vector(48)) vector_cosine_ops) WHERE embedding_model = 'model@1'"
    )
    for forced in ("enable_seqscan = off", "enable_sort = off"):
        found.execute(f"SET {forced}".encode())
    before = index_scans(found, "nearest")
    hits = [len(nearest(query) & wanted) for query, wanted in zip(queries, exact, strict=True)]
    assert index_scans(found, "nearest") >= before + len(queries)  # 6,200 passages pass, which are too many to be sorted
    assert sum(hits) >= 0.95 * 10 * len(queries), hits


def test_a_word_in_every_passage_neither_hides_rare_words_nor_filtered_documents(found: psycopg.Connection) -> None:
    fill(found, 2200, 10, 2)
    assert search(found, "text", "common often needle", limit=1)[0]["content"].startswith("common needle")
    # More are asked for than there are needles, so that others are ranked beside them.
    assert search(found, "text", "common needle", limit=10)[0]["content"].startswith("common needle")
    assert any(row["content"].startswith("common needle") for row in search(found, "hybrid", "common needle", vector=axis(1, 2), limit=10))
    assert set(names(search(found, "text", "common needle", user_id="few"))) == {"d7"}
    assert len(search(found, "text", "common", limit=1000)) == 1000
    assert all("often" in row["content"] for row in search(found, "text", "common often", limit=20))
    weighed = found.execute("SELECT query::text, weight, passages FROM weigh_words('common often needle absent', NULL)").fetchall()
    passages = {query: count for query, _, count in weighed}
    assert passages["'needl' | 'needle'"] == 1
    assert passages["'common'"] == pytest.approx(22_000, rel=0.01)
    assert passages["'often'"] == pytest.approx(2200, rel=0.4)
    assert len(weighed) == 3
    weights = [weight for _, weight, _ in sorted(weighed, key=lambda row: float(row[2]))]
    assert weights == sorted(weights, reverse=True)
