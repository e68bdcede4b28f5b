"""The text of HTML by the standard library's tolerant reader, which has no depth to run out of: for pages too deep for the converter."""

from __future__ import annotations

from html.parser import HTMLParser

_SILENT = frozenset({"script", "style", "template", "head", "noscript"})
_BREAKING = frozenset(
    {
        "p",
        "div",
        "br",
        "li",
        "tr",
        "table",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "section",
        "article",
        "header",
        "footer",
        "blockquote",
        "pre",
        "hr",
    }
    | {"h1", "h2", "h3", "h4", "h5", "h6", "title", "body", "html", "form", "option", "td", "th"}
)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._line: list[str] = []
        self._silent = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BREAKING:
            self.break_line()
        if tag in _SILENT and not self._silent:
            self._silent = tag
        elif tag in ("h1", "h2", "h3", "h4", "h5", "h6") and not self._silent:
            self._line.append("#" * int(tag[1]) + " ")
        elif tag == "li" and not self._silent:
            self._line.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._silent:
            self._silent = ""
        if tag in _BREAKING:
            self.break_line()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._line.append(data)

    def break_line(self) -> None:
        line = " ".join("".join(self._line).split())
        self._line.clear()
        if line.strip("#- "):
            self.lines.append(line)


def plain_text(html: str) -> str:
    """Return the visible text, a blank line between blocks, headings and list items marked."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.break_line()
    return "\n\n".join(reader.lines)
