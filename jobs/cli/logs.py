"""`docmill logs`: a document's events and the lines of the log files in reach, in the order of time, and what comes as it comes."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.text import Text

from jobs.cli.errors import ExitCode, is_database_absent
from jobs.cli.log_lines import LogLine, LogSearch
from jobs.cli.naming import find_document
from jobs.cli.output import aside, moment, out, print_json_line, printable, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from models.settings import Settings, load_settings

_AT_A_TIME = 1000  # events
_SECONDS = 1.0  # between two looks with --follow


def run(word: str, *, follow: bool, files: bool, json: bool) -> ExitCode:
    """Show what there is of the document that the word names, and with `follow` what comes."""
    settings = load_settings()
    quiet_logs(settings)
    try:
        return run_async(_logs(settings, word, follow=follow, files=files, json=json))
    except KeyboardInterrupt:  # the usual end of following
        return ExitCode.OK


async def _logs(settings: Settings, word: str, *, follow: bool, files: bool, json: bool) -> ExitCode:
    doc_id = await find_document(settings, word)
    if doc_id is None:
        return ExitCode.FAILED
    search = LogSearch(settings, doc_id)
    if files:
        _say_where(search.path())
    after = 0
    while True:
        try:
            events = await rows(settings, "events_since", doc_id=doc_id, after=after, limit=_AT_A_TIME)
        except Exception as error:
            if not (follow and is_database_absent(error)):
                raise
            events = []
        after = events[-1]["id"] if events else after
        search.correlation_ids |= {event["correlation_id"] for event in events}
        lines = await asyncio.to_thread(search.find) if files and len(events) < _AT_A_TIME else []
        found: list[Row | LogLine] = [*events, *lines]
        for entry in sorted(found, key=_time):
            _show(entry, json=json)
        if len(events) == _AT_A_TIME:
            continue
        if not follow:
            return ExitCode.OK
        await asyncio.sleep(_SECONDS)


def _say_where(path: Path | None) -> None:
    """Say on stderr which log files are looked through."""
    if path is None:
        say("LOG_FILE_PATH is not set, so there are no log files here: these are the events.", style="dim", console=aside())
    elif not path.parent.is_dir():
        say(f"There is no folder {path.parent} on this host: these are the events.", style="dim", console=aside())


def _time(entry: Row | LogLine) -> datetime:
    return entry.at if isinstance(entry, LogLine) else entry["at"]


def _show(entry: Row | LogLine, *, json: bool) -> None:
    if json:
        print_json_line({"kind": "log", **asdict(entry)} if isinstance(entry, LogLine) else {"kind": "event", **entry})
        return
    if isinstance(entry, LogLine):
        line = Text(f"{moment(entry.at)}  log    ", style="dim") + Text(printable(entry.text, lines=True))
    else:
        worker = f"  [{printable(entry['worker'])}]" if entry["worker"] else ""
        line = (
            Text(f"{moment(entry['at'])}  event  ", style="dim") + Text(printable(entry["what"]), style="bold") + Text(worker, style="dim")
        )
    out().print(line, soft_wrap=True)
