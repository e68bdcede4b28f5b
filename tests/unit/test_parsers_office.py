"""Office files: sheets and slides become labelled pages, what one parser refuses the next may read, bombs are refused unopened."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.adapters import parsers
from jobs.adapters.markdown import read_structure
from jobs.adapters.parsers import office, ooxml, parse_file, slide_runs
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType, ParsedFile
from models.errors import ParseError, PermanentError
from tests.unit.small_files import docx, docx_parts, package, pptx, xlsx, xlsx_parts

Parse = Callable[[str, bytes], ParsedFile]
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """Store bytes under a name without extension, as uploads are, and parse them as what they are."""

    def run(name: str, data: bytes) -> ParsedFile:
        path = tmp_path / "stored"
        path.write_bytes(data)
        found = sniff(path, name)
        return parse_file(StoredFile(path), name, found.file_type, found.mime_type)

    return run


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave a type only the given parsers."""
    return lambda file_type, *chain: monkeypatch.setitem(parsers.PARSERS, file_type, chain)


def test_a_word_document_keeps_headings_and_has_no_pages(parse: Parse) -> None:
    parsed = parse("a.docx", docx("# Report", "First paragraph.", "Größe & <Maß>"))
    assert not parsed.paged
    assert "# Report" in parsed.pages[0].markdown
    assert "Größe & \\<Maß\\>" in parsed.pages[0].markdown
    assert parsed.parser.startswith("xberg ")


def rtf(*paragraphs: str) -> bytes:
    return ("{\\rtf1\\ansi " + "".join(f"{text}\\par " for text in paragraphs) + "}").encode()


@pytest.mark.parametrize(("name", "write"), [("a.docx", docx), ("a.rtf", rtf)])
def test_a_paragraph_that_begins_with_a_hash_is_no_heading_and_other_hashes_stay_bare(
    parse: Parse, name: str, write: Callable[..., bytes]
) -> None:
    text = parse(name, write(" # of units in C#", "## deep", "#", "C# and F#", "#tag 1", "- dash")).pages[0].markdown
    assert [line.strip() for line in text.split("\n") if line] == [
        "\\# of units in C#",
        "\\## deep",
        "\\#",
        "C# and F#",
        "#tag 1",
        "- dash",
    ]
    assert not read_structure(text).headings


def test_a_word_documents_headings_and_backslashes_stay_as_they_are(parse: Parse) -> None:
    text = parse("a.docx", docx("# Our C# code", "C:\\# new", "x")).pages[0].markdown
    assert text.strip().split("\n\n") == ["# Our C# code", "C:\\\\# new", "x"]


def test_sheets_are_pages_labelled_and_headed_by_their_names(parse: Parse) -> None:
    parsed = parse("a.xlsx", xlsx(Prices=[["item", "price"], ["tea", 2.5], ["a|b", "=1+1"]], Sheet2=[], Notes=[["remember"]]))
    assert [(page.number, page.label) for page in parsed.pages] == [(1, "Prices"), (3, "Notes")]
    assert parsed.paged
    assert parsed.pages[0].markdown.startswith("## Prices\n\n| item | price |\n")
    assert "| tea | 2.5 |" in parsed.pages[0].markdown
    assert "=1+1" in parsed.pages[0].markdown


def test_an_empty_sheet_with_a_name_of_its_own_stays_as_a_heading(parse: Parse) -> None:
    parsed = parse("a.xlsx", xlsx(Data=[["x"]], Overview=[], Tabelle3=[]))
    assert [page.label for page in parsed.pages] == ["Data", "Overview"]


def test_calamine_agrees_with_xberg(parse: Parse, only: Callable[..., None]) -> None:
    data = xlsx(Prices=[["item", "price"], ["tea", 2.5], ["coffee", 3]], Notes=[["remember"]])
    expected = parse("a.xlsx", data)
    only(FileType.EXCEL, office.CALAMINE)
    found = parse("a.xlsx", data)
    assert found.parser.startswith("python-calamine ")
    assert found.pages == expected.pages


VALUES = [
    ("4111111111111111", ""),
    ("12345678901234567", ""),
    ("-1234567.5", ""),
    ("1E-07", ""),
    ("1", "b"),
    ("0", "b"),
    ("1.25347222222222", "hours"),
    ("-0.25", "hours"),
    ("45000", "moment"),
    ("45000.123456789", "moment"),
]
"""What stands in a cell's XML, and its format."""


def formatted(values: list[tuple[str, str]]) -> bytes:
    """Return a workbook of one sheet with a column of such cells."""
    parts = xlsx_parts({"S": [["values"]]})
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    styles = ("", "hours", "moment")
    cells = "".join(
        f'<row r="{row}"><c r="A{row}" ' + ('t="b"' if style == "b" else f's="{styles.index(style)}"') + f"><v>{value}</v></c></row>"
        for row, (value, style) in enumerate(values, 2)
    )
    sheet, relations = "xl/worksheets/sheet1.xml", "xl/_rels/workbook.xml.rels"
    link = '<Relationship Id="s" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/styles" Target="styles.xml"/>'
    parts[sheet] = str(parts[sheet]).replace("</sheetData>", f"{cells}</sheetData>")
    parts[relations] = str(parts[relations]).replace("</Relationships>", f"{link}</Relationships>")
    parts["xl/styles.xml"] = (
        f'<styleSheet {space}><numFmts count="1"><numFmt numFmtId="170" formatCode="[h]:mm"/></numFmts><cellXfs count="3">'
        '<xf numFmtId="0"/><xf numFmtId="170" applyNumberFormat="1"/><xf numFmtId="22" applyNumberFormat="1"/></cellXfs></styleSheet>'
    )
    return package(parts)


def test_numbers_durations_and_booleans_read_the_same_with_both_parsers(parse: Parse, only: Callable[..., None]) -> None:
    expected = parse("a.xlsx", formatted(VALUES)).pages
    only(FileType.EXCEL, office.CALAMINE)
    found = parse("a.xlsx", formatted(VALUES)).pages
    assert found == expected
    assert [line.strip("| ") for line in found[0].markdown.strip().split("\n")[4:]] == [
        *("4111111111111111", "12345678901234568", "-1234567.5", "0.0000001", "true", "false"),
        *("30:05:00", "-6:00:00", "2023-03-15", "2023-03-15 02:57:46"),
    ]


def test_slides_are_pages_in_order(parse: Parse) -> None:
    parsed = parse("a.pptx", pptx(*(f"slide number {n}" for n in range(1, 13))))
    assert [page.number for page in parsed.pages] == list(range(1, 13))
    assert all(f"slide number {page.number}" in page.markdown for page in parsed.pages)


BOLD = 'b="1"'


def _slide(*runs: tuple[str, str], cell: bool = False) -> bytes:
    """Return a presentation with one paragraph of these runs, each with its attributes, in a box or in a table's cell."""
    paragraph = "".join(f"<a:r><a:rPr {attributes}/><a:t>{text}</a:t></a:r>" for text, attributes in runs)
    with zipfile.ZipFile(io.BytesIO(pptx("Title", "PLACE"))) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    if cell:
        table = "<a:tbl><a:tblGrid><a:gridCol w='9'/></a:tblGrid><a:tr h='9'><a:tc><a:txBody><a:p>%s</a:p></a:txBody></a:tc></a:tr></a:tbl>"
        frame = "<p:graphicFrame><a:graphic><a:graphicData uri='http://schemas.openxmlformats.org/drawingml/2006/table'>%s</a:graphicData>"
        slide = parts["ppt/slides/slide2.xml"]
        shape = slide[slide.index("<p:sp>") : slide.index("</p:spTree>")]
        frame = f"{frame % (table % paragraph)}</a:graphic></p:graphicFrame>"
        parts["ppt/slides/slide2.xml"] = slide.replace(shape, frame)
    else:
        parts["ppt/slides/slide2.xml"] = parts["ppt/slides/slide2.xml"].replace("<a:r><a:t>PLACE</a:t></a:r>", paragraph)
    return package(dict(parts))


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([("Rev", ""), ("enue ", ""), ("20", ""), ("24", "")], "Revenue 2024"),
        ([("H", ""), ("2", 'baseline="-25000"'), ("O", "")], "H2O"),
        ([("Re", BOLD), ("venue", BOLD), (" falls", "")], "**Revenue** falls"),
        ([("The ", ""), ("Revenue", BOLD), (" fa", ""), ("lls", "")], "The **Revenue** falls"),
        ([("Rev", BOLD), ("enue", "")], "Revenue"),
        ([("Rev", 'strike="sngStrike"'), ("enue", "")], "Revenue"),
        ([("one ", ""), ("two", "")], "one two"),
        ([("a &lt;b", ""), ("c&gt;", "")], r"a \<bc\>"),
        ([("un", 'u="sng"'), ("der", "")], "under"),
    ],
)
def test_words_on_slides_are_in_one_piece_however_they_are_split_into_runs(parse: Parse, runs: list[tuple[str, str]], text: str) -> None:
    assert parse("a.pptx", _slide(*runs)).pages[1].markdown.strip() == f"## {text}"


def test_words_in_cells_of_slides_are_in_one_piece(parse: Parse) -> None:
    assert "| Revenue |" in parse("a.pptx", _slide(("Rev", ""), ("enue", ""), cell=True)).pages[1].markdown


def test_a_slide_that_is_damaged_keeps_its_text(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: object) -> list[str]:
        raise ValueError

    monkeypatch.setattr(slide_runs, "read_paragraphs", fail)
    assert "Rev enue" in parse("a.pptx", _slide(("Rev", ""), ("enue", ""))).pages[1].markdown


def test_a_slide_that_is_too_large_to_read_again_keeps_its_text(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slide_runs, "MAX_SLIDE_BYTES", 10)
    assert "Rev enue" in parse("a.pptx", _slide(("Rev", ""), ("enue", ""))).pages[1].markdown


@pytest.mark.parametrize(
    ("name", "data"), [("a.docx", docx("one", "two")), ("a.pptx", pptx("one", "two")), ("a.xlsx", xlsx(S=[["one", "two"]]))]
)
def test_the_bare_reader_finds_the_same_words(parse: Parse, only: Callable[..., None], name: str, data: bytes) -> None:
    for file_type in (FileType.WORD, FileType.POWERPOINT, FileType.EXCEL):
        only(file_type, ooxml.BARE)
    parsed = parse(name, data)
    assert parsed.parser == "docmill ooxml"
    words = re.findall(r"\b(?:one|two)\b", "\n".join(page.markdown for page in parsed.pages))
    assert words == ["one", "two"]


def test_text_in_headers_only_is_found(parse: Parse) -> None:
    parts = docx_parts([]) | {
        "word/header1.xml": '<w:hdr xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:p><w:r><w:t>letterhead</w:t></w:r></w:p></w:hdr>'
    }
    parsed = parse("a.docx", package(parts))
    assert parsed.pages[0].markdown.strip() == "letterhead"
    assert set(parsed.metadata["failed_parsers"]) == {"xberg", "mammoth"}


WORD_SPACE = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def margin(*paragraphs: str) -> str:
    """Return a header or footer of paragraphs in raw XML."""
    return f"<w:hdr {WORD_SPACE}>{''.join(f'<w:p>{paragraph}</w:p>' for paragraph in paragraphs)}</w:hdr>"


def run(text: str) -> str:
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


def page_field(name: str, shown: str) -> str:
    marks = [f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>' for kind in ("begin", "separate", "end")]
    return f"{marks[0]}<w:r><w:instrText> {name} </w:instrText></w:r>{marks[1]}{run(shown)}{marks[2]}"


@pytest.mark.parametrize("skip", [0, 1], ids=["xberg", "mammoth"])
def test_headers_stand_before_the_body_and_footers_behind_it_each_text_once(tmp_path: Path, skip: int) -> None:
    parts = docx_parts(["# Letter", "the body", "said | before"]) | {
        "word/header1.xml": margin(run("ACME Ltd"), run("Ref 4711")),
        "word/header2.xml": margin(run("ACME Ltd"), run("Follow-up")),
        "word/header3.xml": margin(run("The body")),
        "word/footer1.xml": margin(run("IBAN DE02 1203")),
        "word/footer2.xml": margin(run("IBAN DE02 1203")),
    }
    path = tmp_path / "stored"
    path.write_bytes(package(parts))
    parsed = parse_file(StoredFile(path), "a.docx", FileType.WORD, DOCX, skip=skip)
    blocks = [block for block in parsed.pages[0].markdown.strip().split("\n\n") if not block.startswith("said")]
    assert blocks == ["ACME Ltd", "Ref 4711", "Follow-up", "# Letter", "the body", "IBAN DE02 1203"]
    assert (len(parsed.pages), parsed.paged, "warnings" in parsed.metadata) == (1, False, False)


def test_a_page_number_alone_is_not_kept_from_a_footer(parse: Parse) -> None:
    fields = page_field("PAGE", "2"), page_field("NUMPAGES \\* Arabic", "7")
    parts = docx_parts(["the body"]) | {
        "word/footer1.xml": margin(run("Seite ") + fields[0] + run(" von ") + fields[1]),
        "word/footer2.xml": margin(run("- ") + '<w:fldSimple w:instr="PAGE">' + run("3") + "</w:fldSimple>" + run(" -")),
    }
    assert parse("a.docx", package(parts)).pages[0].markdown.split() == ["the", "body"]
    parts["word/footer3.xml"] = margin(run("ACME Ltd, page ") + fields[0])
    parts["word/footer4.xml"] = margin(run("ACME Ltd, page ") + fields[1])
    assert parse("a.docx", package(parts)).pages[0].markdown.split("\n\n") == ["the body", "ACME Ltd, page 2\n"]


@pytest.mark.parametrize(
    ("header", "warning"),
    [
        ("<w:hdr><w:p>", "(ExpatError)"),
        (f'<!DOCTYPE d [<!ENTITY a "ha">]>{margin(run("&a;"))}', "declares entities"),
        (margin(" " * (33 * 1024 * 1024)), "more than 32 MB"),
    ],
    ids=["torn", "entities", "bomb"],
)
def test_a_header_that_cannot_be_read_costs_a_warning_not_the_body(parse: Parse, header: str, warning: str) -> None:
    parsed = parse("a.docx", package(docx_parts(["the body"]) | {"word/header1.xml": header}))
    assert parsed.pages[0].markdown.strip() == "the body"
    assert [warning in text for text in parsed.metadata["warnings"]] == [True]


def test_a_note_is_marked_once(parse: Parse) -> None:
    reference = '<w:r><w:footnoteReference w:id="1"/></w:r>'
    document = f"<w:document {WORD_SPACE}><w:body><w:p>{run('noted')}{reference}{reference}</w:p></w:body></w:document>"
    note = f'<w:footnotes {WORD_SPACE}><w:footnote w:id="1"><w:p>{run("the note")}</w:p></w:footnote></w:footnotes>'
    found = parse("a.docx", package(docx_parts([]) | {"word/document.xml": document, "word/footnotes.xml": note})).pages[0].markdown
    assert "noted[^1]\n" in found and "the note" in found


def test_the_next_parser_is_tried_when_one_raises(parse: Parse, only: Callable[..., None]) -> None:
    def broken(_source: object) -> ParsedFile:
        raise LookupError("a fault of its own")

    only(FileType.WORD, replace(office.MAMMOTH, name="first", parse=broken), office.MAMMOTH)
    parsed = parse("a.docx", docx("hello"))
    assert parsed.pages[0].markdown.strip() == "hello"
    assert parsed.metadata["failed_parsers"] == {"first": "LookupError: a fault of its own"}


def test_the_last_failure_names_the_reason_of_each_parser(parse: Parse) -> None:
    parts = docx_parts(["x"]) | {"word/document.xml": "<w:document><w:body><w:p></w:body>"}
    with pytest.raises(ParseError, match=r"'broken\.docx' cannot be parsed \(xberg: .+; mammoth: .+; ooxml: .+\)"):
        parse("broken.docx", package(parts))


def test_parsers_can_be_left_out_from_the_front(tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(docx("hello"))
    used = [parse_file(StoredFile(path), "a.docx", FileType.WORD, DOCX, skip=skip).parser.split()[0] for skip in range(3)]
    assert used == ["xberg", "mammoth", "docmill"]
    with pytest.raises(ParseError, match="no parser is left"):
        parse_file(StoredFile(path), "a.docx", FileType.WORD, DOCX, skip=3)


def test_a_package_without_its_part_list_is_refused(parse: Parse) -> None:
    parts = docx_parts(["x"])
    del parts["[Content_Types].xml"]
    with pytest.raises(ParseError, match=r"\[Content_Types\]\.xml is missing"):
        parse("a.docx", package(parts))


def test_entities_are_never_expanded(parse: Parse, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    document = (
        f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY x SYSTEM "file://{secret}"><!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
        f"<w:document {space}><w:body><w:p><w:r><w:t>before &x; &b;</w:t></w:r></w:p></w:body></w:document>"
    )
    data = package(docx_parts([]) | {"word/document.xml": document})
    try:
        text = parse("a.docx", data).pages[0].markdown
    except ParseError as error:
        text = str(error)
    assert "the secret" not in text
    assert "haha" not in text


def test_a_blank_workbook_has_no_text(parse: Parse) -> None:
    with pytest.raises(ParseError, match="no cell with content"):
        parse("a.xlsx", xlsx(Sheet1=[], Sheet2=[]))


def test_the_sheet_names_of_a_workbook_of_pictures_are_its_text(parse: Parse) -> None:
    parts = xlsx_parts({"Sheet1": [], "Sheet2": []}) | {"xl/drawings/drawing1.xml": "<xdr/>"}
    assert [page.markdown for page in parse("a.xlsx", package(parts)).pages] == ["## Sheet1\n", "## Sheet2\n"]


def test_two_cells_at_the_corners_of_a_sheet_do_not_lay_out_the_rectangle(parse: Parse) -> None:
    parts = xlsx_parts({"S": [["first"]]})
    sheet = str(parts["xl/worksheets/sheet1.xml"])
    corner = '<row r="1048576"><c r="XFD1048576" t="inlineStr"><is><t>last</t></is></c></row></sheetData>'
    parsed = parse("a.xlsx", package(parts | {"xl/worksheets/sheet1.xml": sheet.replace("</sheetData>", corner)}))
    assert "first" in parsed.pages[0].markdown
    assert "last" in parsed.pages[0].markdown
    assert len(parsed.pages[0].markdown) < 1_000_000


def test_too_many_slides_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(pptx("one", "two", "three"))
    found = sniff(path, "a.pptx")
    with pytest.raises(ParseError, match="more than the limit of 2"):
        parse_file(StoredFile(path), "a.pptx", found.file_type, found.mime_type, page_limit=2)


def test_what_nobody_can_parse_is_not_supported(parse: Parse) -> None:
    with pytest.raises(ParseError, match=r"'photo\.png' cannot be parsed: files of type image/png are not supported"):
        parse("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(100))


def test_an_empty_file_is_called_empty(parse: Parse) -> None:
    with pytest.raises(ParseError, match=r"'a\.docx' is empty"):
        parse("a.docx", b"")


def test_a_stored_file_that_is_gone_is_a_permanent_error(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="its stored file is gone"):
        parse_file(StoredFile(tmp_path / "nothing"), "a.docx", FileType.WORD, DOCX)
