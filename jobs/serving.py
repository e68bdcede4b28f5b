"""Which model serves searches, as the database says, and the embedder for it in this process."""

from __future__ import annotations

import math
from functools import cache

from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import clock
from jobs.adapters.embedders import make_embedder, make_embedder_of
from jobs.adapters.exchange import DIRECT
from jobs.pipeline.claims import Connection, one
from jobs.stages import Embedder
from models.calls import Caller
from models.errors import ConfigurationError
from models.settings import Settings

_SEEN_SECONDS = 1.0
"""For which what a worker has seen is good enough: a document that has vectors of another model by its end is embedded again."""


@cache
def own_embedder(settings: Settings, caller: Caller = DIRECT) -> Embedder:
    """Return the embedder that EMBEDDING_PROVIDER names, one a process and caller."""
    return make_embedder(settings, caller)


@cache
def embedder_of(settings: Settings, model: str, caller: Caller = DIRECT) -> Embedder:
    """Return the embedder of a model, one a process and caller; a ConfigurationError where it cannot be made here."""
    try:
        own = own_embedder(settings, caller)
    except ConfigurationError:
        return make_embedder_of(settings, model, caller)
    return own if own.model == model else make_embedder_of(settings, model, caller)


async def serving_model(conn: Connection) -> str | None:
    """Return the model that queries must be embedded with; None while there are no passages."""
    row = await one(conn, "serving_model", {})
    return None if row is None else row["embedding_model"]


class ServingEmbedder:
    """Chooses the embedder of each document: the serving model's where it can be made here, else EMBEDDING_PROVIDER's."""

    def __init__(self, settings: Settings, pool: AsyncConnectionPool[Connection], caller: Caller = DIRECT) -> None:
        self._settings = settings
        self._pool = pool
        self._caller = caller
        self._told: set[str] = set()
        self._seen: str | None = None
        self._seen_at = -math.inf

    async def choose(self, *, fresh: bool = False) -> Embedder:
        """Return the embedder that a document is to be embedded with now: see jobs.stages.ChooseEmbedder."""
        if fresh or self._seen is None or clock.seconds() - self._seen_at > _SEEN_SECONDS:
            async with self._pool.connection() as conn:
                self._seen, self._seen_at = await serving_model(conn), clock.seconds()
        model = self._seen
        own = own_embedder(self._settings, self._caller)
        if model is None or model == own.model:
            return own
        try:
            made = embedder_of(self._settings, model, self._caller)
        except ConfigurationError as error:
            # Other workers will add the serving model's vectors; until then only searches by word find these passages.
            self._tell(model, f"Documents are embedded with {own.model} although {model} serves searches: {error}")
            return own
        self._tell(
            model,
            f"EMBEDDING_PROVIDER={self._settings.embedding_provider} stands for {own.model}, but {model} serves searches and is used. "
            "`docmill reembed start` goes over to another model.",
        )
        return made

    def _tell(self, model: str, message: str) -> None:
        if model not in self._told:
            self._told.add(model)
            logger.warning("{}", message)
