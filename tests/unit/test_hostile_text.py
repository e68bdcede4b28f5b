"""Text that is made to break what reads it is read whole, or refused; what takes time by the square of its length would not end here."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.adapters.encoding import decode
from jobs.adapters.parsers import parse_file
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from jobs.stages.check import checked
from jobs.stages.chunk import cut
from models.chunks import Chunk
from models.documents import Document
from models.errors import ParseError
from models.stages import Milestone
from tests.unit.small_files import pptx

DOCUMENT = Document(doc_id="d", version=1, user_id="u", file_name="a.txt", file_path="uploads/d", milestone=Milestone.UPLOADED)
MANY = 300_000
"""Characters: enough for minutes, or for ever, where a text takes time by its square."""
SENTENCE = "Lorem ipsum dolor sit amet, consectetur. "


def passages(markdown: str) -> tuple[str, tuple[Chunk, ...]]:
    """The checked text and its passages, after what every text goes through in a worker."""
    found = checked(replace(DOCUMENT, markdown=markdown)).markdown or ""
    chunks = cut(found, (), doc_id="d", size=1000, overlap=100)
    return found, chunks


def parsed(tmp_path: Path, name: str, data: bytes) -> str:
    """A file's text by its parser."""
    path = tmp_path / "stored"
    path.write_bytes(data)
    found = sniff(path, name)
    return parse_file(StoredFile(path), name, found.file_type, found.mime_type).pages[0].markdown


SHAPES = {
    "one line": SENTENCE * (MANY // len(SENTENCE)),
    "one word": "x" * MANY,
    "blanks inside a line": "x" + " " * MANY + "y",
    "tabs inside lines": ("x" + "\t" * 50_000 + "y\n") * (MANY // 50_000),
    "marks out of order on one letter": "a" + "\u0300\u0327" * (MANY // 2),
    "joiners": "\u200d" * MANY + "a",
    "flags": "\U0001f1e9\U0001f1ea" * (MANY // 2),
    "lines of one letter": "x\n" * (MANY // 2),
    "blank lines": "\n" * MANY + "x",
    "quotes": "> " * (MANY // 2) + "x",
    "brackets": "[" * MANY,
    "links that never close": "[a](" * (MANY // 4),
    "emphasis": "*a_" * (MANY // 3),
    "escapes": "\\" * MANY + "x",
    "tags that never close": "<a " * (MANY // 3),
    "fences that never close": "".join("`" * (3 + number % 50) + "\n" for number in range(MANY // 28)),
    "comments and preformatted text that never close": "<!--\n<pre>\n" * (MANY // 11),
    "comments": "<!--\n-->\n" * (MANY // 9),
    "headings": "###### a\n" * (MANY // 9),
    "one heading": "# " + "word " * (MANY // 10) + "\n\n" + SENTENCE * (MANY // 2 // len(SENTENCE)),
    "one section": "# Title\n\n" + SENTENCE * (MANY // len(SENTENCE)),
    "a long table": "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * (MANY // 10),
    "a wide header": "|" + " a |" * (MANY // 12) + "\n|" + "---|" * (MANY // 12) + "\n" + "| b |\n" * (MANY // 18),
    "wide rows": "| a | b |\n|---|---|\n" + ("| c " * 5000 + "|\n") * (MANY // 20_000),
    "tables of no row": "| a |\n|---|\n" * (MANY // 12),
    "lists of growing depth": "".join(" " * (number % 2000) + "- x\n" for number in range(MANY // 1004)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_of_any_shape_are_cut_whole_and_in_the_time_of_their_length(shape: str) -> None:
    markdown, chunks = passages(SHAPES[shape])
    covered = 0
    for chunk in chunks:
        assert len(chunk.content) <= 1000 and not markdown[covered : chunk.char_start].strip()
        covered = chunk.char_end
    assert not markdown[covered:].strip()


def test_many_comments_before_a_page_are_read_in_one_way_only(tmp_path: Path) -> None:
    assert parsed(tmp_path, "a.txt", b"<!---->" * 2000 + b"visible").endswith("visible")
    assert "visible" in parsed(tmp_path, "a.html", b"<!-- a -->\n" * 200 + b"<html><p>visible</p></html>")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.html", b"<div>" * 100_000 + b"visible"),
        ("a.html", b"<html><body>" + b"<ul><li>" * 30_000 + b"visible"),
        ("a.html", b"<p>visible</p>" + b"<table><tr><td>" * 30_000),
        ("a.html", b"<p>visible</p><p " + b"a=1 " * 200_000 + b">"),
        ("a.md", b"> " * 100_000 + b"visible"),
        ("a.md", b"- " * 100_000 + b"visible"),
        ("a.md", b"[" * 100_000 + b"visible" + b"]" * 100_000),
        ("a.json", b"[" * 100_000 + b'"visible"' + b"]" * 100_000),
        ("a.json", b'{"a":' * 100_000 + b'"visible"' + b"}" * 100_000),
        ("a.xml", b"<?xml version='1.0'?>" + b"<a>" * 100_000 + b"visible"),
        ("a.csv", b"visible," + b"," * 200_000 + b"\n" + b"1\n" * 2000),
        ("a.csv", b'visible,"' + b"x" * 1_000_000),
        ("a.eml", b"From: visible\r\nContent-Type: multipart/mixed; boundary=B\r\n\r\n" + b"--B\r\n\r\n" * 4000 + b"x"),
    ],
)
def test_what_nests_a_hundred_thousand_levels_deep_is_read(name: str, data: bytes, tmp_path: Path) -> None:
    text = parsed(tmp_path, name, data)
    assert "visible" in text
    passages(text)


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000"])
def test_many_blanks_inside_a_line_of_a_slide_are_looked_at_once(blank: str, tmp_path: Path) -> None:
    """Not compressed: a slide that unpacks to so much more than it is, xberg refuses."""
    stored = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pptx(f"all of it{blank * MANY}visible"))) as packed, zipfile.ZipFile(stored, "w") as archive:
        for name in packed.namelist():
            archive.writestr(name, packed.read(name))
    text = parsed(tmp_path, "a.pptx", stored.getvalue())
    assert len(text) > MANY and "visible" in text
    passages(text)


def test_links_that_never_close_in_the_html_of_a_mail_are_looked_at_once(tmp_path: Path) -> None:
    head = b"From: a@b\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=B\r\n\r\n"
    plain = b"--B\r\nContent-Type: text/plain\r\n\r\nSee the page.\r\n"
    html = b"--B\r\nContent-Type: text/html\r\n\r\n<p>visible " + b"](" * (MANY // 2) + b"</p>\r\n--B--\r\n"
    assert "visible" in parsed(tmp_path, "a.eml", head + plain + html)


def test_a_mail_of_too_many_parts_or_messages_in_messages_is_refused_rather_than_cut(tmp_path: Path) -> None:
    parts = b"From: a@b\r\nContent-Type: multipart/mixed; boundary=B\r\n\r\n" + b"--B\r\n\r\n" * 6000 + b"x"
    with pytest.raises(ParseError, match="more than 5,000 parts"):
        parsed(tmp_path, "a.eml", parts)
    with pytest.raises(ParseError, match="more than 100 deep"):
        parsed(tmp_path, "a.eml", b"From: a@b\r\nContent-Type: message/rfc822\r\n\r\n" * 150 + b"From: c@d\r\n\r\nx")


def test_data_in_addresses_is_no_text(tmp_path: Path) -> None:
    """Megabytes of a picture, or a zip bomb, inside a page are dropped and not unpacked."""
    bomb = base64.b64encode(bytes(2_000_000))
    text = parsed(
        tmp_path, "a.html", b'<p>visible</p><img src="data:image/png;base64,' + bomb + b'"><a href="data:x;base64,' + bomb + b'">y</a>'
    )
    assert "visible" in text and len(text) < 1000
    assert len(parsed(tmp_path, "a.md", b"visible ![x](data:application/zip;base64," + bomb + b")")) < 100


ENCODINGS = {
    **dict.fromkeys(("utf-8", "utf-8-sig", "cp1252", "latin-1", "iso8859_15"), "Grüße aus München, das Gerät ist größer als zuvor.\n"),
    **dict.fromkeys(
        ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"), "Plain words in a wide encoding, für alle.\n"
    ),
    **dict.fromkeys(("koi8_r", "cp1251", "cp866"), "Это русский документ, который должен находиться поиском.\n"),
    "shift_jis": "これは日本語の文書です。検索できる必要があります。\n",
    "gb18030": "这是一份中文文件，必须能够被搜索到，并且内容完整。\n",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_any_encoding_comes_out_as_it_was_written(encoding: str) -> None:
    text = ENCODINGS[encoding] * 20
    found = decode(text.encode(encoding))
    assert (found.text, found.damaged) == (text, 0), found.encoding


@pytest.mark.parametrize(
    "data", [b"\x00a\x00b\xed\xa0\x80c\xc0\x80d", "Übung \x00 ".encode("mac_roman"), bytes(range(256)), b"\xff" * 500, b"\xfe\xff\xd8"]
)
def test_what_is_in_no_encoding_still_becomes_text_that_can_be_stored(data: bytes) -> None:
    text = decode(data).text
    assert "\x00" not in text and text.encode("utf-8").decode("utf-8") == text


def test_direction_marks_and_invisible_characters_stay_in_the_content() -> None:
    """They belong to Arabic and Hebrew and to emoji flags: whatever shows a text makes them visible, and nothing drops them."""
    source = "access\u202e\u2066 // check admin\u2069\u2066 begin \u200f\u061c \U000e0041\U000e0042 \u200b"
    markdown, chunks = passages(source)
    assert markdown == source
    assert chunks[0].content == source


def test_a_check_of_hostile_text_names_the_file_and_the_rule() -> None:
    for text in ("\u200b" * 10_000, "\u202e\u2066 \U000e0041", "\x00\x01\x02", " \u00a0\u2003\n\t"):
        with pytest.raises(ParseError, match=r"^a\.txt: the file holds no text"):
            checked(replace(DOCUMENT, markdown=text))
    with pytest.raises(ParseError, match=r"^a\.txt: \d+ of the first \d+ characters could not be decoded"):
        checked(replace(DOCUMENT, markdown="x" + "\ufffd" * 20))


def test_texts_that_look_alike_are_no_duplicates_and_texts_that_are_written_alike_are() -> None:
    def sha(text: str) -> str | None:
        return checked(replace(DOCUMENT, markdown=text)).markdown_sha256

    assert sha("admin") != sha("\u0430dmin")  # a Cyrillic letter
    assert sha("admin") != sha("ad\u200bmin")
    assert sha("\u00e9 x") == sha("e\u0301 x\r\n\n\n")


def test_cells_that_look_like_formulas_stay_the_text_that_they_are(tmp_path: Path) -> None:
    cells = ["=1+1", "+1", "-1", "@SUM(A1)", "=cmd|' /C calc'!A0", '=HYPERLINK("http://127.0.0.1:1")', "\t=1", "=1\r\n=2"]
    data = "\r\n".join('"' + cell.replace('"', '""') + '",x' for cell in cells).encode()
    text = parsed(tmp_path, "a.csv", data)
    for cell in cells:
        assert " ".join(cell.split()).replace("|", "\\|") in text
