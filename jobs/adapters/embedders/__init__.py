"""Turning texts into vectors. Every local embedder is deterministic to the bit: the same text gives the same vector in any company."""

from __future__ import annotations

from jobs.adapters.embedders.hashed import HashedText, HashedWords
from jobs.adapters.embedders.hosted import HostedEmbedder, make_hosted
from jobs.adapters.embedders.minilm import SentenceModel, make_minilm, make_own_model
from jobs.adapters.embedders.requests import bisect, plan_requests
from jobs.adapters.embedders.static import Static
from models.settings import Settings

__all__ = [
    "HashedText",
    "HashedWords",
    "HostedEmbedder",
    "SentenceModel",
    "Static",
    "bisect",
    "make_embedder",
    "make_hosted",
    "make_minilm",
    "make_own_model",
    "plan_requests",
]


def make_embedder(settings: Settings) -> SentenceModel | Static | HashedWords | HostedEmbedder:
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
