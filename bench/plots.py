"""Draw the plots of docs/performance.md from the rows that measurements have written with `--json`.

Usage: python -m bench.plots [FILE ...] [--into docs/images]

FILE: docs/images/data/*.jsonl by default. Rows that differ only in what was measured are taken together: their median is drawn. A plot
whose rows are in none of the files is left as it is. Each says below its axis at which load its rows were measured, and when.
"""

from __future__ import annotations

import argparse
import statistics
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from bench.results import Row, read_rows
from bench.svg import bars, lines, short
from models.stages import STAGES

HOME = Path(__file__).parents[1] / "docs" / "images"
EDGES_MS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 500)
PEERS = {"cocoindex cold": "CocoIndex", "docmill, same work": "docmill, same splitter and vectors"}


def middle(rows: list[Row], key: str, **which: object) -> float | None:
    """Return the median of a value over the rows of which all this is true; None where there are none."""
    found = [row[key] for row in rows if all(row[name] == wanted for name, wanted in which.items()) and row.get(key) is not None]
    return statistics.median(found) if found else None


def distinct(rows: list[Row], key: str) -> list[int]:
    """Return the different whole numbers of a key, the smallest first."""
    return sorted({round(row[key]) for row in rows})


def backlog(rows: list[Row]) -> str:
    """Documents a second, by how many wait behind them."""
    counts = distinct(rows, "waiting")
    each = [middle(rows, "clock_ms", waiting=count) for count in counts]
    series: dict[str, list[float | None]] = {"one worker": [1000 / ms if ms else None for ms in each]}
    labels = [f"{count:,}" for count in counts]
    return bars("Throughput, by backlog", labels, series, x="documents waiting", y="documents a second")


def backlog_cpu(rows: list[Row]) -> str:
    """CPU time of a document, by how many wait behind it."""
    counts = distinct(rows, "waiting")
    series = {
        name: [middle(rows, key, waiting=count) for count in counts]
        for name, key in {"worker and its children": "worker_ms", "Postgres": "postgres_ms"}.items()
    }
    labels = [f"{count:,}" for count in counts]
    return bars("What a small document costs, by backlog", labels, series, x="documents waiting", y="CPU ms a document", stacked=True)


def workers(rows: list[Row]) -> str:
    """Documents a minute, by number of workers."""
    counts, sizes = distinct(rows, "workers"), distinct(rows, "documents")
    series = {f"{size} at once": [middle(rows, "a_minute", workers=count, documents=size) for count in counts] for size in sizes}
    labels = [str(count) for count in counts]
    return bars("Throughput, by number of workers", labels, series, x="workers", y="documents a minute")


def workers_cpu(rows: list[Row]) -> str:
    """CPU time of a document, by number of workers."""
    counts, sizes = distinct(rows, "workers"), distinct(rows, "documents")
    series = {f"{size} at once": [middle(rows, "cpu_ms", workers=count, documents=size) for count in counts] for size in sizes}
    labels = [str(count) for count in counts]
    return bars("What a document costs, by number of workers", labels, series, x="workers", y="CPU ms a document, workers alone")


def latency(rows: list[Row]) -> str:
    """Passages a second through an embedding service, by its latency."""
    steps = distinct(rows, "latency_ms")
    shapes = sorted({(row["documents"], row["passages"], row["workers"]) for row in rows})
    series: dict[str, list[float | None]] = {}
    for documents, passages, count in shapes:
        which = {"documents": documents, "passages": passages, "workers": count}
        taken = [middle(rows, "taken_s", latency_ms=step, **which) for step in steps]
        series[f"{documents:,} documents of {passages}"] = [documents * passages / each if each else None for each in taken]
    documents, passages, count = shapes[-1]
    for name, key in {"a request for each": "one_each_s", "without a service": "alone_s"}.items():
        which = {"documents": documents, "passages": passages, "workers": count}
        taken = [middle(rows, key, latency_ms=step, **which) for step in steps]
        series[name] = [documents * passages / each if each else None for each in taken]
    labels = [f"{step} ms" for step in steps]
    return bars("Throughput, by latency of the embedding service", labels, series, x="the service's latency", y="passages a second")


def memory(rows: list[Row]) -> str:
    """A worker's memory, by documents done."""
    counts = distinct(rows, "documents")
    series = {
        name: [(count, middle(rows, key, documents=count)) for count in counts]
        for name, key in {"resident (Rss)": "rss_mb", "its share (Pss)": "pss_mb"}.items()
    }
    return lines("A worker's memory over small documents", series, x="documents done", y="MB")


def stages(rows: list[Row], key: str, title: str) -> str:
    """What part of a document's time each stage takes, by file type; the time itself stands beside the type."""
    known = [stage.name for stage in STAGES]
    single = [row | {"stage": stage, key: value} for row in rows for stage, value in zip(row["stages"], row[key], strict=True)]
    times = {
        file_type: {stage: middle(single, key, file_type=file_type, stage=stage) or 0 for stage in known}
        for file_type in sorted({row["file_type"] for row in rows})
    }
    totals = {file_type: sum(each.values()) for file_type, each in times.items()}
    order = sorted(totals, key=lambda file_type: -totals[file_type])
    series = {stage: [100 * times[file_type][stage] / (totals[file_type] or 1) for file_type in order] for stage in known}
    labels = [f"{file_type}: {short(totals[file_type])} ms" for file_type in order]
    return bars(title, labels, series, x="", y="percent of the document's time", stacked=True, lying=True)


def stages_clock(rows: list[Row]) -> str:
    """The same by the clock, with vectors that cost next to nothing."""
    return stages(rows, "duration_ms", "Time per stage by the clock, hash provider")


def stages_cpu(rows: list[Row]) -> str:
    """The same by the CPU."""
    return stages(rows, "cpu_ms", "CPU time per stage, hash provider")


def stages_local(rows: list[Row]) -> str:
    """The same with the model that embeds by default."""
    return stages(rows, "cpu_ms", "CPU time per stage, local provider")


def pickup(rows: list[Row]) -> str:
    """Tries, by milliseconds from the submitter's commit to the claim."""
    labels = [*(f"{low}-{high}" for low, high in pairwise(EDGES_MS)), f"{EDGES_MS[-1]}+"]
    series: dict[str, list[float | None]] = {}
    for count in distinct(rows, "workers"):
        waits = [wait for row in rows if row["workers"] == count for wait in row["ms"]]
        into = [0] * len(labels)
        for wait in waits:
            into[max(0, bisect_right(EDGES_MS, wait) - 1)] += 1
        series[f"{count} idle worker{'s' if count > 1 else ''}, {len(waits):,} tries"] = [100 * each / len(waits) for each in into]
    x = "ms from commit to claim"
    return bars("How long a document waits for an idle worker", labels, series, x=x, y="percent of tries", values=False)


def peers(rows: list[Row]) -> str:
    """CPU time of a document, docmill beside others."""
    rows = [row for row in rows if row.get("cpu") is not None]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    each = {
        system: statistics.median(row["cpu"] / row["documents"] for row in rows if row["system"] == system) * 1000 for system in systems
    }
    order = sorted(systems, key=lambda system: -each[system])
    series: dict[str, list[float | None]] = {"all processes, the server's included": [each[system] for system in order]}
    labels = [PEERS.get(system, system) for system in order]
    return bars("What a small document costs, beside others", labels, series, x="", y="CPU ms a document", lying=True)


Draw = Callable[[list[Row]], str]
PLOTS: dict[str, tuple[dict[str, object], Draw]] = {
    "backlog": ({"what": "backlog"}, backlog),
    "backlog-cpu": ({"what": "backlog"}, backlog_cpu),
    "workers": ({"what": "grid", "service": True}, workers),
    "workers-cpu": ({"what": "grid", "service": True}, workers_cpu),
    "latency": ({"what": "services"}, latency),
    "memory": ({"what": "memory"}, memory),
    "stages": ({"what": "stages", "provider": "hash"}, stages_clock),
    "stages-cpu": ({"what": "stages", "provider": "hash"}, stages_cpu),
    "stages-local": ({"what": "stages", "provider": "local"}, stages_local),
    "pickup": ({"what": "pickup"}, pickup),
    "peers": ({"what": "peers"}, peers),
}
"""By name of the picture: what the rows have that it is drawn from, and how."""


def rows_of(name: str, every: list[Row]) -> list[Row]:
    """Return the rows that a picture is drawn from."""
    return [row for row in every if all(row.get(key) == value for key, value in PLOTS[name][0].items())]


def conditions(rows: list[Row]) -> str:
    """Return at which load and when rows were measured."""
    loads, dates = [row["load"] for row in rows], sorted({row["date"][:10] for row in rows})
    between = f"{min(loads):.0f}" if round(min(loads)) == round(max(loads)) else f"{min(loads):.0f} to {max(loads):.0f}"
    return f"load {between} on {rows[0]['cores']} cores, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def main() -> None:
    """Draw what there are rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=sorted((HOME / "data").glob("*.jsonl")))
    parser.add_argument("--into", type=Path, default=HOME)
    given = parser.parse_args()
    every = list(read_rows(given.files))
    for name, (_, draw) in PLOTS.items():
        if rows := rows_of(name, every):
            path = given.into / f"{name}.svg"
            path.write_text(draw(rows).replace("CONDITIONS", conditions(rows)), encoding="utf-8")
            print(f"{path.name}: {len(rows)} rows, {conditions(rows)}")


if __name__ == "__main__":
    main()
