"""What keeps a page from people who do not see it, or do not see it well, as far as its HTML and style sheet tell without a browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder

_VOID = frozenset({"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"})
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_REGIONS = frozenset({"section", "nav", "form", "article"})
_NAMED_ROLES = frozenset({"img", "group", "region"})


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tree, self.open, self.crossed = TreeBuilder(), list[str](), list[str]()
        self.tree.start("page", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        if tag in _VOID:
            self.tree.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.crossed.append(tag)
            return
        self.open.pop()
        self.tree.end(tag)

    def handle_data(self, data: str) -> None:
        self.tree.data(data)


def problems(html: str) -> list[str]:
    """Return what is wrong with a page, in words; nothing for a good one."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    if builder.crossed or builder.open:
        return [f"tags are not closed in order: {builder.crossed or builder.open}"]
    builder.tree.end("page")
    page = builder.tree.close()
    return [f"{name}: {found}" for name, check in CHECKS.items() for found in check(page)]


def _text(element: Element) -> str:
    """Return what a screen reader would say of what is in an element."""
    said = [element.text or ""]
    for child in element:
        said += [child.get("aria-label") or (_text(child) if child.get("aria-hidden") != "true" else ""), child.tail or ""]
    return " ".join("".join(said).split())


def _name(element: Element, page: Element) -> str:
    """Return the name that an element is given by attributes, or by what it holds."""
    ids = (element.get("aria-labelledby") or "").split()
    return (
        " ".join(_text(other) for other in page.iter() if other.get("id") in ids)
        or element.get("aria-label", "").strip()
        or element.get("title", "").strip()
        or (_text(element) if element.tag not in _REGIONS | {"svg", "input", "progress"} else "")
    )


def _language(page: Element) -> Iterator[str]:
    yield from (f"<html lang={html.get('lang')!r}>" for html in page.iter("html") if html.get("lang") != "en")
    if not any(_text(title) for title in page.iterfind(".//head/title")):
        yield "no title"
    yield from ("nobody can enlarge it" for meta in page.iter("meta") if re.search("user-scalable|maximum-scale", meta.get("content", "")))


def _headings(page: Element) -> Iterator[str]:
    levels = [(int(element.tag[1]), _text(element)) for element in page.iter() if element.tag in _HEADINGS]
    firsts = [words for level, words in levels if level == 1]
    if len(firsts) != 1:
        yield f"{len(firsts)} h1: {firsts}"
    before = 0
    for level, words in levels:
        if level > before + 1 or not words:
            yield f"h{level} {words!r} after h{before}"
        before = level


def _fields(page: Element) -> Iterator[str]:
    labels = {label.get("for") for label in page.iter("label") if _text(label)}
    inside = {
        field for label in page.iter("label") if _text(label) for field in label.iter() if field.tag in ("input", "select", "textarea")
    }
    for field in page.iter():
        needs_one = field.tag in ("input", "select", "textarea", "progress") and field.get("type") != "hidden"
        if needs_one and not (_name(field, page) or field in inside or field.get("id", "") in labels):
            yield f"<{field.tag} name={field.get('name')!r}> has no label"


def _tables(page: Element) -> Iterator[str]:
    for table in page.iter("table"):
        yield from (f"<th> {_text(cell)!r} has no scope" for cell in table.iter("th") if cell.get("scope") not in ("col", "row"))
        columns = table.findall("./thead/tr/th")
        yield from ("a column without a name" for cell in columns if not _text(cell))
        for row in table.iterfind("./tbody/tr"):
            if len(row) != len(columns):
                yield f"{len(row)} cells under {len(columns)} columns"
            if row.find("th") is None:
                yield f"the row {_text(row)[:60]!r} has no header"


def _names(page: Element) -> Iterator[str]:
    for element in page.iter():
        named = element.tag in ("a", "button", "summary", "figcaption", "section", "nav") or element.get("role") in _NAMED_ROLES
        if named and not _name(element, page):
            yield f"<{element.tag}> has no name"
        if element.tag == "svg" and element.get("role") != "img" and element.get("aria-hidden") != "true":
            yield "an <svg> that says nothing"
        if element.tag == "img" and "alt" not in element.attrib:
            yield "an <img> without alt"


def _landmarks(page: Element) -> Iterator[str]:
    for tag in ("main", "header", "footer"):
        count = len(page.findall(f".//body/{tag}"))
        if count != 1:
            yield f"{count} <{tag}>"
    kinds: dict[tuple[str, str], int] = {}
    for element in page.iter("nav"):
        kinds[element.tag, _name(element, page)] = kinds.get((element.tag, _name(element, page)), 0) + 1
    yield from (f"{count} <{tag}> called {name!r}" for (tag, name), count in kinds.items() if count > 1)


def _references(page: Element) -> Iterator[str]:
    ids = [element.get("id", "") for element in page.iter() if "id" in element.attrib]
    yield from (f"{name!r} is the id of two" for name in sorted({name for name in ids if ids.count(name) > 1}))
    for element in page.iter():
        for attribute in ("aria-labelledby", "aria-describedby", "for"):
            yield from (f"{attribute}={name!r} leads nowhere" for name in element.get(attribute, "").split() if name not in ids)
        if element.get("href", "").startswith("#") and element.get("href", "")[1:] not in ids:
            yield f"{element.get('href')} leads nowhere"


def _keyboard(page: Element) -> Iterator[str]:
    yield from (f"<{e.tag} tabindex={e.get('tabindex')}>" for e in page.iter() if int(e.get("tabindex", "0")) > 0)
    for element in page.iter():
        if "scroll" in element.get("class", "").split() and element.get("tabindex") != "0":
            yield "what scrolls cannot be scrolled with the keyboard"
    first = next((link for link in page.iter("a")), None)
    if first is None or not first.get("href", "").startswith("#"):
        yield "no link skips what every page begins with"


CHECKS: dict[str, Callable[[Element], Iterator[str]]] = {
    "language and title": _language, "headings": _headings, "fields": _fields, "tables": _tables, "names": _names,
    "landmarks": _landmarks, "references": _references, "keyboard": _keyboard,
}  # fmt: skip
