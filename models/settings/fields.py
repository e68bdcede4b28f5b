"""Every setting with its default, its allowed values and its meaning. `.env.example` and docs/configuration.md are made from this file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Interval
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from models.settings.checks import (
    AnyCase,
    AnyCaseUpper,
    Conninfo,
    Folder,
    FolderInBase,
    LogFile,
    OptionalFile,
    SizesByType,
    WebUrl,
    Words,
    sizes_by_type,
    usable_cores,
)
from models.settings.providers import ProviderSettings
from models.settings.secret_files import SecretFiles, secret_files_of
from models.settings.serving import ServingSettings

SERVER_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGDATABASE", "PGSERVICE")
"""The libpq variables that name a server; with any of them set, the embedded server stays off."""


class Settings(ServingSettings, ProviderSettings):
    """All configuration. The attribute `max_pages` is the environment variable `MAX_PAGES`; `load_settings()` reads it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,  # compose files pass unset variables on as empty ones
        hide_input_in_errors=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    # Database
    database_url: Conninfo = None
    """Where Postgres is. Unset: the PG* variables say it (PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSSLMODE and so on);
    without them an embedded server starts by itself."""
    database_url_direct: Conninfo = None
    """A way to the same database around a transaction pooler such as PgBouncer, for LISTEN and migrations; it tells
    docmill that there is one. Unset: DATABASE_URL."""
    database_max_connections: Annotated[int, Interval(ge=2, le=1000)] = 10
    """Most pooled connections of one process."""
    database_timeout: Annotated[float, Interval(ge=0.1, le=3600)] = 30
    """Seconds to wait for a connection."""

    # Storage
    storage_base_path: Annotated[Folder, Words(default=".docmill in the working directory")] = Field(
        default_factory=lambda: Path.cwd() / ".docmill"
    )
    """Where all files are kept. Workers on several hosts need the same shared folder."""
    storage_uploads_dir: FolderInBase = "uploads"
    """Copies of the submitted files."""
    storage_extracted_dir: FolderInBase = "extracted"
    """Parsed text, for people to read."""
    storage_temp_dir: FolderInBase = "temp"
    """Files that are being written or unpacked."""
    storage_logs_dir: FolderInBase = "logs"
    """Log files, where LOG_FILE_PATH is relative."""

    # Logging
    log_level: Annotated[Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"], AnyCaseUpper] = "INFO"
    """Least severe level that is logged."""
    log_format: Annotated[Literal["text", "json"], AnyCase] = "text"
    """text for people; json, one object a line, for machines."""
    log_file_path: LogFile = None
    """Log to this file too, one file a process: role, host name and process id are put before its suffix unless the name places
    them itself. A relative name lies in STORAGE_LOGS_DIR. Unset: console only."""
    log_rotation_mb: Annotated[float, Interval(ge=0.001, le=10_000)] = 50
    """Size at which a log file is rotated, in MB of 1,000,000 bytes."""
    log_retention_files: Annotated[int, Interval(ge=1, le=10_000)] = 10
    """Rotated log files that a process keeps, and files of ended processes that are kept for longer than a day."""

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
    """Longest wait of a document for a rate limit or an outage, in hours; such waits count as no attempt. Then it is a dead letter.
    0: as long as it takes."""
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
    """Deadline of one stage, in seconds."""
    checkpoint_seconds: Annotated[float, Interval(ge=0, le=3600)] = 1.0
    """A stage that took longer than this many seconds is made durable before the next one starts."""
    small_documents_together: Annotated[int, Interval(ge=1, le=64)] = 16
    """Most small new documents of one user that a worker takes up at once where many wait; 1 for each by itself. Each may be 64 KB."""
    carry_limit_mb: Annotated[int, Interval(ge=1, le=100_000)] = 64
    """Results of one document that may wait in memory for the next checkpoint, in MB of 1,000,000 bytes."""
    worker_memory_limit_mb: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """A worker whose own memory, without its parsing processes, grows past this many MB of 1,000,000 bytes takes no more work, finishes
    what it has in hand and ends with exit code 0; whatever supervises it starts a new one. Each does at least one job. 0: no limit."""
    shutdown_grace_seconds: Annotated[float, Interval(ge=0, le=3600)] = 30
    """Seconds that work in hand has to end after SIGTERM."""
    submit_lock_timeout_seconds: Annotated[float, Interval(ge=0.01, le=300)] = 5
    """Seconds that a submission waits for somebody else's open transaction on the same document."""

    # Zip archives
    max_archive_mb: Annotated[int, Interval(ge=1, le=1_000_000)] = 10_000
    """Largest zip archive that is accepted, in MB of 1,000,000 bytes. MAX_FILE_SIZE_MB limits each file inside."""
    max_archive_unpacked_mb: Annotated[int, Interval(ge=1, le=10_000_000)] = 20_000
    """Most that an archive may hold when unpacked, archives inside of it included, in MB of 1,000,000 bytes."""
    max_archive_entries: Annotated[int, Interval(ge=1, le=1_000_000)] = 50_000
    """Most files that an archive may hold, archives inside of it included."""
    max_archive_ratio: Annotated[int, Interval(ge=2, le=100_000)] = 250
    """How many times as large as in the archive a file of more than 1 MB may be when unpacked."""

    # Parsing and chunking
    duplicate_policy: Annotated[Literal["reuse", "skip", "process"], AnyCase] = "reuse"
    """What becomes of content that the same user has already under another doc_id. reuse: text, vectors and extraction are copied.
    skip: the document ends as a duplicate without rows of its own. process: it is worked on like any other."""
    max_file_size_mb: Annotated[int, Interval(ge=1, le=100_000)] = 100
    """Largest file that is accepted, in MB of 1,000,000 bytes."""
    max_file_size_mb_by_type: SizesByType = ""
    """Lower limits for some types of files, by content: text=20,html=20,powerpoint=0. 0: such files are refused."""
    max_document_unpacked_mb: Annotated[int, Interval(ge=1, le=100_000)] = 1000
    """Most that an Office file, an OpenDocument file or an e-book, which are archives inside, may hold when unpacked, in MB of 1,000,000
    bytes. MAX_ARCHIVE_ENTRIES and MAX_ARCHIVE_RATIO hold for it too."""
    max_pages: Annotated[int, Interval(ge=1, le=1_000_000)] = 10_000
    """Most pages, slides or sheets of a document."""
    parse_timeout_seconds: Annotated[float, Interval(ge=0.1, le=86_400)] = 300
    """Seconds that a parser has for one file before it is killed."""
    parse_memory_mb: Annotated[int, Interval(ge=256, le=1_000_000)] = 4096
    """Address space of a parsing process, in MB of 1,000,000 bytes."""
    parse_output_mb: Annotated[int, Interval(ge=1, le=10_000)] = 256
    """Most text that a parser may return for one file, in MB of 1,000,000 bytes."""
    parse_processes: Annotated[int, Interval(ge=1, le=256)] = 2
    """Parsing processes of one worker."""
    chunk_size: Annotated[int, Interval(ge=100, le=20_000)] = 1000
    """Longest passage, in characters."""
    chunk_overlap: Annotated[int, Interval(ge=0, le=9_999), Words(allowed="0 to less than half of CHUNK_SIZE")] = 100
    """Characters of the passage before that a passage repeats."""

    # Embedding, extraction and search
    embedding_provider: Annotated[Literal["local", "fast", "hash", "openai"], AnyCase] = "local"
    """local: a sentence model on the CPU. fast: a static model, a hundred times faster and less exact. hash: word hashes, for tests.
    openai: any service that speaks OpenAI's protocol (OpenAI, Azure, vLLM, TEI, Ollama, LiteLLM).
    A database that has passages keeps its model whatever this says; `docmill reembed start` goes over to this one."""
    embedding_model_path: Annotated[OptionalFile, Words(allowed="an ONNX file with its tokenizer.json beside it", default="unset")] = None
    """One's own sentence model for EMBEDDING_PROVIDER=local. Unset: the one that is installed with docmill."""
    embedding_threads: Annotated[int, Interval(ge=1, le=256), Words(default="the usable cores, at most 4")] = Field(
        default_factory=lambda: usable_cores(at_most=4)
    )
    """Threads of the local model. More than there are cores make it slower."""
    extraction_required: Annotated[bool, Words(allowed="true or false")] = False
    """true: a document whose extraction fails is failed. false: it is finalised without, and the failure is recorded."""
    vector_index_threshold: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 10_000
    """Passages of one embedding model from which on a vector index is built."""

    # Folder sync
    sync_settle_seconds: Annotated[float, Interval(ge=0, le=3600)] = 2
    """Seconds that a file of a watched folder must have been left alone, or been missing, before `docmill sync --watch` believes it."""
    sync_rescan_seconds: Annotated[float, Interval(ge=0.1, le=86_400)] = 300
    """Seconds between two looks at a watched folder that sends no events."""

    # Outside services
    provider_connect_seconds: Annotated[float, Interval(ge=0.1, le=300)] = 10
    """Longest wait for a connection to an outside service, in seconds."""
    provider_read_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Longest silence of an outside service in mid-call, in seconds."""
    breaker_failures: Annotated[int, Interval(ge=1, le=10_000)] = 5
    """Failures of an outside service, over all workers, after which it is not called for a while: in a row, or within
    BREAKER_WINDOW_SECONDS and a tenth of its calls. A refused key or a quota that is used up is enough at once."""
    breaker_window_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Seconds in which the failures must lie."""
    breaker_open_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Seconds until one call tries whether the service is back; doubles while it is not."""
    breaker_max_open_seconds: Annotated[float, Interval(ge=0.1, le=86_400)] = 900
    """Longest time between two such tries, in seconds."""
    embedding_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the embedding service in any 60 s, over all workers that use the same address and key. 0: no limit."""
    embedding_tokens_per_minute: Annotated[int, Interval(ge=0, le=100_000_000_000)] = 0
    """Most tokens to the embedding service in any 60 s. 0: no limit."""
    extraction_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the extraction service in any 60 s, over all workers that use the same address and key. 0: no limit."""
    extraction_tokens_per_minute: Annotated[int, Interval(ge=0, le=100_000_000_000)] = 0
    """Most tokens to and from the extraction service in any 60 s. 0: no limit."""
    parse_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the parsing service in any 60 s, over all workers that use the same address and key. 0: no limit."""

    # Alerts
    alert_webhook_url: WebUrl = None
    """Where critical failures, such as new dead letters, are posted as JSON. Unset: they only stand in the table alerts and are notified
    on the channel docmill_alerts."""
    alert_timeout_seconds: Annotated[float, Interval(ge=0.1, le=300)] = 5
    """Seconds that the webhook has to answer."""

    # Retention
    event_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 0
    """Days that the audit trail of a document is kept that has ended and is still there. 0: for ever."""
    deleted_event_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 365
    """Days that the audit trail of a document is kept after its deletion. 0: for ever."""
    job_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 7
    """Days that ended jobs of docmill's tasks are kept in the queue's tables, with their events. 0: for ever."""
    dead_letter_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 90
    """Days that a dead letter is kept after it was requeued, discarded or superseded; open ones always are. 0: for ever."""
    alert_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 90
    """Days that alerts are kept; open ones, and those that a webhook may still be sent, always are. 0: for ever."""
    usage_retention_days: Annotated[int, Interval(ge=0, le=36_500)] = 400
    """Days that the ledger of calls to outside services is kept, from which costs are added up; their sums for longer, as long as the
    document or batch is there. 0: for ever."""
    orphan_file_days: Annotated[int, Interval(ge=0, le=36_500)] = 7
    """Days after which a stored file goes that no document, archive or batch refers to, because its submission was cut off. 0: never."""

    @field_validator("chunk_overlap")
    @classmethod
    def _less_than_half(cls, overlap: int, info: ValidationInfo) -> int:
        size = info.data.get("chunk_size")
        if size is not None and 2 * overlap >= size:
            raise ValueError(f"is not less than half of CHUNK_SIZE={size}")
        return overlap

    @field_validator("storage_extracted_dir", "storage_temp_dir", "storage_logs_dir")
    @classmethod
    def _own_folder(cls, folder: str, info: ValidationInfo) -> str:
        for other, taken in info.data.items():
            if other.startswith("storage_") and taken == folder:
                raise ValueError(f"is the folder of {other.upper()}")
        return folder

    def file_size_limit_mb(self, file_type: str) -> int:
        """Return the largest size of a file of a type, in MB; 0 where the type is refused."""
        return min(self.max_file_size_mb, sizes_by_type(self.max_file_size_mb_by_type).get(file_type, self.max_file_size_mb))

    @property
    def database_conninfo(self) -> str | None:
        """The connection string; empty when libpq's PG* variables say it all; None for the embedded server. May hold a password."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return "" if any(os.environ.get(name) for name in SERVER_VARIABLES) else None

    @property
    def database_conninfo_direct(self) -> str | None:
        """Like `database_conninfo`, but around a transaction pooler where DATABASE_URL_DIRECT names the way."""
        return self.database_conninfo if self.database_url_direct is None else self.database_url_direct.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments win over NAME_FILE (a secret in a file), that over the environment, that over `.env`."""
        return init_settings, SecretFiles(settings_cls, env_settings, dotenv_settings), env_settings, dotenv_settings


def secret_files() -> dict[str, Path]:
    """Return which file each NAME_FILE names, in the environment or in `.env`."""
    return secret_files_of(Settings)


def allowed_values(name: str) -> str:
    """Say in words which values a setting may have, for example `2 to 1000`."""
    field = Settings.model_fields[name]
    if words := next((mark.allowed for mark in field.metadata if isinstance(mark, Words) and mark.allowed), None):
        return words
    if options := get_args(field.annotation):
        return " or ".join(str(option) for option in options)
    interval = next(mark for mark in field.metadata if isinstance(mark, Interval))
    return f"{interval.ge} to {interval.le}"


def default_value(name: str) -> str:
    """Say in words what a setting is when it is not given."""
    field = Settings.model_fields[name]
    words = next((mark.default for mark in field.metadata if isinstance(mark, Words) and mark.default), None)
    return words or str(field.default).replace("False", "false")
