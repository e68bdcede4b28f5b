"""A sentence model in ONNX: tokens in, one vector for each token out; mean pooling, L2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession
    from tokenizers import Tokenizer

WINDOW_TOKENS = 256
"""Tokens that the model sees at once, its two special ones included: what all-MiniLM-L6-v2 was trained and is published with."""

_KNOWN_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})


class OnnxModel:
    """A loaded model. `vector` may be called from several threads at once."""

    def __init__(self, model_file: Path, tokenizer_file: Path) -> None:
        self._tokenizer = _open_tokenizer(tokenizer_file)
        self._session = _open_session(model_file)
        self._inputs = [each.name for each in self._session.get_inputs()]
        unknown = sorted(set(self._inputs) - _KNOWN_INPUTS)
        output = self._session.get_outputs()[0]
        self._output = output.name
        if unknown or "input_ids" not in self._inputs or len(output.shape) != 3 or not isinstance(output.shape[2], int):
            raise ConfigurationError(
                f"{model_file} is not a sentence model that docmill can run: it must take input_ids (and at most attention_mask and "
                f"token_type_ids) and give one vector for each token, shape (batch, tokens, dimensions); it takes {self._inputs} and gives "
                f"{output.name} of shape {output.shape}."
            )
        self.dimensions: int = output.shape[2]

    def vector(self, text: str) -> NDArray[np.float32]:
        """Return the unit vector of a text, shape (dimensions,).

        A text is a batch of its own, without padding: a matrix product rounds differently with its shape, and the same text must
        give the same bits whatever it is embedded with. A text that is longer than the window is cut into windows, and the mean is
        taken over the tokens of all of them: nothing is dropped, and a text that fits gets the published vector.
        """
        import numpy as np

        encoding = self._tokenizer.encode(text.encode("utf-8", "replace").decode())
        total = np.zeros(self.dimensions)
        for window in (encoding, *encoding.overflowing):
            total += self._tokens(window.ids).sum(axis=0, dtype=np.float64)
        return (total / np.linalg.norm(total)).astype(np.float32)

    def _tokens(self, ids: list[int]) -> NDArray[np.float32]:
        import numpy as np

        tokens = np.array([ids], dtype=np.int64)
        values = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        hidden = self._session.run([self._output], {name: values[name] for name in self._inputs})[0]
        return np.asarray(hidden[0], dtype=np.float32)


def _open_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ConfigurationError(f"{path} is not a tokenizer file: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(WINDOW_TOKENS)
    return tokenizer


def _open_session(path: Path) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread a text: texts are spread over threads instead, which is as quick and keeps CPU time where it can be counted.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but Exception
        raise ConfigurationError(f"{path} cannot be loaded as an ONNX model: {error}") from error
