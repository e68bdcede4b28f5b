"""The settings of how work is done: retries, leases, deadlines, and how much at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import AnyCase


class WorkSettings(BaseSettings):
    """Part of `Settings`."""

    model_config = SettingsConfigDict(defer_build=True)

    # Retries
    max_retry_attempts: Annotated[int, Interval(ge=0, le=100)] = 3
    """Retries after the first try of a stage."""
    retry_base_delay_seconds: Annotated[float, Interval(ge=0, le=3600)] = 2.0
    """Seconds before the first retry; doubles with each further one."""
    retry_max_delay_seconds: Annotated[float, Interval(ge=0, le=86_400)] = 300
    """Longest delay between two retries, in seconds."""
    max_crashes: Annotated[int, Interval(ge=1, le=100)] = 3
    """Crashes of its worker, with no other document in it, that make a document a dead letter."""
    max_requeues: Annotated[int, Interval(ge=1, le=1000)] = 10
    """How often a document whose job was lost before any worker began it is queued again at one milestone before it is failed, visibly."""
    reconcile_seconds: Annotated[float, Interval(ge=0.05, le=3600)] = 5
    """Seconds between two passes of the reconciler that every worker runs."""
    watchdog_seconds: Annotated[float, Interval(ge=1, le=86_400)] = 120
    """A worker whose event loop is stuck for this long, or whose queries hang this long although the database answers, ends itself."""
    max_wait_hours: Annotated[float, Interval(ge=0, le=8760)] = 72
    """Longest wait of a document for a rate limit, an outage, the storage or a full disk of the database, in hours, and of an archive for
    the storage; such waits count as no attempt. Then it is a dead letter, or failed. 0: as long as it takes."""
    batch_processing_timeout: Annotated[float, Interval(ge=1, le=604_800)] = 1800
    """Seconds without progress, while one of its documents is being worked on, after which a batch is failed."""

    # Workers
    handoff: Annotated[Literal["inline", "queue"], AnyCase] = "inline"
    """inline: a worker carries a document on through all stages whose queues it listens to. queue: every stage waits in its queue."""
    worker_concurrency: Annotated[int, Interval(ge=1, le=1000)] = 4
    """Documents that one worker works on at a time. One that only waits for the embedding service lends its place to another; four times
    as many wait at most."""
    max_documents_per_user: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """Documents of one user that are in work at once, over all workers, which should all be given the same number; 0 for as many as there
    are workers for. Whatever it is, users take turns: the one with the fewest documents in work goes first. Among the documents of a user
    the highest priority goes first, then what has been begun, then the oldest."""
    worker_poll_seconds: Annotated[float, Interval(ge=0.02, le=60)] = 0.5
    """Seconds after which an idle worker looks for work that no notification announced."""
    lease_seconds: Annotated[float, Interval(ge=2, le=3600)] = 60
    """Seconds that a claim on a document holds without renewal."""
    stage_timeout_seconds: Annotated[float, Interval(ge=1, le=86_400)] = 1800
    """Deadline of one stage, in seconds. Past it the stage is tried again; that counts unless something paid for was kept."""
    checkpoint_seconds: Annotated[float, Interval(ge=0, le=3600)] = 1.0
    """A stage that took longer than this many seconds is made durable before the next one starts; of documents that are worked on together
    each took its part of them."""
    small_documents_together: Annotated[int, Interval(ge=1, le=64)] = 16
    """Most small documents of one user that a worker takes up at once where many wait for the same stage; 1 for each by itself. Each may be
    64 KB. Not where the local model, a hosted parser or a model that extracts works on each."""
    carry_limit_mb: Annotated[int, Interval(ge=1, le=100_000)] = 64
    """Results of one document that may wait in memory for the next checkpoint, in MB of 1,000,000 bytes."""
    worker_memory_limit_mb: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """A worker whose own memory, without its parsing processes, grows past this many MB of 1,000,000 bytes takes no more work, finishes
    what it has in hand and ends with exit code 0; whatever supervises it starts a new one. Each does at least one job. 0: no limit."""
    shutdown_grace_seconds: Annotated[float, Interval(ge=0, le=3600)] = 30
    """Seconds that work in hand has to end after SIGTERM."""
    submit_lock_timeout_seconds: Annotated[float, Interval(ge=0.01, le=300)] = 5
    """Seconds that a submission waits for somebody else's open transaction on the same document or batch."""
