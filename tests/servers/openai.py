"""OpenAI's protocol: /v1/embeddings and /v1/chat/completions, with the ways in which other servers differ from it."""

from __future__ import annotations

import base64
import json
import random
import re
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jobs.adapters.embedders.hashed import HashedText, HashedWords
from tests.servers.faults import openai_error
from tests.servers.http import LocalServer, Request, Response

_TOKEN = re.compile(rb"[A-Za-z]{1,4}|[0-9]{1,3}|[^A-Za-z0-9\s]")
Answerer = Callable[[dict[str, Any]], str | dict[str, Any]]


def count_tokens(text: str) -> int:
    """Count as a byte-pair tokenizer roughly would."""
    return max(1, len(_TOKEN.findall(text.encode("utf-8", "replace"))))


class Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.response = Response(status, openai_error(code, message).encode(), {"content-type": "application/json"})


class OpenAIServer(LocalServer):
    """Embeds with word hashes; chats with what `say` holds, or fills in the schema. Attributes may be changed while it runs."""

    def __init__(
        self, *, port: int = 0, latency: float = 0.0, key: str | None = None, tls: ssl.SSLContext | None = None, dimensions: int = 1536
    ) -> None:
        super().__init__(port=port, latency=latency, key=key, tls=tls)
        self.dimensions = dimensions
        """The model's own size."""
        self.base64: Literal["yes", "ignored", "refused"] = "yes"
        self.chooses_dimensions: Literal["yes", "ignored", "refused"] = "yes"
        self.max_texts = 2048
        self.max_tokens = 300_000
        self.max_text_tokens = 8192
        self.poison: str | None = None
        """A text with this in it is refused with 400, and the whole request with it."""
        self.cheap = False
        """Vectors without meaning and estimates of tokens, at a tenth of the cost: for measuring what asks, not what answers."""
        self.shuffled = False
        """Answers list the embeddings in another order; `index` is right."""
        self.requests_per_minute: int | None = None
        self.tokens_per_minute: int | None = None
        self.minute = 60.0
        """Seconds of a minute, for tests that have none."""
        self.say: deque[str | dict[str, Any]] = deque()
        """Answers to give to the next chats."""
        self.answerer: Answerer = fill_in

    @property
    def url(self) -> str:
        """What EMBEDDING_BASE_URL and EXTRACTION_BASE_URL are."""
        return f"{self.root}/v1"

    async def handle(self, request: Request, mangle: str) -> Response:
        """Answer one request."""
        try:
            if request.method == "POST" and request.path.endswith("/embeddings"):
                return await self._embed(request.json(), mangle)
            if request.method == "POST" and request.path.endswith("/chat/completions"):
                return self._chat(request.json(), mangle)
            raise Refused(404, None, f"Unknown path {request.path}")
        except Refused as refused:
            return refused.response

    def _spend(self, tokens: int) -> dict[str, str]:
        """Return rate-limit headers, or refuse what is over the limits."""
        tally, now = self.tally, self.clock
        tally.tokens_seen += tokens
        recent = [spent for at, spent in tally.tokens_at if now - at < self.minute]
        requests, limit = self.requests_per_minute, self.tokens_per_minute
        if (requests is not None and len(recent) >= requests) or (limit is not None and sum(recent) + tokens > limit):
            tally.faults["over_limit"] += 1
            raise Refused(429, "rate_limit_exceeded", "Rate limit reached")
        tally.tokens_at.append((now, tokens))
        headers: dict[str, str] = {}
        for name, most, left in (
            ("requests", requests, None if requests is None else requests - len(recent) - 1),
            ("tokens", limit, None if limit is None else limit - sum(recent) - tokens),
        ):
            if most is not None:
                headers |= {f"x-ratelimit-limit-{name}": str(most), f"x-ratelimit-remaining-{name}": str(left)}
                headers[f"x-ratelimit-reset-{name}"] = f"{self.minute:g}s"
        return headers

    async def _embed(self, asked: dict[str, Any], mangle: str) -> Response:
        texts = asked["input"]
        counts = [1 + len(text) // 4 if self.cheap else count_tokens(text) for text in texts]
        self._refuse(asked, texts, counts)
        headers = self._spend(sum(counts))
        size = asked.get("dimensions", self.dimensions) if self.chooses_dimensions == "yes" else self.dimensions
        rows = 2 * await (HashedText if self.cheap else HashedWords)(size).embed(texts)  # not of length 1: that is the client's to make
        items = [(index, row) for index, row in enumerate(rows)]
        if self.shuffled:
            random.Random(len(texts)).shuffle(items)
        plain = self.base64 == "ignored" or asked.get("encoding_format") != "base64"
        data = [{"object": "embedding", "index": index, "embedding": _written(row, plain=plain)} for index, row in items]
        if mangle == "permuted":
            data = data[::-1]
        elif mangle:
            data = _mangled(data, mangle, rows, plain=plain)
        if mangle in ("", "permuted"):
            self.tally.answered += 1
            self.tally.texts += len(texts)
            self.tally.tokens += sum(counts)
            self.tally.seen.update(texts)
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        return Response.of({"object": "list", "data": data, "model": asked["model"], "usage": usage}, headers=headers)

    def _refuse(self, asked: dict[str, Any], texts: Sequence[str], counts: Sequence[int]) -> None:
        if not texts or len(texts) > self.max_texts or any(not text for text in texts):
            raise Refused(400, None, "'$.input' is invalid.")
        if self.base64 == "refused" and "encoding_format" in asked:
            raise Refused(422, None, "encoding_format: extra fields not permitted")
        if self.chooses_dimensions == "refused" and "dimensions" in asked:
            raise Refused(400, None, "This model does not support matryoshka representation.")
        if max(counts) > self.max_text_tokens:
            raise Refused(400, "context_length_exceeded", f"maximum context length is {self.max_text_tokens} tokens")
        if sum(counts) > self.max_tokens:
            raise Refused(400, "max_tokens_per_request", f"max {self.max_tokens} tokens per request")
        if self.poison is not None and any(self.poison in text for text in texts):
            raise Refused(400, None, "Input contains an invalid sequence.")

    def _chat(self, asked: dict[str, Any], mangle: str) -> Response:
        shape = asked.get("response_format", {})
        if shape.get("type") != "json_schema" or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", shape["json_schema"]["name"]):
            raise Refused(400, None, "Invalid response_format.")
        tokens_in = sum(count_tokens(message["content"]) for message in asked["messages"])
        if tokens_in > self.max_tokens:
            raise Refused(400, "context_length_exceeded", f"maximum context length is {self.max_tokens} tokens")
        answer = self.say.popleft() if self.say else self.answerer(asked)
        words = answer if isinstance(answer, str) else json.dumps(answer)
        tokens_out = count_tokens(words)
        headers = self._spend(tokens_in + tokens_out)
        message: dict[str, Any] = {"role": "assistant", "content": words, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        choices = [choice]
        match mangle:
            case "refusal":
                message |= {"content": None, "refusal": "I cannot help with that."}
            case "length":
                choice["finish_reason"] = "length"
                message["content"] = words[: len(words) // 2]
            case "empty":
                message["content"] = None
            case "prose":
                message["content"] = "Here is what I found."
            case "wrong_shape":
                message["content"] = '{"surprise": 1}'
            case "unlisted":
                choices = []
            case _:
                self.tally.answered += 1
        self.tally.tokens += tokens_in + tokens_out
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        data = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": f"{asked['model']}-2026-01-01",
            "choices": choices,
            "usage": usage,
        }
        return Response.of(data, headers=headers)


def _written(row: Any, *, plain: bool) -> Any:
    return [float(value) for value in row] if plain else base64.b64encode(np.asarray(row, dtype="<f4").tobytes()).decode()


def _mangled(data: list[dict[str, Any]], mangle: str, rows: Any, *, plain: bool) -> list[dict[str, Any]]:
    """Return the embeddings with one thing wrong."""
    last = data[-1]
    bad = np.array(rows[-1])
    match mangle:
        case "wrong_count":
            return data[:-1]
        case "bad_index":
            return [{**item, "index": item["index"] + 1} for item in data]
        case "same_index":
            return [{**item, "index": 0} for item in data]
        case "wrong_dimension":
            return [*data[:-1], {**last, "embedding": _written(bad[:-1], plain=plain)}]
        case "nan":
            bad[3] = np.nan
        case "infinity":
            bad[3] = np.inf
        case "zeros":
            bad[:] = 0
        case "not_base64":
            return [*data[:-1], {**last, "embedding": "????"}]
    return [*data[:-1], {**last, "embedding": _written(bad, plain=plain)}]


def document_of(asked: dict[str, Any]) -> str:
    """Return the document's text between the marks of the first user message."""
    content: str = next(message["content"] for message in asked["messages"] if message["role"] == "user")
    return content.partition("\n")[2].rpartition("\n")[0]


def fill_in(asked: dict[str, Any]) -> dict[str, Any]:
    """Return an answer that fits the schema: texts hold the document's first words, all else is empty."""
    schema = asked["response_format"]["json_schema"]["schema"]
    words = " ".join(document_of(asked).split()[:8])
    made = _empty(schema, schema, words)
    return made if isinstance(made, dict) else {}


def _empty(schema: dict[str, Any], root: dict[str, Any], words: str) -> Any:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if "object" in kinds:
        return {name: _empty(schema["properties"][name], root, words) for name in schema.get("required", [])}
    made = {"array": [], "string": words, "integer": 0, "number": 0, "boolean": False}
    return next((made[name] for name in kinds if name in made), None)
