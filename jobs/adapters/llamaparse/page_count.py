"""How many pages a service will find in a file, before it is paid for them. Opens files of strangers: runs in the sandbox's child."""

from __future__ import annotations

import re
import zipfile

from jobs.adapters.stored_file import StoredFile
from models.documents import FileType

_BYTES_A_PAGE = 20_000
"""Of a file whose pages cannot be counted: less than most files need, so that the estimate is rather too high."""
_SLIDE = re.compile(r"ppt/slides/slide\d+\.xml")
_SHEET = re.compile(r"xl/worksheets/sheet\d+\.(xml|bin)")
_TOLD_PAGES = re.compile(rb"<(?:\w+:)?Pages>(\d{1,7})</")
_LARGEST_PROPERTIES = 1_000_000


def count_pages(file: StoredFile, file_type: FileType, page_limit: int) -> int | None:
    """Return the pages of a PDF, the slides or sheets of an Office package or the pages that Word noted in one; None where none are told.

    Never more than `page_limit`. Raises nothing that a broken file could cause, except by its library's crash.
    """
    try:
        counted = _of_pdf(file) if file_type is FileType.PDF else _of_package(file)
    except (OSError, RuntimeError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return None
    return min(counted, page_limit) or None


def guess_pages(size: int, page_limit: int) -> int:
    """Return how many pages a file of so many bytes may have, at least 1."""
    return max(1, min(page_limit, -(-size // _BYTES_A_PAGE)))


def _of_pdf(file: StoredFile) -> int:
    import pypdfium2  # noqa: PLC0415 - native code, loaded in the child only

    pdf = pypdfium2.PdfDocument(file.read_bytes())
    try:
        return len(pdf)
    finally:
        pdf.close()


def _of_package(file: StoredFile) -> int:
    with file.open() as opened, zipfile.ZipFile(opened) as package:
        names = package.namelist()
        parts = sum(bool(_SLIDE.fullmatch(name) or _SHEET.fullmatch(name)) for name in names)
        if parts or "docProps/app.xml" not in names:
            return parts
        with package.open("docProps/app.xml") as properties:
            told = _TOLD_PAGES.search(properties.read(_LARGEST_PROPERTIES))
    return int(told[1]) if told else 0
