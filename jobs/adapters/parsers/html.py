"""HTML to markdown. Scripts, styles and embedded data go; nothing that the page names is ever fetched."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from jobs.adapters.encoding import decode
from jobs.adapters.parsers.html_plain import plain_text
from jobs.adapters.parsers.source import Parser, Source, versioned
from jobs.adapters.parsers.text import about_encoding
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

_CHARSET = re.compile(rb"""<meta[^>]{0,300}?charset\s*=\s*["']?\s*([A-Za-z0-9._:-]{1,40})""", re.I)
_TITLE = re.compile(r"<title\b[^<>]{0,200}>([^<]{1,1000})</title", re.I)
_XML_ENCODING = re.compile(rb"""<\?xml[^>]{0,100}\bencoding\s*=\s*["']([A-Za-z0-9._-]{1,40})""")


def parse_html(source: Source) -> ParsedFile:
    """Return the page as markdown."""
    data = source.file.read_bytes()
    decoded = decode(data, declared_charset(data))
    markdown, metadata = html_to_markdown(decoded.text)
    metadata |= about_encoding(decoded)
    return ParsedFile((ParsedPage(1, markdown),), versioned("html-to-markdown"), paged=False, metadata=metadata)


def declared_charset(data: bytes) -> str | None:
    """Return the charset that a page claims in its first 4 KB."""
    match = _XML_ENCODING.match(data[:300].lstrip()) or _CHARSET.search(data[:4096])
    return match[1].decode("ascii") if match else None


def html_to_markdown(html: str) -> tuple[str, dict[str, Any]]:
    """Convert decoded HTML; return markdown and what the page says of itself. Where elements nest too deep, bare text."""
    from html_to_markdown import ConversionOptions, PreprocessingOptions, WarningKind, convert  # noqa: PLC0415 - loaded in the child only

    options = ConversionOptions(
        extract_metadata=False,
        heading_style="atx",
        bullets="-",
        escape_misc=False,
        br_in_tables=False,
        strip_tags=["script", "style"],
        preprocessing=PreprocessingOptions(enabled=False),
    )
    result = convert(html, options)
    if result.content is None:
        raise ParseError("the converter returned nothing")
    title = _TITLE.search(html, 0, 64 * 1024)
    values = {"title": " ".join(unescape(title[1]).split()) if title else ""}
    content = result.content
    if any(warning.kind == WarningKind.DEPTH_LIMIT_EXCEEDED for warning in result.warnings):  # it drops what lies deeper
        content = plain_text(html)
        values["warnings"] = "elements nest too deep to convert: read as plain text"
    return content, {key: value for key, value in values.items() if value}


HTML = Parser("html-to-markdown", parse_html)
