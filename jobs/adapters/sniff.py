"""What a file is, by its content; the name decides only where the content cannot (CSV, Markdown and other plain text).

Runs in the worker, on files of strangers: it reads a bounded part of the file in bounded memory, decompresses nothing but the small part
list of Office packages, and never raises for any bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from jobs.adapters import ole
from jobs.adapters.sniff_text import sniff_text
from jobs.adapters.sniff_types import BY_EXTENSION, EXTENSIONS_OF, MAGIC, NAMES
from jobs.adapters.sniff_zip import sniff_zip
from jobs.adapters.zip_directory import has_directory
from models.documents import FileType

HEAD_BYTES = 64 * 1024
TAIL_BYTES = 4 * 1024
_PDF_OBJECT = re.compile(rb"(?:\s|%[^\r\n]*)*+\d+ \d+ obj\b")


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What the content says. `encrypted` is True only where that is certain; for a PDF the parser has the last word."""

    file_type: FileType
    mime_type: str
    encrypted: bool = False
    note: str | None = None
    """Something a person should know, for example that name and content disagree."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is read of a file: its beginning and end, and the file itself for archives."""

    file: BinaryIO
    head: bytes
    tail: bytes
    extension: str


def sniff(source: Path | BinaryIO, file_name: str) -> Sniffed:
    """Return the type of a file, a path or open, which its submitter calls `file_name`. OSError if it cannot be read, nothing else."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return sniff(file, file_name)
    extension = _extension(file_name)
    source.seek(0)
    head = source.read(HEAD_BYTES)
    if not head:
        return Sniffed(FileType.UNKNOWN, "application/x-empty", note="the file is empty")
    sample = _Sample(source, head, _tail(source, head), extension)
    # What is known by its first bytes goes first: an archive may well begin with a PDF.
    probes = (_probe_ole, _probe_zip, _probe_pdf, _probe_magic, _probe_text, _probe_late_zip)
    found = next((kind for probe in probes if (kind := probe(sample)) is not None), None)
    found = found or Sniffed(FileType.UNKNOWN, "application/octet-stream")
    if found.note is None and not extension_agrees(file_name, found):
        content = NAMES.get(found.mime_type, found.mime_type)
        return replace(found, note=f"content is {content} although the name ends in .{extension}")
    return found


def _tail(file: BinaryIO, head: bytes) -> bytes:
    """Return the end of a file, which need not be read again where it lies in the head."""
    if len(head) < HEAD_BYTES:
        return head[-TAIL_BYTES:]
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
    return file.read(TAIL_BYTES)


def extension_agrees(file_name: str, sniffed: Sniffed) -> bool:
    """Tell whether the name's extension fits the content. Names without extension, or with one we do not know, agree with anything."""
    extension = _extension(file_name)
    expected = BY_EXTENSION.get(extension)
    if expected is None:
        return True
    if extension in EXTENSIONS_OF.get(sniffed.mime_type, ()):
        return True
    return expected.file_type is FileType.TEXT and sniffed.file_type is FileType.TEXT


def _extension(file_name: str) -> str:
    return PurePosixPath(file_name.strip().replace("\\", "/").rsplit("/", 1)[-1]).suffix.lstrip(".").lower()


def _probe_pdf(sample: _Sample) -> Sniffed | None:
    """Go by the header, which may follow 1,024 bytes of something else, or by an object at the start where the header is damaged."""
    if not sample.head.startswith(b"%PDF-"):
        named_so = sample.extension == "pdf" and b"endobj" in sample.head
        if b"%PDF-" not in sample.head[:1024] and not named_so and not _PDF_OBJECT.match(sample.head):
            return None
        text = sniff_text(sample.head, "")
        if text is not None and (text.file_type is FileType.HTML or not _has_parts_of_pdf(sample)):
            return None  # a page with a PDF in a comment is a page, and a text about PDF is a text
    note = None
    if b"/Encrypt" in sample.tail or b"/Encrypt" in sample.head:
        note = "the PDF is encrypted; whether it opens without a password shows when it is parsed"
    return Sniffed(FileType.PDF, "application/pdf", note=note)


def _has_parts_of_pdf(sample: _Sample) -> bool:
    return b"endobj" in sample.head or b"%%EOF" in sample.tail or b"startxref" in sample.tail


def _probe_ole(sample: _Sample) -> Sniffed | None:
    if not sample.head.startswith(ole.MAGIC):
        return None
    streams = {stream.name: stream.head for stream in ole.read_root(sample.file)}
    workbook = streams.get("Workbook", streams.get("Book"))
    found = Sniffed(FileType.UNKNOWN, "application/x-ole-storage")
    if "EncryptedPackage" in streams:  # which Office program it is for lies inside the encryption
        found = Sniffed(FileType.WORD, "application/x-ole-encrypted-package", encrypted=True, note="a password protects the Office file")
    elif "WordDocument" in streams:
        fib = streams["WordDocument"]
        found = Sniffed(FileType.WORD, "application/msword", encrypted=len(fib) > 11 and bool(fib[11] & 1))
    elif workbook is not None:
        found = Sniffed(FileType.EXCEL, "application/vnd.ms-excel", encrypted=_has_filepass(workbook))
    elif "PowerPoint Document" in streams:
        found = Sniffed(FileType.POWERPOINT, "application/vnd.ms-powerpoint", encrypted="EncryptedSummary" in streams)
    elif "__properties_version1.0" in streams:
        found = Sniffed(FileType.EMAIL, "application/vnd.ms-outlook")
    return found


def _probe_magic(sample: _Sample) -> Sniffed | None:
    if sample.head.lstrip()[:5] == b"{\\rtf":
        return Sniffed(FileType.WORD, "application/rtf")
    for offset, magic, mime_type in MAGIC:
        if sample.head[offset : offset + len(magic)] == magic:
            return Sniffed(FileType.UNKNOWN, mime_type)
    return None


def _probe_text(sample: _Sample) -> Sniffed | None:
    kind = sniff_text(sample.head, sample.extension)
    return None if kind is None else Sniffed(kind.file_type, kind.mime_type)


def _probe_zip(sample: _Sample) -> Sniffed | None:
    starts = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK00PK\x03\x04")
    return _zip(sample) if sample.head.startswith(starts) else None


def _probe_late_zip(sample: _Sample) -> Sniffed | None:
    """Find an archive behind junk, a self-extractor for example."""
    return _zip(sample) if has_directory(sample.file) else None


def _zip(sample: _Sample) -> Sniffed:
    kind, encrypted, note = sniff_zip(sample.file, sample.head)
    return Sniffed(kind.file_type, kind.mime_type, encrypted, note)


def _has_filepass(workbook: bytes) -> bool:
    """Look for a FILEPASS record (0x2F) among the first records of a workbook stream; they are BOF and few others."""
    at = 0
    for _ in range(20):
        kind, length = int.from_bytes(workbook[at : at + 2], "little"), int.from_bytes(workbook[at + 2 : at + 4], "little")
        if kind == 0x2F:
            return True
        at += 4 + length
        if at + 4 > len(workbook):
            return False
    return False
