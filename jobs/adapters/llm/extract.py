"""Facts of a document by a language model: one request, or one a part and the answers merged; one repair each where one does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.adapters.http import Service, Through, Timeouts, directly
from jobs.adapters.llm import prompt
from jobs.adapters.llm.chat import Said, complete
from jobs.adapters.llm.merge import merge, trim
from jobs.adapters.llm.schema import Shape, load_shape
from jobs.adapters.tokens import estimate_tokens, split_by_tokens
from models.calls import Reply, Usage
from models.errors import ConfigurationError, LLMError, RequestRefused
from models.settings import Settings

LONGEST_REPAIRED = 100_000
"""Characters of a wrong answer that is sent back for repair."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold, and how many there may be."""

    max_tokens: int = 60_000
    max_parts: int = 20
    max_answer_tokens: int = 8000


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a model found in a document, and how."""

    data: Mapping[str, Any]
    model: str
    """As the service names what answered, which may be a dated version of what was asked for."""
    shape: Shape
    parts: int
    repairs: int
    usage: Usage


class ModelExtractor:
    """Extraction with one model and one schema."""

    def __init__(self, service: Service, model: str, shape: Shape, limits: Limits | None = None, through: Through = directly) -> None:
        self.service = service
        self.model = model
        self.shape = shape
        self.limits = limits or Limits()
        self.through = through

    def plan(self, markdown: str) -> list[str]:
        """Return the parts of a document that make one request each. More than `max_parts` are a RequestRefused: nothing is cut off."""
        limit = self.limits.max_tokens
        parts = split_by_tokens(markdown, limit) if estimate_tokens(markdown) > limit else [markdown]
        if len(parts) > self.limits.max_parts:
            raise RequestRefused(
                f"The document is too long for extraction: {len(parts)} requests of EXTRACTION_MAX_TOKENS={limit}, "
                f"EXTRACTION_MAX_PARTS={self.limits.max_parts}."
            )
        return parts

    async def extract(self, markdown: str, *, through: Through | None = None) -> Extraction:
        """Return what the model finds. LLMError where its answer does not fit the schema after one repair, or cannot be used; otherwise
        what Service.exchange raises."""
        parts = self.plan(markdown)
        answers: list[Any] = []
        usage, repairs, model = Usage(), 0, self.model
        for number, text in enumerate(parts, start=1):
            messages = prompt.ask(text, number=number, count=len(parts))
            replies = await self._answer(messages, through or self.through)
            answers.append(replies[-1].value.data)
            model = replies[-1].value.model
            repairs += len(replies) - 1
            usage = sum((reply.usage for reply in replies), usage)
        data = answers[0]
        if len(answers) > 1:
            data, problems = self.shape.check(trim(merge(answers), self.shape.schema))
            if problems:
                raise self._unfit(f"The answers for {len(parts)} parts do not fit EXTRACTION_SCHEMA once merged", problems)
        return Extraction(data, model, self.shape, len(parts), repairs, usage)

    async def _answer(self, messages: list[prompt.Message], through: Through) -> list[Reply[Said]]:
        """Return one reply that fits, or one that does not and its repair. The data of the last one is what is to be stored."""
        replies: list[Reply[Said]] = []
        for last in (False, True):
            tokens = sum(estimate_tokens(message.content) for message in messages) + estimate_tokens(str(self.shape.schema))
            most = self.limits.max_answer_tokens
            exchange = partial(complete, self.service, self.model, messages, shape=self.shape, max_tokens=most, fallback=tokens)
            reply = await through(exchange, tokens=tokens + most)
            said = reply.value
            data, problems = (said.data, ["$: no JSON object"]) if said.data is None else self.shape.check(said.data)
            replies.append(Reply(Said(said.words, data, said.model), reply.usage, reply.allowance))
            if not problems:
                break
            if last:
                raise self._unfit("The answer does not fit EXTRACTION_SCHEMA, and not after one repair", problems)
            messages = prompt.repair(messages, said.words[:LONGEST_REPAIRED], problems)
        return replies

    def _unfit(self, what: str, problems: list[str]) -> LLMError:
        return LLMError(f"{self.service.name} at {self.service.host}: {what}: {'; '.join(problems[:3])}")

    async def aclose(self) -> None:
        """Close the connections."""
        await self.service.aclose()


def with_extraction(local: Mapping[str, Any], extraction: Extraction) -> dict[str, Any]:
    """Return `raw_extraction`: what the local extractor found, with `model_extraction` beside it."""
    return {
        **local,
        "model_extraction": {
            "data": extraction.data,
            "model": extraction.model,
            "prompt_version": prompt.VERSION,
            "schema": {"name": extraction.shape.name, "sha256": extraction.shape.sha256},
            "parts": extraction.parts,
            "repairs": extraction.repairs,
            "tokens_in": extraction.usage.tokens_in,
            "tokens_out": extraction.usage.tokens_out,
        },
    }


def make_extractor(settings: Settings, through: Through = directly) -> ModelExtractor | None:
    """Return the extractor of EXTRACTION_PROVIDER=openai, None for local. A key missing for OpenAI itself is a ConfigurationError."""
    if settings.extraction_provider == "local":
        return None
    if settings.extraction_api_key is None and settings.extraction_base_url.startswith("https://api.openai.com"):
        raise ConfigurationError(
            "EXTRACTION_PROVIDER=openai needs EXTRACTION_API_KEY or EXTRACTION_API_KEY_FILE, "
            "or the EXTRACTION_BASE_URL of a server without keys."
        )
    seconds = settings.extraction_timeout_seconds
    times = Timeouts(settings.provider_connect_seconds, seconds, seconds)
    service = Service("The extraction service", settings.extraction_base_url, settings.extraction_api_key, times)
    limits = Limits(settings.extraction_max_tokens, settings.extraction_max_parts, settings.extraction_max_answer_tokens)
    return ModelExtractor(service, settings.extraction_model, load_shape(settings.extraction_schema), limits, through)
