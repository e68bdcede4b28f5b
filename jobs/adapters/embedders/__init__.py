"""Turning texts into vectors. Every local embedder is deterministic to the bit: the same text gives the same vector in any company."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from jobs.adapters.embedders.hashed import HashedText, HashedWords
from jobs.adapters.embedders.hosted import HostedEmbedder, make_hosted
from jobs.adapters.embedders.minilm import SentenceModel, make_minilm, make_own_model
from jobs.adapters.embedders.requests import bisect, plan_requests
from jobs.adapters.embedders.static import Static
from models.errors import ConfigurationError
from models.settings import Settings

__all__ = [
    "HashedText",
    "HashedWords",
    "HostedEmbedder",
    "SentenceModel",
    "Static",
    "bisect",
    "make_embedder",
    "make_embedder_of",
    "make_hosted",
    "make_minilm",
    "make_own_model",
    "plan_requests",
]

Made = SentenceModel | Static | HashedWords | HostedEmbedder

_HASHED_WORDS = re.compile(r"hashed-words-([1-9]\d{0,3})@1")


def make_embedder(settings: Settings) -> Made:
    """Return the embedder that EMBEDDING_PROVIDER names. Only a model of one's own is loaded before the first text."""
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
            return make_hosted(settings)


def _makers(settings: Settings, model: str) -> Iterator[Callable[[], Made]]:
    """Yield ways to make an embedder here that might be the one of a model: EMBEDDING_PROVIDER's first, those that load a file last."""
    yield lambda: make_embedder(settings)
    if found := _HASHED_WORDS.fullmatch(model):
        yield lambda: HashedWords(int(found.group(1)))
    yield Static
    yield lambda: make_minilm(threads=settings.embedding_threads)
    own = settings.embedding_model_path
    if own is not None:
        yield lambda: make_own_model(own, threads=settings.embedding_threads)


def make_embedder_of(settings: Settings, model: str) -> Made:
    """Return the embedder whose vectors are stored under this name; a ConfigurationError where these settings give none."""
    reasons: list[str] = []
    for make in _makers(settings, model):
        try:
            made = make()
        except ConfigurationError as error:
            reasons.append(str(error))
            continue
        if made.model == model:
            return made
    raise ConfigurationError(
        f'The embedding model "{model}" cannot be made with these settings; see EMBEDDING_PROVIDER and EMBEDDING_MODEL_PATH.'
        + "".join(f" {reason}" for reason in dict.fromkeys(reasons))
    )
