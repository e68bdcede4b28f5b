"""What a vector[] looks like on the wire, as psycopg and pgvector would write it one vector at a time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from pgvector.psycopg.vector import register_vector_info
from psycopg import adapt
from psycopg.abc import AdaptContext, Transformer
from psycopg.adapt import AdaptersMap, PyFormat
from psycopg.types import TypeInfo

from jobs.pipeline.rows import chunk_params, vector_params
from jobs.vector_array import VectorArray, VectorArrayDumper, register_vector_array
from models.chunks import Chunk
from tests.unit.test_stages import WHOLE, chunk

OID, ARRAY_OID = 70_001, 70_002


@pytest.fixture
def written() -> Transformer:
    """What turns parameters into bytes for a connection that knows vectors."""
    context = cast(Any, SimpleNamespace(adapters=AdaptersMap(psycopg.adapters), connection=None))
    register_vector_info(context, TypeInfo("vector", OID, ARRAY_OID))
    register_vector_array(context)
    return adapt.Transformer(cast(AdaptContext, context))


def sent(written: Transformer, value: object) -> tuple[int, bytes]:
    (found,) = written.dump_sequence([value], [PyFormat.BINARY])
    assert written.types is not None
    return written.types[0], bytes(found or b"")


def vectors(count: int, dimensions: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).standard_normal((count, dimensions), np.float32)


@pytest.mark.parametrize("shapes", [[(1, 1)], [(3, 16_000)], [(256, 384)], [(2, 8), (0, 8), (1, 3), (5, 8)]])
def test_a_block_of_vectors_is_written_as_a_list_of_them(written: Transformer, shapes: list[tuple[int, int]]) -> None:
    blocks = [vectors(*shape) for shape in shapes]
    one_by_one = [vector for block in blocks for vector in block]
    assert sent(written, VectorArray(blocks)) == sent(written, one_by_one)
    assert sent(written, VectorArray.of(one_by_one)) == sent(written, one_by_one)
    assert written.types == (ARRAY_OID,)


@pytest.mark.parametrize("none", [VectorArray([]), VectorArray([np.empty((0, 8), np.float32)]), VectorArray.of([])])
def test_no_vectors_are_an_empty_array(written: Transformer, none: VectorArray) -> None:
    assert sent(written, none) == (ARRAY_OID, bytes(8) + OID.to_bytes(4, "big"))


def test_other_numbers_than_float32_are_written_as_such(written: Transformer) -> None:
    exact: Any = np.arange(6.0).reshape(2, 3)[:, ::2]
    assert sent(written, VectorArray([exact])) == sent(written, list(exact.astype(np.float32)))


def test_a_vector_array_asks_for_a_connection() -> None:
    with pytest.raises(ValueError, match="oid"):
        VectorArrayDumper(VectorArray)


def test_vectors_go_to_the_server_without_an_object_each_and_in_the_order_of_their_passages() -> None:
    documents = [replace(WHOLE, doc_id=str(size), chunks=passages(size), vectors=vectors(size, 4)) for size in (200, 0, 100, 300)]
    rows = list(chunk_params(*documents))
    assert [len(row["ids"]) for row in rows] == [256, 256, 88]
    assert [[len(block) for block in row["embeddings"].blocks] for row in rows] == [[200, 56], [44, 212], [88]]
    for block in (block for row in rows for block in row["embeddings"].blocks):
        assert any(np.shares_memory(block, document.vectors) for document in documents if document.vectors is not None)
    together = np.concatenate([block for row in rows for block in row["embeddings"].blocks])
    assert np.array_equal(together, np.concatenate([document.vectors for document in documents if document.vectors is not None]))
    assert [place for row in rows for place in integers(row["whose"])] == [1] * 200 + [3] * 100 + [4] * 300


@pytest.mark.parametrize("made", [None, vectors(1, 4), vectors(3, 4)])
def test_passages_without_a_vector_each_are_not_sent(made: NDArray[np.float32] | None) -> None:
    with pytest.raises(ValueError, match="2 passages"):
        list(chunk_params(replace(WHOLE, chunks=passages(2), vectors=made)))


def test_vectors_for_the_buffer_keep_their_order() -> None:
    made = vectors(300, 4)
    numbered = list(enumerate(made))
    rows = list(vector_params([(WHOLE, numbered[:100]), (WHOLE, numbered[100:])]))
    assert [index for row in rows for index in integers(row["indexes"])] == list(range(300))
    assert np.array_equal(np.concatenate([block for row in rows for block in row["embeddings"].blocks]), made)


def integers(text: str) -> list[int]:
    return [int(number) for number in text.strip("{}").split(",")]


def passages(count: int) -> tuple[Chunk, ...]:
    return tuple(chunk(number, f"passage {number}") for number in range(count))
