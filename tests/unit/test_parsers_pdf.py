"""PDF: text by page, pages without text are named, a scan and a password are told apart from a broken file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.adapters import parsers
from jobs.adapters.parsers import parse_file
from jobs.adapters.parsers.pdf import PART_PAGES, PDFIUM
from jobs.adapters.parsers.pdf_edges import PageEdges
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile, ParsedPage
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


def _drawn(*texts: tuple[int, int, str]) -> str:
    """Return a page with each text at a place of its own, in points from the lower left corner."""
    return ") Tj (".join(f") Tj 1 0 0 1 {x} {y} Tm ({text}" for x, y, text in texts)


def _body(number: int) -> list[tuple[int, int, str]]:
    words = ("pumps", "valves", "pipes", "tanks", "seals", "gauges", "boilers", "meters")
    return [(72, 660 - 14 * row, f"The {words[row]} of hall {number} need some care each year.") for row in range(len(words))]


def test_rows_at_the_edge_of_a_page_keep_their_numbers(parse: Parse) -> None:
    def row(number: int, y: int) -> list[tuple[int, int, str]]:
        return [(72, y, f"Item {number}"), (300, y, f"{number}"), (450, y, f"{number}.50")]

    pages = [[cell for place in range(35) for cell in row(35 * page + place, 760 - 20 * place)] for page in range(4)]
    parsed = parse(pdf(*(_drawn(*page) for page in pages)))
    for number in range(140):
        assert f"| Item {number} | {number} | {number}.50 |" in parsed.pages[number // 35].markdown


def test_lines_that_differ_in_digits_alone_are_no_repetitions(parse: Parse) -> None:
    pages = [_drawn((72, 760, f"Chapter {n}"), *_body(n), (72, 40, f"Contract 4711-{n}, IBAN DE89 3704 000{n}")) for n in range(1, 7)]
    parsed = parse(pdf(*pages))
    for page in parsed.pages:
        assert f"Chapter {page.number}" in page.markdown
        assert f"Contract 4711-{page.number}, IBAN DE89 3704 000{page.number}" in page.markdown


@pytest.mark.parametrize("count", [6, PART_PAGES + 3])
def test_of_a_running_title_the_first_stays(parse: Parse, count: int) -> None:
    parsed = parse(pdf(*(_drawn((72, 760, "Pump manual"), *_body(n), (72, 40, "Confidential")) for n in range(count))))
    assert [page.number for page in parsed.pages] == list(range(1, count + 1))
    assert [page.number for page in parsed.pages if "Pump manual" in page.markdown] == [1]
    assert [page.number for page in parsed.pages if "Confidential" in page.markdown] == [1]
    assert all("need some care" in page.markdown for page in parsed.pages)


@pytest.mark.parametrize("form", ["{}", "- {} -", "Page {} of 9", "Seite {}", "{} / 9"])
def test_lines_that_are_page_numbers_and_nothing_else_are_left_out(parse: Parse, form: str) -> None:
    parsed = parse(pdf(*(_drawn((72, 760, "Manual"), *_body(n), (300, 40, form.format(n + 2))) for n in range(1, 5))))
    assert all(page.markdown.endswith("need some care each year.") for page in parsed.pages)
    assert all(page.markdown.startswith("Manual") for page in parsed.pages)


def test_a_number_that_does_not_count_with_the_pages_stays(parse: Parse) -> None:
    parsed = parse(pdf(*(_drawn(*_body(place), (300, 40, number)) for place, number in enumerate(["412", "870", "1990"]))))
    assert [page.markdown.split()[-1] for page in parsed.pages] == ["412", "870", "1990"]


def test_a_page_with_nothing_but_such_lines_stays_as_it_is(parse: Parse) -> None:
    pages = [_drawn((72, 760, "Pump manual"), *(_body(n) if n != 4 else []), (300, 40, f"Page {n}")) for n in range(1, 8)]
    parsed = parse(pdf(*pages))
    assert parsed.pages[3].markdown.split() == ["Pump", "manual", "Page", "4"]
    assert "pages_without_text" not in parsed.metadata


def test_what_many_pages_share_stays_where_a_page_has_no_other_text_or_it_is_long() -> None:
    clause = "The buyer pays within a month. " * 8
    pages = [ParsedPage(n, f"Order\n\n{clause}\n\nItem {n}a") for n in range(1, 8)]
    made = PageEdges().without_running_lines([*pages, ParsedPage(8, "Order")])
    assert all(clause in page.markdown for page in made[:7])
    assert [page.number for page in made if "Order" in page.markdown] == [1, 8]


def test_of_tables_and_code_nothing_is_taken() -> None:
    pages = [ParsedPage(n, f"| Name | Sum |\n|---|---|\n| Page {n} | 1 |\n\n```\nend\n```") for n in range(1, 8)]
    assert PageEdges().without_running_lines(pages) == pages
