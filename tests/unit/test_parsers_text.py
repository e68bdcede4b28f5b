"""Text, tables of text and HTML: nothing is lost, nothing is fetched, nothing unstorable gets through."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.adapters.parsers import parse_file
from jobs.adapters.parsers.tables import markdown_table
from jobs.adapters.parsers.text import find_delimiter
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import ParsedFile
from models.errors import ParseError

Parse = Callable[[str, bytes], ParsedFile]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def run(name: str, data: bytes) -> ParsedFile:
        path = tmp_path / "stored"
        path.write_bytes(data)
        found = sniff(path, name)
        return parse_file(StoredFile(path), name, found.file_type, found.mime_type)

    return run


def markdown(parsed: ParsedFile) -> str:
    assert len(parsed.pages) == 1 and not parsed.paged
    return parsed.pages[0].markdown


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.json", "a.xml", "a.log", "a"])
def test_text_stays_as_it_is(parse: Parse, name: str) -> None:
    text = "# Not a heading everywhere\n\n* {star} | pipe \\ `code` <tag>\n\n\ttab\n"
    assert markdown(parse(name, text.encode())) == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
def test_text_in_any_encoding_is_read(parse: Parse, encoding: str) -> None:
    text = "Ein längerer Satz über größere Bäume, damit es etwas zu raten gibt.\n"
    parsed = parse("a.txt", text.encode(encoding))
    assert markdown(parsed) == text
    assert parsed.metadata["encoding"]


def test_nuls_surrogates_and_carriage_returns_are_gone_everywhere(parse: Parse) -> None:
    parsed = parse("a.txt", b"one\x00 two\r\nthree \xed\xa0\x80four, and enough text around it\r")
    assert markdown(parsed) == "one two\nthree four, and enough text around it\n"


@pytest.mark.parametrize("data", [b" \n\t \r\n", b"\xef\xbb\xbf", b"\x00\n"])
def test_a_file_without_text_is_a_parse_error(parse: Parse, data: bytes) -> None:
    with pytest.raises(ParseError, match=r"'a\.txt' (has no text to read|cannot be parsed)"):
        parse("a.txt", data)


def test_rows_become_a_table(parse: Parse) -> None:
    found = markdown(parse("a.csv", b'item,"the, price"\n"a ""b""",1\n\nx|y,"two\nlines"\n'))
    assert found.split("\n") == ["| item | the, price |", "| --- | --- |", '| a "b" | 1 |', "| x\\|y | two lines |"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(delimiter: str) -> None:
    rows = [["name", "amount", "note"], ["a", "1,5", "x"], ["b", "2,5", "y z"]]
    assert find_delimiter("\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)) == delimiter


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_comma_that_cuts_as_evenly_as_another_delimiter_is_part_of_an_amount(delimiter: str) -> None:
    assert find_delimiter(f"Miete{delimiter}1200,50\nStrom{delimiter}85,20\nGas{delimiter}1,00\n") == delimiter
    assert find_delimiter("Miete, kalt\nStrom\n") == ","


def test_an_amount_in_a_german_file_without_a_header_stays_one_cell(parse: Parse) -> None:
    assert "| Strom | 85,20 |" in markdown(parse("a.csv", b"Miete;1200,50\nStrom;85,20\nGas;60,10\n"))


def test_tsv_in_utf16_as_excel_saves_it_is_a_table(parse: Parse) -> None:
    assert markdown(parse("a.tsv", "Ort\tZahl\nKöln\t1\n".encode("utf-16"))) == "| Ort | Zahl |\n| --- | --- |\n| Köln | 1 |"


def test_a_quote_that_never_closes_does_not_swallow_the_rows(parse: Parse) -> None:
    found = markdown(parse("a.csv", b'a,b\n1,"open\n' + b"x,y\n" * 500))
    assert found.count("| x | y |") == 500


@pytest.mark.parametrize("later", [b"", b'35,"quoted",z\n', b'"35","quoted","z"\n', b'35,12",z\n36,"open\n'])
def test_a_quote_that_never_closes_swallows_no_rows_of_a_short_file(parse: Parse, later: bytes) -> None:
    rows = [b"%d,x,y\n" % number for number in range(40)]
    rows[8] = b'8,"open,y\n'
    found = markdown(parse("a.csv", b"id,b,c\n" + b"".join(rows[:34]) + later + b"".join(rows[34:])))
    assert all(f"\n| {number} | x | y |" in found for number in range(40) if number != 8)
    assert '| 8 | "open | y |' in found


@pytest.mark.parametrize("lines", [3, 25, 300])
def test_a_cell_of_many_lines_whose_quote_closes_stays_one_cell(parse: Parse, lines: int) -> None:
    text = "\n".join(f'line {number}, ""so""' for number in range(lines))
    found = markdown(parse("a.csv", f'id,note,c\n1,x,y\n2,"{text}",y\n3,"a ""b""", "z"\n'.encode()))
    assert len(found.split("\n")) == 5
    assert f'line {lines - 1}, "so" | y |' in found and '| 3 | a "b" | z |' in found


def test_one_sloppy_quote_makes_no_other_row_of_a_quoted_file_uneven(parse: Parse) -> None:
    rows = [f'"{number}, of 200","x, y","z"' for number in range(200)]
    rows[100] = '"100","{}","z"'.format("\n".join(f"line {line}, of a note" for line in range(25)))
    rows[150] = '"150","pipe 12" wide, blue","z"'
    found = markdown(parse("a.csv", ("a,b,c\n" + "\n".join(rows)).encode()))
    assert found.count(" of 200 | x, y | z |") == 198


def test_delimiters_alone_are_no_text(parse: Parse) -> None:
    with pytest.raises(ParseError, match="no cell with content"):
        parse("a.csv", b",,,\n" * 50)


def test_one_wide_row_does_not_widen_the_others() -> None:
    table = markdown_table([["a"], *[["x"]] * 1000, ["y"] * 1000])
    assert len(table) < 30_000


@given(st.lists(st.lists(st.text(max_size=5), max_size=4), max_size=5))
def test_every_row_of_a_table_is_one_line(rows: list[list[str]]) -> None:
    table = markdown_table(rows)
    assert len(table.splitlines()) == (len(rows) + 1 if any(rows) else 0)


def test_html_keeps_structure_and_drops_scripts_and_styles(parse: Parse) -> None:
    page = (
        "<html><head><title>The page</title><style>.x{color:red}</style></head><body><h1>Head</h1><script>alert(1)</script>"
        "<p>Text with <b>bold</b></p><ul><li>one</li><li>two</li></ul>"
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
        "<noscript>no script</noscript></body></html>"
    )
    parsed = parse("a.html", page.encode())
    found = markdown(parsed)
    assert found.startswith("# Head")
    assert "- one" in found and "| 1 | 2 |" in found and "**bold**" in found
    assert "alert" not in found and "color" not in found
    assert parsed.metadata["title"] == "The page"


@pytest.mark.parametrize("declared", ["iso-2022-jp", "shift_jis", "euc-jp", "utf-8"])
def test_html_is_read_in_the_charset_that_it_declares(parse: Parse, declared: str) -> None:
    page = f'<html><head><meta charset="{declared}"></head><body><p>日本語の文書</p></body></html>'
    assert markdown(parse("a.html", page.encode(declared))).strip() == "日本語の文書"


def test_characters_of_windows_in_a_page_of_shift_jis_are_read(parse: Parse) -> None:
    page = '<html><head><meta charset="shift_jis"></head><body><p>㈱日立①</p></body></html>'
    parsed = parse("a.html", page.encode("cp932"))
    assert (markdown(parsed).strip(), parsed.metadata["encoding"]) == ("㈱日立①", "cp932")


def test_embedded_data_is_not_text(parse: Parse) -> None:
    image = base64.b64encode(bytes(range(256)) * 100).decode()
    page = f'<p>before</p><img alt="a cat" src="data:image/png;base64,{image}"><p>after</p>'
    found = markdown(parse("a.html", page.encode()))
    assert "before" in found and "after" in found
    assert len(found) < 200
    assert len(markdown(parse("a.md", f"text ![cat](data:image/png;base64,{image})".encode()))) < 100


def test_elements_nested_too_deep_to_convert_still_give_their_text(parse: Parse) -> None:
    page = "<html><body><h2>top</h2>" + "<div>" * 5000 + "deep <script>no()</script>down" + "</div>" * 5000 + "</body></html>"
    found = markdown(parse("a.html", page.encode()))
    assert "## top" in found and "deep down" in found and "no()" not in found


def test_a_page_of_scripts_has_no_text(parse: Parse) -> None:
    with pytest.raises(ParseError, match="holds no text"):
        parse("a.html", b"<html><head><script>var x = 1;</script></head><body><style>p{}</style></body></html>")


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A web server that remembers who came."""
    visits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", visits
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_that_a_page_names_is_fetched(parse: Parse, canary: tuple[str, list[str]]) -> None:
    url, visits = canary
    page = (
        f'<html><head><base href="{url}/"><link rel="stylesheet" href="{url}/css">'
        f'<meta http-equiv="refresh" content="0;url={url}/m"></head>'
        f'<body><img src="{url}/img"><iframe src="{url}/frame"></iframe><object data="{url}/object"></object><p>text</p></body></html>'
    )
    assert "text" in markdown(parse("a.html", page.encode()))
    mail = b"From: a@b.c\nSubject: x\nContent-Type: text/html\n\n" + page.encode()
    assert "text" in markdown(parse("a.eml", mail))
    assert visits == []
