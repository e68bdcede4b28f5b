"""PDF: text by page, pages without text are named, a scan and a password are told apart from a broken file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.adapters import parsers
from jobs.adapters.parsers import parse_file
from jobs.adapters.parsers.pdf import PDFIUM
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile
from models.errors import ParseError, PermanentError
from tests.unit.small_files import PASSWORD_ENTRY, pdf

Parse = Callable[..., ParsedFile]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def run(data: bytes, page_limit: int = 10_000) -> ParsedFile:
        path = tmp_path / "stored"
        path.write_bytes(data)
        return parse_file(StoredFile(path), "a.pdf", FileType.PDF, "application/pdf", page_limit)

    return run


def test_pages_are_numbered_and_the_file_tells_about_itself(parse: Parse) -> None:
    parsed = parse(pdf("Hello first page", "Hello second page", title="A title"))
    assert [(page.number, page.markdown.strip()) for page in parsed.pages] == [(1, "Hello first page"), (2, "Hello second page")]
    assert parsed.parser.startswith("liteparse ")
    assert parsed.metadata["title"] == "A title"
    assert parsed.metadata["page_count"] == 2


def test_pages_without_text_keep_their_number_and_are_named(parse: Parse) -> None:
    parsed = parse(pdf("Hello", "", "World"))
    assert [page.number for page in parsed.pages] == [1, 2, 3]
    assert parsed.pages[1].markdown == ""
    assert parsed.metadata["pages_without_text"] == [2]


def test_a_scan_is_a_parse_error_that_says_that_ocr_is_not_configured(parse: Parse) -> None:
    with pytest.raises(ParseError, match=r"'a\.pdf' .*no text layer.*OCR is not configured"):
        parse(pdf("", ""))


def test_a_password_is_a_permanent_error_that_says_so(parse: Parse) -> None:
    with pytest.raises(PermanentError, match=r"'a\.pdf' is encrypted: a password is needed"):
        parse(pdf("x", encrypt=PASSWORD_ENTRY))


def test_a_broken_file_is_a_parse_error(parse: Parse) -> None:
    with pytest.raises(ParseError, match=r"liteparse: it is no readable PDF; pypdfium2: it is no readable PDF"):
        parse(b"%PDF-1.4\nnothing more")


def test_junk_before_the_header_is_skipped(parse: Parse) -> None:
    assert parse(b"junk\n" * 50 + pdf("Hello")).parser.startswith("liteparse ")


def test_too_many_pages_are_refused(parse: Parse) -> None:
    with pytest.raises(ParseError, match="3 pages, more than the limit of 2"):
        parse(pdf("a", "b", "c"), page_limit=2)


def test_the_fallback_finds_the_same_text(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pdf("Hello", "", "World")
    expected = [page.markdown.strip() for page in parse(data).pages]
    monkeypatch.setitem(parsers.PARSERS, FileType.PDF, (PDFIUM,))
    parsed = parse(data)
    assert parsed.parser.startswith("pypdfium2 ")
    assert [page.markdown.strip() for page in parsed.pages] == expected
    assert parsed.metadata["pages_without_text"] == [2]
