"""What became of the documents of one `docmill ingest`, as a table, as JSON and as an exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.batch import BatchSubmission, FileResult
from jobs.cli.errors import ExitCode
from jobs.cli.output import duration, say, table
from models.stages import UNFINISHED_STATES, State

LONGEST_TABLE = 100
"""Rows from which on documents that are complete or on their way are only counted; what needs attention is always listed."""
GOOD = frozenset({State.COMPLETE, State.DUPLICATE})


@dataclass(frozen=True, slots=True)
class Line:
    """One file in the report. `state` is the document's or the archive's, or `refused`."""

    result: FileResult
    row: Mapping[str, Any]

    @property
    def state(self) -> str:
        """Where it stands."""
        if self.result.submission is None:
            return self.result.archive_state or "refused"
        return str(self.row.get("state", "deleted"))

    @property
    def unchanged(self) -> bool:
        """Whether submitting it did nothing and nothing was left to do."""
        submission = self.result.submission
        return submission is not None and submission.outcome == "unchanged" and submission.state not in UNFINISHED_STATES

    @property
    def error(self) -> str | None:
        """Why it failed or was refused."""
        return str(self.result.error) if self.result.error is not None else self.row.get("error_message")


@dataclass(frozen=True, slots=True)
class Report:
    """The files of one call, each document once, and the documents' rows by doc_id."""

    files: Sequence[FileResult]
    rows: Mapping[str, Mapping[str, Any]]
    batches: Sequence[BatchSubmission]
    seconds: float
    packed: int = 0
    """Archives that are still to be unpacked."""

    def lines(self) -> Iterator[Line]:
        """Yield one line a document, archive that was not unpacked or refused file, in the order of submission."""
        seen: set[str] = set()
        for result in self.files:
            doc_id = None if result.submission is None else result.submission.doc_id
            if doc_id is None or doc_id not in seen:
                seen.update(() if doc_id is None else (doc_id,))
                yield Line(result, self.rows.get(doc_id or "", {}))

    def unfinished(self) -> list[Line]:
        """Return the documents that are still on their way."""
        return [line for line in self.lines() if line.state in UNFINISHED_STATES]

    def exit_code(self, *, waited: bool) -> ExitCode:
        """Return OK if every document is complete; if nobody waited, what is still on its way is no failure."""
        good = GOOD if waited else GOOD | UNFINISHED_STATES
        return ExitCode.OK if all(line.state in good for line in self.lines()) else ExitCode.FAILED


def as_json(report: Report) -> dict[str, Any]:
    """Return the report in its machine-readable form."""
    lines = list(report.lines())
    return {
        "documents": [_document(line) for line in lines],
        "batches": [{"batch_id": b.batch_id, "run_id": b.run_id, "skipped": b.skipped, "files": len(b.files)} for b in report.batches],
        "counts": dict(Counter(line.state for line in lines)),
        "unchanged": sum(line.unchanged for line in lines),
        "skipped": sum(batch.skipped for batch in report.batches),
        "seconds": round(report.seconds, 3),
    }


def _document(line: Line) -> dict[str, Any]:
    submission, row, refusal = line.result.submission, line.row, line.result.error
    return {
        "file": line.result.name,
        "doc_id": None if submission is None else submission.doc_id,
        "outcome": line.state if submission is None else submission.outcome,
        "state": line.state,
        "status": row.get("status"),
        "version": row.get("version"),
        "file_type": row.get("file_type"),
        "page_count": row.get("page_count"),
        "chunk_count": row.get("chunk_count"),
        "processing_duration_ms": row.get("processing_duration_ms"),
        "error_type": row.get("error_type") if refusal is None else refusal.error_type.value,
        "error_message": line.error,
    }


def print_report(report: Report) -> None:
    """Print the table of what was done, and one line that sums it up."""
    lines = list(report.lines())
    listed = [line for line in lines if not (line.unchanged and line.state in GOOD)]
    if len(listed) > LONGEST_TABLE:
        listed = [line for line in listed if line.state not in GOOD | UNFINISHED_STATES]
    if listed:
        columns = ["file", "type", "pages", "passages", "state", "time"] + (["error"] if any(line.error for line in listed) else [])
        table("", columns, [_cells(line)[: len(columns)] for line in listed], numbers=("pages", "passages", "time"))
    skipped = sum(batch.skipped for batch in report.batches)
    aside = f", {skipped} hidden, system or linked files skipped" if skipped else ""
    unchanged = [line for line in lines if line.unchanged]
    failed = sum(line.state not in GOOD for line in unchanged)
    of_them = f" ({failed} of them not complete)" if failed else ""
    if not lines and not any(batch.archives for batch in report.batches):
        say(f"0 documents: there is no file that docmill takes{aside}")
        return
    if lines and len(unchanged) == len(lines) and not report.packed:
        say(f"nothing to do: {_counted(len(lines), 'document')} unchanged{of_them}{aside}")
        return
    counts = Counter(f"unchanged{of_them}" if line.unchanged else line.state for line in lines)
    parts = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    packed = f", {_counted(report.packed, 'archive')} to be unpacked" if report.packed else ""
    say(f"{_counted(len(lines), 'document')}{': ' if parts else ''}{parts}{packed}{aside}, in {duration(report.seconds)}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _cells(line: Line) -> list[object]:
    took = line.row.get("processing_duration_ms")
    return [
        line.result.name,
        line.row.get("file_type"),
        line.row.get("page_count"),
        line.row.get("chunk_count"),
        line.state,
        duration(None if took is None else took / 1000),
        line.error,
    ]
