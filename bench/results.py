"""Measured rows as JSON lines, beside what a measurement prints: what was measured, when, at which load, and the values.

`bench.plots` draws from them. A file is only ever appended to, so several runs and measurements may share one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a measurement take `--json FILE`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each measured row to FILE as a line of JSON")


def write_row(path: Path | None, what: str, **values: Any) -> None:
    """Append one measured row to a file; without a file do nothing. Floats keep four digits."""
    if path is None:
        return
    about = {"what": what, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}", "load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about | {name: _short(value) for name, value in values.items()}) + "\n")


def read_rows(paths: list[Path]) -> Iterator[Row]:
    """Yield the rows of files in order."""
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_short(each) for each in value]
    return value
