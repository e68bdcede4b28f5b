"""Reading the answer of an embeddings endpoint: nothing in it is taken on trust."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Refuse = Callable[[str], Exception]
"""Makes the error for an answer that cannot be used, from what is wrong with it."""


def read_vectors(data: Any, count: int, dimensions: int, refuse: Refuse) -> NDArray[np.float32]:
    """Return L2-normalised rows, shape (count, dimensions), in the order of the texts, which is that of `index` and not of the list.

    Raises what `refuse` makes for a wrong count, order, dimension, for NaN or infinity, and for a vector without length.
    """
    import numpy as np

    items = data.get("data") if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise refuse("sent no list of embeddings.")
    if len(items) != count:
        raise refuse(f"sent {len(items)} embeddings for {count} texts.")
    rows = np.empty((count, dimensions), dtype=np.float32)
    seen: set[int] = set()
    for place, item in enumerate(items):
        index = item.get("index", place) if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < count or index in seen:
            raise refuse("sent embeddings whose indexes are not those of the texts.")
        seen.add(index)
        vector = _vector(item.get("embedding"), refuse)
        if vector.shape != (dimensions,):
            raise refuse(
                f"sent vectors of {vector.size} dimensions where EMBEDDING_DIMENSIONS says {dimensions}; set it to what the model gives."
            )
        rows[index] = vector
    return normalised(rows, refuse)


def normalised(rows: NDArray[np.float32], refuse: Refuse) -> NDArray[np.float32]:
    """Return the rows with length 1. Lengths are taken in double precision: squares of large values overflow in single."""
    import numpy as np

    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise refuse("sent a vector with NaN or infinity.")
    if (lengths < 1e-12).any():
        raise refuse("sent a vector of zeros.")
    return np.asarray(rows / lengths, dtype=np.float32)


def _vector(told: Any, refuse: Refuse) -> NDArray[np.float32]:
    """Read base64 of little-endian float32, or a list of numbers where the server knows no base64."""
    import numpy as np

    try:
        if isinstance(told, str):
            return np.frombuffer(base64.b64decode(told, validate=True), dtype="<f4")
        if isinstance(told, list):
            with np.errstate(over="ignore"):  # a number too large for float32 becomes infinity, which is refused with the others
                vector = np.asarray(told)
                if vector.dtype.kind in "if" and vector.ndim == 1:
                    return vector.astype(np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error):
        pass
    raise refuse("sent an embedding that is neither base64 of floats nor a list of numbers.")


def read_usage(data: Any) -> tuple[int | None, int | None]:
    """Return the tokens in and out that the service counted, None where it does not say so in a way that makes sense.

    Nothing is sent or said without a token: servers that do not count say that there were none.
    """
    told = data.get("usage") if isinstance(data, dict) else None
    counts = [told.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(told, dict) else [None, None]
    tokens_in, tokens_out = (count if type(count) is int and 0 <= count < 1 << 40 else None for count in counts)
    return tokens_in or None, tokens_out or None
