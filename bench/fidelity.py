"""Text fidelity of `parse_file` against the ground truth of the corpus, as a markdown table by type.

Run `python -m bench.fidelity [--files] [--parser NAME]`; the corpus is found through DOCMILL_CORPUS or ../shared/corpus.

- text: normalised edit similarity of the words (rapidfuzz, 1 is equal), markup, case and punctuation left out on both sides.
- tables: the cells of all tables in order, the same similarity over whole cells; files whose truth has no table do not count.
- headings: the same over heading texts in order; files whose truth has no heading do not count.
Most ground truths are another converter's output (docling's), so 1 is not reachable and differences of 0.02 mean little.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

from rapidfuzz.distance import Indel

from jobs.adapters import parsers
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.errors import DocmillError

CORPUS = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))
Scores = tuple[float, float | None, float | None]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--files", action="store_true", help="also print a line for each file")
    arguments.add_argument("--parser", help="use only the parser of this name where a type has it")
    given = arguments.parse_args()
    if not (CORPUS / "good" / "MANIFEST.tsv").exists():
        print(f"no corpus at {CORPUS}: set DOCMILL_CORPUS")
        return
    by_type: dict[str, list[Scores]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    with (CORPUS / "good" / "MANIFEST.tsv").open(encoding="utf-8") as manifest:
        rows = [row for row in csv.DictReader(manifest, delimiter="\t", quoting=csv.QUOTE_NONE) if row["ground_truth"]]
    for row in rows:
        started = time.perf_counter()
        markdown = parsed(CORPUS / "good" / row["path"], given.parser)
        seconds[row["type"]] += time.perf_counter() - started
        scores = compare(markdown, ground_truth(CORPUS / "good" / row["ground_truth"]))
        by_type[row["type"]].append(scores)
        if given.files:
            print(f"{row['path']:60} " + " ".join("  -  " if score is None else f"{score:.3f}" for score in scores))
    print("| type | files | text | tables | headings | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for kind, found in sorted(by_type.items()):
        columns = [[score for score in column if score is not None] for column in zip(*found, strict=True)]
        shown = " | ".join(f"{mean(column):.3f} ({len(column)})" if column else "" for column in columns)
        print(f"| {kind} | {len(found)} | {shown} | {seconds[kind]:.2f} |")


def parsed(path: Path, only: str | None) -> str:
    """Return the file's markdown, by the first parser of its type or the named one; nothing if it fails."""
    sniffed = sniff(path, path.name)
    skip = 0
    if only is not None:
        chain = parsers.PARSERS.get(sniffed.mime_type) or parsers.PARSERS[sniffed.file_type]
        chosen = tuple(replace(parser, first_above_bytes=None) for parser in chain if parser.name == only)
        parsers.PARSERS[sniffed.mime_type] = chosen or chain
    try:
        result = parsers.parse_file(StoredFile(path), path.name, sniffed.file_type, sniffed.mime_type, skip=skip)
    except DocmillError as error:
        print(f"{path.name}: {error}", file=sys.stderr)
        return ""
    return "\n\n".join(page.markdown for page in result.pages)


def ground_truth(path: Path) -> str:
    """Return the truth as markdown or text; pandoc's AST is reduced to its strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".native":
        return text
    pieces = re.findall(
        r'\b(?:Str|Code \([^)]*\)|Math \w+) "((?:[^"\\]|\\.)*)"|\b(Space|SoftBreak|LineBreak)\b|\b(Para|Plain|Header|Cell)\b', text
    )
    return "".join(_unescaped(string) if string else " " if space else "\n\n" for string, space, _block in pieces)


def _unescaped(string: str) -> str:
    """Undo Haskell's escapes: decimal code points, `\\&` for nothing, quotes."""
    return re.sub(r"\\(\d+|&|.)", lambda match: chr(int(match[1])) if match[1].isdigit() else match[1].replace("&", ""), string)


def compare(markdown: str, truth: str) -> Scores:
    """Return text, table and heading similarity; None where the truth has no tables or headings."""
    text = Indel.normalized_similarity(words(markdown), words(truth))
    truth_cells, truth_headings = cells(truth), headings(truth)
    return (
        text,
        Indel.normalized_similarity(cells(markdown), truth_cells) if truth_cells else None,
        Indel.normalized_similarity(headings(markdown), truth_headings) if truth_headings else None,
    )


def words(markdown: str) -> list[str]:
    """Return the words without markup, lower case: link targets, images, comments, tags and table rules are no words."""
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", " ", markdown, flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"</?[a-zA-Z][^<>]{0,200}>", " ", text)
    text = re.sub(r"&amp;|&lt;|&gt;|&quot;|&#\d+;", " ", text)
    return re.findall(r"\w+", text.replace("\\", "").replace("_", " ").lower())


def cells(markdown: str) -> list[str]:
    """Return the cells of all pipe tables in order, each as its words; empty cells and rules are left out."""
    found = []
    for line in markdown.split("\n"):
        row = line.strip()
        if row.startswith("|") and not re.fullmatch(r"[|\s:-]+", row):
            found += [cell for part in re.split(r"(?<!\\)\|", row.strip("|")) if (cell := " ".join(words(part)))]
    return found


def headings(markdown: str) -> list[str]:
    """Return the texts of all `#` headings in order, without their levels."""
    return [" ".join(words(line.lstrip("#"))) for line in markdown.split("\n") if re.match(r"#{1,6}\s", line)]


if __name__ == "__main__":
    main()
