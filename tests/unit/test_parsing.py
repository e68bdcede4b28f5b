"""Parsing in the sandbox: the next parser's turn after a crash, and the corpus's core files as their MANIFEST expects."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.adapters.parsing import parse_isolated
from jobs.adapters.sandbox import Exhausted, ProcessSandbox
from jobs.adapters.sandbox_child import Crashed
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile, ParsedPage
from models.errors import ParseError, RateLimitError, TimeoutError
from tests.unit.small_files import docx, pdf

CORPUS = Path(os.environ.get("DOCMILL_CORPUS", Path(__file__).parents[3] / "shared" / "corpus")) / "good"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


class Crashing:
    """A sandbox whose first calls end in a given error; the others run here."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.skipped: list[int] = []

    async def run(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.skipped.append(kwargs["skip"])
        if self.errors:
            raise self.errors.pop(0)
        return function(*args, **kwargs)


async def test_a_file_is_parsed_in_a_child(tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(pdf("Hello"))
    sandbox = ProcessSandbox(children=1)
    parsed = await parse_isolated(sandbox, StoredFile(path), "a.pdf", FileType.PDF, "application/pdf")
    assert parsed.pages[0].markdown.strip() == "Hello"
    with pytest.raises(ParseError, match=r"'a\.pdf' .*no text layer"):
        path.write_bytes(pdf(""))
        await parse_isolated(sandbox, StoredFile(path), "a.pdf", FileType.PDF, "application/pdf")
    await sandbox.aclose()


@pytest.mark.parametrize("error", [Crashed("The parser crashed (signal SIGSEGV)."), Exhausted("The parser loops.")])
async def test_a_crash_or_a_loop_is_the_next_parsers_turn(tmp_path: Path, error: ParseError) -> None:
    path = tmp_path / "stored"
    path.write_bytes(docx("hello"))
    sandbox = Crashing(error)
    parsed = await parse_isolated(sandbox, StoredFile(path), "a.docx", FileType.WORD, DOCX)
    assert parsed.parser.startswith("mammoth ")
    assert parsed.metadata["crashes"] == [str(error)]
    assert sandbox.skipped == [0, 1]


async def test_pages_that_a_loop_left_are_not_spent_on_the_next_parser(tmp_path: Path) -> None:
    error = Exhausted("The parser loops.")
    error.kept = [ParsedFile((ParsedPage(1, "hello"),), "xberg 1")]
    sandbox = Crashing(error)
    parsed = await parse_isolated(sandbox, StoredFile(tmp_path), "a.docx", FileType.WORD, DOCX, partial=True)
    assert (parsed.pages[0].markdown, parsed.metadata["cut_by"], sandbox.skipped) == ("hello", "The parser loops.", [0])


async def test_crashes_of_all_parsers_are_one_parse_error_that_names_the_file(tmp_path: Path) -> None:
    sandbox = Crashing(*[Crashed("The parser crashed (signal SIGSEGV).")] * 3)
    with pytest.raises(ParseError, match=r"'a\.docx' cannot be parsed: The parser crashed \(signal SIGSEGV\)\.$"):
        await parse_isolated(sandbox, StoredFile(tmp_path), "a.docx", FileType.WORD, DOCX)
    assert sandbox.skipped == [0, 1, 2]


@pytest.mark.parametrize("error", [TimeoutError("late"), ParseError("broken"), RateLimitError("wait")])
async def test_other_errors_are_not_tried_again(tmp_path: Path, error: Exception) -> None:
    sandbox = Crashing(error)
    with pytest.raises(type(error)):
        await parse_isolated(sandbox, StoredFile(tmp_path), "a.docx", FileType.WORD, DOCX)
    assert sandbox.skipped == [0]


async def test_core_files_of_the_corpus_end_as_expected() -> None:
    if not CORPUS.exists():
        pytest.skip("no corpus: set DOCMILL_CORPUS")
    with (CORPUS / "MANIFEST.tsv").open(encoding="utf-8") as manifest:
        rows = [row for row in csv.DictReader(manifest, delimiter="\t", quoting=csv.QUOTE_NONE) if row["core"] == "1"]
    assert rows
    sandbox = ProcessSandbox(children=2)
    unexpected = []
    for row in rows:
        path = CORPUS / row["path"]
        found = sniff(path, path.name)
        try:
            await parse_isolated(sandbox, StoredFile(path), path.name, found.file_type, found.mime_type)
        except ParseError as error:
            if "no text layer" not in row["expected"] or "OCR is not configured" not in str(error):
                unexpected.append((row["path"], row["expected"], str(error)))
    await sandbox.aclose()
    assert unexpected == []
