"""Where the blocks of a markdown text lie: headings, tables, code fences, paragraphs.

One pass over the lines, linear in the length of the text, all offsets in code points and end exclusive. A full CommonMark
parser in Python takes a second for a megabyte, and the fast ones keep no offsets; chunking and extraction need block positions only.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.documents import PageMark

MAX_HEADING_CHARACTERS = 300
"""A heading's text is cut here, so that a megabyte behind a `#` stays harmless."""
MAX_FRONT_MATTER_LINES = 200

_FENCE = re.compile(r"(`{3,}+(?=[^`]*+$)|~{3,}+)(.*+)$")
_HTML = re.compile(r"(?i)<(?:!--|(?P<pre>pre)(?=[\s>]|$))")
_COMMENT_END, _PRE_END = re.compile(r"-->"), re.compile(r"(?i)</pre>")
_FRONT_MATTER = {"---": ("---", "..."), "+++": ("+++",)}
"""How front matter begins and ends: YAML, and Hugo's TOML."""
_YAML_KEY = re.compile(r"""["']?\w[\w .@/-]{0,60}+["']?[ \t]*+:(?:[ \t]|$)""")
_YAML_REST = re.compile(r"[\s#\]}]|-(?:[ \t]|$)|$")
_TOML_KEY = re.compile(r"""[\w."'-]{1,100}+[ \t]*+=""")
_ATX = re.compile(r"(#{1,6}+)(?:[ \t]|$)")
_NOT_A_PARAGRAPH = re.compile(r"[>|]|[-*+][ \t]|[0-9]{1,9}[.)][ \t]")
_LINK = re.compile(r"!?\[([^\[\]]*+)\]\([^()]*+\)")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,200}+>")
_EMPHASIS = re.compile(r"(?<!\\)(?:(?<![^\W_])_{1,3}+(?=\S)|(?<=\S)_{1,3}+(?![^\W_])|\*{1,3}+|`{1,3}+|~~)")
_ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
_UNESCAPED_PIPE = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading, ATX (`## Text`) or setext (a line underlined with `===` or `---`); `end` is after its last newline."""

    level: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Table:
    """A pipe table. `lines` are the offsets where its lines start: header, delimiter, rows."""

    start: int
    end: int
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced code block with its info string; `end` is after the closing line."""

    start: int
    end: int
    info: str


@dataclass(slots=True)
class Structure:
    """The blocks of a text, each list in order of offset."""

    headings: list[Heading] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    fences: list[Fence] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    """Offsets where a block begins after a blank line, outside fences, tables, comments and `<pre>`."""
    front_matter_end: int = 0
    """0 where the text has no front matter."""


class _Lines:
    """The lines of a text, each made when it is asked for: all of them would take more memory than the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.starts = array("q", [0])
        """Where each begins; and where one more would, behind a last newline that the text may lack."""
        while at := text.find("\n", self.starts[-1]) + 1:
            self.starts.append(at)
        self.starts.append(len(text) + 1)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, at: int) -> str:
        return self.text[self.starts[at] : self.starts[at + 1] - 1]

    def at(self, offset: int) -> int:
        """Return the line that an offset lies in."""
        return bisect_right(self.starts, offset) - 1


def read_structure(markdown: str, *, headings: bool = True) -> Structure:
    """Return where the blocks lie. Any text is valid; an unclosed fence runs to the end, as in CommonMark.

    Without `headings` no line is one, as in program code.
    """
    found = Structure()
    lines = _Lines(markdown)
    at = _front_matter_lines(lines)
    found.front_matter_end = lines.starts[at]
    paragraph = 0  # lines of the paragraph that the previous line belongs to; 0 after anything else
    after_blank = True
    unclosed: set[re.Pattern[str]] = set()
    while at < len(lines):
        offset, line = lines.starts[at], lines[at]
        text = line.strip()
        used = 1
        if text and after_blank:
            found.blocks.append(offset)
        after_blank = not text
        if not text:
            paragraph = 0
        elif line.startswith(("    ", "\t")):
            pass  # indented code or the continuation of a paragraph: never the start of another block
        elif text[0] in "`~" and (fence := _FENCE.match(text)):
            used = _fence_lines(lines, at, fence.group(1))
            found.fences.append(Fence(offset, lines.starts[at + used], fence.group(2).strip()[:100]))
            paragraph = 0
        elif text[0] == "<" and (html := _html_lines(lines, at, unclosed)):
            used, paragraph = html, 0
        elif headings and text[0] == "#" and (atx := _ATX.match(text)):
            title = _heading_text(text[atx.end() :])
            found.headings.append(Heading(len(atx.group(1)), title, offset, lines.starts[at + 1]))
            paragraph = 0
        elif text[0] in "=-" and not text.strip(text[0]):
            if headings and paragraph == 1:
                level, title = 1 if text[0] == "=" else 2, _heading_text(lines[at - 1])
                found.headings.append(Heading(level, title, lines.starts[at - 1], lines.starts[at + 1]))
            paragraph = 0
        elif "|" in text and at + 1 < len(lines) and _is_delimiter(lines[at + 1], text):
            used = _table_lines(lines, at)
            found.tables.append(Table(offset, lines.starts[at + used], tuple(lines.starts[at : at + used])))
            paragraph = 0
        else:
            paragraph = 0 if _NOT_A_PARAGRAPH.match(text) else paragraph + 1
        at += used
    _end_within(found, len(markdown))
    return found


def cells(row: str) -> list[str]:
    r"""Return the cells of a table line, stripped; `\|` is a character and not a border."""
    text = row.strip()
    text = text[1:] if text.startswith("|") else text
    parts = _UNESCAPED_PIPE.split(text)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return [part.replace("\\|", "|").strip() for part in parts]


def plain(text: str) -> str:
    """Return inline markdown as text: links and images by their words, without emphasis, code marks, tags and escapes."""
    if not any(mark in text for mark in "[*_`<\\~"):
        return " ".join(text.split())
    text = _TAG.sub(" ", _LINK.sub(r"\1", text))
    return " ".join(_ESCAPED.sub(r"\1", _EMPHASIS.sub("", text)).split())


def table_at(structure: Structure, offset: int) -> Table | None:
    """Return the table that an offset lies in."""
    index = bisect_right(structure.tables, offset, key=lambda table: table.start) - 1
    return structure.tables[index] if index >= 0 and offset < structure.tables[index].end else None


def page_at(pages: Sequence[PageMark], offset: int) -> int | None:
    """Return the number of the page that an offset lies on, None without pages. Text before the first mark counts as the first page."""
    if not pages:
        return None
    return pages[max(0, bisect_right(pages, offset, key=lambda page: page.start) - 1)].number


def _front_matter_lines(lines: _Lines) -> int:
    """Return how many lines front matter has, with a blank one before it; 0 where a rule only looks like its beginning."""
    first = 1 if len(lines) > 1 and not lines[0].strip() else 0
    ends = _FRONT_MATTER.get(lines[first].rstrip())
    if ends is None:
        return 0
    body: list[str] = []
    for at in range(first + 1, min(len(lines), first + MAX_FRONT_MATTER_LINES)):
        line = lines[at].rstrip()
        if line in ends:
            return at + 1 if _is_front_matter(body, toml="+++" in ends, after_blank=first == 1) else 0
        body.append(line)
    return 0


def _is_front_matter(body: list[str], *, toml: bool, after_blank: bool) -> bool:
    """Tell front matter from text between two rules: of YAML every line must be such, unless the first has a colon."""
    if not body or not body[0]:
        return False  # a rule before a blank line is a rule, as in Pandoc
    if toml:
        return any(_TOML_KEY.match(line) for line in body)
    keys = [_YAML_KEY.match(line) is not None for line in body]
    return (":" in body[0] and not after_blank) or (
        any(keys) and all(key or _YAML_REST.match(line) for key, line in zip(keys, body, strict=True))
    )


def _html_lines(lines: _Lines, at: int, unclosed: set[re.Pattern[str]]) -> int:
    """Return how many lines a comment or `<pre>` has that a line begins with; 0 if there is none, or none that ends.

    `unclosed` keeps which end does not come any more, so that each is looked for once.
    """
    found = _HTML.match(lines[at].lstrip())
    if found is None:
        return 0
    end = _PRE_END if found["pre"] else _COMMENT_END
    if end in unclosed:
        return 0
    closing = end.search(lines.text, lines.starts[at])
    if closing is None:
        unclosed.add(end)
        return 0
    return lines.at(closing.start()) + 1 - at


def _fence_lines(lines: _Lines, at: int, mark: str) -> int:
    """Return how many lines a code block has. What is indented 4 more than the opening line, as code may be, does not close it."""
    limit = _indentation(lines[at]) + 4
    for index in range(at + 1, len(lines)):
        text = lines[index].strip()
        if text.startswith(mark) and not text.strip(mark[0]) and _indentation(lines[index]) < limit:
            return index + 1 - at
    return len(lines) - at


def _indentation(line: str) -> int:
    return len(line[: len(line) - len(line.lstrip())].expandtabs(4))


def _heading_text(text: str) -> str:
    text = text.strip()[: MAX_HEADING_CHARACTERS * 2]
    without = text.rstrip("#")
    if without != text and (not without or without[-1] in " \t"):
        text = without
    return plain(text)[:MAX_HEADING_CHARACTERS]


def _is_delimiter(line: str, header: str) -> bool:
    text = line.strip()
    if not text.startswith(("|", "-", ":")) or "|" not in text or text.strip("|:- \t"):
        return False
    marks = cells(text)
    return len(marks) == len(cells(header)) and all("-" in mark and not mark.strip(":").strip("-") for mark in marks)


def _table_lines(lines: _Lines, at: int) -> int:
    used = 2
    while at + used < len(lines) and "|" in lines[at + used]:
        used += 1
    return used


def _end_within(found: Structure, length: int) -> None:
    """The last line has no newline: a block that ends with it ends with the text."""
    if found.headings and (heading := found.headings[-1]).end > length:
        found.headings[-1] = Heading(heading.level, heading.text, heading.start, length)
    if found.tables and (table := found.tables[-1]).end > length:
        found.tables[-1] = Table(table.start, length, table.lines)
    if found.fences and (fence := found.fences[-1]).end > length:
        found.fences[-1] = Fence(fence.start, length, fence.info)
