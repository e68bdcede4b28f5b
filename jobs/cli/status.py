"""`docmill status`: the overview, one document with its timeline, or one batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from json import dumps
from typing import Any

from jobs.adapters.storage.copies import copy_name
from jobs.cli.errors import ExitCode
from jobs.cli.naming import complain_of, documents_named
from jobs.cli.output import duration, moment, print_json, say, table
from jobs.cli.session import Row, quiet_logs, rows, run_async
from models.settings import Settings, load_settings

LATEST = 10
"""How many batches and dead letters are shown."""
LONGEST_TABLE = 200
"""Documents of a batch from which on those that are complete or on their way are only counted."""
MOST_FAILED = 1000
"""Documents of such a batch that are listed at most: a table of 100,000 takes minutes, and nobody reads it."""


def run(word: str | None, *, batch: str | None = None, json: bool) -> ExitCode:
    """Show what the word names, or the batch that another one names, or everything."""
    settings = load_settings()
    quiet_logs(settings)
    if batch is not None:
        return run_async(_named_batch(settings, batch, json=json))
    return run_async(_overview(settings, json=json) if word is None else _named(settings, word, json=json))


async def _overview(settings: Settings, *, json: bool) -> ExitCode:
    found = {
        "documents": await rows(settings, "count_documents_by_state"),
        "incomplete": (await rows(settings, "count_incomplete_documents"))[0]["documents"],
        "stages": await rows(settings, "count_unfinished_by_stage"),
        "queues": await rows(settings, "count_live_jobs"),
        "batches": await rows(settings, "latest_batches", limit=LATEST),
        "dead_letters": await rows(settings, "open_dead_letters", limit=LATEST),
        "stuck": await rows(settings, "stuck_causes"),
        "workers": (await rows(settings, "live_workers"))[0]["workers"],
    }
    if json:
        print_json(found)
        return ExitCode.OK
    _print_overview(found)
    return ExitCode.OK


def _print_overview(found: Mapping[str, Any]) -> None:
    if not found["documents"]:
        say("No documents yet: `docmill ingest PATH...` submits some.")
    else:
        table("Documents", ["state", "documents"], [[row["state"], row["documents"]] for row in found["documents"]], numbers=["documents"])
    if found["incomplete"]:
        say(f"Documents of which a part is missing: {found['incomplete']}. The view incomplete_documents says which, and why.")
    if found["stages"]:
        columns = ["stage", "queue", "queued", "working", "retrying"]
        table("Unfinished, by the stage that is due", columns, [[row[c] for c in columns] for row in found["stages"]], numbers=columns[2:])
    if found["queues"]:
        columns = ["queue", "waiting", "scheduled", "running"]
        table("Queue", columns, [[row[c] for c in columns] for row in found["queues"]], numbers=columns[1:])
    if found["batches"]:
        columns = ["batch_id", "source_path", "status", "total_files", "completed", "failed", "cancelled", "unfinished", "left", "begun"]
        cells = [[*(row[c] for c in columns[:-2]), duration(row["seconds_left"]), moment(row["created_at"])] for row in found["batches"]]
        table("Latest batches", columns, cells, numbers=columns[3:-1])
    letters = found["dead_letters"]
    if letters:
        cells = [[r["file_name"] or r["doc_id"], r["stage"], r["error_type"], r["error_message"], moment(r["created_at"])] for r in letters]
        table(f"Open dead letters: {letters[0]['total']}", ["file", "stage", "error", "reason", "since"], cells)
    if found["stuck"]:
        cells = [[r["documents"], r["reason"], moment(r["since"]), r["for_example"], r["what_to_do"]] for r in found["stuck"]]
        table("Stuck", ["documents", "reason", "since", "for example", "what to do"], cells, numbers=["documents"])
    say(f"Workers alive: {found['workers']}")


async def _named(settings: Settings, word: str, *, json: bool) -> ExitCode:
    """Show the one document or batch that a word names; several, or none, are an error that lists what there is."""
    documents = await documents_named(settings, word, LATEST + 1)
    batches = await rows(settings, "find_batches", word=word, limit=LATEST + 1)
    exact = [row for row in documents if row["doc_id"] == word]
    if exact or (len(documents) == 1 and not any(row["batch_id"] == word for row in batches)):
        return await _document(settings, (exact or documents)[0]["doc_id"], json=json)
    if len(batches) == 1:
        return await _batch(settings, batches[0]["batch_id"], json=json)
    complain_of(word, documents, batches)
    return ExitCode.FAILED


async def _named_batch(settings: Settings, word: str, *, json: bool) -> ExitCode:
    """Show the one batch that a word names."""
    batches = await rows(settings, "find_batches", word=word, limit=LATEST + 1)
    if len(batches) == 1:
        return await _batch(settings, batches[0]["batch_id"], json=json)
    complain_of(word, [], batches, "batch")
    return ExitCode.FAILED


async def _document(settings: Settings, doc_id: str, *, json: bool) -> ExitCode:
    shown = await rows(settings, "show_document", doc_id=doc_id)
    events = await rows(settings, "show_events", doc_id=doc_id)
    row = {**shown[0], "text_copy": _text_copy(settings, shown[0])}
    if json:
        print_json({**row, "events": events})
        return ExitCode.OK
    say(row["file_name"], style="bold")
    facts = {
        "doc_id": doc_id,
        "status": row["status"] + (f" (due: {row['stage_due']})" if row["stage_due"] and row["state"] != "failed" else ""),
        "next try": moment(row["scheduled_at"]),
        "error": f"{row['error_type']}: {row['error_message']}" if row["error_message"] else None,
        "batch": row["batch_id"],
        "user": row["user_id"],
        "source": row["source_path"],
        "type": " ".join(part for part in (row["file_type"], row["mime_type"] and f"({row['mime_type']})") if part),
        "size": f"{row['file_size']:,} bytes" if row["file_size"] is not None else None,
        "pages": row["page_count"],
        "passages": row["chunk_count"],
        "version": f"{row['version']} (searches see {row['served_version'] or 'none'})",
        "text": row["text_copy"],
        "retries": row["retry_count"] or None,
        "crashes": row["crash_count"] or None,
        "duplicate of": row["duplicate_of"],
        "metadata": _as_json(row["metadata"]),
        "correlation": row["correlation_id"],
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name:<13}", value)
    cells = [[moment(e["at"]), e["version"], e["stage"], e["event"], _took(e), _details(e), e["worker"]] for e in events]
    table("Timeline", ["at", "version", "stage", "event", "time", "detail", "worker"], cells, numbers=["version", "time"])
    return ExitCode.OK


def _text_copy(settings: Settings, row: Row) -> str | None:
    """Return where the copy of the text in service lies; None where there is none on this machine."""
    if row["served_text_sha256"] is None:
        return None
    path = settings.storage_base_path / settings.storage_extracted_dir / copy_name(row["doc_id"], row["served_text_sha256"])
    return str(path) if os.path.isfile(path) else None  # noqa: PTH113 - says no, where pathlib raises, if nobody can say


def _took(event: Row) -> str:
    return "" if event["duration_ms"] is None else f"{event['duration_ms']:,.0f} ms"


def _details(event: Row) -> str:
    """Say an event's detail in a line, the error first."""
    detail = dict(event["detail"])
    words = [f"{detail.pop('error_type')}: {detail.pop('error_message', '')}"] if "error_type" in detail else []
    words += [f"{key} {value}" for key, value in detail.items() if value not in (None, "")]
    return ", ".join(words) + (f" (try {event['attempt'] + 1})" if event["attempt"] else "")


async def _batch(settings: Settings, batch_id: str, *, json: bool) -> ExitCode:
    row = (await rows(settings, "show_batch", batch_id=batch_id))[0]
    is_long = row["documents"] > LONGEST_TABLE and not json
    limit = MOST_FAILED if is_long else None
    documents = await rows(settings, "documents_of_batch", batch_id=batch_id, only_failed=is_long, limit=limit)
    archives = await rows(settings, "archives_of_batch", batch_id=batch_id)
    if json:
        print_json({**row, "archives": archives, "documents": documents})
        return ExitCode.OK
    say(f"Batch {batch_id}", style="bold")
    facts = {
        "status": row["status"],
        "reason": row["error_message"],
        "source": row["source_path"],
        "user": row["user_id"],
        "run": row["run_id"],
        "files": _files(row),
        "progress": None if row["completed_at"] else _progress(row),
        "archives": f"{row['archives']}: {row['archives_open']} to be unpacked, {row['archives_failed']} failed, "
        f"{row['archives_cancelled']} cancelled; "
        f"{row['unpacked_files']} of {row['archive_files']} files unpacked"
        if row["archives"]
        else None,
        "submitted": moment(row["created_at"]),
        "submission": None if row["sealed_at"] else "not finished: submit it again",
        "ended": moment(row["completed_at"]),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name:<13}", value)
    if archives:
        _print_archives(archives)
    columns = ["file", "type", "pages", "passages", "status", "time", "error"]
    cells = [
        [d["source_path"] or d["file_name"], d["file_type"], d["page_count"], d["chunk_count"], d["status"], _span(d), d["error_message"]]
        for d in documents
    ]
    if cells or not is_long:
        table("", columns, cells, numbers=["pages", "passages", "time"])
    if is_long and (hidden := row["documents"] - len(documents)):
        say(f"{hidden} more documents: --json lists all.")
    return ExitCode.OK


def _files(row: Row) -> str:
    """Say what became of a batch's files, such as `12: 7 completed, 1 failed, 1 cancelled, 3 unfinished (2 queued, 1 to be unpacked)`."""
    waits = {word: row[word] for word in ("queued", "working", "retrying")} | {"to be unpacked": row["archives_open"]}
    which = ", ".join(f"{count} {word}" for word, count in waits.items() if count)
    packed = row["total_files"] - row["files"]
    said = f"{row['total_files']}: {row['completed']} completed, {row['failed']} failed, {row['cancelled']} cancelled, "
    return said + f"{row['unfinished']} unfinished" + (f" ({which})" if which else "") + (f", {packed} still packed" if packed else "")


def _progress(row: Row) -> str:
    """Say how far a batch is, for example `42.5 %, 3.10 documents/s, through in 4 min 20 s, last change 2026-01-31 08:15:00`."""
    parts = [] if row["percent"] is None else [f"{row['percent']:.1f} %"]
    if row["per_second"]:
        parts += [f"{row['per_second']:.2f} documents/s", f"through in {duration(row['seconds_left'])}"]
    elif row["unfinished"]:
        parts += ["nothing has ended in the last 5 minutes"]
    return ", ".join([*parts, f"last change {moment(row['last_progress_at'])}"] if row["last_progress_at"] else parts)


def _print_archives(archives: list[Row]) -> None:
    columns = ["archive", "state", "files", "unpacked", "skipped", "error"]
    cells = [
        [a["entry_path"] or "(the batch)", a["state"], a["entry_count"], a["unpacked_count"], a["skipped_count"], a["error_message"]]
        for a in archives
    ]
    table("Archives", columns, cells, numbers=columns[2:5])


def _span(document: Row) -> str:
    took = document["processing_duration_ms"]
    return duration(None if took is None else took / 1000)


def _as_json(metadata: Mapping[str, Any]) -> str | None:
    return dumps(metadata, ensure_ascii=False) if metadata else None
