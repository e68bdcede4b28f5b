"""What has come out of the archives of a call: their documents, and those archives that were not unpacked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePath

from jobs.batch import BatchSubmission, FileResult
from jobs.cli.session import Row, rows
from jobs.cli.waiting import OPEN_ARCHIVE
from models.errors import PermanentError
from models.settings import Settings
from models.stages import State
from models.submissions import Outcome, Submission


async def open_archives(settings: Settings, batches: Sequence[BatchSubmission]) -> int:
    """Return how many archives of these batches are not unpacked to the end yet."""
    ids = [batch.batch_id for batch in batches if batch.archives]
    if not ids:
        return 0
    return sum(row["state"] in OPEN_ARCHIVE for row in await rows(settings, "archives_of_batches", batch_ids=ids))


async def documents_in_archives(settings: Settings, batches: Sequence[BatchSubmission], known: Collection[str]) -> list[FileResult]:
    """Return, by name, the documents in archives, those that are known left out, and archives that failed or were cancelled.

    Counts what they skipped.
    """
    found: list[FileResult] = []
    for batch in batches:
        if not batch.archives:
            continue
        archives = await rows(settings, "archives_of_batches", batch_ids=[batch.batch_id])
        documents = await rows(settings, "unpacked_documents", batch_id=batch.batch_id)
        batch.skipped += sum(row["skipped_count"] for row in archives)
        made = [*_documents(batch, archives, documents, known), *_ended_packed(batch, archives)]
        batch.files += made
        found += made
    return found


def _documents(batch: BatchSubmission, archives: Sequence[Row], documents: Sequence[Row], known: Collection[str]) -> Iterator[FileResult]:
    root = f"{archives[0]['source_path']}/" if archives else ""
    whole = _is_zip(archives)
    for row in documents:
        if row["doc_id"] not in known:
            name = row["source_path"] or row["file_name"]
            name = f"{batch.archives[0]}/{name}" if whole else name.removeprefix(root)
            outcome: Outcome = "unchanged" if batch.run_id is None or row["outcome"] is None else row["outcome"]
            submission = Submission(row["doc_id"], outcome, row["version"], State(row["state"]), row["correlation_id"])
            yield FileResult(name, submission)


def _ended_packed(batch: BatchSubmission, archives: Sequence[Row]) -> Iterator[FileResult]:
    for row in archives:
        if row["state"] in ("failed", "cancelled"):
            name = row["entry_path"].rstrip("/")
            prefix = f"{batch.archives[0]}/" if _is_zip(archives) else ""
            error = PermanentError(row["error_message"]) if row["state"] == "failed" else None
            yield FileResult(f"{prefix}{name}".rstrip("/"), error=error, archive_state=row["state"])


def _is_zip(archives: Sequence[Row]) -> bool:
    """Say whether the batch is a zip, rather than a folder with zips inside."""
    return any(PurePath(row["entry_path"]).parts == () for row in archives)
