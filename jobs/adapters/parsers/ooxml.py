"""The bare text of docx, xlsx and pptx, straight from their XML parts: the last resort where real parsers fail or find nothing."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from xml.parsers import expat

from jobs.adapters.parsers.source import NoText, Parser, Source
from jobs.adapters.parsers.tables import markdown_table
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

MB = 1024 * 1024
MAX_COLUMNS = 16_384
MAX_CHARACTERS = 64 * MB
"""Longest text of a sheet: each cell may name the same long shared string."""


def refuse_incomplete(source: Source) -> None:
    """Raise a ParseError for a package without its part list; BadZipFile and the like for one that cannot be opened."""
    with source.file.open() as file, zipfile.ZipFile(file) as archive:
        if "[Content_Types].xml" not in archive.namelist():
            raise ParseError("it is no complete Office file: the part [Content_Types].xml is missing")


def has_drawings(source: Source) -> bool:
    """Tell whether a workbook has pictures or charts."""
    with source.file.open() as file, zipfile.ZipFile(file) as archive:
        return any(name.startswith(("xl/drawings/drawing", "xl/charts/")) for name in archive.namelist())


def parse_bare(source: Source) -> ParsedFile:
    """Return paragraphs of a Word document (margins and notes too), of slides, or cells of sheets, without any formatting."""
    with source.file.open() as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if any(name.startswith("word/") for name in names):
            text = "\n\n".join(filter(None, (_paragraphs(archive, name) for name in word_parts(names))))
            pages, paged = [ParsedPage(1, text)], False
        elif any(name.startswith("ppt/") for name in names):
            slides = _numbered(names, r"ppt/slides/slide(\d+)\.xml")
            pages, paged = [ParsedPage(number, _paragraphs(archive, name)) for number, name in enumerate(slides, start=1)], True
        else:
            pages, paged = _sheets(archive, names), True
    kept, cut = source.within_limit(tuple(pages))
    if not any(page.markdown.strip() for page in kept):
        raise NoText("it holds no text")
    return ParsedFile(kept, "docmill ooxml", paged=paged, metadata=cut)


def word_parts(names: list[str], kinds: tuple[str, ...] = ("header", "document", "footnotes", "endnotes", "footer")) -> list[str]:
    """Return the parts of these kinds of a Word document, kind after kind."""
    pattern = re.compile(rf"word/({'|'.join(kinds)})\d*\.xml")
    found = [(kinds.index(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _numbered(names: list[str], pattern: str) -> list[str]:
    found = sorted((int(match[1]), name) for name in names if (match := re.fullmatch(pattern, name)))
    return [name for _, name in found]


@dataclass
class PartReader:
    """Collects text while expat reads; `start` and `end` see element names without their prefix."""

    start: Callable[[str, dict[str, str]], None]
    end: Callable[[str], None]
    text: Callable[[str], None]

    def read(self, archive: zipfile.ZipFile, name: str) -> None:
        """Read one part. Entities are refused where they are declared, so none is ever expanded; malformed XML is an ExpatError."""
        parser = expat.ParserCreate()
        parser.StartElementHandler = lambda tag, attributes: self.start(tag.rpartition(":")[2], attributes)
        parser.EndElementHandler = lambda tag: self.end(tag.rpartition(":")[2])
        parser.CharacterDataHandler = self.text
        parser.EntityDeclHandler = _refuse_entities
        with archive.open(name) as part:
            parser.ParseFile(part)


def _refuse_entities(*_declaration: object) -> None:
    raise ParseError("its XML declares entities, which no Office program writes")


def _paragraphs(archive: zipfile.ZipFile, name: str) -> str:
    """Return the text of a Word or PowerPoint part, a blank line between paragraphs."""
    return "\n\n".join(read_paragraphs(archive, name))


def read_paragraphs(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Return the paragraphs of a Word or PowerPoint part that have text, any blanks in them as one space."""
    paragraphs: list[str] = []
    run: list[str] = []
    inside = [False]

    def start(tag: str, _attributes: dict[str, str]) -> None:
        if tag == "t":
            inside[0] = True
        elif tag in ("tab", "br", "cr"):
            run.append(" ")

    def end(tag: str) -> None:
        if tag == "t":
            inside[0] = False
        elif tag == "p":
            paragraphs.append(" ".join("".join(run).split()))
            run.clear()

    def text(data: str) -> None:
        if inside[0]:
            run.append(data)

    PartReader(start, end, text).read(archive, name)
    return list(filter(None, paragraphs))


@dataclass
class _Sheet:
    """Cells of one sheet, or the shared strings, as they come."""

    shared: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    kind: str = ""
    inside: bool = False
    value: list[str] = field(default_factory=list)
    characters: int = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "row":
            self.rows.append([])
        elif tag in ("c", "si"):
            self.kind = attributes.get("t", "")
            self.value = []
        elif tag in ("v", "t"):
            self.inside = True

    def end(self, tag: str) -> None:
        if tag in ("v", "t"):
            self.inside = False
        elif tag == "c" and self.rows and len(self.rows[-1]) < MAX_COLUMNS:
            cell = self._resolved("".join(self.value).strip())
            self.characters += len(cell)
            if self.characters > MAX_CHARACTERS:
                raise ParseError(f"a sheet has more than {MAX_CHARACTERS:,} characters")
            self.rows[-1].append(cell)
        elif tag == "si":
            self.rows.append(["".join(self.value)])

    def text(self, data: str) -> None:
        if self.inside:
            self.value.append(data)

    def _resolved(self, value: str) -> str:
        if self.kind != "s":
            return value
        return self.shared[int(value)] if value.isdigit() and int(value) < len(self.shared) else ""


def _sheets(archive: zipfile.ZipFile, names: list[str]) -> list[ParsedPage]:
    """Return a table for each sheet; cells stand in the order of the file, gaps between them are closed."""
    strings = _Sheet()
    if "xl/sharedStrings.xml" in names:
        PartReader(strings.start, strings.end, strings.text).read(archive, "xl/sharedStrings.xml")
    shared = [row[0] for row in strings.rows]
    pages = []
    for number, name in enumerate(_numbered(names, r"xl/worksheets/sheet(\d+)\.xml"), start=1):
        sheet = _Sheet(shared)
        PartReader(sheet.start, sheet.end, sheet.text).read(archive, name)
        pages.append(ParsedPage(number, markdown_table([row for row in sheet.rows if any(row)])))
    return pages


BARE = Parser("ooxml", parse_bare)
