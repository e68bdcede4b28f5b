"""`docmill summary`: what became of a batch, for people, or as the JSON that front ends get."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jobs.cli.errors import ExitCode
from jobs.cli.output import aside, complain, duration, moment, print_json, say, table
from jobs.cli.session import quiet_logs, rows, run_async
from jobs.records import run_summary_async
from models.records import RunSummary
from models.settings import Settings, load_settings

CANDIDATES = 10
"""How many batches are named where a word could mean several."""
LONGEST_TABLE = 200
"""Files from which on those that succeeded are only counted."""


def run(word: str, *, nested: bool, json: bool) -> ExitCode:
    """Show the summary of the batch or run that the word names; of a batch that has not ended, as it stands now."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_show(settings, word, nested=nested, json=json))


async def _show(settings: Settings, word: str, *, nested: bool, json: bool) -> ExitCode:
    found = await _find(settings, word)
    if found is None:
        return ExitCode.FAILED
    if json:
        print_json(found.nested_summary if nested else found.ui_json)
    elif nested:
        _print_nested(found.nested_summary)
    else:
        _print_summary(found.ui_json)
    return ExitCode.OK


async def _find(settings: Settings, word: str) -> RunSummary | None:
    if (found := await run_summary_async(word)) is not None:
        return found
    batches = await rows(settings, "find_batches", word=word, limit=CANDIDATES + 1)
    if len(batches) == 1:
        batch_id = batches[0]["batch_id"]
        return await run_summary_async(batch_id) or await run_summary_async(batch_id, present=True)
    if batches:
        complain(f'"{word}" could be any of these:')
        for row in batches[:CANDIDATES]:
            say("  batch", row["batch_id"], row["source_path"] or "", row["status"], console=aside())
    else:
        complain(f'There is no batch "{word}": neither an id, nor the beginning of one, nor a run.')
    return None


def _print_summary(ui: Mapping[str, Any]) -> None:
    batch, totals, files = ui["batch"], ui["totals"], ui["files"]
    say(f"Batch {batch['batch_id']}", style="bold")
    among = {"succeeded": f" (duplicates among them: {totals['duplicates']})" if totals["duplicates"] else ""}
    counted = [f"{totals[key]} {key}{among.get(key, '')}" for key in ("succeeded", "failed", "cancelled", "unfinished") if totals[key]]
    facts = {
        "status": batch["status_text"],
        "reason": batch["error_message"],
        "source": batch["source_path"],
        "files": f"{totals['files']}" + (f": {', '.join(counted)}" if counted else ""),
        "pages": totals["pages"],
        "passages": totals["passages"],
        "size": f"{totals['bytes']:,} bytes",
        "types": ", ".join(f"{kind} {count}" for kind, count in sorted(totals["by_file_type"].items())),
        "errors": ", ".join(f"{kind} {count}" for kind, count in sorted(totals["by_error_type"].items())),
        "took": _span(batch["duration_ms"]),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name:<13}", value)
    table("Timeline", ["at", "what"], [[moment(datetime.fromisoformat(e["at"])), e["text"]] for e in ui["timeline"]])
    shown = files if len(files) <= LONGEST_TABLE else [card for card in files if card["outcome"] != "succeeded"]
    columns = ["file", "type", "title", "pages", "passages", "status", "time", "error"]
    cells = [
        [
            card["path"], card["file_type"], (card["key_fields"] or {}).get("title"), card["pages"], card["passages"], card["status"],
            _span(card["duration_ms"]), card["error_message"],
        ]
        for card in shown
    ]  # fmt: skip
    if cells:
        table("", columns, cells, numbers=["pages", "passages", "time"])
    if hidden := totals["files"] - len(shown):
        say(f"{hidden} more files: --json lists up to 10,000, `docmill status --json {batch['batch_id']}` all.")


def _print_nested(nested: Mapping[str, Any]) -> None:
    for folder in nested["folders"]:
        counts = ", ".join(f"{folder[key]} {key}" for key in ("succeeded", "failed", "cancelled", "unfinished") if folder[key])
        say(f"{folder['path'] or '.'}/  {folder['files_below']} files ({counts}), {folder['passages']} passages", style="bold")
        for file in folder["files"]:
            say(f"  {file['name']}  {file['status']}" + (f", {file['passages']} passages" if file["passages"] is not None else ""))
            for section in file["sections"] or ():
                place = f", page {section['page_start']}" if section["page_start"] is not None else ""
                say(f"    {' > '.join(section['heading_path']) or '(no heading)'}: {section['passages']}{place}")
            if file["sections_omitted"]:
                say(f"    ... {file['sections_omitted']} more sections")
        if folder["files_omitted"]:
            say(f"  ... {folder['files_omitted']} more files")


def _span(milliseconds: int | None) -> str:
    return duration(None if milliseconds is None else milliseconds / 1000)
