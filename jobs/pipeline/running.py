"""The stages in code, and how one of them is run: within its deadline, measured, with its event noted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from loguru import logger

from jobs import clock, faults
from jobs.adapters.usage import measured
from jobs.outages import drop_late
from jobs.pipeline.details import stage_detail
from jobs.pipeline.work import StageEvent, Work
from jobs.stages import Tools, check, chunk, embed, extract, finalize, parse, validate
from jobs.tracing import span
from models.documents import Document
from models.errors import StageTimeout
from models.stages import Stage

StageFunction = Callable[[Document, Tools], Awaitable[Document]]

STAGE_FUNCTIONS: dict[str, StageFunction] = {
    "validate": validate.run,
    "parse": parse.run,
    "check": check.run,
    "chunk": chunk.run,
    "embed": embed.run,
    "extract": extract.run,
    "finalize": finalize.run,
}


async def run_stage(stage: Stage, work: Work, run: StageFunction, tools: Tools, *, limit: float) -> float:
    """Run one stage for at most `limit` seconds, note its event, and return how long it took in seconds."""
    started = work.stage_began_at = clock.seconds()
    attempt = work.attempt_at(stage.due_at)
    with span(stage.name, doc_id=work.document.doc_id, stage=stage.name, attempt=attempt) as note, measured() as usage:
        work.used = usage
        document = await run_within(stage.name, work, run, tools, limit=limit)
        note(cpu_ms=usage.cpu_ms, peak_memory_mb=usage.peak_memory_mb, file_type=document.file_type, file_size=document.file_size)
    elapsed = clock.seconds() - started
    work.document = replace(document, milestone=stage.reaches)
    logger.bind(duration_ms=round(elapsed * 1000, 1), cpu_ms=round(usage.cpu_ms, 1)).debug("{} is through", stage.name)
    work.events.append(
        StageEvent(
            "completed" if stage.name == "finalize" else "stage_completed",
            stage.name,
            attempt,
            round(elapsed * 1000, 3),
            round(usage.cpu_ms, 3),
            round(usage.peak_memory_mb, 1) or None,
            stage_detail(stage.name, work.document),
        )
    )
    return elapsed


async def run_within(name: str, work: Work, run: StageFunction, tools: Tools, *, limit: float) -> Document:
    """Return what a stage makes of the document in at most `limit` seconds; the work stays as it is. StageTimeout after that."""
    work.lease.deadline = clock.seconds() + limit
    work.advanced = False
    try:
        async with asyncio.timeout(limit) as deadline:
            await faults.at(f"stage_started:{name}", work.document.doc_id)
            document = await run(work.document, tools)
            await faults.at(f"stage_done:{name}", work.document.doc_id)
        await drop_late(deadline)
    except TimeoutError as error:
        if not deadline.expired():
            raise
        message = f"{work.document.file_name}: {name} took longer than STAGE_TIMEOUT_SECONDS={limit:g}."
        raise StageTimeout(message, advanced=work.advanced) from error
    return document
