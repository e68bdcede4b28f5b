"""Makes the table scenario x mode from the lines that the scenarios left. `python -m tests.faults.table LINES TABLE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SERVICES = (
    "service", "what it did", "mode", "documents", "calls made", "of which needed", "first second", "attempts spent", "dead letters",
    "seconds from recovery", "seconds in all",
)  # fmt: skip
HEAD = ("scenario", "mode", "what was done", "documents", "faults", "lost", "doubled", "seconds to recover")


def table(lines: list[dict[str, Any]]) -> str:
    """Return a markdown table, a row for each scenario in each mode, and the sums."""
    ordered = sorted(lines, key=lambda line: (_number(line["scenario"]), line["scenario"], line["did"], line["mode"]))
    rows = [
        (
            line["scenario"], line["mode"], line["did"], line["documents"], line["faults"], line["lost"], line["doubled"],
            _dash(line["recovered_s"]),
        )
        for line in ordered
    ]  # fmt: skip
    sums = [sum(line[name] for line in lines) for name in ("documents", "faults", "lost", "doubled")]
    shown = [HEAD, ("---",) * len(HEAD), *rows, ("all", "", f"{len(rows)} runs", *sums, "")]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in shown)


def table_of_services(lines: list[dict[str, Any]]) -> str:
    """Return a markdown table of what outside services did and what it took, a row for each scenario in each mode."""
    rows = [
        (
            line["kind"], line["did"], line["mode"], line["documents"], line["calls"], line["needed"], _dash(line["stampede"]),
            line["attempts"], line["dead_letters"], _dash(line["recovered_s"]), line["seconds"],
        )
        for line in sorted(lines, key=lambda line: (line["kind"], line["scenario"], line["mode"]))
    ]  # fmt: skip
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in [SERVICES, ("---",) * len(SERVICES), *rows])


def _dash(value: Any) -> Any:
    return "-" if value is None else value


def _number(scenario: str) -> int:
    first = scenario.split(maxsplit=1)[0]
    return int(first) if first.isdigit() else 99


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    found = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    text = table([line for line in found if "calls" not in line])
    if services := [line for line in found if "calls" in line]:
        text += "\n" + table_of_services(services)
    target.write_text(text, encoding="utf-8")
    print(text)
