"""Speed of checking, cutting and of local extraction: generated texts of several shapes, and the corpus' text files where it is at hand.

Run by hand: `python -m bench.chunking`. CPU seconds of this process, so that a busy machine changes little.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.adapters.extractor import extract_locally
from jobs.stages.check import normalise
from jobs.stages.chunk import cut

SIZE, OVERLAP = 1000, 100
SENTENCE = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt. "
SHAPES = {
    "prose with headings": "## Section\n\n" + (SENTENCE * 6 + "\n\n") * 3,
    "one line": SENTENCE,
    "one word": "x" * 1000,
    "table": "| a cell | another cell of text | 123.45 | 2024-01-01 |\n",
    "list": "- an item in a list of things\n",
    "Chinese": "文書管理、請求書は受領後三十日以内にお支払いください。",
    "Chinese without punctuation": "文書管理",
    "headings only": "# a\n",
    "emoji": "👨‍👩‍👧‍👦",
    "brackets": "[",
    "lines of one letter": "x\n",
    "blanks inside lines": "x" + " " * 200_000,
    "marks on one letter": "\u0300\u0327",
    "table with a wide header": "| b |\n",
}
HEADS = {
    "table": "| a | b | c | d |\n|---|---|---|---|\n",
    "table with a wide header": "|" + " a |" * 60_000 + "\n|" + "---|" * 60_000 + "\n",
}


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def chunk(text: str) -> int:
    return len(cut(text, (), doc_id="bench", size=SIZE, overlap=OVERLAP))


def shapes(console: Console) -> None:
    table = Table(
        "text", "MB", "passages", "check MB/s", "cut MB/s", "passages/s", "extract MB/s", title="Generated, 1 and 4 million characters"
    )
    for name, unit in SHAPES.items():
        head = HEADS.get(name, "")
        for length in (1_000_000, 4_000_000):
            text = head + unit * (length // len(unit))
            megabytes = len(text.encode()) / 1e6
            checking = seconds(partial(normalise, text))
            cutting, extracting = seconds(partial(chunk, text)), seconds(partial(extract_locally, text, (), "a.txt", {}))
            count = chunk(text)
            table.add_row(
                name,
                f"{megabytes:.1f}",
                f"{count}",
                f"{megabytes / checking:.0f}",
                f"{megabytes / cutting:.1f}",
                f"{count / cutting:.0f}",
                f"{megabytes / extracting:.1f}",
            )
    console.print(table)


def corpus(console: Console) -> None:
    folder = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))
    files = [file for kind in ("md", "txt", "gt") for file in sorted((folder / "good" / kind).glob("*")) if file.suffix in (".md", ".txt")]
    if not files:
        console.print("no corpus: set DOCMILL_CORPUS")
        return
    texts = [file.read_text("utf-8", errors="replace") for file in files]
    characters = sum(map(len, texts))
    cutting = seconds(lambda: [chunk(text) for text in texts])
    times = sorted(seconds(partial(extract_locally, text, (), "a.txt", {})) * 1000 for text in texts)
    table = Table("documents", "characters", "passages", "cut s", "passages/s", "extract ms mean", "median", "p95", "max", title="Corpus")
    count = sum(map(chunk, texts))
    mean, middle, high = sum(times) / len(times), times[len(times) // 2], times[int(len(times) * 0.95)]
    table.add_row(
        *(str(value) for value in (len(texts), characters, count)),
        *(f"{value:.2f}" for value in (cutting, count / cutting, mean, middle, high, times[-1])),
    )
    console.print(table)


def main() -> None:
    console = Console()
    seconds(lambda: (chunk(SENTENCE), extract_locally(SENTENCE, (), "a.txt", {})))  # load libraries and the language model
    shapes(console)
    corpus(console)


if __name__ == "__main__":
    main()
