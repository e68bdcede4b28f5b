"""The tests' server of OpenAI's protocol as a process of its own, and documents for it whose passages are known beforehand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench.running import WORDS

DIMENSIONS = 384
LATENCY = 0.2
"""Seconds before each answer, where nothing else is asked for."""


class Service:
    """The server in its own process, asked over HTTP what it has seen."""

    def __init__(self, url: str, latency: float = LATENCY) -> None:
        self.url, self.latency = url, latency
        self.settings = {
            "embedding_provider": "openai",
            "embedding_base_url": url,
            "embedding_model": "bench",
            "embedding_dimensions": DIMENSIONS,
        }
        """Of workers that embed with it."""

    def _control(self, what: str, method: str = "GET", told: dict[str, Any] | None = None) -> dict[str, Any]:
        root, body = self.url.removesuffix("/v1"), None if told is None else json.dumps(told).encode()
        asked = urllib.request.Request(f"{root}/_{what}", body, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return dict(json.load(answer))

    def fail(self) -> None:
        """Have it answer HTTP 502 until it is reset."""
        self._control("script", "POST", {"when": "outage", "fault": "502_html", "start": 0, "end": 1e6})

    def reset(self) -> None:
        """Have it forget everything, and be well."""
        self._control("reset", "POST")

    def tally(self) -> dict[str, Any]:
        """Return what it has counted since: see tests.servers.tally."""
        return self._control("tally")


@contextmanager
def service(latency: float = LATENCY) -> Iterator[Service]:
    """Yield the running server, which answers after `latency` seconds and ends afterwards."""
    own = ["--latency", str(latency), "--punctual", "--dimensions", str(DIMENSIONS), "--cheap"]
    command = [sys.executable, "-m", "tests.servers", "openai", *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        try:
            assert process.stdout is not None
            yield Service(process.stdout.readline().split()[-1], latency)
        finally:
            process.terminate()


def write(folder: Path, name: str, documents: int, passages: int) -> list[Path]:
    """Write markdown files of one passage a section and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(documents):
        rng = random.Random(f"{name} {number}")
        sections = []
        for section in range(passages):
            words: list[str] = []
            while sum(map(len, words)) + len(words) < 850:
                words.append(rng.choice(WORDS) + (str(rng.randrange(9999)) if rng.random() < 0.1 else ""))
            sections.append(f"## Section {section} of {name} {number}\n\n{' '.join(words)}.")
        paths.append(folder / f"{name}-{number:04}.md")
        paths[-1].write_text("\n\n".join(sections))
    return paths


def ids(conn: psycopg.Connection, paths: list[Path]) -> list[str]:
    rows = conn.execute("SELECT doc_id FROM file_extractions WHERE file_name = ANY(%s)", [[path.name for path in paths]]).fetchall()
    return [row[0] for row in rows]


def wait(conn: psycopg.Connection, question: str, answer: int, *args: object, seconds: float = 900) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        row = conn.execute(question.encode(), args).fetchone()
        if row is not None and row[0] == answer:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{question} was not {answer} after {seconds} s")
