"""The zip probe of `sniff`: Office, OpenDocument and EPUB packages told from other archives by what they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

from jobs.adapters.sniff_types import BY_EXTENSION, OPENDOCUMENT, Kind
from jobs.adapters.zip_content import entry_blocks
from jobs.adapters.zip_directory import DirectoryEntry, first_entries
from models.documents import FileType
from models.errors import PermanentError

MAX_ENTRIES = 100_000
_PART_LIST_BYTES = 256 * 1024
_ZIP = Kind(FileType.ZIP, "application/zip")
_IWORK = Kind(FileType.UNKNOWN, "application/vnd.apple.iwork")
_OTHER_PACKAGE = Kind(FileType.UNKNOWN, "application/vnd.openxmlformats-package")
"""With a part list but no Office document: Visio, XPS, 3D models, NuGet. Its parts are no documents either."""
_PART_LIST = "[Content_Types].xml"
_MAIN_PARTS = {"word/document.xml": "docx", "xl/workbook.xml": "xlsx", "xl/workbook.bin": "xlsb", "ppt/presentation.xml": "pptx"}
_TELLING = frozenset({"mimetype", _PART_LIST, *_MAIN_PARTS})


@dataclass(slots=True)
class _Contents:
    """What the directory says, without the entries that tell nothing: there may be very many."""

    telling: dict[str, DirectoryEntry] = field(default_factory=dict)
    files: int = 0
    locked: int = 0
    iwork: bool = False


def sniff_zip(file: BinaryIO, head: bytes) -> tuple[Kind, bool, str | None]:
    """Return what an archive is, whether it is encrypted as a whole, and a note. OSError if the file cannot be read, nothing else."""
    try:
        contents = _read(file)
        kind = _package_kind(file, contents)
    except PermanentError:
        return _broken_kind(head), False, "the archive is damaged"
    note = f"{contents.locked} of {contents.files} entries are encrypted" if 0 < contents.locked < contents.files else None
    encrypted = contents.locked > 0 and (contents.locked == contents.files or kind.file_type is not FileType.ZIP)
    return kind, encrypted, note


def _read(file: BinaryIO) -> _Contents:
    found = _Contents()
    for entry in first_entries(file, MAX_ENTRIES):
        name = entry.name.decode("utf-8", "replace")
        if name.endswith("/"):
            continue
        found.files += 1
        found.locked += entry.flags & 1
        found.iwork |= name == "Index.zip" or (name.startswith("Index/") and name.endswith(".iwa"))
        if name in _TELLING:
            found.telling.setdefault(name, entry)
    return found


def _package_kind(file: BinaryIO, contents: _Contents) -> Kind:
    """Tell Office, OpenDocument, EPUB and other packages from archives of files."""
    if entry := contents.telling.get("mimetype"):
        declared = _beginning(file, entry, 100).decode("ascii", errors="replace").strip()
        if declared in OPENDOCUMENT:
            return OPENDOCUMENT[declared]
    if entry := contents.telling.get(_PART_LIST):
        kind = _office_kind(_beginning(file, entry, _PART_LIST_BYTES))
        if kind is not None:
            return kind
    for name, extension in _MAIN_PARTS.items():
        if name in contents.telling:
            return BY_EXTENSION[extension]
    if _PART_LIST in contents.telling:
        return _OTHER_PACKAGE
    return _IWORK if contents.iwork else _ZIP


def _office_kind(parts: bytes) -> Kind | None:
    """Read the main part's type out of the package's part list; a document may hold other documents, so the main part decides."""
    for marker, extension in (
        (b"wordprocessingml.document.main+xml", "docx"), (b"wordprocessingml.template.main+xml", "docx"),
        (b"ms-word.document.macroEnabled.main+xml", "docm"), (b"ms-word.template.macroEnabledTemplate.main+xml", "docm"),
        (b"spreadsheetml.sheet.main+xml", "xlsx"), (b"spreadsheetml.template.main+xml", "xlsx"),
        (b"ms-excel.sheet.macroEnabled.main+xml", "xlsm"), (b"ms-excel.template.macroEnabled.main+xml", "xlsm"),
        (b"ms-excel.sheet.binary.macroEnabled.main", "xlsb"),
        (b"presentationml.presentation.main+xml", "pptx"), (b"presentationml.slideshow.main+xml", "pptx"),
        (b"presentationml.template.main+xml", "pptx"), (b"ms-powerpoint.presentation.macroEnabled.main+xml", "pptm"),
        (b"ms-powerpoint.slideshow.macroEnabled.main+xml", "pptm"),
    ):  # fmt: skip
        if marker in parts:
            return BY_EXTENSION[extension]
    return None


def _beginning(file: BinaryIO, entry: DirectoryEntry, limit: int) -> bytes:
    """Return at most `limit` bytes of an entry; nothing if it cannot be read."""
    try:
        return next(entry_blocks(file, entry), b"")[:limit]
    except PermanentError:
        return b""


def _broken_kind(head: bytes) -> Kind:
    """Go by the member names in the local headers, for an archive whose directory is missing or wrong."""
    for marker, extension in ((b"word/", "docx"), (b"xl/", "xlsx"), (b"ppt/", "pptx")):
        at = head.find(b"PK\x03\x04")
        while at >= 0:
            if head[at + 30 : at + 30 + len(marker)] == marker:
                return BY_EXTENSION[extension]
            at = head.find(b"PK\x03\x04", at + 4)
    return _ZIP
