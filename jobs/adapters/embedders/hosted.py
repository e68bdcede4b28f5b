"""Embeddings from any endpoint that speaks OpenAI's protocol: OpenAI, Azure, vLLM, TEI, Ollama, LiteLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

from jobs.adapters.embedders.answers import read_usage, read_vectors
from jobs.adapters.embedders.requests import plan_requests
from jobs.adapters.exchange import DIRECT, Service, Timeouts, read_json
from jobs.adapters.tokens import estimate_tokens, split_by_tokens
from jobs.adapters.usage import in_thread
from models.calls import Caller, CallPurpose, CallShare, Reply
from models.errors import ConfigurationError, CostLimitReached, NotSent, RateLimitError, RequestRefused, ServiceUnavailable
from models.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

OWN_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536}
"""What models give that are not asked for a size."""
MAX_SPLIT = 4096
"""Pieces of one text; a text beyond is refused whatever the rule."""
_OTHER_BYTES = 65_536  # of an answer, beside its vectors
_LARGE_BYTES = 500_000
_BYTES_A_NUMBER = 40  # of a float in JSON, at most about 25


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which optional fields are sent. Servers refuse what they do not know with HTTP 400, and not in one way."""

    encoding_format: bool
    dimensions: bool


@dataclass(frozen=True, slots=True)
class Tries:
    """How many of the dialects were refused before a wait: whatever texts come next go on there."""

    place: int = 0
    texts: Sequence[str] = ()
    """What was refused, and how at first: told to no other texts, which may be another user's."""
    refused: RequestRefused | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold, and what happens to a text that is longer than the model reads."""

    max_texts: int = 256
    max_tokens: int = 250_000
    max_text_tokens: int = 8000
    long_texts: Literal["split", "refuse"] = "split"


@dataclass(frozen=True, slots=True)
class SizedText:
    """A text as it is sent: whole, or in pieces that the model reads whole, each with its estimated tokens. Blank ones are not sent."""

    pieces: tuple[tuple[str, int], ...]
    tokens: int
    """Of all pieces."""


class HostedEmbedder:
    """Texts into vectors over HTTP. `size` and `embed_sized` let a caller make up each request; `embed` does it all."""

    quick = False

    def __init__(
        self,
        service: Service,
        name: str,
        dimensions: int | None,
        limits: Limits | None = None,
        caller: Caller = DIRECT,
    ) -> None:
        """`dimensions` is asked of the service and checked; None: the model's own size, for models where it is known."""
        size = dimensions or OWN_DIMENSIONS.get(name)
        if size is None:
            raise ConfigurationError(f"EMBEDDING_DIMENSIONS must say how many dimensions the vectors of EMBEDDING_MODEL={name} have.")
        self.dimensions: int = size
        self.model = f"{name}@{size}"
        self.service = service
        self.limits = limits or Limits()
        self.caller = caller
        self._name = name
        asked = dimensions is not None
        self._dialects = list(dict.fromkeys([Dialect(True, asked), Dialect(False, asked), Dialect(False, False)]))
        """What is tried; one, once it was answered."""
        self._tries = Tries()

    def estimate(self, text: str) -> int:
        """Return a safe upper estimate of a text's tokens, as budgets and plans count them."""
        return estimate_tokens(text)

    def size(self, texts: Sequence[str]) -> list[SizedText]:
        """Return the texts as they are sent; RequestRefused for one that may not be. A thousand characters take .01 ms."""
        made = [tuple((piece, tokens) for piece, tokens in self._pieces(text) if piece.strip()) for text in texts]
        return [SizedText(pieces, sum(tokens for _, tokens in pieces)) for pieces in made]

    def plan(self, texts: Sequence[SizedText]) -> list[slice]:
        """Return the slices of the texts that make one request each."""
        limits, tokens, pieces = self.limits, [text.tokens for text in texts], [len(text.pieces) for text in texts]
        return plan_requests(tokens, max_texts=limits.max_texts, max_tokens=limits.max_tokens, pieces=pieces)

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> Vectors:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order. Passages and queries are treated alike.

        A text without any character to be seen is the first axis and costs nothing. Errors as of `embed_sized`.
        """
        import numpy as np

        sized = await in_thread(self.size, texts)
        parts = [(await self.embed_sized(sized[part])).value for part in self.plan(sized)]
        return np.concatenate(parts) if parts else np.empty((0, self.dimensions), dtype=np.float32)

    async def embed_sized(
        self, texts: Sequence[SizedText], *, shares: tuple[CallShare, ...] = (), caller: Caller | None = None
    ) -> Reply[Vectors]:
        """Embed the texts of one slice of `plan`: one request, several only where a single text is longer than a request may be.

        `shares` are the documents that it is for. Raises what Service.exchange and the caller raise. RequestRefused: a text among these
        cannot be embedded, and `bisect` says how to find it.
        """
        import numpy as np

        sized = [(row, piece, tokens) for row, text in enumerate(texts) for piece, tokens in text.pieces]
        pieces = [(row, piece) for row, piece, _ in sized]
        weights = [tokens for _, _, tokens in sized]
        found: dict[int, list[tuple[int, Vectors]]] = {}
        counted: list[int] = []
        last: Reply[Vectors] | None = None
        for part in plan_requests(weights, max_texts=self.limits.max_texts, max_tokens=self.limits.max_tokens):
            tokens = sum(weights[part])
            purpose = CallPurpose("embed", shares, model=self._name, tokens=tokens)
            last = await self._call(caller or self.caller, [piece for _, piece in pieces[part]], purpose)
            counted.append(tokens if last.tokens_in is None else last.tokens_in)
            for (row, _), weight, vector in zip(pieces[part], weights[part], last.value, strict=True):
                found.setdefault(row, []).append((weight, vector))
        rows = [self._mean(found.get(row, [])) for row in range(len(texts))]
        vectors = np.stack(rows) if rows else np.empty((0, self.dimensions), dtype=np.float32)
        return Reply(vectors, sum(counted)) if last is None else replace(last, value=vectors, tokens_in=sum(counted))

    def _mean(self, pieces: list[tuple[int, Vectors]]) -> Vectors:
        """Return the mean of a text's pieces, weighted by length, with length 1. One piece keeps its bits."""
        import numpy as np

        if not pieces:
            return np.asarray(np.eye(1, self.dimensions)[0], dtype=np.float32)
        if len(pieces) == 1:
            return pieces[0][1]
        weight, longest = max(pieces, key=lambda piece: piece[0])
        total = np.sum([weight * vector.astype(np.float64) for weight, vector in pieces], axis=0)
        length = float(np.linalg.norm(total))
        # Pieces that cancel each other out have no direction in common: the longest speaks for the text.
        return longest if length < 1e-6 * weight else np.asarray(total / length, dtype=np.float32)

    def _pieces(self, text: str) -> list[tuple[str, int]]:
        """Return the text as it is sent, whole or in pieces that the model reads whole, each with its tokens."""
        limit, tokens = self.limits.max_text_tokens, self.estimate(text)
        text = text.encode("utf-8", "replace").decode() if not text.isascii() else text
        text = text.replace("\0", "\ufffd")
        if tokens <= limit:
            return [(text, tokens)]
        if self.limits.long_texts == "refuse":
            raise RequestRefused(
                f"A text of {len(text):,} characters, about {tokens:,} tokens, is longer than EMBEDDING_MAX_TEXT_TOKENS={limit:,}, "
                "and EMBEDDING_LONG_TEXTS=refuse forbids to split it."
            )
        pieces = split_by_tokens(text, limit)
        if len(pieces) > MAX_SPLIT:
            raise RequestRefused(f"A text of {len(text):,} characters would need {len(pieces):,} pieces; {MAX_SPLIT:,} are the limit.")
        return [(piece, self.estimate(piece)) for piece in pieces]

    async def _call(self, caller: Caller, texts: Sequence[str], purpose: CallPurpose) -> Reply[Vectors]:
        """Make a call. Until one has succeeded, a refusal may be of an optional field: another call goes without, which budget and ledger
        count like any other, and the first refusal of these texts is raised if that does not help."""
        dialects, tries = self._dialects, self._tries
        first = tries.refused if tries.texts == texts else None
        for place, dialect in enumerate(dialects[tries.place :], tries.place):
            try:
                reply = await caller.call(partial(self._ask, texts, dialect), purpose)
            except RequestRefused as refused:
                first = first or refused
            except (RateLimitError, ServiceUnavailable, NotSent, CostLimitReached):
                # Other requests, which are under way at the same time, may know more by now.
                if self._dialects is dialects and place > self._tries.place:
                    self._tries = Tries(place, texts, first)
                raise
            except Exception:
                self._tries = Tries()  # what came back may be for want of a field that the texts were refused with
                raise
            else:
                if self._dialects is dialects:
                    self._dialects, self._tries = [dialect], Tries()
                return reply
        self._tries = Tries()  # it was the texts
        assert first is not None
        raise first

    async def _ask(self, texts: Sequence[str], dialect: Dialect) -> Reply[Vectors]:
        payload: dict[str, Any] = {"model": self._name, "input": list(texts)}
        if dialect.encoding_format:
            payload["encoding_format"] = "base64"
        if dialect.dimensions:
            payload["dimensions"] = self.dimensions
        limit = _OTHER_BYTES + len(texts) * (self.dimensions * _BYTES_A_NUMBER + 1024)
        answer = await self.service.exchange("POST", "/embeddings", limit=limit, json=payload)

        def read() -> Reply[Vectors]:
            data = read_json(self.service, answer)
            tokens, _ = read_usage(data)
            refuse = partial(self.service.bad_answer, tokens_in=tokens)
            return answer.reply(read_vectors(data, len(texts), self.dimensions, refuse), tokens_in=tokens)

        # Lists of floats take up to half a second to read, which no event loop should spend.
        return await in_thread(read) if len(answer.body) > _LARGE_BYTES else read()

    async def aclose(self) -> None:
        """Close the connections."""
        await self.service.aclose()


def make_hosted(settings: Settings, caller: Caller = DIRECT) -> HostedEmbedder:
    """Return the embedder of EMBEDDING_PROVIDER=openai. A key that is missing for OpenAI itself is a ConfigurationError."""
    base: str = settings.embedding_base_url
    key: SecretStr | None = settings.embedding_api_key
    if key is None and base.startswith("https://api.openai.com"):
        raise ConfigurationError(
            "EMBEDDING_PROVIDER=openai needs EMBEDDING_API_KEY or EMBEDDING_API_KEY_FILE, "
            "or the EMBEDDING_BASE_URL of a server without keys."
        )
    times = Timeouts(settings.provider_connect_seconds, settings.provider_read_seconds, settings.embedding_timeout_seconds)
    # A request that the budget of a minute cannot hold could never be sent.
    most = min(settings.embedding_max_tokens, settings.embedding_tokens_per_minute or settings.embedding_max_tokens)
    limits = Limits(settings.embedding_max_texts, most, settings.embedding_max_text_tokens, settings.embedding_long_texts)
    return HostedEmbedder(
        Service("The embedding service", base, key, times), settings.embedding_model, settings.embedding_dimensions, limits, caller
    )
