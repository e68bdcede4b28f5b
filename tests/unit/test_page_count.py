"""How many pages a file is thought to have before a service is paid for them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from jobs.adapters.llamaparse import count_pages, guess_pages
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType


def package(path: Path, **parts: str) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in parts.items():
            made.writestr(name, content)
    return path


def test_the_pages_of_a_pdf_are_counted(tmp_path: Path) -> None:
    import pypdfium2

    pdf = pypdfium2.PdfDocument.new()
    for _ in range(7):
        pdf.new_page(100, 100)
    pdf.save(tmp_path / "a")
    assert count_pages(StoredFile(tmp_path / "a"), FileType.PDF, 100) == 7
    assert count_pages(StoredFile(tmp_path / "a"), FileType.PDF, 5) == 5


def test_slides_sheets_and_the_pages_that_word_noted_are_counted(tmp_path: Path) -> None:
    slides = {f"ppt/slides/slide{number}.xml": "" for number in range(1, 5)} | {"ppt/slides/_rels/slide1.xml.rels": ""}
    assert count_pages(StoredFile(package(tmp_path / "p", **slides)), FileType.POWERPOINT, 100) == 4
    assert count_pages(StoredFile(package(tmp_path / "x", **{"xl/worksheets/sheet1.xml": ""})), FileType.EXCEL, 100) == 1
    word = {"word/document.xml": "", "docProps/app.xml": "<Properties><Pages>12</Pages></Properties>"}
    assert count_pages(StoredFile(package(tmp_path / "w", **word)), FileType.WORD, 100) == 12
    assert count_pages(StoredFile(package(tmp_path / "n", **{"word/document.xml": ""})), FileType.WORD, 100) is None


@pytest.mark.parametrize("content", [b"", b"%PDF-1.7 and nothing else", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("kind", [FileType.PDF, FileType.WORD, FileType.HTML])
def test_a_broken_file_is_guessed_by_its_size(tmp_path: Path, content: bytes, kind: FileType) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    assert count_pages(StoredFile(path), kind, 100) is None
    assert (guess_pages(0, 100), guess_pages(20_001, 100), guess_pages(10**9, 100)) == (1, 2, 100)
