"""The settings of what is accepted and what becomes of it: archives, parsing, passages, vectors, folders in sync."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import AnyCase, OptionalFile, SizesByType, Words, sizes_by_type, usable_cores


class DocumentSettings(BaseSettings):
    """Part of `Settings`."""

    model_config = SettingsConfigDict(defer_build=True)

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

    @field_validator("chunk_overlap")
    @classmethod
    def _less_than_half(cls, overlap: int, info: ValidationInfo) -> int:
        size = info.data.get("chunk_size")
        if size is not None and 2 * overlap >= size:
            raise ValueError(f"is not less than half of CHUNK_SIZE={size}")
        return overlap

    def file_size_limit_mb(self, file_type: str) -> int:
        """Return the largest size of a file of a type, in MB; 0 where the type is refused."""
        return min(self.max_file_size_mb, sizes_by_type(self.max_file_size_mb_by_type).get(file_type, self.max_file_size_mb))
