"""Turning texts into vectors. Every local embedder is deterministic to the bit: the same text gives the same vector in any company."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from jobs.adapters.embedders.hashed import HashedText, HashedWords
from jobs.adapters.embedders.hosted import OWN_DIMENSIONS, HostedEmbedder, SizedText, make_hosted
from jobs.adapters.embedders.minilm import SentenceModel, make_minilm, make_own_model
from jobs.adapters.embedders.requests import bisect, fill_request, plan_requests
from jobs.adapters.embedders.static import Static
from jobs.adapters.exchange import DIRECT
from models.calls import Caller
from models.errors import ConfigurationError
from models.settings import Settings

__all__ = [
    "HashedText",
    "HashedWords",
    "HostedEmbedder",
    "SentenceModel",
    "SizedText",
    "Static",
    "bisect",
    "fill_request",
    "make_embedder",
    "make_embedder_of",
    "make_hosted",
    "make_minilm",
    "make_own_model",
    "plan_requests",
]

Made = SentenceModel | Static | HashedWords | HostedEmbedder

_HASHED_WORDS = re.compile(r"hashed-words-([1-9]\d{0,3})@1")
_HOSTED = re.compile(r"(.+)@([1-9]\d{1,4})")


def make_embedder(settings: Settings, caller: Caller = DIRECT) -> Made:
    """Return the embedder that EMBEDDING_PROVIDER names. Only a model of one's own is loaded before the first text.

    A hosted one makes its requests through `caller`.
    """
    match settings.embedding_provider:
        case "local" if settings.embedding_model_path is not None:
            return make_own_model(settings.embedding_model_path, threads=settings.embedding_threads)
        case "local":
            return make_minilm(threads=settings.embedding_threads)
        case "fast":
            return Static()
        case "hash":
            return HashedWords()
        case "openai":
            return make_hosted(settings, caller)


def _makers(settings: Settings, model: str, caller: Caller) -> Iterator[Callable[[], Made]]:
    """Yield ways to make an embedder here that might be the one of a model: EMBEDDING_PROVIDER's first, those that load a file last."""
    yield lambda: make_embedder(settings, caller)
    if found := _HASHED_WORDS.fullmatch(model):
        yield lambda: HashedWords(int(found.group(1)))
    yield Static
    yield lambda: make_minilm(threads=settings.embedding_threads)
    own = settings.embedding_model_path
    if own is not None:
        yield lambda: make_own_model(own, threads=settings.embedding_threads)
    service_is_set = settings.embedding_provider == "openai" or not {"embedding_base_url", "embedding_api_key"}.isdisjoint(
        settings.model_fields_set
    )
    if service_is_set and (hosted := _HOSTED.fullmatch(model)):
        # The size is asked for only where the model has another one by itself: not every server knows the field.
        size = None if OWN_DIMENSIONS.get(hosted.group(1)) == int(hosted.group(2)) else int(hosted.group(2))
        named = settings.model_copy(update={"embedding_model": hosted.group(1), "embedding_dimensions": size})
        yield lambda: make_hosted(named, caller)


def make_embedder_of(settings: Settings, model: str, caller: Caller = DIRECT) -> Made:
    """Return the embedder whose vectors are stored under this name; a ConfigurationError where these settings give none."""
    reasons: list[str] = []
    for make in _makers(settings, model, caller):
        try:
            made = make()
        except ConfigurationError as error:
            reasons.append(str(error))
            continue
        if made.model == model:
            return made
    raise ConfigurationError(
        f'The embedding model "{model}" cannot be made with these settings; see EMBEDDING_PROVIDER, '
        "EMBEDDING_MODEL_PATH and EMBEDDING_BASE_URL." + "".join(f" {reason}" for reason in dict.fromkeys(reasons))
    )
