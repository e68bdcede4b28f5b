"""The vocabulary of the pipeline: stages, milestones, states and queue names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Milestone(StrEnum):
    """The last stage that a document has completed. The order of definition is the order of progress."""

    UPLOADED = "uploaded"
    UPLOAD_VALIDATED = "upload_validated"
    PARSE_COMPLETE = "parse_complete"
    PARSE_VALIDATED = "parse_validated"
    CHUNKS_STORED = "chunks_stored"
    EMBEDDINGS_STORED = "embeddings_stored"
    EXTRACTED = "extracted"
    COMPLETE = "complete"


class State(StrEnum):
    """What is happening to a document now; `milestone` says how far it has come."""

    QUEUED = "queued"
    WORKING = "working"
    RETRYING = "retrying"
    COMPLETE = "complete"
    FAILED = "failed"
    DUPLICATE = "duplicate"
    CANCELLED = "cancelled"


UNFINISHED_STATES = frozenset({State.QUEUED, State.WORKING, State.RETRYING})


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the pipeline: a procrastinate task of the same name."""

    name: str
    queue: str
    due_at: Milestone
    """The stage is due while the document stands at this milestone."""
    reaches: Milestone
    """The milestone that the document stands at once the stage is durable."""


CPU_QUEUE = "cpu"
EMBED_QUEUE = "embed"
EXTRACT_QUEUE = "extract"

STAGES: tuple[Stage, ...] = (
    Stage("validate", CPU_QUEUE, Milestone.UPLOADED, Milestone.UPLOAD_VALIDATED),
    Stage("parse", CPU_QUEUE, Milestone.UPLOAD_VALIDATED, Milestone.PARSE_COMPLETE),
    Stage("check", CPU_QUEUE, Milestone.PARSE_COMPLETE, Milestone.PARSE_VALIDATED),
    Stage("chunk", CPU_QUEUE, Milestone.PARSE_VALIDATED, Milestone.CHUNKS_STORED),
    Stage("embed", EMBED_QUEUE, Milestone.CHUNKS_STORED, Milestone.EMBEDDINGS_STORED),
    Stage("extract", EXTRACT_QUEUE, Milestone.EMBEDDINGS_STORED, Milestone.EXTRACTED),
    Stage("finalize", CPU_QUEUE, Milestone.EXTRACTED, Milestone.COMPLETE),
)
"""The stages in order. The SQL function `due_stage` holds the same table; a test keeps them equal."""

_DUE = {stage.due_at: stage for stage in STAGES}
STAGE_BY_NAME = {stage.name: stage for stage in STAGES}


def due_stage(milestone: Milestone) -> Stage | None:
    """Return the stage that is due at a milestone, or None for a complete document."""
    return _DUE.get(milestone)
