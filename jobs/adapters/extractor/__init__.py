"""The deterministic local extractor: facts that can be read off a text without a model or a network.

The output is JSON-safe and bounded by the limits named here and in `fields`; `docs/raw_extraction.schema.json` describes it.
Same input, same output. Every pattern is linear in the length of the text, so that an attack costs no more than a long document.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jobs.adapters.extractor.amounts import find_amounts
from jobs.adapters.extractor.dates import find_dates
from jobs.adapters.extractor.fields import pairs_in_lines, pairs_in_tables, read_tables
from jobs.adapters.extractor.identifiers import find_emails, find_ibans, find_urls
from jobs.adapters.extractor.language import find_language
from jobs.adapters.markdown import Structure, page_at, plain, read_structure
from models.documents import PageMark

SCHEMA_VERSION = 1
"""Of the shape of the output. Raised when a reader of the old shape could misread the new one."""
EXTRACTOR = {"name": "docmill-local", "version": "3"}
MAX_FACTS = 500
"""Different dates, amounts, addresses or pairs of a document, each; also headings of its outline."""
MAX_TITLE_CHARACTERS = 300

_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
_WORD = re.compile(r"[^\W_]++")
_WORD_BYTES = bytes(byte if bytes([byte]).decode("cp1252", "replace").isalnum() else 32 for byte in range(256))
_LINE = re.compile(r"\S[^\n]{0,999}+")
_FRONT_TITLE = re.compile(r"(?m)^title(?::|[ \t]*+=)(.*+)")
_EMPTY_TITLE = re.compile(
    r"(?i)(?:microsoft (?:word|excel|powerpoint)\b.*|untitled|unbenannt|unknown|document ?[0-9]*|(?:slide|folie|sheet|tabelle) ?[0-9]*)"
)
_FILE_ENDING = re.compile(r"\.[A-Za-z0-9]{1,5}$")


def extract_locally(
    markdown: str, pages: Sequence[PageMark], file_name: str, parse_metadata: Mapping[str, Any], *, headings: bool = True
) -> dict[str, Any]:
    """Return what can be read off a document, in the shape of `docs/raw_extraction.schema.json`. Any text is valid; raises nothing.

    Without `headings` no line is one, as in program code.
    """
    markdown = _storable(markdown)
    structure = read_structure(markdown, headings=headings)
    texts = _texts(markdown, structure, pages)
    truncated: set[str] = set()
    tables, cut = read_tables(markdown, structure, pages)
    if cut:
        truncated.add("tables")
    outline = [
        {"level": heading.level, "text": heading.text, "page": page_at(pages, heading.start)}
        for heading in structure.headings
        if heading.text
    ]
    if len(outline) > MAX_FACTS:
        truncated.add("outline")
    language = find_language(" ".join(text for _, text in texts[:2000]))
    return {
        "schema_version": SCHEMA_VERSION,
        "extractor": dict(EXTRACTOR),
        "title": _title(markdown, structure, file_name, parse_metadata),
        "language": {"code": language[0], "confidence": language[1]} if language else None,
        "outline": outline[:MAX_FACTS],
        "tables": tables,
        **_facts(texts, tables, truncated),
        "statistics": _statistics(markdown, structure, pages),
        "truncated": sorted(truncated),
    }


def _texts(markdown: str, structure: Structure, pages: Sequence[PageMark]) -> list[tuple[int | None, str]]:
    """Return (page, its text without program code, escapes, entities and bold marks); a fact that spans two pages is missed."""
    starts = sorted({0, *(page.start for page in pages if 0 < page.start < len(markdown)), len(markdown)})
    code = [(fence.start, fence.end) for fence in structure.fences if fence.info.lower() not in ("", "text", "txt", "plain")]
    texts = []
    at = 0
    for start, end in pairwise(starts):
        kept, position = [], start
        while at < len(code) and code[at][0] < end:
            kept.append(markdown[position : max(position, code[at][0])])
            position = min(end, max(position, code[at][1]))
            if code[at][1] > end:
                break
            at += 1
        kept.append(markdown[position:end])
        text = _ESCAPED.sub(r"\1", "".join(kept)).replace("**", "")
        texts.append((page_at(pages, start), _storable(html.unescape(text)) if "&" in text else text))
    return texts


def _storable(text: str) -> str:
    return text if text.isascii() and "\0" not in text else _UNSTORABLE.sub("\ufffd", text)


def _facts(texts: Sequence[tuple[int | None, str]], tables: Sequence[dict[str, Any]], truncated: set[str]) -> dict[str, Any]:
    pages, plain_texts = [page for page, _ in texts], [text for _, text in texts]
    pairs = [(page, {"key": key, "value": value}) for page, text in texts for key, value in pairs_in_lines(text)]
    pairs += [(page, {"key": key, "value": value}) for key, value, page in pairs_in_tables(tables)]
    dates = ((pages[number], {"iso": it.iso, "text": it.text, "ambiguous": it.ambiguous}) for number, it in find_dates(plain_texts))
    amounts = ((page, {"currency": it.currency, "value": it.value, "text": it.text}) for page, text in texts for it in find_amounts(text))
    found: dict[str, Iterable[tuple[int | None, dict[str, Any]]]] = {
        "key_values": pairs,
        "dates": dates,
        "amounts": amounts,
        "emails": ((page, {"address": it}) for page, text in texts for it in find_emails(text)),
        "urls": ((page, {"url": it}) for page, text in texts for it in find_urls(text)),
        "ibans": ((page, {"iban": it}) for page, text in texts for it in find_ibans(text)),
    }
    return {name: _distinct(name, facts, truncated) for name, facts in found.items()}


def _distinct(name: str, facts: Iterable[tuple[int | None, dict[str, Any]]], truncated: set[str]) -> list[dict[str, Any]]:
    """Return each different fact once, in order, with the page of the first and how often it stands in the text."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for page, fact in facts:
        key = tuple(fact.values())
        if key in kept:
            kept[key]["count"] += 1
        elif len(kept) < MAX_FACTS:
            kept[key] = {**fact, "page": page, "count": 1}
        else:
            truncated.add(name)
    return list(kept.values())


def _title(markdown: str, structure: Structure, file_name: str, parse_metadata: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the first title there is: front matter, what the file says of itself, first heading, first line, file name."""
    front = _FRONT_TITLE.search(markdown, 0, structure.front_matter_end)
    own = parse_metadata.get("title")
    heading = next((heading.text for heading in structure.headings if heading.text), "")
    candidates = (
        ("front_matter", front[1].strip().strip("\"'") if front else ""),
        ("metadata", own if isinstance(own, str) else ""),
        ("heading", heading),
        ("first_line", _first_line(markdown, structure)),
        ("file_name", _FILE_ENDING.sub("", file_name)),
    )
    for source, candidate in candidates:
        text = " ".join(_UNSTORABLE.sub("\ufffd", candidate[: 2 * MAX_TITLE_CHARACTERS]).split())[:MAX_TITLE_CHARACTERS]
        doubtful = source == "metadata" and (_EMPTY_TITLE.fullmatch(text) or _FILE_ENDING.search(text))
        if text and not doubtful:
            return {"text": text, "source": source}
    return None


def _first_line(markdown: str, structure: Structure) -> str:
    """Return the first line with letters that is no border of a table or fence and short enough to be a title."""
    for match in _LINE.finditer(markdown, structure.front_matter_end, structure.front_matter_end + 5_000):
        line = match[0]
        if line.startswith(("```", "~~~", "|", "![")):
            continue
        text = plain(line).lstrip("#>-+ ")
        if any(character.isalpha() for character in text):
            return text if len(text) <= MAX_TITLE_CHARACTERS else ""
    return ""


def _words(text: str) -> int:
    """Count runs of letters and digits; as bytes where Windows-1252 has all the characters, which takes a third of the time."""
    try:
        return len(text.encode("cp1252").translate(_WORD_BYTES).split())
    except UnicodeEncodeError:
        return len(_WORD.findall(text))


def _statistics(markdown: str, structure: Structure, pages: Sequence[PageMark]) -> dict[str, int | None]:
    return {
        "characters": len(markdown),
        "words": _words(markdown),
        "pages": len(pages) or None,
        "headings": len(structure.headings),
        "tables": len(structure.tables),
        "table_rows": sum(len(table.lines) - 2 for table in structure.tables),
        "code_blocks": len(structure.fences),
        "images": markdown.count("!["),
    }
