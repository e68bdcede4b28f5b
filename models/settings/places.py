"""The settings of where things are: the database, the stored files, the log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import AnyCase, AnyCaseUpper, Conninfo, Folder, FolderInBase, LogFile, Words

SERVER_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGUSER", "PGDATABASE", "PGSERVICE")
"""The libpq variables that name a server; with any of them set, the embedded server stays off."""


class PlaceSettings(BaseSettings):
    """Part of `Settings`."""

    model_config = SettingsConfigDict(defer_build=True)

    # Database
    database_url: Conninfo = None
    """Where Postgres is. Unset: the PG* variables say it (PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGSSLMODE and so on);
    without them an embedded server starts by itself."""
    database_url_direct: Conninfo = None
    """A way to the same database around a transaction pooler such as PgBouncer, for LISTEN and migrations; it tells
    docmill that there is one. Needs DATABASE_URL, or the PG* variables. Unset: DATABASE_URL."""
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
    """Copies of the parsed texts that are served, for people to read; see STORAGE_KEEP_EXTRACTED."""
    storage_keep_extracted: Annotated[bool, Words(allowed="true or false")] = True
    """Keep a copy of each text in STORAGE_EXTRACTED_DIR. docmill itself never reads one."""
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
    """Log to this file too, one file a process: role, host name and process id (in a container with its namespace) are put before its
    suffix unless the name places them itself. A relative name lies in STORAGE_LOGS_DIR. Unset: console only."""
    log_rotation_mb: Annotated[float, Interval(ge=0.001, le=10_000)] = 50
    """Size at which a log file is rotated, in MB of 1,000,000 bytes."""
    log_retention_files: Annotated[int, Interval(ge=1, le=10_000)] = 10
    """Rotated log files that a process keeps, and files of ended processes that are kept for longer than a day."""

    @field_validator("storage_extracted_dir", "storage_temp_dir", "storage_logs_dir")
    @classmethod
    def _own_folder(cls, folder: str, info: ValidationInfo) -> str:
        for other, taken in info.data.items():
            if other.startswith("storage_") and taken == folder:
                raise ValueError(f"is the folder of {other.upper()}")
        return folder

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
