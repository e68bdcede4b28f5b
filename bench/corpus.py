"""Every corpus file through `sniff` and `parse_isolated`, beside what its MANIFEST expects.

Run `python -m bench.corpus [good|hostile] [--timeout S] [--all]`. Prints the files whose outcome differs from `expected`
(with --all every file), the slowest and hungriest, and the processes left afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import re
import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jobs.adapters import usage
from jobs.adapters.parsing import parse_isolated
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Limits
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType
from models.errors import DocmillError

CORPUS = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    path: str
    expected: str
    note: str
    result: str
    """`ok` or the class of the error."""
    detail: str
    seconds: float
    peak_mb: float

    @property
    def differs(self) -> bool:
        """Compare with the words that the MANIFEST begins with; a clean failure is allowed wherever it says so."""
        if (
            " or a clean" in self.expected
            or ", or refuse" in self.expected
            or self.expected.startswith(("extract or", "either", "decode", "open;", "bounded", "incons", "reject", "../", "clean"))
        ):
            return self.result not in ("ok", "ParseError", "PermanentError", "TimeoutError")
        if self.expected.startswith(("fail", "no text layer")):
            return self.result == "ok" and not self.expected.startswith("no text layer")
        if self.expected.startswith(("ok", "extract")):
            return self.result != "ok"
        return self.result not in ("ok", "ParseError", "PermanentError")


async def try_file(sandbox: ProcessSandbox, row: dict[str, str], folder: Path) -> Outcome:
    """Return what becomes of one file; a zip is not parsed, it is a batch."""
    path = folder / row["path"]
    started = time.perf_counter()
    result, detail = "ok", ""
    with usage.measured() as used:
        try:
            found = sniff(path, path.name)
            detail = f"{found.mime_type}"
            if found.file_type is FileType.ZIP:
                detail = "zip (batch)"
            elif found.encrypted:
                result, detail = "PermanentError", "encrypted (sniffed)"
            else:
                parsed = await parse_isolated(sandbox, StoredFile(path), path.name, found.file_type, found.mime_type)
                text = "\n".join(page.markdown for page in parsed.pages)
                trouble = {key: parsed.metadata[key] for key in ("failed_parsers", "crashes") if key in parsed.metadata}
                detail = f"{parsed.parser}, {len(parsed.pages)} pages, {len(text):,} characters {trouble or ''}"
                token = re.search(r"token (.+)$", row["note"])
                if token is not None and token[1] not in text:
                    detail += ", WITHOUT THE TOKEN"
        except DocmillError as error:
            result, detail = type(error).__name__, str(error)
    return Outcome(row["path"], row["expected"], row["note"], result, detail, time.perf_counter() - started, used.peak_memory_mb)


async def run(which: str, seconds: float, show_all: bool) -> None:
    """Run the folder, two files at a time."""
    folder = CORPUS / which
    with (folder / "MANIFEST.tsv").open(encoding="utf-8") as manifest:
        rows = list(csv.DictReader(manifest, delimiter="\t", quoting=csv.QUOTE_NONE))
    sandbox = ProcessSandbox(children=2, limits=Limits(timeout=seconds))
    slots = asyncio.Semaphore(2)

    async def one(row: dict[str, str]) -> Outcome:
        async with slots:
            return await try_file(sandbox, row, folder)

    before, started = _own_memory(), time.perf_counter()
    outcomes = await asyncio.gather(*(one(row) for row in rows))
    elapsed = time.perf_counter() - started
    await sandbox.aclose()
    for outcome in outcomes:
        if show_all or outcome.differs or "WITHOUT" in outcome.detail:
            mark = "DIFFERS" if outcome.differs else ""
            cost = f"{outcome.seconds:.2f} s, {outcome.peak_mb:.0f} MB"
            print(f"{outcome.path} | {outcome.expected[:60]} | {outcome.result} {mark} | {outcome.detail[:300]} | {cost}")
    print(f"{len(rows)} files in {elapsed:.1f} s: {dict(Counter(outcome.result for outcome in outcomes))}")
    print("slowest:", [(o.path, round(o.seconds, 1)) for o in sorted(outcomes, key=lambda o: -o.seconds)[:6]])
    print("hungriest:", [(o.path, round(o.peak_mb)) for o in sorted(outcomes, key=lambda o: -o.peak_mb)[:6]])
    print(f"own memory: {before:.0f} MB before, {_own_memory():.0f} MB after")


def _own_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("folder", nargs="?", default="good", choices=["good", "hostile"])
    arguments.add_argument("--timeout", type=float, default=60)
    arguments.add_argument("--all", action="store_true")
    given = arguments.parse_args()
    if CORPUS.exists():
        asyncio.run(run(given.folder, given.timeout, given.all))
    else:
        print(f"no corpus at {CORPUS}: set DOCMILL_CORPUS")
