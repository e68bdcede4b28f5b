"""Documents that are archives inside go through the archives' rules before any parser gets them; macros are data like any other."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.adapters.archives import ArchiveLimits, check_package
from jobs.adapters.parsers import parse_file
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from jobs.stages.validate import is_package
from models.documents import FileType
from models.errors import PermanentError
from models.settings import Settings
from tests.archives import Raw, raw_zip, zip_bytes
from tests.unit.small_files import docx, docx_parts, package, pptx, xlsx

LIMITS = ArchiveLimits(entries=50, archive_bytes=5_000_000, unpacked_bytes=5_000_000, file_bytes=5_000_000, ratio=250)
ODT = {"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": "<x/>"}
EPUB = {"mimetype": "application/epub+zip", "META-INF/container.xml": "<x/>"}


def refusal(tmp_path: Path, content: bytes, limits: ArchiveLimits = LIMITS) -> str:
    """Why a package is refused; empty if it is not."""
    path = tmp_path / "stored"
    path.write_bytes(content)
    try:
        check_package(StoredFile(path), "a.docx", limits)
    except PermanentError as error:
        assert str(error).startswith("a.docx: ")
        return str(error)
    return ""


def with_part(name: bytes, data: bytes = b"<x/>", **about: int) -> bytes:
    """A Word document with one more part."""
    parts = [
        Raw(part.encode(), content.encode() if isinstance(content, str) else content) for part, content in docx_parts(["text"]).items()
    ]
    return raw_zip([*parts, Raw(name, data, **about)])  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [docx("x"), xlsx(S=[["x"]]), pptx("x"), package(dict(ODT)), package(dict(EPUB))])
def test_what_programs_write_passes(content: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, content) == ""


def densely(times: int) -> bytes:
    return zip_bytes({**docx_parts(["x"]), "word/media/image1.bmp": b" " * times})


RULES = {
    "too large": (with_part(b"a.xml", bytes(range(256)) * 20_000), "more than the 5,000,000 that MAX_DOCUMENT_UNPACKED_MB allows"),
    "large together": (raw_zip(Raw(b"%d.xml" % n, bytes(range(256)) * 8000) for n in range(3)), "MAX_DOCUMENT_UNPACKED_MB"),
    "ratio": (densely(2_000_000), "MAX_ARCHIVE_RATIO allows 250"),
    "too many parts": (raw_zip(Raw(b"%d.xml" % n) for n in range(51)), "more than the 50 entries that MAX_ARCHIVE_ENTRIES allows"),
    "larger than declared": (with_part(b"word/a.xml", b"x" * 5000, size=10), "'word/a.xml': it is larger than the 10 bytes"),
    "a bomb that declares little": (with_part(b"word/a.xml", b"x" * 40_000_000, size=100), "larger than the 100 bytes"),
    "4 GB declared": (with_part(b"a.xml", size=2**32 - 2), "MAX_DOCUMENT_UNPACKED_MB"),
    "overlap": (raw_zip([Raw(b"a.xml"), Raw(b"b.xml", lies_at=0)]), "upon one another"),
    "twice": (with_part(b"word/document.xml"), "'word/document.xml' is there twice"),
    "twice but for case": (with_part(b"WORD/document.XML"), "is there twice"),
    "twice but for the separator": (with_part(b"word\\document.xml"), "is there twice"),
    "upwards": (with_part(b"../../up.xml"), "'../../up.xml': its path leads out of the archive ('..')"),
    "absolute": (with_part(b"/etc/passwd"), "its path is absolute"),
    "drive": (with_part(b"C:\\x.xml"), "its path is absolute"),
    "link": (with_part(b"link", b"/etc/passwd", method=0, mode=0o120777), "symbolic link"),
    "encrypted": (with_part(b"a.xml", flags=1), "encrypted"),
    "method": (with_part(b"a.xml", method=93), "zstd"),
    "no directory": (docx("x")[:-30], "end is missing"),
    "terminal escapes in a name": (with_part(b"../\x1b[2Jx"), r"'../\\x1b[2Jx'"),
}


@pytest.mark.parametrize("case", RULES)
def test_each_rule_of_archives_holds_for_a_document_that_is_one_inside(case: str, tmp_path: Path) -> None:
    content, words = RULES[case]
    assert words in refusal(tmp_path, content)


def test_the_settings_are_what_limits_a_document(tmp_path: Path) -> None:
    limits = ArchiveLimits.of_document(Settings(max_document_unpacked_mb=2, max_archive_entries=7, max_archive_ratio=11))
    assert (limits.unpacked_bytes, limits.entries, limits.ratio) == (2_000_000, 7, 11)
    repetitive = zip_bytes({"a.xml": b"ab" * 20_000_000})
    assert "MAX_ARCHIVE_RATIO allows 11" in refusal(tmp_path, repetitive, ArchiveLimits.of_document(Settings(max_archive_ratio=11)))


def test_some_megabytes_of_one_sentence_are_no_bomb(tmp_path: Path) -> None:
    assert refusal(tmp_path, docx("one sentence over and over. " * 400_000), ArchiveLimits.of_document(Settings())) == ""


ENTITIES = {
    "expansion": b'<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><a>&c;</a>',
    "file": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "parameter": b'<!DOCTYPE a [<!ENTITY % b SYSTEM "http://127.0.0.1:1/x">%b;]><a/>',
    "quadratic": b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 10_000 + b'">]><a>' + b"&b;" * 1000 + b"</a>",
    "utf-16": '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "x">]><a/>'.encode("utf-16"),
    "utf-16-be without a mark": '<!DOCTYPE a [<!ENTITY b "x">]><a/>'.encode("utf-16-be"),
    "utf-32": '<!DOCTYPE a [<!ENTITY b "x">]><a/>'.encode("utf-32"),
    "after a megabyte": b"<!--" + b"x" * ((1 << 20) - 8) + b'--><!DOCTYPE a [<!ENTITY b "x">]><a/>',
}


@pytest.mark.parametrize("case", ENTITIES)
@pytest.mark.parametrize("part", ["word/document.xml", "word/_rels/document.xml.rels", "docProps/core.xml", "customXml/item1.bin"])
def test_a_part_that_declares_entities_is_refused_unparsed(case: str, part: str, tmp_path: Path) -> None:
    said = refusal(tmp_path, package({**docx_parts(["x"]), part: ENTITIES[case]}), replace(LIMITS, ratio=100_000))
    assert f"'{part}': it declares XML entities" in said


def test_a_reference_to_a_dtd_is_no_entity_and_drawings_may_name_their_spaces(tmp_path: Path) -> None:
    page = b'<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "http://127.0.0.1:1/xhtml11.dtd"><html/>'
    drawing = b'<!DOCTYPE svg [<!ENTITY ns_svg "http://www.w3.org/2000/svg">]><svg/>'
    assert refusal(tmp_path, package({**EPUB, "text/1.xhtml": page, "images/cover.svg": drawing})) == ""


def test_a_damaged_part_is_left_to_the_parsers(tmp_path: Path) -> None:
    """Some read a document all the same, without its broken picture for example."""
    content = bytearray(with_part(b"word/media/image1.png", bytes(range(256)) * 8))
    content[content.find(b"word/media/image1.png") + len("word/media/image1.png")] = 0x07  # a kind of block that does not exist
    assert refusal(tmp_path, bytes(content)) == ""
    wrong_sum = with_part(b"word/media/image1.png", b"x" * 50, crc=zlib.crc32(b"y"))
    assert refusal(tmp_path, wrong_sum) == ""


def test_what_lies_packed_inside_a_part_is_not_unpacked_again(tmp_path: Path) -> None:
    """A zip bomb embedded in a document is some kilobytes of data that no parser opens."""
    bomb = zip_bytes({"zeros": bytes(20_000_000)})
    content = package({**docx_parts(["visible text"]), "word/embeddings/oleObject1.zip": bomb})
    assert refusal(tmp_path, content) == ""
    path = tmp_path / "stored"
    mime = sniff(path, "a.docx").mime_type
    assert parse_file(StoredFile(path), "a.docx", FileType.WORD, mime).pages[0].markdown.strip() == "visible text"


@pytest.mark.parametrize(
    ("extension", "kind"), [("docm", "ms-word.document"), ("xlsm", "ms-excel.sheet"), ("pptm", "ms-powerpoint.presentation")]
)
def test_a_file_with_macros_is_read_and_its_macros_are_neither_run_nor_text(extension: str, kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    macro = f'Sub AutoOpen()\nOpen "{canary}" For Output As #1\nEnd Sub'.encode()
    made = {"docm": docx("visible"), "xlsm": xlsx(S=[["visible"]]), "pptm": pptx("visible")}[extension]
    with zipfile.ZipFile(io.BytesIO(made)) as opened:
        parts = {name: opened.read(name) for name in opened.namelist()}
    types = parts["[Content_Types].xml"]
    for plain in (b"vnd.openxmlformats-officedocument.wordprocessingml.document", b"vnd.openxmlformats-officedocument.spreadsheetml.sheet",
                  b"vnd.openxmlformats-officedocument.presentationml.presentation"):  # fmt: skip
        types = types.replace(plain, f"vnd.{kind}.macroEnabled".encode())
    folder = {"docm": "word", "xlsm": "xl", "pptm": "ppt"}[extension]
    path = tmp_path / "stored"
    path.write_bytes(package({**parts, "[Content_Types].xml": types, f"{folder}/vbaProject.bin": macro}))
    found = sniff(path, f"a.{extension}")
    assert found.mime_type.lower() == f"application/vnd.{kind}.macroenabled.12" and found.note is None and is_package(found.mime_type)
    check_package(StoredFile(path), f"a.{extension}", LIMITS)
    text = parse_file(StoredFile(path), f"a.{extension}", found.file_type, found.mime_type).pages[0].markdown
    assert "visible" in text and "AutoOpen" not in text
    assert not canary.exists()


def test_every_type_that_is_an_archive_inside_is_checked(tmp_path: Path) -> None:
    for content, name in ((docx("x"), "a.docx"), (xlsx(S=[["x"]]), "a.xlsx"), (pptx("x"), "a.pptx"), (package(dict(ODT)), "a.odt"),
                          (package(dict(EPUB)), "a.epub"), (package({"xl/workbook.bin": "x"}), "a.xlsb")):  # fmt: skip
        path = tmp_path / "stored"
        path.write_bytes(content)
        assert is_package(sniff(path, name).mime_type), name
    for other in ("application/pdf", "text/html", "application/msword", "application/zip", "application/vnd.ms-excel", "message/rfc822"):
        assert not is_package(other)


def test_a_million_parts_cost_the_worker_nothing_and_are_refused(tmp_path: Path) -> None:
    entry = struct.Struct("<4s6H3L5H2L")
    parts = docx_parts(["x"])
    begun = raw_zip([Raw(name.encode(), str(content).encode()) for name, content in parts.items()])
    end = begun.rfind(b"PK\x05\x06")
    start = struct.unpack_from("<L", begun, end + 16)[0]
    many = entry.pack(b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    directory = begun[start:end] + many * 300_000
    path = tmp_path / "stored"
    path.write_bytes(begun[:start] + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, len(directory), start, 0))
    tracemalloc.start()
    found = sniff(path, "a.docx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.file_type is FileType.WORD
    assert peak < 2_000_000
    with pytest.raises(PermanentError, match="more than the 50 entries that MAX_ARCHIVE_ENTRIES allows"):
        check_package(StoredFile(path), "a.docx", LIMITS)
