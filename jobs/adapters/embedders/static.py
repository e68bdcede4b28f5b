"""The fast profile: a static model, a hundred times quicker than MiniLM and less exact. Needs the extra `fast`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jobs.adapters.embedders.carried import checked_file, find_carried
from jobs.adapters.usage import in_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

PACKAGE = "wordllama"
_HINT = "EMBEDDING_PROVIDER=fast needs the extra `fast` (pip install 'docmill[fast]'); EMBEDDING_PROVIDER=local works without it."
_WEIGHTS = ("wordllama/weights/l2_supercat_256.safetensors", "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5")
_TOKENIZER = ("wordllama/tokenizers/l2_supercat_tokenizer_config.json", "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68")
_TEXTS_A_TURN = 256


class Static:
    """WordLlama's l2_supercat, 256 dimensions: the mean of a vector for each token. Its files are used, its code is not
    (which would set up logging at import). Loaded at the first text, once."""

    quick = True

    model = f"wordllama-l2-supercat@{_WEIGHTS[1][:8]}"
    dimensions = 256

    def __init__(self) -> None:
        """Without the extra, a ConfigurationError."""
        find_carried(PACKAGE, _WEIGHTS[0], hint=_HINT)
        self._loading = threading.Lock()
        self._loaded: tuple[Tokenizer, NDArray[np.float32]] | None = None

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order. A text without tokens is the first axis."""
        import numpy as np

        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for i in range(0, len(texts), _TEXTS_A_TURN):
            await in_thread(self._fill, rows[i : i + _TEXTS_A_TURN], texts[i : i + _TEXTS_A_TURN])
        return rows

    def _fill(self, rows: NDArray[np.float32], texts: Sequence[str]) -> None:
        import numpy as np

        tokenizer, weights = self._load()
        for row, text in zip(rows, texts, strict=True):
            # Summed text by text, in the order of its tokens: the same text gives the same bits in any company.
            ids = tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
            total = weights[ids].sum(axis=0, dtype=np.float64) if ids else np.zeros(self.dimensions)
            length = float(np.linalg.norm(total))
            row[:] = total / length if length > 0 else np.eye(1, self.dimensions)[0]

    def _load(self) -> tuple[Tokenizer, NDArray[np.float32]]:
        with self._loading:
            if self._loaded is None:
                self._loaded = _open()
            return self._loaded


def _open() -> tuple[Tokenizer, NDArray[np.float32]]:
    weights_file = checked_file(PACKAGE, *_WEIGHTS, hint=_HINT)
    tokenizer_file = checked_file(PACKAGE, *_TOKENIZER, hint=_HINT)
    # Heavy, and safetensors comes with the extra.
    import numpy as np
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, load_file(weights_file)["embedding.weight"].astype(np.float32)
