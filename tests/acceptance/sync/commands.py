"""`docmill sync` as people run it, and what is stored of the folder afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

COMMAND = (sys.executable, "-m", "jobs.cli", "sync")
STATES = "SELECT source_path, state::text FROM file_extractions WHERE replaced_by IS NULL ORDER BY 1"


def put(path: Path, number: int) -> None:
    path.write_text(f"# Document {number}\n\nPump {number} of the plant has a valve and a seal, and its pressure is {number} bar.\n")


def sync(folder: Path, *options: str, **environment: str) -> tuple[int, Any, str]:
    """Run the command and return its exit code, the part of its JSON that is about the sync, and what it said besides."""
    done = subprocess.run(
        [*COMMAND, str(folder), "--json", *options], capture_output=True, text=True, timeout=90, env=os.environ | environment, check=False
    )
    return done.returncode, json.loads(done.stdout)["sync"] if done.stdout else None, done.stderr


def states(conn: psycopg.Connection, folder: Path) -> dict[str, str]:
    return {str(Path(path).relative_to(folder)): state for path, state in conn.execute(STATES).fetchall()}


def complete(*names: str) -> dict[str, str]:
    return dict.fromkeys(sorted(names), "complete")


@contextmanager
def watching(folder: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen([*COMMAND, str(folder), "--watch", *options], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def archive(path: Path, **entries: int) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name, number in entries.items():
            made.writestr(f"in/{name}.md", f"# Entry {number}\n\nValve {number} of the plant leaks at {number} bar.\n")
