"""What the fuzzer tries: each target takes any bytes, allows docmill's own refusals, and asserts what must hold for everything else.

The first bytes of an input are choices (a name, sizes, pages), the rest is the content.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from jobs.adapters.archives import ArchiveLimits, check_package, is_archive, list_archive, unpack_members
from jobs.adapters.encoding import decode
from jobs.adapters.sniff import sniff
from jobs.adapters.storage import LocalStorage
from jobs.adapters.stored_file import StoredFile
from jobs.stages.check import checked, normalise
from jobs.stages.chunk import cut
from jobs.stages.validate import refuse_file, refuse_size, refuse_type
from models.documents import Document, PageMark
from models.errors import ParseError, PermanentError
from models.stages import Milestone
from tests.archives import Raw, raw_zip

SLOWEST_SECONDS = 20.0
"""For one input, on a busy machine and with every branch counted; a loop that does not end, or a square that grew, takes longer."""
NAMES = (
    "a.txt",
    "a.pdf",
    "a.docx",
    "a.xlsx",
    "a.zip",
    "a.eml",
    "a.html",
    "a.md",
    "a.csv",
    "a.json",
    "a.xml",
    "a",
    "a.odt",
    "a.epub",
    ".mbox",
)
LIMITS = ArchiveLimits(entries=20, archive_bytes=1_000_000, unpacked_bytes=3_000_000, file_bytes=2_000_000, ratio=250)
DOCUMENT = Document(doc_id="d", version=1, user_id="u", file_name="a.txt", file_path="uploads/d", milestone=Milestone.UPLOADED)


@cache
def _folder() -> Path:
    """One folder for all inputs of this process, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(prefix="docmill-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def _in_time() -> Iterator[None]:
    started = time.process_time()
    yield
    spent = time.process_time() - started
    assert spent < SLOWEST_SECONDS, f"one input took {spent:.0f} s of CPU time"


def validate(data: bytes) -> None:
    """Fingerprint, type and the rules of `validate`; and whether the file is an archive."""
    name, content = NAMES[data[0] % len(NAMES) if data else 0], data[1:]
    storage = LocalStorage(_folder())
    path = storage.base / "upload"
    path.write_bytes(content)
    with _in_time():
        found = storage.fingerprint("upload")
        assert (found.size, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        sniffed = sniff(path, name)
        assert sniffed == sniff(path, name)
        assert sniffed.note is None or sniffed.note.isprintable()
        is_archive(path, name)
        try:
            refuse_file(DOCUMENT, found, 1)
            refuse_type(name, sniffed)
            refuse_size(name, found.size, sniffed.file_type, len(content) % 2)
        except PermanentError as error:
            assert str(error)


def _built(data: bytes) -> bytes:
    """Make an archive whose entries the input chooses: bytes that are changed at random seldom stay one."""
    entries: list[Raw] = []
    while len(data) > 8 and len(entries) < 25:
        method, flags, mode, size, crc, of, name, content = data[:8]
        packed = data[8 + name : 8 + name + content * 16]
        entries.append(
            Raw(
                data[8 : 8 + name],
                packed,
                method=(8, 8, 0, 0, 12, 14, 93, 99)[method % 8],
                flags=flags if flags % 3 == 0 else 0,
                mode=(0o100644, 0o100644, 0o120777, 0o040755, 0o010600, 0)[mode % 6],
                size=(None, None, 0, len(packed) + 1, 2_500_000, 2**32 - 1)[size % 6],
                crc=1 if crc % 8 == 0 else None,
                lies_at=of % len(entries) if entries and of % 8 == 0 else None,
            )
        )
        data = data[8 + name + content * 16 :]
    return raw_zip(entries, before=data, behind=data[:3])


def archive(data: bytes) -> None:
    """Directory, listing, names and extraction of an archive; and the same file taken for an Office package.

    An input that begins as archives do is the file; of any other one is built.
    """
    data = data if data.startswith((b"PK", b"MZ")) else _built(data)
    base = _folder()
    folder = base / "workspace"
    folder.mkdir(exist_ok=True)
    path = base / "archive.zip"
    path.write_bytes(data)
    with _in_time():
        try:
            listing = list_archive(StoredFile(path), LIMITS)
        except PermanentError as error:
            assert str(error).endswith(".")
        else:
            paths = [member.path for member in listing.members]
            assert 0 < len(paths) == len(set(paths)) <= LIMITS.entries
            assert all(path.isprintable() and len(path.encode()) <= 1200 for path in paths)
            good = [member for member in listing.members if member.reason is None]
            assert not any(".." in member.path.split("/") or member.path.startswith("/") for member in good)
            assert sum(member.size for member in good) == listing.unpacked_bytes <= LIMITS.unpacked_bytes
            made = unpack_members(StoredFile(path), good, str(folder), LIMITS)
            assert [result.path for result in made] == [member.path for member in good]
            for member, result in zip(good, made, strict=True):
                assert (result.file is None) == (result.reason is not None)
                if result.file is not None:
                    content = (folder / result.file).read_bytes()
                    assert (len(content), hashlib.sha256(content).hexdigest()) == (member.size, result.sha256)
            assert {file.name for file in folder.iterdir()} == {result.file for result in made if result.file is not None}
        try:
            check_package(StoredFile(path), "archive.zip", LIMITS)
        except PermanentError as error:
            assert str(error).startswith("archive.zip: ")
    for file in folder.iterdir():
        file.unlink()
    assert sorted(file.name for file in base.iterdir() if file.name != "upload") == ["archive.zip", "workspace"]


def _text_and_pages(data: bytes) -> tuple[str, tuple[PageMark, ...]]:
    """Make a text in any encoding and up to 255 pages out of an input; the marks are not in order by themselves."""
    count = data[0] if data else 0
    text = decode(data[1 + count :]).text
    return text, tuple(PageMark(number, byte * len(text) // 255) for number, byte in enumerate(data[1 : 1 + count], 1))


def check(data: bytes) -> None:
    """Decoding and `check`: what comes out is normal, sound and whole, or refused."""
    with _in_time():
        text, pages = _text_and_pages(data)
        text.encode()
        assert "\x00" not in text and "\r" not in text
        try:
            found = checked(replace(DOCUMENT, markdown=text, pages=pages))
        except (ParseError, PermanentError) as error:
            assert str(error).startswith("a.txt: ")
            return
    markdown = found.markdown or ""
    assert markdown.strip()
    assert found.markdown_sha256 == hashlib.sha256(markdown.encode()).hexdigest()
    assert [page.number for page in found.pages] == [page.number for page in pages]
    assert all(one.start <= other.start for one, other in pairwise(found.pages))
    assert all(0 <= page.start <= len(markdown) for page in found.pages)
    if not pages:
        assert normalise(markdown) == markdown
        assert "\n\n\n" not in markdown and all(line == line.rstrip(" \t") for line in markdown.split("\n"))
    again = checked(found)
    assert (again.markdown, again.pages) == (markdown, found.pages)


def chunk(data: bytes) -> None:
    """`chunk` of a checked text: exact, whole, in order, within the size, and the same each time."""
    size = 50 + int.from_bytes(data[:2], "little") % 2000
    overlap = int.from_bytes(data[2:4], "little") % ((size + 1) // 2)
    text, pages = _text_and_pages(data[4:])
    try:
        ordered = sorted(page.start for page in pages)
        found = checked(replace(DOCUMENT, markdown=text, pages=tuple(PageMark(at + 1, start) for at, start in enumerate(ordered))))
    except (ParseError, PermanentError):
        return
    markdown, marks = found.markdown or "", found.pages
    with _in_time():
        chunks = cut(markdown, marks, doc_id="d", size=size, overlap=overlap)
    assert chunks == cut(markdown, marks, doc_id="d", size=size, overlap=overlap)
    assert len({chunk.id for chunk in chunks}) == len(chunks) > 0
    covered = 0
    for number, chunk in enumerate(chunks):
        assert chunk.index == number
        assert chunk.content == markdown[chunk.char_start : chunk.char_end]
        assert 0 < len(chunk.content) <= size and chunk.content.strip()
        assert covered - chunk.char_start <= overlap
        assert not markdown[covered : chunk.char_start].strip()
        assert (chunk.page_start is None) == (chunk.page_end is None) == (not marks)
        assert chunk.page_start is None or chunk.page_end is None or chunk.page_start <= chunk.page_end
        covered = chunk.char_end
    assert not markdown[covered:].strip()


TARGETS: dict[str, Callable[[bytes], None]] = {"validate": validate, "archive": archive, "check": check, "chunk": chunk}
