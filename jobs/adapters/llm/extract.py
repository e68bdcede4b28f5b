"""Facts of a document by a language model: one request, or one a part and the answers merged; one repair each where one does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from jobs.adapters.exchange import DIRECT, Service, Timeouts
from jobs.adapters.llm import prompt
from jobs.adapters.llm.chat import Said, complete
from jobs.adapters.llm.merge import merge, trim
from jobs.adapters.llm.schema import Shape, load_shape
from jobs.adapters.tokens import estimate_tokens, split_by_tokens
from jobs.adapters.usage import in_thread
from models.calls import Caller, CallPurpose, CallShare, Reply
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
    tokens_in: int
    """As the service counts; our estimate where it does not."""
    tokens_out: int


@dataclass(frozen=True, slots=True)
class PartAnswer:
    """What a model found in one part of a document, and what that took."""

    data: Any
    """As it fits the schema."""
    model: str
    repairs: int
    tokens_in: int
    tokens_out: int


class KeptAnswers(Protocol):
    """Keeps the answers for the parts of one document until all are there."""

    async def kept_answers(self) -> Mapping[str, PartAnswer]:
        """Return those that are durable, by what they answer."""
        ...

    async def keep_answer(self, part: int, asked_sha256: str, answer: PartAnswer) -> None:
        """Make one durable."""
        ...

    async def drop_answers(self) -> None:
        """Forget them: together they are of no use."""
        ...


class ModelExtractor:
    """Extraction with one model and one schema."""

    def __init__(self, service: Service, model: str, shape: Shape, limits: Limits | None = None, caller: Caller = DIRECT) -> None:
        self.service = service
        self.model = model
        self.shape = shape
        self.limits = limits or Limits()
        self.caller = caller

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

    async def extract(
        self, markdown: str, *, shares: tuple[CallShare, ...] = (), caller: Caller | None = None, kept: KeptAnswers | None = None
    ) -> Extraction:
        """Return what the model finds. LLMError where its answer does not fit the schema after one repair, or cannot be used; otherwise
        what Service.exchange raises. With `kept` the answer for each part but the last is durable before the next is asked for."""
        parts = await in_thread(self.plan, markdown)
        if len(parts) == 1:
            kept = None
        known = {} if kept is None else await kept.kept_answers()
        answers: list[PartAnswer] = []
        for number, text in enumerate(parts, start=1):
            asked = self._asked(text, number, len(parts))
            answer = known.get(asked)
            if answer is None:
                messages = await in_thread(prompt.ask, text, number=number, count=len(parts))
                answer = await self._answer(messages, shares, caller or self.caller)
                if kept is not None and number < len(parts):
                    await kept.keep_answer(number, asked, answer)
            answers.append(answer)
        data = answers[0].data
        if len(answers) > 1:
            data, problems = self.shape.check(trim(merge([answer.data for answer in answers]), self.shape.schema))
            if problems:
                if kept is not None:
                    await kept.drop_answers()
                raise self._unfit(f"The answers for {len(parts)} parts do not fit EXTRACTION_SCHEMA once merged", problems)
        return Extraction(
            data,
            answers[-1].model,
            self.shape,
            len(parts),
            sum(answer.repairs for answer in answers),
            sum(answer.tokens_in for answer in answers),
            sum(answer.tokens_out for answer in answers),
        )

    def _asked(self, text: str, number: int, count: int) -> str:
        """Return the SHA-256 of all that decides what an answer for a part is worth."""
        question = [prompt.VERSION, self.service.host, self.model, self.shape.sha256, number, count, text]
        return hashlib.sha256(json.dumps(question).encode()).hexdigest()

    async def _answer(self, messages: list[prompt.Message], shares: tuple[CallShare, ...], caller: Caller) -> PartAnswer:
        """Return what fits: the first answer, or else its repair."""
        replies: list[Reply[Said]] = []
        for last in (False, True):
            texts = [*(message.content for message in messages), str(self.shape.schema)]
            tokens = await in_thread(lambda texts: sum(map(estimate_tokens, texts)), texts)
            most = self.limits.max_answer_tokens
            send = partial(complete, self.service, self.model, messages, shape=self.shape, max_tokens=most)
            purpose = CallPurpose("extract", shares, model=self.model, tokens=tokens + most, tokens_out=most)
            reply = await caller.call(send, purpose)
            said = reply.value
            data, problems = (said.data, ["$: no JSON object"]) if said.data is None else self.shape.check(said.data)
            counted = tokens if reply.tokens_in is None else reply.tokens_in
            replies.append(replace(reply, value=Said(said.words, data, said.model), tokens_in=counted))
            if not problems:
                break
            if last:
                raise self._unfit("The answer does not fit EXTRACTION_SCHEMA, and not after one repair", problems)
            messages = prompt.repair(messages, said.words[:LONGEST_REPAIRED], problems)
        return PartAnswer(
            replies[-1].value.data,
            replies[-1].value.model,
            len(replies) - 1,
            sum(reply.tokens_in or 0 for reply in replies),
            sum(reply.tokens_out or 0 for reply in replies),
        )

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
            "tokens_in": extraction.tokens_in,
            "tokens_out": extraction.tokens_out,
        },
    }


def make_extractor(settings: Settings, caller: Caller = DIRECT) -> ModelExtractor | None:
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
    return ModelExtractor(service, settings.extraction_model, load_shape(settings.extraction_schema), limits, caller)
