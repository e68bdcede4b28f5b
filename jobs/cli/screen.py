"""What `docmill watch` shows of one look: a screen of tables, or one line. Draws, and asks nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.cli.output import STATE_STYLES, duration, printable
from jobs.cli.session import Row

_BARS = " ▁▂▃▄▅▆▇█"
_STYLES = {**STATE_STYLES, "alive": "green", "stopping": "yellow", "silent": "yellow", "dead": "red", "up": "green", "shaky": "yellow",
           "paused": "yellow", "recovering": "yellow", "down": "red", "refused": "red", "idle": "dim"}  # fmt: skip


def summary_line(found: Mapping[str, Any]) -> str:
    """Say one look in a line, for logs and pipes."""
    at = found["at"].strftime("%H:%M:%S")
    if "trouble" in found:
        return f"{at} {found['trouble']}"
    queues, last = found["queues"], _last_minute(found["rates"])
    parts = [
        ", ".join(f"{sum(row[word] for row in queues)} {word}" for word in ("waiting", "scheduled", "running")),
        f"{last['per_second']:.2f} documents/s, {last['failed']} failed, {last['retries']} retries in the last minute",
        f"{_alive(found)} workers",
        f"{_open(found)} dead letters",
    ]
    stuck = sum(row["documents"] for row in found["stuck"])
    parts += [f"{stuck} stuck: {found['stuck'][0]['reason']}"] if stuck else []
    parts += [f"{row['service']} is {row['health']}" for row in found["services"] if row["health"] not in ("up", "idle")]
    return f"{at} {'; '.join(parts)}"


def screen(found: Mapping[str, Any], height: int) -> RenderableType:
    """Return the whole screen, at most `height` lines: what needs attention first."""
    if "trouble" in found:
        return Text(f"{found['at']:%H:%M:%S}  {found['trouble']}", style="bold red")
    head = Text(f"docmill  {found['at']:%Y-%m-%d %H:%M:%S}  ", style="bold") + Text("Ctrl-C ends watching, nothing else", style="dim")
    parts: list[RenderableType] = [head, _rates(found["rates"])]
    room = max(3, height - 30)
    if found["stuck"]:
        cells = [[r["documents"], r["reason"], r["what_to_do"]] for r in found["stuck"]]
        parts.append(_table("Stuck", ["documents", "reason", "what to do"], cells[:room], numbers={"documents"}))
    troubled = [s for s in found["services"] if s["health"] not in ("up", "idle")]
    if troubled:
        cells = [[s["service"], s["health"], s["trouble"]] for s in troubled]
        parts.append(_table("Services", ["service", "health", "trouble"], cells[:room]))
    parts.append(_queues(found["queues"], found["stages"]))
    if found["batches"]:
        parts.append(_batches(found["batches"]))
    parts.append(_workers(found["workers"], room))
    if found["dead_letters"]:
        cells = [[r["file_name"] or r["doc_id"], r["stage"], r["error_type"], r["error_message"]] for r in found["dead_letters"]]
        parts.append(_table(f"Dead letters: {_open(found)} open, the newest", ["file", "stage", "error", "reason"], cells))
    return Group(*parts)


def _rates(rates: Sequence[Row]) -> Text:
    """Draw the documents that ended in each of the last minutes."""
    whole = rates[:-1] or rates
    ended = [row["complete"] + row["failed"] for row in whole]
    top = max([*ended, 1])
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in ended)
    last = _last_minute(rates)
    counts = ", ".join(f"{last[word]} {word}" for word in ("failed", "retries", "rescues"))
    words = f"  {last['per_second']:.2f} documents/s, {counts} in the last minute"
    return Text("ended, by the minute ") + Text(bars, style="green") + Text(words)


def _last_minute(rates: Sequence[Row]) -> Row:
    """Return the last minute that is over; the present one has only begun."""
    return rates[-2] if len(rates) > 1 else rates[-1]


def _queues(queues: Sequence[Row], stages: Sequence[Row]) -> Table:
    by_stage = {row["stage"]: row for row in stages}
    columns = ["stage", "queue", "waiting", "oldest", "scheduled", "running", "workers", "runs", "failed", "p50", "p95", "max"]
    cells = []
    for row in queues:
        took = by_stage.get(row["stage"], {})
        times = [_ms(took.get(name)) for name in ("p50_ms", "p95_ms", "max_ms")]
        cells.append([row["stage"], row["queue"], row["waiting"], duration(row["oldest_seconds"]), row["scheduled"], row["running"],
                      row["listeners"], took.get("runs"), took.get("failures"), *times])  # fmt: skip
    return _table("Queues, and stages in the last 10 to 20 minutes", columns, cells, numbers=set(columns[2:]))


def _batches(batches: Sequence[Row]) -> Table:
    columns = ["batch", "source", "status", "files", "done %", "working", "retrying", "failed", "cancelled", "left"]
    cells = [
        [b["batch_id"], b["source_path"], b["status"], b["total_files"], b["percent"], b["working"], b["retrying"], b["failed"],
         b["cancelled"], duration(b["seconds_left"])] for b in batches
    ]  # fmt: skip
    return _table("Latest batches", columns, cells, numbers=set(columns[3:]))


def _workers(workers: Sequence[Row], room: int) -> Table:
    columns = ["worker", "health", "jobs", "of", "memory MB", "cores", "connections", "silent"]
    cells = [
        [w["worker"], w["health"], w["jobs"], w["concurrency"], _rounded(w["memory_mb"], 0), _rounded(w["cpu_share"], 2), w["connections"],
         duration(w["silent_seconds"]) if w["health"] in ("silent", "dead") else ""] for w in workers
    ]  # fmt: skip
    more = f", {len(cells) - room} more not shown" if len(cells) > room else ""
    return _table(f"Workers: {sum(w['health'] == 'alive' for w in workers)} alive{more}", columns, cells[:room], numbers=set(columns[2:]))


def _alive(found: Mapping[str, Any]) -> int:
    return sum(row["health"] == "alive" for row in found["workers"])


def _open(found: Mapping[str, Any]) -> int:
    return int(found["dead_letters"][0]["total"]) if found["dead_letters"] else 0


def _rounded(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"


def _ms(value: float | None) -> str:
    return "" if value is None else duration(value / 1000) if value >= 1000 else f"{value:.0f} ms"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: set[str] | None = None) -> Table:
    """Return a table that fits: what is too long for its column is cut off, and nothing in it is obeyed by the terminal."""
    made = Table(title=printable(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, expand=False)
    for column in columns:
        made.add_column(column, justify="right" if column in (numbers or ()) else "left", overflow="ellipsis", no_wrap=True)
    for row in rows:
        shown = ["" if cell is None else printable(cell) for cell in row]
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in shown))
    return made
