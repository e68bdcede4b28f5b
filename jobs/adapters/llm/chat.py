"""One chat completion with structured output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.adapters.embedders.answers import read_usage
from jobs.adapters.exchange import Service, read_json
from jobs.adapters.llm.prompt import Message
from jobs.adapters.llm.schema import Shape
from models.calls import Reply
from models.errors import FailedCall, LLMError

LARGEST_ANSWER = 8_000_000
"""Bytes."""
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Said:
    """What a model said: its words, and the data in them, or None where they are no JSON object."""

    words: str
    data: Any
    model: str
    """The model that answered, as the service names it."""


async def complete(service: Service, model: str, messages: Sequence[Message], *, shape: Shape, max_tokens: int) -> Reply[Said]:
    """Return one answer.

    Raises what Service.exchange raises, and LLMError for a refusal, a filtered answer or one that is cut off at `max_tokens`.
    """
    payload = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "response_format": {"type": "json_schema", "json_schema": {"name": shape.name, "schema": shape.schema, "strict": shape.strict}},
        "max_completion_tokens": max_tokens,
    }
    answer = await service.exchange("POST", "/chat/completions", limit=LARGEST_ANSWER, json=payload)
    data = read_json(service, answer)
    usage = read_usage(data)
    choice = _first_choice(service, data)
    message = choice["message"]
    ended = choice.get("finish_reason")
    if message.get("refusal") or ended == "content_filter":
        raise _llm_error(service, "declined to read the document.", usage)
    if ended == "length":
        raise _llm_error(service, f"gave an answer that is cut off at EXTRACTION_MAX_ANSWER_TOKENS={max_tokens}.", usage)
    words = message.get("content")
    if not isinstance(words, str):
        raise _llm_error(service, "gave an answer without content.", usage)
    told = data.get("model")
    said = Said(_storable(words), read_object(words), told if isinstance(told, str) else model)
    return answer.reply(said, tokens_in=usage[0], tokens_out=usage[1])


def _first_choice(service: Service, data: Any) -> dict[str, Any]:
    try:
        choice = data["choices"][0]
        if isinstance(choice["message"], dict):
            return dict(choice)
    except (KeyError, IndexError, TypeError):
        pass
    raise service.bad_answer("sent no chat completion.")


def _llm_error(service: Service, what: str, usage: tuple[int | None, int | None]) -> LLMError:
    error = LLMError(f"{service.name} at {service.host} {what}")
    error.call = FailedCall(service.host, sent=True, status=200, tokens_in=usage[0], tokens_out=usage[1])
    return error


def read_object(words: str) -> Any:
    """Return the JSON object in a model's words, fit for Postgres; None for anything else. Servers without structured output may put it
    into a code fence."""
    text = words.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]

    def refuse(constant: str) -> float:
        raise ValueError(constant)

    try:
        data = json.loads(text, parse_constant=refuse)
        return _storable(data) if isinstance(data, dict) else None
    except (ValueError, RecursionError):
        return None


def _storable(data: Any) -> Any:
    """Return the data without NUL and lone surrogates, which jsonb refuses, and without numbers that overflow."""
    if isinstance(data, dict):
        return {_storable(name): _storable(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_storable(each) for each in data]
    if isinstance(data, str):
        return _UNSTORABLE.sub("\ufffd", data)
    if isinstance(data, float) and data in (float("inf"), float("-inf")):
        raise ValueError("a number that is too large")
    return data
