"""What every parser promises, local or hosted: text with pages in order, errors of the right class without the file's own words."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pytest
from pydantic import SecretStr

from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.llamaparse import LlamaParse, to_parsed_file
from jobs.adapters.parsers import PARSERS, parse_file
from jobs.adapters.stored_file import StoredFile
from jobs.stages.parse import join_pages
from models.documents import FileType, ParsedFile
from models.errors import ParseError, PermanentError
from tests.servers import LlamaParseServer
from tests.unit.small_files import docx, package, pdf, pptx, xlsx

OFFICE = "application/vnd.openxmlformats-officedocument."
PAGES = ("The pump holds six bar", "Seals are changed in May", "Ask for Quillfeather at the gate")
SECRET = "Quillfeather"
EMBEDDED = "data:image/png;base64," + "QUJD" * 40
UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_MAIL = "From a@b.example Fri Jan  3 10:00:00 2025\nFrom: a@b.example\nSubject: S\n\n{}\n\n"
_KEY = "llx-conformance-4711"


@dataclass(frozen=True)
class Kind:
    """A type of file, and how one is made that has these texts, a page each where the type has pages."""

    file_type: FileType
    mime_type: str
    make: Callable[[Sequence[str]], bytes]
    paged: bool = True
    text: bool = False
    """Whether a file is characters: whatever they are, it cannot be broken."""


def _html(texts: Sequence[str]) -> bytes:
    return f"<html><body>{''.join(f'<p>{escape(text)}</p>' for text in texts)}</body></html>".encode("utf-8", "surrogatepass")


def _lines(texts: Sequence[str]) -> bytes:
    return "\n".join(texts).encode("utf-8", "surrogatepass")


def _rows(texts: Sequence[str]) -> bytes:
    rows = io.StringIO()
    csv.writer(rows, quoting=csv.QUOTE_ALL).writerows([text] if text else [] for text in texts)
    return rows.getvalue().encode("utf-8", "surrogatepass")


def _opf(texts: Sequence[str]) -> bytes:
    container = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    container += '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    opf = '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/><manifest>'
    opf += '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine></package>'
    return package({"mimetype": "application/epub+zip", "META-INF/container.xml": container, "c.opf": opf, "a.xhtml": _html(texts)})


def _torn(data: bytes) -> bytes:
    """Return a package whose parts end in tags and entities that are none."""
    with zipfile.ZipFile(io.BytesIO(data)) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    word = SECRET.encode()
    return package({name: part.replace(word, b"%b &%b; </%b>" % (word, word, word)) for name, part in parts.items()})


def _sheets(texts: Sequence[str]) -> bytes:
    return xlsx(**{f"Sheet{number}": [[text]] if text else [] for number, text in enumerate(texts, 1)})


KINDS = {
    "pdf": Kind(FileType.PDF, "application/pdf", lambda texts: pdf(*texts)),
    "word": Kind(FileType.WORD, OFFICE + "wordprocessingml.document", lambda texts: docx(*texts), paged=False),
    "excel": Kind(FileType.EXCEL, OFFICE + "spreadsheetml.sheet", _sheets),
    "powerpoint": Kind(FileType.POWERPOINT, OFFICE + "presentationml.presentation", lambda texts: pptx(*texts)),
    "ebook": Kind(FileType.EBOOK, "application/epub+zip", _opf, paged=False),
    "html": Kind(FileType.HTML, "text/html", _html, paged=False, text=True),
    "text": Kind(FileType.TEXT, "text/plain", _lines, paged=False, text=True),
    "csv": Kind(FileType.TEXT, "text/csv", _rows, paged=False, text=True),
    "email": Kind(FileType.EMAIL, "message/rfc822", lambda texts: b"Subject: \n\n" + _lines(texts), paged=False, text=True),
    "mbox": Kind(FileType.EMAIL, "application/mbox", lambda texts: "".join(map(_MAIL.format, texts)).encode(), text=True),
}
"""What the local parsers are tried on."""


@dataclass(frozen=True)
class Adapter:
    """A parser, and the files that it is given."""

    kind: Kind
    skip: int
    """Which of the local parsers of the type, from 0; -1 for the hosted one."""
    folder: Path
    server: LlamaParseServer

    async def parse(self, data: bytes | None, page_limit: int = 100) -> ParsedFile:
        """Parse a file; None for one that is gone."""
        path = self.folder / "stored"
        path.unlink(missing_ok=True)
        (self.folder / "another").touch()  # a storage without any file counts as one that is away
        if data is not None:
            path.write_bytes(data)
        if self.skip >= 0:
            given = (StoredFile(path), "given.name", self.kind.file_type, self.kind.mime_type, page_limit)
            return await asyncio.to_thread(parse_file, *given, skip=self.skip)
        service = Service("LlamaParse", self.server.url, SecretStr(_KEY), Timeouts(5, 10, 30))
        parser = LlamaParse(service, page_limit=page_limit, poll_seconds=0.01, deadline=20)
        job_id = await parser.start(StoredFile(path), self.kind.mime_type)
        return to_parsed_file(await parser.wait(job_id), parser.parser)

    def broken(self) -> list[bytes]:
        """Files of this type that are damaged, with words in them. The service says by its job that it could not read it."""
        data = self.kind.make(PAGES)
        if self.skip < 0:
            self.server.bad_pages = dict.fromkeys(range(1, 4), 9)
            return [data]
        return [data[:40] + b"<w:p <" + SECRET.encode() * 20, data[: len(data) // 2], *([_torn(data)] if data.startswith(b"PK") else [])]


ADAPTERS = {
    f"{name}-{parser.name}": (kind, skip)
    for name, kind in KINDS.items()
    for skip, parser in enumerate(PARSERS.get(kind.mime_type) or PARSERS[kind.file_type])
} | {"hosted": (Kind(FileType.PDF, "application/pdf", lambda texts: "\f".join(texts).encode("utf-8", "replace")), -1)}
"""Each local parser alone, on each type that it is there for, and LlamaParse; its server's pages lie between form feeds."""


@pytest.fixture(scope="module")
def server() -> Iterator[LlamaParseServer]:
    with LlamaParseServer(key=_KEY) as running:
        yield running


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest, tmp_path: Path, server: LlamaParseServer) -> Adapter:
    server.bad_pages = {}
    return Adapter(*ADAPTERS[request.param], tmp_path, server)


async def test_every_word_is_in_the_text_and_the_parser_named_with_its_version(adapter: Adapter) -> None:
    parsed = await adapter.parse(adapter.kind.make(PAGES))
    markdown, _ = join_pages(parsed)
    at = [markdown.find(text) for text in PAGES]
    assert -1 not in at and at == sorted(at), markdown
    assert re.fullmatch(r"\S+( \S+)+", parsed.parser)
    assert json.loads(json.dumps(parsed.metadata, allow_nan=False)) == parsed.metadata


async def test_pages_are_numbered_from_1_in_order_and_marks_say_where_they_begin(adapter: Adapter) -> None:
    parsed = await adapter.parse(adapter.kind.make(PAGES))
    markdown, marks = join_pages(parsed)
    assert parsed.paged == adapter.kind.paged
    assert [page.number for page in parsed.pages] == (list(range(1, 1 + len(PAGES))) if parsed.paged else [1])
    assert [mark.number for mark in marks] == ([page.number for page in parsed.pages] if parsed.paged else [])
    ends = [*(mark.start for mark in marks[1:]), len(markdown)]
    for mark, end, text in zip(marks, ends, PAGES, strict=False):
        assert text in markdown[mark.start : end]


async def test_the_same_file_gives_the_same_text(adapter: Adapter) -> None:
    data = adapter.kind.make(PAGES)
    assert await adapter.parse(data) == await adapter.parse(data)


async def test_a_blank_page_among_others_keeps_the_numbers_of_the_others(adapter: Adapter) -> None:
    if not adapter.kind.paged:
        pytest.skip("a type without pages")
    parsed = await adapter.parse(adapter.kind.make([PAGES[0], "", PAGES[2]]))
    assert {page.number for page in parsed.pages if "pump" in page.markdown} == {1}
    assert {page.number for page in parsed.pages if SECRET in page.markdown} == {3}


async def test_what_postgres_refuses_and_what_is_no_text_is_not_handed_on(adapter: Adapter) -> None:
    # Of the types that are packages only what is allowed in XML can be in them.
    bad = "a\x00b " if adapter.kind.text or adapter.skip < 0 else ""
    parsed = await adapter.parse(adapter.kind.make([f"{bad}before {EMBEDDED} after", *PAGES[1:]]))
    told = "".join(page.markdown + (page.label or "") for page in parsed.pages) + repr(parsed.metadata)
    assert UNSTORABLE.search(told) is None
    assert "QUJDQUJD" not in told
    assert "before" in told and SECRET in told


@pytest.mark.parametrize("texts", [["", "", ""], [" ", "\u00a0", " "]], ids=["nothing", "blanks"])
async def test_a_file_without_text_is_a_parse_error(adapter: Adapter, texts: list[str]) -> None:
    if adapter.kind is KINDS["mbox"]:
        pytest.skip("headers are text")
    if adapter.kind is KINDS["powerpoint"] and adapter.skip >= 0:
        pytest.skip("a blank slide is a rule, which stands for its title")
    if adapter.kind is KINDS["excel"] and not texts[0]:
        texts = []
    with pytest.raises(ParseError):
        await adapter.parse(adapter.kind.make(texts))


async def test_a_damaged_file_is_read_or_is_a_parse_error_without_its_words(adapter: Adapter) -> None:
    if adapter.kind.text:
        pytest.skip("characters cannot be broken")
    refused = 0
    for data in adapter.broken():
        try:
            await adapter.parse(data)  # what can be read of it, perhaps
        except ParseError as error:
            refused += 1
            assert SECRET not in str(error)
            assert 20 < len(str(error)) < 1000
    assert refused


async def test_more_pages_than_may_be_are_a_parse_error_that_names_the_limit(adapter: Adapter) -> None:
    if not adapter.kind.paged:
        pytest.skip("a type without pages")
    with pytest.raises(ParseError, match=r"3 \w+, more than .*2") as caught:
        await adapter.parse(adapter.kind.make(PAGES), page_limit=2)
    assert SECRET not in str(caught.value)


async def test_a_stored_file_that_is_gone_is_a_permanent_error(adapter: Adapter) -> None:
    calls = adapter.server.tally.requests
    with pytest.raises(PermanentError, match=r"stored file is gone|does not exist"):
        await adapter.parse(None)
    assert adapter.server.tally.requests == calls


async def test_an_empty_file_is_a_parse_error(adapter: Adapter) -> None:
    with pytest.raises(ParseError):
        await adapter.parse(b"")
