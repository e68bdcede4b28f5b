"""Embedders that need no model: for tests, and for measuring everything but the model."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_WORD = re.compile(r"\w+")


class HashedWords:
    """A bag of words hashed onto axes: texts with words in common are near each other, so that searching makes sense."""

    quick = True

    def __init__(self, dimensions: int = 384) -> None:
        self.dimensions = dimensions
        self.model = f"hashed-words-{dimensions}@1"

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order. A text without words is the first axis."""
        import numpy as np

        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            row[:] = self._vector(text)
        return rows

    def _vector(self, text: str) -> NDArray[np.float64]:
        import numpy as np

        vector = np.zeros(self.dimensions)
        for word, count in Counter(_WORD.findall(text.lower())).items():
            code = crc32(word.encode("utf-8", "replace"))
            vector[code % self.dimensions] += (1 + math.log(count)) * (1 if code >> 31 else -1)
        length = float(np.linalg.norm(vector))
        if length == 0:
            vector[0] = length = 1.0
        return vector / length


class HashedText:
    """A digest of the whole text as a vector: no meaning, next to no cost. For benchmarks beside programs that embed the same way."""

    quick = True

    def __init__(self, dimensions: int = 384) -> None:
        self.dimensions = dimensions
        self.model = f"hashed-text-{dimensions}@1"

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order."""
        import numpy as np

        if not texts:
            return np.empty((0, self.dimensions), dtype=np.float32)
        digests = [hashlib.shake_256(text.encode("utf-8", "replace")).digest(self.dimensions * 2) for text in texts]
        rows = np.stack([np.frombuffer(digest, dtype="<i2") for digest in digests]).astype(np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
