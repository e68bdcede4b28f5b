"""What a batch is submitted as: its files, what became of each, and what is asked before anything is written."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg.types.json import Jsonb

from jobs.batch.steps import Ask, Steps
from jobs.submit import NOTHING_DONE, taken_or_held
from models.errors import DocmillError, SubmitConflict, SubmitError
from models.stages import State
from models.submissions import Submission


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a batch, wherever it came from."""

    name: str
    """Path inside the folder or archive, for people."""
    doc_id: str
    path: Path
    """Where its bytes can be read now."""
    source_path: str
    """Where the submitter has it; stored for people, never opened."""


@dataclass(frozen=True, slots=True)
class FileResult:
    """What became of one file: a submission, or the error that kept it out."""

    name: str
    submission: Submission | None = None
    error: DocmillError | None = None
    content_sha256: str | None = None
    """Of what was read and submitted; None where nothing was read."""
    archive_state: Literal["failed", "cancelled"] | None = None
    """How an archive ended that was submitted and not unpacked; `error` says why it failed."""


@dataclass(slots=True)
class BatchSubmission:
    """What became of a batch."""

    batch_id: str
    run_id: uuid.UUID | None = None
    """The run that was begun; None when there was nothing to change."""
    files: list[FileResult] = field(default_factory=list)
    skipped: int = 0
    """Hidden and system files, and links that lead out of the folder."""
    archives: list[str] = field(default_factory=list)
    """Zip archives; their files follow as workers unpack them."""
    known: bool = False
    """Whether there was such a batch before."""
    standing: uuid.UUID | None = None
    """The run that it was in then."""


Listener = Callable[[FileResult], None]


@dataclass(frozen=True, slots=True)
class Whole:
    """What holds for a batch as a whole."""

    batch_id: str
    user_id: str
    source_path: str
    priority: int = 0
    metadata: Jsonb | None = None
    correlation_id: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True, slots=True)
class Looked:
    """What somebody who has looked at the files already knows of them."""

    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name: these files need not be read to see whether they have changed."""
    resume: bool = True
    """Whether a cancelled document, or an archive that failed, is taken up again although its content is the same."""
    busy: frozenset[str] = frozenset()
    """Names of files that somebody is writing: they are not read, and stay what their digest says."""
    others: frozenset[str] = frozenset()
    """Names of unchanged files whose documents stay in the batch that they are in."""


def archive_upload_id(batch_id: str, entry_path: str) -> str:
    """Return the name under which an archive of a batch is stored; no doc_id can be the same, for it holds control characters."""
    return f"\n{batch_id}\n{entry_path}"


def look_at_batch(batch_id: str, user_id: str, *, resume: bool) -> Steps[dict[str, Any] | None]:
    """Return how a batch stands, None if there is none; SubmitError if it is another user's. `resume`: as in `Looked`."""
    params = {"batch_id": batch_id, "resume": resume}
    batch: dict[str, Any] | None = next(iter((yield Ask("look_at_batch", params))), None)
    if batch is not None and batch["user_id"] != user_id:
        raise SubmitError(f'batch_id "{batch_id}" is taken; choose another.')
    return batch


def stands(batch: Mapping[str, Any] | None, documents: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether the batch's last run was sealed and holds just these documents, and all of those in its archives."""
    if batch is None or not batch["sealed"] or batch["direct_files"] != len(documents) or batch["lacking"]:
        return False
    return all(document["run_id"] == batch["run_id"] for document in documents)


def refused_batch(error: psycopg.Error, batch_id: str, *, in_part: bool = False) -> Exception:
    """Translate what Postgres said to the submission of a batch. `in_part`: a run of it has been begun by then."""
    if isinstance(error, psycopg.errors.ObjectNotInPrerequisiteState):
        return SubmitConflict(f'batch_id "{batch_id}" has been begun again meanwhile.')
    if isinstance(error, psycopg.errors.ForeignKeyViolation):
        return SubmitConflict(f'batch_id "{batch_id}" has been deleted meanwhile.')
    done = "A part of the batch has been submitted, and submitting it again does the rest" if in_part else NOTHING_DONE
    return taken_or_held(error, f'batch_id "{batch_id}"', "this batch or a document of it", done)


def unchanged(entry: Entry, known: Mapping[str, Any]) -> FileResult:
    """Return the result of a file whose document stays as it is known."""
    kept = Submission(entry.doc_id, "unchanged", known["version"], State(known["state"]), known["correlation_id"])
    return FileResult(entry.name, kept)


def told_apart(entries: Sequence[Entry]) -> tuple[list[Entry], list[FileResult]]:
    """Return the entries, in order, without those that have the doc_id of another, and an error for each of those.

    Whatever the order, the first by path stays: another one each time would be a new version each time.
    """
    first: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: str(entry.path)):
        first.setdefault(entry.doc_id, entry)
    mine = [entry for entry in entries if first[entry.doc_id] is entry]
    doubles = (entry for entry in entries if first[entry.doc_id] is not entry)
    return mine, [FileResult(entry.name, error=same_name(entry, first[entry.doc_id])) for entry in doubles]


def same_name(entry: Entry, other: Entry) -> SubmitError:
    """Return the error of a file whose name is that of another one, once what cannot be stored or shown of them is escaped."""
    return SubmitError(
        f"File {str(entry.path)!r} cannot be told from {str(other.path)!r}: with control characters and bytes that are no UTF-8 escaped, "
        "their names are the same. Rename one of them."
    )
