"""The seven stage tasks, registered on the App. Each hands its document to the runner."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from procrastinate import JobContext

from jobs.pipeline.company import Company
from jobs.retry import StageRetry
from jobs.services import OwnServices
from models.errors import PermanentError
from models.stages import STAGES
from procrastinate_app import app

if TYPE_CHECKING:
    from jobs.pipeline.runner import Runner
    from jobs.stages import Tools

_settings = app.settings
_runners: list[Runner] = []
company = Company()
"""Who works in this process: a document that is suspected of crashing it is alone in it, without re-embedding too."""

services = OwnServices(_settings, pool=lambda: app.pool, worker=app.worker_name, stopping=app.stopping, at_close=app.at_close)
"""The outside services that this worker calls."""

retry = StageRetry(
    max_attempts=_settings.max_retry_attempts,
    base=_settings.retry_base_delay_seconds,
    max_delay=_settings.retry_max_delay_seconds,
    max_wait_hours=_settings.max_wait_hours,
)


def _runner() -> Runner:
    """Return this worker's runner, made on first use: a worker that only waits loads no model and no stage, and starts no child."""
    if not _runners:
        _runners.append(_new_runner())
        app.job_manager.takes_along = _runners[0].takes_along
    return _runners[0]


def _new_runner() -> Runner:
    from jobs.adapters.storage import LocalStorage  # noqa: PLC0415
    from jobs.adapters.storage.copies import TextCopies  # noqa: PLC0415
    from jobs.pipeline.copying import Copier  # noqa: PLC0415
    from jobs.pipeline.runner import Runner  # noqa: PLC0415

    assert app.leases is not None
    tools = _tools()
    app.at_close.append(partial(_close, tools))
    copier = Copier(TextCopies(LocalStorage.from_settings(_settings)), keep=_settings.storage_keep_extracted)
    app.at_close.append(copier.aclose)
    return Runner(
        settings=_settings,
        pool=app.pool,
        tools=tools,
        leases=app.leases,
        retry=retry,
        worker=app.worker_name,
        stopping=app.stopping,
        finished_jobs=app.finished_jobs,
        company=company,
        lent_place=app.lent_place,
        claimed=app.job_manager.claimed,
        copier=copier,
    )


def _tools() -> Tools:
    """Return what the stages work with. Starts nothing yet."""
    from jobs.adapters.llamaparse import make_llamaparse  # noqa: PLC0415
    from jobs.adapters.llm import make_extractor  # noqa: PLC0415
    from jobs.adapters.sandbox import ProcessSandbox  # noqa: PLC0415
    from jobs.adapters.sandbox_child import Limits  # noqa: PLC0415
    from jobs.adapters.storage import LocalStorage  # noqa: PLC0415
    from jobs.pipeline.reading import Reading  # noqa: PLC0415
    from jobs.serving import ServingEmbedder, own_embedder  # noqa: PLC0415
    from jobs.stages import Tools  # noqa: PLC0415

    limits = Limits(timeout=_settings.parse_timeout_seconds, memory_mb=_settings.parse_memory_mb, max_output_mb=_settings.parse_output_mb)
    reading = Reading(app.pool)
    return Tools(
        settings=_settings,
        storage=LocalStorage.from_settings(_settings),
        sandbox=ProcessSandbox(children=_settings.parse_processes, limits=limits),
        embedder=own_embedder(_settings, services.caller("embedding")),
        known_vectors=reading.known_vectors,
        find_original=reading.find_original,
        original_text=reading.original_text,
        original_extraction=reading.original_extraction,
        extractor=make_extractor(_settings, services.caller("extraction")),
        hosted_parser=make_llamaparse(_settings, services.caller("parse")),
        choose_embedder=ServingEmbedder(_settings, app.pool, services.caller("embedding")).choose,
    )


async def _close(tools: Tools) -> None:
    from jobs.adapters.embedders import HostedEmbedder  # noqa: PLC0415
    from jobs.adapters.llamaparse import LlamaParse  # noqa: PLC0415
    from jobs.adapters.llm import ModelExtractor  # noqa: PLC0415
    from jobs.adapters.sandbox import ProcessSandbox  # noqa: PLC0415

    _runners.clear()
    for tool in (tools.sandbox, tools.embedder, tools.extractor, tools.hosted_parser):
        if isinstance(tool, ProcessSandbox | HostedEmbedder | ModelExtractor | LlamaParse):
            await tool.aclose()


async def _run(context: JobContext, doc_id: str) -> None:
    from jobs.pipeline.claiming import Job  # noqa: PLC0415 - as above

    if context.job.id is None or not isinstance(doc_id, str):
        raise PermanentError(f"The task {context.job.task_name} takes a doc_id, a string; it was given {doc_id!r}.")
    queues = frozenset(context.worker_queues) if context.worker_queues else None
    await _runner().run(Job(context.job.id, context.job.task_name, queues), doc_id)


for _stage in STAGES:
    app.task(name=_stage.name, queue=_stage.queue, retry=retry, pass_context=True)(_run)
