"""One file per stage. A stage takes the document in hand and returns it with what it made; it writes nothing and catches nothing.

Every stage module has one coroutine `run(document, tools) -> Document`. `Tools` is all that a stage may use beside the document,
so that a stage can be tried without a database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, ParamSpec, Protocol, TypeVar

from jobs.adapters.stored_file import StoredFile
from jobs.adapters.usage import in_thread
from models.calls import Caller, CallShare
from models.documents import Document, OriginalExtraction, OriginalText
from models.errors import RequestRefused
from models.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.adapters.embedders import HostedEmbedder, SizedText
    from jobs.adapters.llamaparse import LlamaParse
    from jobs.adapters.llm import ModelExtractor, PartAnswer
    from jobs.adapters.sandbox_child import Answer

P = ParamSpec("P")
R = TypeVar("R")
SandboxCall = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
"""A function, its arguments and its named arguments."""


class Sandbox(Protocol):
    """Runs CPU-heavy or untrusted work in a child process with limits."""

    async def run(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run an importable function in a child. A crash, a loop or a limit is a ParseError, a wait too long a TimeoutError; DocmillErrors
        come through."""
        ...

    async def run_each(self, calls: Sequence[SandboxCall]) -> list[Answer]:
        """Run short calls, several of them one after the other in a child, and return an answer each. A crash or a limit is all theirs."""
        ...


class InThread(Protocol):
    """Runs a function in a thread and counts its CPU time."""

    async def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what it returns."""
        ...


class KnownVectors(Protocol):
    """Finds vectors that a user already has."""

    async def __call__(self, *documents: Document) -> dict[str, NDArray[np.float32]]:
        """Return those of passages of documents of one user and model: content_sha256 -> vector."""
        ...


class Embedder(Protocol):
    """Turns texts into vectors."""

    model: str
    """Name and version as stored beside each vector."""
    dimensions: int
    quick: bool
    """Whether a passage takes so little that many documents can be embedded at once while others wait."""

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]:
        """Return one L2-normalised row a text, shape (len(texts), dimensions), in order."""
        ...


class ChooseEmbedder(Protocol):
    """Says which embedder a document is to be embedded with now."""

    async def __call__(self, *, fresh: bool = False) -> Embedder:
        """Return that of the model that serves searches, as of a second ago at most; `fresh`: as of now."""
        ...


class Storage(Protocol):
    """Files below the storage base path."""

    def resolve(self, relative: str) -> Path:
        """Return the absolute path; a path that leaves the base is a PermanentError."""
        ...

    def file(self, relative: str) -> StoredFile:
        """Return a stored file for a sandbox's child to read; a path that leaves the base is a PermanentError."""
        ...

    def open(self, relative: str) -> AbstractContextManager[BinaryIO]:
        """Open a stored file for reading. PermanentError if the name is at fault; RetryableError if the storage is, also in the block."""
        ...


@dataclass(frozen=True, slots=True)
class HostedJob:
    """A job at an outside service that has been paid for."""

    job_id: str
    waited: float = 0.0
    """Seconds since it was started."""


JobPart = Literal["file", "failed_pages"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a request has brought for the first `count` of the texts that were asked for."""

    count: int
    vectors: NDArray[np.float32] | None
    """One row a text; None where they are refused."""
    refused: RequestRefused | None = None
    """Why the service refuses these texts, which no other document's were with."""


class Paid(Protocol):
    """The way to outside services for one document in hand, and to what they have been paid for already."""

    @property
    def shares(self) -> tuple[CallShare, ...]:
        """Whom the ledger names for a call."""
        ...

    def through(self, caller: Caller) -> Caller:
        """Return a way to a service on which nothing is paid for unless the document is ours and earlier stages are durable."""
        ...

    async def embed(self, embedder: HostedEmbedder, texts: Sequence[SizedText], *, alone: bool = False) -> Embedded:
        """Embed the first of the texts with one request, which other documents may share unless `alone`; as many as find room there."""
        ...

    async def kept_vectors(self, model: str) -> dict[int, NDArray[np.float32]]:
        """Return what is durable of this version's vectors: number of the passage -> vector."""
        ...

    async def keep_vectors(self, model: str, vectors: Mapping[int, NDArray[np.float32]]) -> None:
        """Make vectors of passages durable while the stage goes on."""
        ...

    async def kept_jobs(self, service: str) -> dict[str, HostedJob]:
        """Return the jobs that were started for this version at a service: part -> job."""
        ...

    async def keep_job(self, service: str, part: JobPart, job_id: str) -> None:
        """Make a job's id durable."""
        ...

    async def drop_job(self, part: JobPart) -> None:
        """Forget a job that is of no use any more."""
        ...

    async def kept_answers(self) -> Mapping[str, PartAnswer]:
        """Return a model's answers for parts of this version: asked_sha256 -> answer."""
        ...

    async def keep_answer(self, part: int, asked_sha256: str, answer: PartAnswer) -> None:
        """Make a model's answer for a part durable while the stage goes on."""
        ...

    async def drop_answers(self) -> None:
        """Forget a model's answers for this version."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What a stage may use beside the document in hand."""

    settings: Settings
    storage: Storage
    sandbox: Sandbox
    embedder: Embedder
    known_vectors: KnownVectors
    find_original: Callable[[Document], Awaitable[str | None]]
    """doc_id of another complete document of the same user with the same content."""
    original_text: Callable[[Document], Awaitable[OriginalText | None]]
    """The text of such a document, if it is of the same type."""
    original_extraction: Callable[[Document], Awaitable[OriginalExtraction | None]]
    """What was extracted from the newest such document whose text is the same and whose extraction did not fail."""
    choose_embedder: ChooseEmbedder | None = None
    """None for `embedder` always."""
    extractor: ModelExtractor | None = None
    """Extraction by a language model beside the local one; None for EXTRACTION_PROVIDER=local."""
    hosted_parser: LlamaParse | None = None
    """Parsing by an outside service; None for PARSING_PROVIDER=local."""
    in_thread: InThread = in_thread
    paid: Paid | None = None
    """Of the document in hand; None where nothing is kept while a stage goes on."""
