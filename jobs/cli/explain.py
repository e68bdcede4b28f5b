"""`docmill explain`: the story of one document, where it stands, and what comes next."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from jobs.cli.errors import ExitCode
from jobs.cli.naming import find_document
from jobs.cli.output import duration, moment, out, print_json, printable
from jobs.cli.session import Row, quiet_logs, rows, run_async
from models.settings import Settings, load_settings

STYLES = {"past": "", "now": "bold", "next": "bold cyan"}


def run(word: str, *, json: bool) -> ExitCode:
    """Tell the story of the document that the word names."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_explain(settings, word, json=json))


async def _explain(settings: Settings, word: str, *, json: bool) -> ExitCode:
    doc_id = await find_document(settings, word)
    if doc_id is None:
        return ExitCode.FAILED
    story = await rows(settings, "explain_document", doc_id=doc_id)
    if json:
        print_json({"doc_id": doc_id, "story": story})
        return ExitCode.OK
    out().print(Text(printable(doc_id), style="bold"), soft_wrap=True)
    before: datetime | None = None
    for line in story:
        out().print(_line(line, before), soft_wrap=True)
        before = line["at"]
    return ExitCode.OK


def _line(line: Row, before: datetime | None) -> Text:
    """Return a line: when, how long after the line before, what, how long it took, and by whom."""
    when = moment(line["at"]) if line["tense"] != "now" else "now"
    words = Text(f"{when:<19}  {_gap(line, before):>11}  ", style="dim")
    words += Text({"next": "then: "}.get(line["tense"], "") + printable(line["what"]), style=STYLES[line["tense"]])
    aside: list[Any] = [] if line["took_ms"] is None else [duration(line["took_ms"] / 1000)]
    aside += [line["worker"]] if line["worker"] and line["tense"] == "past" else []
    return words + Text(f"  [{', '.join(map(printable, aside))}]" if aside else "", style="dim")


def _gap(line: Row, before: datetime | None) -> str:
    """Say how long after the line before it was, or for what is to come, how long from now."""
    if line["at"] is None:
        return ""
    if line["tense"] == "next":
        left = (line["at"] - datetime.now(UTC)).total_seconds()
        return f"in {duration(left)}" if left > 0 else "now"
    gap = None if before is None else (line["at"] - before).total_seconds()
    return f"+{duration(gap)}" if gap is not None and gap >= 0.05 else ""
