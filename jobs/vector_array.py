"""Many vectors as one parameter of a statement, a vector[]: in a list psycopg would dump each by itself, in Python."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pgvector.psycopg import register_vector_async
from psycopg import AsyncConnection, BaseConnection
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HEAD = struct.Struct("!III")  # dimensions of the array, whether it has nulls, type of its elements
_DIMENSION = struct.Struct("!II")  # length, first subscript


class VectorArray:
    """Vectors in order, as blocks: arrays with a vector a row. The vectors of one block are of one length."""

    __slots__ = ("blocks",)

    def __init__(self, blocks: Sequence[NDArray[np.float32]]) -> None:
        self.blocks = blocks

    @classmethod
    def of(cls, vectors: Iterable[NDArray[np.float32]]) -> VectorArray:
        """Return an array of vectors that are arrays of their own; they are copied."""
        import numpy as np  # noqa: PLC0415 - an idle worker does without

        return cls([np.stack(list(alike)) for _, alike in groupby(vectors, key=len)])


class VectorArrayDumper(Dumper):
    """Writes a VectorArray in Postgres' binary form of vector[], for a connection that knows pgvector's types."""

    format = Format.BINARY

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        if context is None:
            raise ValueError("a VectorArray can only be dumped for a connection: the type vector has another oid in each database")
        vector = context.adapters.types["vector"]
        self.oid, self._element = vector.array_oid, vector.oid

    def dump(self, obj: VectorArray) -> Buffer:
        """Return the array's bytes, the only copy of its vectors that is made here."""
        import numpy as np  # noqa: PLC0415 - an idle worker does without

        count = sum(len(block) for block in obj.blocks)
        if not count:
            return _HEAD.pack(0, 0, self._element)
        data = bytearray(_HEAD.size + _DIMENSION.size + sum(4 * block.size + 8 * len(block) for block in obj.blocks))
        _HEAD.pack_into(data, 0, 1, 0, self._element)
        _DIMENSION.pack_into(data, _HEAD.size, count, 1)
        at = _HEAD.size + _DIMENSION.size
        for block in obj.blocks:
            length = block.shape[1]
            # How pgvector sends a vector, after the number of bytes that follow.
            row = np.dtype([("bytes", ">i4"), ("length", ">u2"), ("unused", ">u2"), ("values", ">f4", (length,))])
            rows = np.frombuffer(data, row, len(block), at)
            rows["bytes"], rows["length"], rows["values"] = 4 * length + 4, length, block
            at += rows.nbytes
        return data


def register_vector_array(conn: BaseConnection[Any]) -> None:
    """Have a connection take VectorArrays, after pgvector's own `register_vector`."""
    conn.adapters.register_dumper(VectorArray, VectorArrayDumper)


async def register_vectors(conn: AsyncConnection[Any]) -> None:
    """Have a connection take and give pgvector's types, and take VectorArrays. Asks the database for the types' oids."""
    await register_vector_async(conn)
    register_vector_array(conn)
