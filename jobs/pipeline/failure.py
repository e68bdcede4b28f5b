"""What is recorded about a failure. Nothing here decides or writes."""

from __future__ import annotations

from typing import Any

from psycopg.types.json import Jsonb

from jobs.adapters.usage import Usage
from jobs.pipeline.checkpoint import Failure, Outcome
from jobs.pipeline.work import StageEvent, Work
from jobs.redaction import describe, render_traceback
from jobs.retry import RetryPlan, classify_error
from models.documents import Document
from models.errors import DocmillError
from models.stages import State

_MESSAGE_LIMIT = 2_000  # characters
_TRACEBACK_LIMIT = 20_000  # characters, the last ones


def describe_failure(document: Document, stage: str, error: Exception, *, attempt: int, worker: str) -> Failure:
    """Return what the document's row and its dead letter say about an exception."""
    return Failure(
        stage=stage,
        error_type=classify_error(error),
        message=_storable(describe(error).strip() or type(error).__name__)[:_MESSAGE_LIMIT],
        traceback=_storable(render_traceback(error))[-_TRACEBACK_LIMIT:],
        context={
            "exception": f"{type(error).__module__}.{type(error).__qualname__}",
            "milestone": document.milestone,
            "attempt": attempt,
            "worker": worker,
            "file_name": document.file_name,
        },
        turn=error.turn if isinstance(error, DocmillError) else None,
    )


def failure_event(failure: Failure, plan: RetryPlan | None, attempt: int, used: Usage) -> StageEvent:
    """Return what the audit trail says: failed for good, or when it is tried again and whether that counts; and what the try has cost."""
    detail: dict[str, Any] = {"error_type": failure.error_type, "error_message": failure.message}
    if plan is not None:
        detail |= {"delay_seconds": round(plan.delay, 3), "counts": plan.counts}
    spent = {"cpu_ms": round(used.cpu_ms, 3), "peak_memory_mb": round(used.peak_memory_mb, 1) or None}
    return StageEvent("failed" if plan is None else "retry_scheduled", failure.stage, attempt, **spent, detail=detail)


def outcome_of(plan: RetryPlan | None, failure: Failure, attempt: int) -> Outcome:
    """Return where a failure leaves the document: waiting for its next try, or failed."""
    if plan is None:
        return Outcome(State.FAILED, retry_count=attempt, failure=failure)
    return Outcome(State.RETRYING, failure.stage, plan.delay, attempt + plan.counts, failure, waits=not plan.counts)


def fenced_params(work: Work, stage: str | None, worker: str) -> dict[str, Any]:
    """Return the parameters of the event that says that work was dropped because the claim had moved on."""
    document = work.document
    return {
        "doc_id": document.doc_id,
        "version": document.version,
        "batch_id": document.batch_id,
        "user_id": document.user_id,
        "correlation_id": document.correlation_id,
        "stage": stage,
        "event": "fenced_off",
        "worker": worker,
        "claim": work.claim,
        "detail": Jsonb({"milestone": document.milestone}),
    }


def _storable(text: str) -> str:
    """Return text that Postgres can store: no NUL, no lone surrogates."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()
