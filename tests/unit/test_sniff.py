"""Type detection: the content decides, the name only settles what content cannot, and no bytes raise."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.adapters.sniff import Sniffed, extension_agrees, sniff
from models.documents import FileType
from tests.unit.small_files import PASSWORD_ENTRY, docx, docx_parts, ole, package, pdf, pptx, xlsx

SAMPLES = Path(__file__).parents[2] / "samples"
MAIL = b"From: a@example.com\nTo: b@example.com\nSubject: Hi\n\nBody\n"
HTML = b"<!DOCTYPE html><html><body><p>Hi</p></body></html>"


def sniffed(tmp_path: Path, name: str, data: bytes) -> Sniffed:
    path = tmp_path / "stored"  # uploads have no extension
    path.write_bytes(data)
    return sniff(path, name)


def zipped(*names: str, flag: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    data = bytearray(buffer.getvalue())
    at = data.find(b"PK\x01\x02")
    data[at + 8] |= flag
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "file_type", "mime_type"),
    [
        ("a.pdf", pdf("x"), FileType.PDF, "application/pdf"),
        ("a.pdf", b"junk\n" * 20 + pdf("x"), FileType.PDF, "application/pdf"),
        ("a.docx", docx("x"), FileType.WORD, "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        ("a.xlsx", xlsx(S=[["x"]]), FileType.EXCEL, "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
        ("a.pptx", pptx("x"), FileType.POWERPOINT, "application/vnd.openxmlformats-officedocument.presentationml.presentation"),
        ("a.docx", docx("x" * 5000)[:600], FileType.WORD, "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        (
            "a.odt",
            package({"mimetype": "application/vnd.oasis.opendocument.text"}),
            FileType.WORD,
            "application/vnd.oasis.opendocument.text",
        ),
        ("a.epub", package({"mimetype": "application/epub+zip"}), FileType.EBOOK, "application/epub+zip"),
        ("a.zip", zipped("one.txt"), FileType.ZIP, "application/zip"),
        ("a.doc", ole(WordDocument=b""), FileType.WORD, "application/msword"),
        ("a.xls", ole(Workbook=b""), FileType.EXCEL, "application/vnd.ms-excel"),
        ("a.ppt", ole(**{"PowerPoint Document": b""}), FileType.POWERPOINT, "application/vnd.ms-powerpoint"),
        ("a.msg", ole(**{"__properties_version1.0": b""}), FileType.EMAIL, "application/vnd.ms-outlook"),
        ("a.rtf", b"{\\rtf1 x}", FileType.WORD, "application/rtf"),
        ("a.html", HTML, FileType.HTML, "text/html"),
        ("a.html", b"just <b>bold</b>", FileType.HTML, "text/html"),
        ("a.html", HTML.decode().encode("utf-16"), FileType.HTML, "text/html"),
        ("a.eml", MAIL, FileType.EMAIL, "message/rfc822"),
        ("a.mbox", b"From a@example.com Mon Jan  1 00:00:00 2024\n" + MAIL, FileType.EMAIL, "application/mbox"),
        ("a.txt", "Grüße".encode("cp1252"), FileType.TEXT, "text/plain"),
        ("a.txt", "Grüße".encode("utf-16-le") * 10, FileType.TEXT, "text/plain"),
        ("a.md", b"# Title\n<div>html in markdown</div>", FileType.TEXT, "text/markdown"),
        ("a.csv", b"a,b\n1,2\n", FileType.TEXT, "text/csv"),
        ("a.tsv", b"a\tb\n", FileType.TEXT, "text/tab-separated-values"),
        ("a.json", b'{"a": 1}', FileType.TEXT, "application/json"),
        ("a", b'[{"a": 1}]', FileType.TEXT, "application/json"),
        ("a.xml", b"<?xml version='1.0'?><a/>", FileType.TEXT, "application/xml"),
        ("a.bin", b"\x89PNG\r\n\x1a\n", FileType.UNKNOWN, "image/png"),
        ("a.md", b"\x7fELF\x02\x01\x01" + bytes(50), FileType.UNKNOWN, "application/x-executable"),
        ("a.txt", bytes(range(256)) * 20, FileType.UNKNOWN, "application/octet-stream"),
        ("a.txt", b"", FileType.UNKNOWN, "application/x-empty"),
    ],
)
def test_content_names_the_type(tmp_path: Path, name: str, data: bytes, file_type: FileType, mime_type: str) -> None:
    found = sniffed(tmp_path, name, data)
    assert (found.file_type, found.mime_type) == (file_type, mime_type)
    assert not found.encrypted


MEMO = b"To: all\nFrom: Ann\nDate: 3 May\nSubject: Pumps\nProject: Harbour\n\nText\n"


@pytest.mark.parametrize(
    ("name", "mime_type"),
    [
        ("memo.txt", "text/plain"),
        ("memo.log", "text/plain"),
        ("memo.md", "text/markdown"),
        ("memo.csv", "text/csv"),
        ("memo.eml", "message/rfc822"),
        ("memo", "message/rfc822"),
    ],
)
def test_a_memo_is_mail_only_if_its_name_leaves_that_open(tmp_path: Path, name: str, mime_type: str) -> None:
    found = sniffed(tmp_path, name, MEMO)
    assert (found.mime_type, found.note) == (mime_type, None)


@pytest.mark.parametrize(
    "header", ["Message-ID: <1@a>", "MIME-Version: 1.0", "Received: by a", "Return-Path: <a@b>", "Content-Type: text/plain"]
)
def test_a_saved_mail_called_text_is_mail(tmp_path: Path, header: str) -> None:
    assert sniffed(tmp_path, "mail.txt", header.encode() + b"\n" + MEMO).mime_type == "message/rfc822"


@pytest.mark.parametrize(
    "data",
    [
        ole(EncryptionInfo=b"", EncryptedPackage=b""),
        ole(WordDocument=b"\xec\xa5" + bytes(9) + b"\x01"),
        ole(Workbook=b"\x09\x08\x10\x00" + bytes(16) + b"\x2f\x00\x36\x00"),
        ole(**{"PowerPoint Document": b"", "EncryptedSummary": b""}),
        zipped("one.txt", flag=1),
    ],
    ids=["office package", "doc", "xls", "ppt", "zip"],
)
def test_a_file_behind_a_password_is_encrypted(tmp_path: Path, data: bytes) -> None:
    assert sniffed(tmp_path, "a", data).encrypted


def test_a_zip_with_some_encrypted_entries_is_not_refused_as_a_whole(tmp_path: Path) -> None:
    found = sniffed(tmp_path, "a.zip", zipped("one.txt", "two.txt", flag=1))
    assert not found.encrypted
    assert found.note == "1 of 2 entries are encrypted"


def test_an_encrypted_pdf_is_noted_but_left_to_the_parser(tmp_path: Path) -> None:
    found = sniffed(tmp_path, "a.pdf", pdf("x", encrypt=PASSWORD_ENTRY))
    assert not found.encrypted
    assert found.note is not None and "encrypted" in found.note


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("report.txt", pdf("x"), "content is PDF although the name ends in .txt"),
        ("report.pdf", docx("x"), "content is Word (docx) although the name ends in .pdf"),
        ("photo.docx", b"\x89PNG\r\n\x1a\n", "content is image/png although the name ends in .docx"),
        ("page.PDF", HTML, "content is HTML although the name ends in .pdf"),
        ("report.pdf", pdf("x"), None),
        ("REPORT.PDF", pdf("x"), None),
        ("notes", b"text", None),
        ("notes.unheard-of", b"text", None),
        ("macro.docm", docx("x"), None),
        ("page.md", b"a,b\n1,2\n", None),
    ],
)
def test_a_name_that_contradicts_the_content_is_noted(tmp_path: Path, name: str, data: bytes, note: str | None) -> None:
    found = sniffed(tmp_path, name, data)
    assert found.note == note
    assert extension_agrees(name, found) is (note is None)


def test_an_office_file_inside_another_does_not_decide(tmp_path: Path) -> None:
    parts = docx_parts(["x"]) | {"word/embeddings/sheet.xlsx": xlsx(S=[["y"]]), "xl/workbook.xml": "<workbook/>"}
    assert sniffed(tmp_path, "a.docx", package(parts)).file_type is FileType.WORD


@pytest.mark.parametrize("part", ["visio/document.xml", "3D/3dmodel.model", "FixedDocSeq.fdseq", "package.nuspec"])
def test_a_package_of_another_kind_is_no_archive_of_documents(tmp_path: Path, part: str) -> None:
    types = '<Types><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/></Types>'
    found = sniffed(tmp_path, "a", package({"[Content_Types].xml": types, "_rels/.rels": "<Relationships/>", part: "<x/>"}))
    assert (found.file_type, found.mime_type) == (FileType.UNKNOWN, "application/vnd.openxmlformats-package")


def test_an_office_file_whose_part_list_is_cut_is_known_by_its_main_part(tmp_path: Path) -> None:
    found = sniffed(tmp_path, "a", package({"[Content_Types].xml": "<Types>", "word/document.xml": "<x/>"}))
    assert found.file_type is FileType.WORD


def test_an_ole_directory_that_loops_ends(tmp_path: Path) -> None:
    data = bytearray(ole(WordDocument=b""))
    data[512 + 4 : 512 + 8] = (1).to_bytes(4, "little")  # the directory's sector is its own successor
    data[1024 + 128 + 68 : 1024 + 128 + 72] = (1).to_bytes(4, "little")  # and its first entry its own sibling
    assert sniffed(tmp_path, "a.doc", bytes(data)).file_type is FileType.WORD


SEEDS = [pdf("x"), docx("x"), ole(WordDocument=b""), ole(Workbook=b""), MAIL, HTML, zipped("a")]


@given(seed=st.sampled_from(SEEDS), cut=st.integers(0, 3000), at=st.integers(0, 3000), patch=st.binary(max_size=40))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, seed: bytes, cut: int, at: int, patch: bytes) -> None:
    data = bytearray(seed[: max(cut, 1)] if cut % 2 else seed)
    data[at : at + len(patch)] = patch
    sniffed(tmp_path_factory.getbasetemp(), "a.docx", bytes(data))


def test_an_archive_that_begins_with_a_pdf_is_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "stored.zip", "w") as archive:  # stored as it is, so that the PDF's first bytes follow
        archive.writestr("in/a.pdf", (SAMPLES / "supply-contract.pdf").read_bytes())
    assert sniff(tmp_path / "stored.zip", "stored.zip").file_type is FileType.ZIP


@pytest.mark.parametrize(
    ("name", "head", "expected"), [("note.md", b"", FileType.TEXT), ("note.txt", b"", FileType.TEXT), ("mail.eml", MAIL, FileType.EMAIL)]
)
def test_a_text_about_pdf_is_a_text(name: str, head: bytes, expected: FileType, tmp_path: Path) -> None:
    found = sniffed(tmp_path, name, head + b"A PDF file begins with the bytes %PDF-1.4, a zip with PK.\n")
    assert (found.file_type, found.note) == (expected, None)


def test_a_pdf_behind_other_bytes_is_a_pdf(tmp_path: Path) -> None:
    data = b"some words before it\n" + (SAMPLES / "supply-contract.pdf").read_bytes()
    assert sniffed(tmp_path, "a.pdf", data).file_type is FileType.PDF
