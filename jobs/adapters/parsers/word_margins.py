"""Headers and footers of Word documents, which parsers of the body leave out: letterheads, account and reference numbers stand there."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from typing import NamedTuple

from jobs.adapters.parsers.ooxml import MB, PartReader, word_parts
from jobs.adapters.parsers.source import Source
from models.errors import ParseError

MAX_MARGIN_BYTES = 32 * MB
"""Of XML in all headers and footers; Word repeats them for each section."""
MAX_INSTRUCTION = 100
"""Characters of a field's instruction that are read: its name comes first."""
_PAGE_FIELDS = frozenset({"PAGE", "NUMPAGES", "SECTIONPAGES"})
_PAGE_WORDS = frozenset({"page", "pages", "of", "seite", "von", "blatt", "pagina", "di", "página", "de", "sur", "strona", "z", "van"})
"""What stands beside a page number and says nothing without it."""
_WORD = re.compile(r"[^\W_]+")


def with_margins(source: Source, body: str) -> tuple[str, list[str]]:
    """Return a Word document's body with its headers before it and its footers behind, each text once, and warnings.

    An empty body stays empty: the next parser may find it. A header that cannot be read costs a warning, not the body.
    """
    if not source.is_ooxml or not body.strip():
        return body, []
    try:
        with source.file.open() as file, zipfile.ZipFile(file) as archive:
            headers, footers = (_margin(archive, kind) for kind in ("header", "footer"))
    except MemoryError:
        raise
    except Exception as error:  # zip, its decompressors and expat have no common class, and the body is read already
        return body, [f"headers and footers are left out ({error if isinstance(error, ParseError) else type(error).__name__})"]
    if not any(headers + footers):
        return body, []
    there = {_key(piece) for line in body.splitlines() for piece in (line, *line.split("|"))}
    taken: set[str] = set()
    before, after = (_new(parts, there, taken) for parts in (headers, footers))
    if before:
        body = f"{before}\n\n{body}"
    return (f"{body.rstrip()}\n\n{after}\n" if after else body), []


def _margin(archive: zipfile.ZipFile, kind: str) -> list[list[_Paragraph]]:
    """Return the paragraphs of each header, or each footer."""
    names = word_parts(archive.namelist(), (kind,))
    if sum(archive.getinfo(name).file_size for name in names) > MAX_MARGIN_BYTES:
        raise ParseError(f"they have more than {MAX_MARGIN_BYTES // MB} MB")
    found = []
    for name in names:
        part = _Part()
        PartReader(part.start, part.end, part.text).read(archive, name)
        found.append(part.paragraphs)
    return found


def _new(parts: list[list[_Paragraph]], there: set[str], taken: set[str]) -> str:
    """Return the paragraphs that no other part had, which are `taken` from here on.

    Of a part that says something new all paragraphs count: `Version` may stand in the body too, and means nothing there.
    """
    found = []
    for part in parts:
        keys = [paragraph.key for paragraph in part]
        if there.issuperset(keys):
            continue
        found += [paragraph.text for paragraph in part if paragraph.key not in taken]
        taken.update(keys)
    return "\n\n".join(found)


def _key(text: str) -> str:
    """Return what two texts have in common that differ in spaces and markup only."""
    return " ".join(_WORD.findall(text)).casefold()


class _Paragraph(NamedTuple):
    """A paragraph's text, and by what it is known again: the key without page numbers."""

    text: str
    key: str


@dataclass
class _Part:
    """Collects the paragraphs of one header or footer without those that only number pages."""

    paragraphs: list[_Paragraph] = field(default_factory=list)
    run: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    """The text of the paragraph outside of page numbers."""
    fields: list[str] = field(default_factory=list)
    """Instructions of the fields that are open, the innermost last."""
    inside: str = ""
    fallback: int = 0
    """How deep in drawings for old programs, which say again what stands before them."""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        values = {name.rpartition(":")[2]: value for name, value in attributes.items()}
        if tag == "Fallback":
            self.fallback += 1
        elif tag in ("t", "instrText"):
            self.inside = tag
        elif tag in ("tab", "br", "cr"):
            self._add(" ")
        elif tag == "fldSimple":
            self.fields.append(values.get("instr", ""))
        elif tag == "fldChar" and values.get("fldCharType") == "begin":
            self.fields.append("")
        elif tag == "fldChar" and values.get("fldCharType") == "end":
            del self.fields[-1:]

    def end(self, tag: str) -> None:
        if tag == "Fallback":
            self.fallback -= 1
        elif tag in ("t", "instrText"):
            self.inside = ""
        elif tag == "fldSimple":
            del self.fields[-1:]
        elif tag == "p":
            self._end_paragraph()

    def text(self, data: str) -> None:
        if self.inside == "t":
            self._add(data)
        elif self.inside and self.fields:
            self.fields[-1] = (self.fields[-1] + data)[:MAX_INSTRUCTION]

    def _add(self, data: str) -> None:
        if self.fallback:
            return
        self.run.append(data)
        instruction = self.fields[-1].split() if self.fields else []
        if not instruction or instruction[0].upper() not in _PAGE_FIELDS:
            self.fixed.append(data)

    def _end_paragraph(self) -> None:
        """Keep the paragraph if it says something; a field that is still open is one that was never closed."""
        paragraph = " ".join("".join(self.run).split())
        fixed = "".join(self.fixed)
        words = _WORD.findall(fixed.casefold())
        numbered = len(self.fixed) < len(self.run)
        if words and not (numbered and _PAGE_WORDS.issuperset(words)):
            self.paragraphs.append(_Paragraph(paragraph, _key(fixed)))
        self.run.clear()
        self.fixed.clear()
        self.fields.clear()
