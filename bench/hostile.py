"""The hostile corpus through real workers: each file beside what its MANIFEST expects, and what became of workers, neighbours and disk.

Usage: python -m bench.hostile [--workers 2] [--timeout 60] [--neighbours 100] [--write docs/hostile.md] [--all]

Each file is one document, each zip one batch; small text documents are submitted among them. The workers' memory is looked at four times
a second. Prints every file whose outcome is not what is expected (with --all every file), then the checks; --write makes the page.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.corpus import CORPUS
from bench.running import bench_server, environment, fresh_settings, small_documents, url_of, workers
from jobs.adapters.archives import is_archive
from jobs.front import close_async
from models.errors import DocmillError
from models.settings import Settings, load_settings

FOLDER = CORPUS / "hostile"
OWN_FAULTS = {"PERMANENT", "PARSE_ERROR", "TIMEOUT"}
"""Error types that say that the file is to blame."""
UNENDED = """SELECT (SELECT count(*) FROM file_extractions WHERE state NOT IN ('complete', 'failed', 'duplicate', 'cancelled'))
    + (SELECT count(*) FROM processing_jobs WHERE completed_at IS NULL)"""
DOCUMENTS = """SELECT d.doc_id, d.batch_id, d.file_name, d.state::text, d.error_type::text, d.error_message, d.retry_count, d.crash_count,
    d.processing_duration_ms / 1000.0 AS seconds, s.memory_mb,
    coalesce(m.markdown, '') AS markdown, coalesce(m.parse_metadata, '{}') AS about
FROM file_extractions AS d
LEFT JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.version
LEFT JOIN LATERAL (SELECT max(e.peak_memory_mb) AS memory_mb
    FROM document_events AS e WHERE e.doc_id = d.doc_id) AS s ON true"""
BATCHES = "SELECT b.batch_id, b.status::text, b.error_message FROM processing_jobs AS b"
TOLD = """SELECT e.doc_id, e.detail::text FROM document_events AS e
UNION ALL SELECT l.doc_id, concat(l.error_message, l.traceback, l.context) FROM dead_letters AS l"""


@dataclass(frozen=True)
class File:
    """A row of the MANIFEST."""

    path: str
    expected: str
    token: str | None

    @property
    def is_zip(self) -> bool:
        """Whether it is submitted as a batch."""
        return is_archive(FOLDER / self.path, self.path)


@dataclass
class Outcome:
    """What became of a file."""

    result: str
    """complete, failed, refused (at submission), or for a zip how many of its files are complete."""
    error_type: str = ""
    error: str = ""
    seconds: float = 0.0
    memory_mb: float = 0.0
    retries: int = 0
    complete: int = 0
    files: int = 0
    has_token: bool = False
    about: str = ""


def judge(file: File, outcome: Outcome) -> str:
    """Say in what an outcome is not what the MANIFEST expects; empty if in nothing."""
    if outcome.result == "unended":
        return "has not ended"
    if outcome.error_type and outcome.error_type not in OWN_FAULTS:
        return f"an error of type {outcome.error_type}"
    expected = file.expected
    if expected.startswith("fail") and outcome.complete:
        return "should have failed"
    if expected in ("ok", "ok-part") or expected.startswith("ok:"):
        if not outcome.complete and "or refuse" not in expected:
            return "should be complete"
        if file.token and not outcome.has_token:
            return "without its text"
    return "retried" if "not retried" in expected and outcome.retries else ""


def manifest() -> list[File]:
    """Read the MANIFEST."""
    with (FOLDER / "MANIFEST.tsv").open(encoding="utf-8") as rows:
        found = list(csv.DictReader(rows, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokens = (re.search(r"\btoken (\S.*)$", row["note"]) for row in found)
    return [File(row["path"], row["expected"], token and token[1]) for row, token in zip(found, tokens, strict=True)]


async def submit(files: Iterable[File], neighbours: list[Path]) -> dict[str, str]:
    """Submit all, neighbours among them; return why some were refused at once."""
    from jobs import submit_batch_async, submit_document_async

    refused = {}
    waiting = iter(neighbours)
    for number, file in enumerate(files):
        try:
            if file.is_zip:
                await submit_batch_async(FOLDER / file.path, batch_id=file.path)
            else:
                await submit_document_async(FOLDER / file.path, doc_id=file.path)
        except DocmillError as error:
            refused[file.path] = str(error)
        if number % 4 == 0 and (neighbour := next(waiting, None)):
            await submit_document_async(neighbour, doc_id=f"neighbour {neighbour.name}")
    for neighbour in waiting:
        await submit_document_async(neighbour, doc_id=f"neighbour {neighbour.name}")
    await close_async()
    return refused


@dataclass
class Watch:
    """Memory of the workers, from before the first file to after the last."""

    pids: list[int]
    memory: dict[int, list[float]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Note each worker's memory until stopped."""
        while not self.stop.wait(0.25):
            for pid in self.pids:
                with_status = Path(f"/proc/{pid}/status")
                if with_status.exists() and (found := re.search(r"VmRSS:\s+(\d+)", with_status.read_text())):
                    self.memory.setdefault(pid, []).append(int(found[1]) / 1024)


@contextmanager
def watched(pids: list[int]) -> Iterator[Watch]:
    watch = Watch(pids)
    thread = threading.Thread(target=watch.look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop.set()
        thread.join()


def quarters(values: list[float]) -> list[float]:
    """Return the values at a quarter, half, three quarters and the end."""
    return [values[len(values) * n // 4 - 1] for n in (1, 2, 3, 4)]


def children_of(pids: list[int]) -> set[int]:
    """Return the processes below these."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    below: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in below | set(pids)} - below:
        below |= more
    return below


def names_in(folder: str) -> set[str]:
    """Return what lies directly in a folder."""
    return {path.name for path in Path(folder).iterdir()}


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file beneath folders."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if not path.is_dir() and "__pycache__" not in path.parts and ".git" not in path.parts:
                about = path.lstat()
                found[str(path)] = about.st_size, about.st_mtime_ns
    return found


def collect(settings: Settings, files: Iterable[File], refused: Mapping[str, str]) -> tuple[dict[str, Outcome], list[dict[str, Any]]]:
    """Return what became of each file, and all documents."""
    with psycopg.connect(url_of(settings), row_factory=dict_row) as conn:
        documents = conn.execute(DOCUMENTS).fetchall()
        batches = {row["batch_id"]: row for row in conn.execute(BATCHES)}
    alone = {row["doc_id"]: row for row in documents}
    outcomes = {}
    for file in files:
        token = file.token or "\0"
        if file.path in refused:
            outcomes[file.path] = Outcome("refused", "PERMANENT", refused[file.path])
        elif file.path in batches:
            batch, parts = batches[file.path], [row for row in documents if row["batch_id"] == file.path]
            complete = sum(row["state"] in ("complete", "duplicate") for row in parts)
            bad = next((row for row in parts if row["error_type"] not in (None, *OWN_FAULTS)), None)
            outcomes[file.path] = Outcome(
                f"{complete} of {len(parts)} complete" if parts else str(batch["status"]),
                bad["error_type"] if bad else "",
                batch["error_message"] or next((row["error_message"] for row in parts if row["error_message"]), ""),
                sum(float(row["seconds"] or 0) for row in parts),
                max((row["memory_mb"] or 0.0 for row in parts), default=0.0),
                max((row["retry_count"] for row in parts), default=0),
                complete,
                len(parts),
                any(token in row["markdown"] for row in parts),
            )
        else:
            row = alone[file.path]
            ended = row["state"] in ("complete", "duplicate", "failed")
            outcomes[file.path] = Outcome(
                row["state"] if ended else "unended",
                row["error_type"] or "",
                row["error_message"] or "",
                float(row["seconds"] or 0),
                row["memory_mb"] or 0.0,
                row["retry_count"],
                int(row["state"] in ("complete", "duplicate")),
                1,
                token in row["markdown"],
                str(row["about"].get("cut_by", "")),
            )
    return outcomes, documents


def leaks(settings: Settings, files: Iterable[File], documents: list[dict[str, Any]], logs: Path) -> list[str]:
    """Return where a planted token stands beside its own document's text."""
    with psycopg.connect(url_of(settings)) as conn:
        told = conn.execute(TOLD).fetchall()
    lines = "\n".join(path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file())
    found = []
    for file in files:
        if not file.token or not re.fullmatch(r"zq[a-z]{10}", file.token):
            continue
        own = {row["doc_id"]: row for row in documents if file.path in (row["doc_id"], row["batch_id"])}
        in_name = any(file.token in row["file_name"] for row in own.values())
        if file.token in lines and not in_name:
            found.append(f"{file.path}: in a log")
        found += [f"{file.path}: told of {i}" for i, words in told if file.token in (words or "") and not (in_name and i in own)]
        found += [
            f"{file.path}: in the text of {row['doc_id']}"
            for row in documents
            if file.token in row["markdown"] and row["doc_id"] not in own
        ]
    return found


def short(text: str, length: int) -> str:
    """Return a text on one line, for a table."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= length else f"{line[: length - 3]}..."


def table(files: Iterable[File], outcomes: Mapping[str, Outcome], length: int = 150) -> Iterator[str]:
    """Yield the table, a line a file."""
    yield "| file | expected | outcome | error or limit | seconds | peak MB |"
    yield "|---|---|---|---|---|---|"
    for file in files:
        o = outcomes[file.path]
        memory = f"{o.memory_mb:.0f}" if o.memory_mb else ""
        expected = short(file.expected, 40)
        yield f"| `{file.path}` | {expected} | {o.result} | {short(o.error or o.about, length)} | {o.seconds:.1f} | {memory} |"


def run(given: argparse.Namespace) -> None:
    """Run the corpus and print what came of it."""
    files = manifest()
    with bench_server() as (server, folder):
        settings = fresh_settings(
            server,
            folder,
            "hostile",
            embedding_provider="hash",
            parse_timeout_seconds=given.timeout,
            log_level="INFO",
            log_format="json",
            log_file_path=folder / "logs" / "worker.log",
            max_retry_attempts=1,
            retry_base_delay_seconds=0.2,
        )
        for name in ("tmp", "home", "canary"):
            (folder / name).mkdir()
        (folder / "canary" / "secret.txt").write_text("a secret that no document may hold: zqcanaryzqcanary")
        os.environ.update(environment(settings), TMPDIR=str(folder / "tmp"), HOME=str(folder / "home"))
        load_settings.cache_clear()
        neighbours = small_documents(folder / "neighbours", given.neighbours)
        outside = (FOLDER, folder / "tmp", folder / "home", folder / "canary", folder / "neighbours", Path(__file__).parents[1] / "jobs")
        before, roots = tree(*outside), {root: names_in(root) for root in ("/", "/etc", "/home", "/root", "/var/tmp")}
        with workers(settings, given.workers) as processes, watched([process.pid for process in processes]) as watch:
            warm(settings, folder)
            resting = {pid: values[-1] for pid, values in watch.memory.items()}
            for values in watch.memory.values():
                values.clear()
            began = time.perf_counter()
            refused = asyncio.run(submit(files, neighbours))
            taken = wait(settings, began, given.patience)
            time.sleep(3)
            alive = [process.poll() is None for process in processes]
            below = children_of(watch.pids)
        time.sleep(0.5)
        outcomes, documents = collect(settings, files, refused)
        crashes = sum(row["crash_count"] for row in documents)
        complete = sum(row["state"] == "complete" for row in documents if row["doc_id"].startswith("neighbour "))
        changed = sorted(set(tree(*outside).items()) ^ set(before.items()))
        new = [f"{root}/{name}" for root, names in roots.items() for name in names_in(root) - names]
        canary = [row["doc_id"] for row in documents if "zqcanaryzqcanary" in row["markdown"]]
        told = leaks(settings, files, documents, folder / "logs")
        mismatches = {file.path: words for file in files if (words := judge(file, outcomes[file.path]))}
        checks = [
            f"{len(files)} files in {taken:.0f} s with {given.workers} workers and a time limit of {given.timeout:g} s",
            f"as expected: {len(files) - len(mismatches)} of {len(files)}",
            f"workers alive at the end: {sum(alive)} of {len(alive)}; documents that count a crash of a worker: {crashes}",
            f"processes below the workers after they had ended: {sum(Path(f'/proc/{pid}').exists() for pid in below)}",
            f"neighbours complete: {complete} of {len(neighbours)}",
            f"files changed outside of the storage: {len(changed)}, new in system folders: {len(new)}",
            f"documents that hold the canary: {len(canary)}; planted tokens told elsewhere: {len(told)}",
            "memory of the workers before, after each quarter of the time, and at most: "
            + "; ".join(
                ", ".join(f"{mb:.0f}" for mb in [resting[pid], *quarters(watch.memory[pid]), max(watch.memory[pid])]) for pid in watch.pids
            )
            + " MB",
        ]
        print("\n".join(table([file for file in files if given.all or file.path in mismatches], outcomes)))
        for path, words in mismatches.items():
            print(f"NOT AS EXPECTED {path}: {words}")
        for line in [*map(str, changed), *new, *canary, *told]:
            print(f"OUTSIDE {line}")
        print("\n".join(checks))
        if given.write:
            page(Path(given.write), files, outcomes, checks, mismatches)
        if given.keep_logs:
            shutil.copytree(folder / "logs", given.keep_logs, dirs_exist_ok=True)


def warm(settings: Settings, folder: Path) -> None:
    """Have the workers work, so that what they load once does not count as growth."""
    from jobs import submit_document_async

    async def some() -> None:
        paths = small_documents(folder / "warm", 300)
        large = folder / "warm" / "large.txt"
        large.write_text("\n\n".join(path.read_text() for path in paths))
        for path in [*paths[:20], large]:
            await submit_document_async(path, doc_id=f"warm {path.name}")
        await close_async()

    asyncio.run(some())
    wait(settings, time.perf_counter(), 120)
    time.sleep(1)


def wait(settings: Settings, began: float, patience: float) -> float:
    """Wait until everything has ended and return the seconds."""
    with psycopg.connect(url_of(settings), autocommit=True) as conn:
        while time.perf_counter() - began < patience:
            row = conn.execute(UNENDED).fetchone()
            if row == (0,):
                break
            time.sleep(0.2)
    return time.perf_counter() - began


def page(path: Path, files: list[File], outcomes: Mapping[str, Outcome], checks: list[str], mismatches: Mapping[str, str]) -> None:
    """Write the page."""
    lines = [
        "# The hostile corpus, file by file",
        "",
        "Generated by `python -m bench.hostile --write docs/hostile.md`, which sends every file of the corpus through real workers.",
        "Peak memory is that of the child process that parsed the file; a file that was refused before had none. The time limit is for one",
        "parser's work on one file. Seconds are those of the whole document, with the parsers that were tried one after the other,",
        "attempts after a time limit, and waiting for a child; those of a zip are the sum of its entries'.",
        "",
        *(f"- {check}" for check in checks),
        *(f"- not as expected: `{name}`: {words}" for name, words in mismatches.items()),
        "",
        *table(files, outcomes, 90),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--patience", type=float, default=1500)
    parser.add_argument("--neighbours", type=int, default=100)
    parser.add_argument("--write")
    parser.add_argument("--keep-logs")
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    if FOLDER.exists():
        run(given)
    else:
        print(f"no corpus at {FOLDER}: set DOCMILL_CORPUS")


if __name__ == "__main__":
    main()
