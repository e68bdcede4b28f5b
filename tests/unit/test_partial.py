"""PARTIAL_PARSE=keep: what lies within the limits stays, and the metadata says which limit cut the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.adapters.parsers import parse_file
from jobs.adapters.parsers.pdf import PART_PAGES
from jobs.adapters.parsing import parse_isolated
from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.sandbox_child import Limits
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile
from models.errors import ParseError
from tests.unit.small_files import pdf, pptx, xlsx

MAILBOX = b"".join(b"From a@b Thu Jan  1 00:00:00 2026\nSubject: %d\n\nHello\n\n" % number for number in range(3))


def parse(tmp_path: Path, name: str, content: bytes, *, pages: int = 10_000, output_mb: int = 256, partial: bool = True) -> ParsedFile:
    path = tmp_path / "stored"
    path.write_bytes(content)
    found = sniff(path, name)
    return parse_file(StoredFile(path), name, found.file_type, found.mime_type, pages, partial=partial, output_mb=output_mb)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.pdf", pdf("one", "two", "three")), ("a.pptx", pptx("one", "two", "three")), ("a.mbox", MAILBOX),
     ("a.xlsx", xlsx(A=[["one"]], B=[["two"]], C=[["three"]]))],
)  # fmt: skip
def test_the_pages_within_the_page_limit_are_kept(tmp_path: Path, name: str, content: bytes) -> None:
    whole = parse(tmp_path, name, content)
    assert "cut_by" not in whole.metadata
    parsed = parse(tmp_path, name, content, pages=2)
    assert parsed.pages == whole.pages[:2]
    assert "MAX_PAGES" in parsed.metadata["cut_by"]
    assert (parsed.metadata["pages_kept"], parsed.metadata["pages_of"]) == (2, 3)
    with pytest.raises(ParseError, match="more than the limit of 2"):
        parse(tmp_path, name, content, pages=2, partial=False)


def test_text_within_the_output_limit_is_kept_and_cut_at_a_character(tmp_path: Path) -> None:
    text = "aä" * 500_000
    parsed = parse(tmp_path, "a.txt", text.encode(), output_mb=1)
    assert text.startswith(parsed.pages[0].markdown)
    assert 900_000 < len(parsed.pages[0].markdown.encode()) < 1024 * 1024
    assert parsed.metadata["cut_by"] == "the output limit of 1 MB (PARSE_OUTPUT_MB)"
    assert "cut_by" not in parse(tmp_path, "a.txt", text.encode()).metadata


def test_a_page_tree_that_counts_pages_over_and_over_is_refused_not_cut(tmp_path: Path) -> None:
    tree = [b"%d 0 obj << /Type /Pages /Count 100000 /Kids [%s] >> endobj" % (n, b"%d 0 R " % (n + 1) * 10) for n in range(2, 7)]
    page = b"7 0 obj << /Type /Page /Parent 6 0 R /MediaBox [0 0 9 9] >> endobj"
    bomb = b"%PDF-1.4\n1 0 obj << /Type /Catalog /Pages 2 0 R >> endobj\n" + b"\n".join([*tree, page]) + b"\ntrailer << /Root 1 0 R >>"
    with pytest.raises(ParseError, match=r"pages, more than [\d,]+ bytes can hold"):
        parse(tmp_path, "a.pdf", bomb, pages=10)


async def test_pages_before_an_endless_one_are_kept_and_without_them_the_limit_is_an_error(tmp_path: Path) -> None:
    sandbox = ProcessSandbox(children=1, limits=Limits(timeout=120, cpu_seconds=4))
    path = tmp_path / "stored"
    path.write_bytes(pdf(*(f"page {number}" for number in range(PART_PAGES + 1)), bomb=True))
    given = (sandbox, StoredFile(path), "a.pdf", FileType.PDF, "application/pdf")
    parsed = await parse_isolated(*given, partial=True)
    assert [page.markdown.strip() for page in parsed.pages] == [f"page {number}" for number in range(PART_PAGES)]
    assert "CPU limit" in parsed.metadata["cut_by"]
    assert (parsed.metadata["pages_kept"], parsed.metadata["pages_of"]) == (PART_PAGES, PART_PAGES + 2)
    with pytest.raises(ParseError, match=r"'a\.pdf' cannot be parsed: Parsing was stopped at the CPU limit of 4 s\.$"):
        await parse_isolated(*given)
    await sandbox.aclose()
