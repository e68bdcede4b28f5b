"""What the operations on documents and batches answer with: rows as they stood when they were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from models.documents import FileType
from models.errors import ErrorType
from models.stages import Milestone, State

BatchStatus = Literal["pending", "processing", "completed", "completed_with_errors", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRecord:
    """One document."""

    doc_id: str
    user_id: str
    batch_id: str | None
    run_id: UUID | None
    file_name: str
    source_path: str | None
    file_path: str
    """The stored upload, relative to the storage base path."""
    file_type: FileType | None
    mime_type: str | None
    file_size: int | None
    content_sha256: str | None
    version: int
    served_version: int | None
    """The version that searches see."""
    milestone: Milestone
    state: State
    status: str
    """The coarse word: pending, processing, completed or failed."""
    stage_due: str | None
    priority: int
    page_count: int | None
    chunk_count: int | None
    duplicate_of: str | None
    """The doc_id of the document with the same content that was complete first; None where there is none any more."""
    retry_count: int
    crash_count: int
    error_type: ErrorType | None
    error_message: str | None
    correlation_id: str
    metadata: Mapping[str, Any]
    created_at: datetime
    updated_at: datetime
    processing_started_at: datetime | None
    processing_completed_at: datetime | None
    processing_duration_ms: int | None
    raw_extraction: Mapping[str, Any] | None = None
    """Of the served version; docs/raw_extraction.schema.json. Left out in lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch with its current run."""

    batch_id: str
    run_id: UUID
    user_id: str
    source_path: str | None
    status: BatchStatus
    error_message: str | None
    """Why it failed, in plain words."""
    total_files: int
    correlation_id: str
    metadata: Mapping[str, Any]
    created_at: datetime
    """When it was first submitted."""
    run_started_at: datetime
    sealed_at: datetime | None
    """When everything had been submitted."""
    completed_at: datetime | None
    """When it ended, however it ended; None while it goes on."""
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatistics:
    """The current run of a batch in figures."""

    batch_id: str
    run_id: UUID
    status: BatchStatus
    files: int
    """Documents, and archives that are not unpacked."""
    queued: int
    working: int
    retrying: int
    complete: int
    failed: int
    duplicate: int
    cancelled: int
    archives_open: int
    archives_failed: int
    pages: int
    passages: int
    """Pages and passages of documents that ended well."""
    bytes: int
    """Of the uploads."""
    retries: int
    """Failures that counted at the documents' present milestones."""
    crashes: int
    first_started_at: datetime | None
    last_progress_at: datetime | None
    mean_duration_ms: float | None
    max_duration_ms: int | None
    by_file_type: Mapping[str, int]
    by_error_type: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The summary of one run; docs/run_summary.schema.json describes both documents."""

    run_id: UUID
    batch_id: str
    user_id: str
    ui_json: Mapping[str, Any]
    nested_summary: Mapping[str, Any]
    file_count: int
    success_count: int
    error_count: int
    created_at: datetime
    """When the run first ended."""
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Advice:
    """Whether a document should be processed again, and why. True or false like its answer."""

    answer: bool
    reason: str

    def __bool__(self) -> bool:
        """Return the answer."""
        return self.answer


@dataclass(frozen=True, slots=True)
class Retry:
    """A failed document was taken up again: at which stage, and how often that has been done by hand, this time included."""

    stage: str
    count: int
