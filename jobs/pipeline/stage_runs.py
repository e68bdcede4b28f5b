"""Runs the stages of a worker's documents, each with the tools for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs.pipeline.checkpoint import FencedOff
from jobs.pipeline.claims import Connection
from jobs.pipeline.durable import CheckpointFailed
from jobs.pipeline.endings import Endings
from jobs.pipeline.failure import describe_failure
from jobs.pipeline.keeping import Keeping
from jobs.pipeline.running import STAGE_FUNCTIONS, StageFunction, run_stage, run_within
from jobs.pipeline.shared_tools import shared
from jobs.pipeline.sharing import Sharing
from jobs.pipeline.work import StageEvent, Work
from jobs.redaction import describe
from jobs.retry import StageRetry
from jobs.stages import Tools, extract
from models.documents import Document
from models.settings import Settings
from models.stages import Milestone, Stage


async def _none(document: Document) -> None:
    """There is none."""


class StageRuns:
    """The stages in one worker."""

    def __init__(
        self,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        *,
        tools: Tools,
        endings: Endings,
        retry: StageRetry,
        sharing: Sharing,
        worker: str,
        lease_seconds: float,
        stopping: Callable[[], bool],
        stages: dict[str, StageFunction] | None,
    ) -> None:
        """`stages`: by name, None for docmill's own; the others as in Runner."""
        self._settings, self._pool, self._tools, self._endings, self._retry = settings, pool, tools, endings, retry
        self._sharing, self._worker, self._lease_seconds, self._stopping = sharing, worker, lease_seconds, stopping
        self._stages = stages or STAGE_FUNCTIONS

    async def original(self, document: Document) -> str | None:
        """Return the doc_id of the complete document for which this one is to be skipped, if any."""
        return await self._tools.find_original(document) if self._settings.duplicate_policy == "skip" else None

    async def run(self, stage: Stage, work: Work) -> float:
        """Run one stage. A document whose extraction fails for good goes on without, unless EXTRACTION_REQUIRED."""
        try:
            return await self._run_stage(stage, work, self._stages[stage.name])
        except (FencedOff, CheckpointFailed):
            raise
        except Exception as error:
            attempt = work.attempt_at(stage.due_at)
            final = self._retry.judge(error, work.waited_at(stage.due_at))
            if stage.name != "extract" or self._settings.extraction_required or self._retry.plan(final, attempt) is not None:
                raise
            failure = describe_failure(work.document, stage.name, final, attempt=attempt, worker=self._worker)
            told = {"error_type": failure.error_type, "error_message": failure.message}
            work.events.append(StageEvent("extraction_failed", stage.name, attempt, detail=told))
            logger.bind(error_type=failure.error_type, duration_ms=work.stage_taken_ms()).error(
                "The document goes on without its extraction: {}: {}", failure.error_type, failure.message
            )
            return await self._run_stage(stage, work, partial(extract.run_without, failure=told))

    async def _run_stage(self, stage: Stage, work: Work, run: StageFunction) -> float:
        return await run_stage(stage, work, run, self._tools_for(work), limit=self._settings.stage_timeout_seconds)

    def _tools_for(self, work: Work, *, keeps_vectors: bool = True) -> Tools:
        keeping = Keeping(
            self._pool,
            work,
            lease_seconds=self._lease_seconds,
            checkpoint=self._endings.keep,
            stopping=self._stopping,
            sharing=self._sharing,
            keeps_vectors=keeps_vectors,
        )
        tools = self._tools if work.together is None else shared(self._tools, work.together)
        if work.is_sole:  # the claim has said so already
            return replace(tools, paid=keeping, find_original=_none, original_text=_none)
        return replace(tools, paid=keeping)

    async def embed_once_more(self, work: Work, *, keeps_vectors: bool = True) -> None:
        """Give a document that is past embed vectors of one model. It stays at its milestone, and the audit trail has embed already."""
        tools, limit = self._tools_for(work, keeps_vectors=keeps_vectors), self._settings.stage_timeout_seconds
        work.document = await run_within("embed", work, self._stages["embed"], tools, limit=limit)

    async def embed_again(self, work: Work) -> None:
        """Take the vectors of the model that has come to serve; where that cannot be, the re-embedding job adds them afterwards.

        Until all are there the old ones stay, so that a document whose worker stops, or which the new model refuses, has them still.
        """
        work.takes_any_model = True
        choose = self._tools.choose_embedder
        finished, completed = work.document, work.events.pop()
        # A checkpoint comes before what is paid for, and nothing is complete until it is swapped in.
        work.document = replace(finished, milestone=Milestone.EXTRACTED)
        work.part()
        try:
            if choose is not None and (await choose(fresh=True)).model != finished.embedding_model:
                await self.embed_once_more(work, keeps_vectors=False)
        except (FencedOff, CheckpointFailed):
            raise
        except Exception as error:
            logger.warning("{} keeps its vectors of {}: {}", finished.file_name, finished.embedding_model, describe(error))
        work.document = replace(work.document, milestone=finished.milestone)
        work.events.append(completed)
