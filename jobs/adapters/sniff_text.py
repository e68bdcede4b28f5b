"""The text probe of `sniff`: is it text, and what kind."""

from __future__ import annotations

import json
import re

from jobs.adapters.encoding import decode, guess_encoding
from jobs.adapters.sniff_types import BY_EXTENSION, Kind
from models.documents import FileType

_HTML_START = re.compile(
    # Atomic: with a choice of where each comment ends, a hundred comments would have more readings than there is time.
    r"\s*+(?>(?:<\?xml[^>]{0,200}\?>\s*)?)(?>(?><!--.{0,4000}?-->)\s*+)*+<(?:!doctype\s+html|html[\s>]|head[\s>]|body[\s>])",
    re.I | re.S,
)
_HTML_TAG = re.compile(
    r"</?(?:html|head|title|meta|link|script|style|body|div|p|span|a|table|tr|td|th|ul|ol|li|h[1-6]|br|img|form|section|article|center|font|b|i|pre)"
    r"(?=[\s/>])",
    re.I,
)
_XML_START = re.compile(r"\s*<(?:\?xml\s|[A-Za-z_][\w.-]*(?::[\w.-]+)?[\s/>]|!DOCTYPE\s+(?!html)|!--)", re.I)
_MBOX_START = re.compile(r"From \S{1,200} .{0,60}\d{4}[^\n]{0,20}\n(?:>?[A-Za-z][\w-]{0,60}:|\s)")
_HEADER = re.compile(r"([A-Za-z][A-Za-z0-9-]{0,60}):(?:[ \t]|$|\S)")
_MAIL_HEADERS = frozenset({
    "from", "to", "cc", "bcc", "subject", "date", "received", "message-id", "mime-version", "content-type", "return-path",
    "delivered-to", "reply-to", "sender", "x-mailer", "content-transfer-encoding", "in-reply-to", "references",
    "dkim-signature", "x-received", "envelope-to", "list-id", "thread-topic",
})  # fmt: skip
_TECHNICAL_HEADERS = frozenset({"message-id", "mime-version", "received", "return-path", "dkim-signature", "content-type"})
"""What programs write and people do not: a memo may begin with From, To, Date and Subject."""
_TEXT_EXTENSIONS = frozenset(extension for extension, kind in BY_EXTENSION.items() if kind.file_type is FileType.TEXT)


def sniff_text(head: bytes, extension: str) -> Kind | None:
    """Return the kind of text that a file begins with, or None if it is no text. The extension settles what content cannot."""
    encoding = guess_encoding(head)
    if encoding is None:
        return None
    text = decode(head, guessed=encoding).text
    return _mail_or_page(text, extension) or _plain_kind(text, extension)


def _mail_or_page(text: str, extension: str) -> Kind | None:
    if _MBOX_START.match(text) and extension != "eml":
        return BY_EXTENSION["mbox"]
    if _is_mail(text, extension):
        return BY_EXTENSION["eml"]
    if _HTML_START.match(text):
        return BY_EXTENSION["xhtml"] if extension == "xhtml" or "<?xml" in text[:100] else BY_EXTENSION["html"]
    if extension in ("html", "htm", "xhtml") and _HTML_TAG.search(text):
        return BY_EXTENSION["html"]
    return None


def _plain_kind(text: str, extension: str) -> Kind:
    """Tell text from text: Markdown, CSV and their like by name alone, as their content can be anything."""
    if extension in _TEXT_EXTENSIONS and extension not in ("txt", "text", "log", "xml", "svg", "json"):
        return BY_EXTENSION[extension]
    start = text.lstrip()[:2000]
    if _XML_START.match(start) and (start.startswith("<?xml") or extension in ("xml", "svg")):
        return BY_EXTENSION["svg"] if "<svg" in start else BY_EXTENSION["xml"]
    if extension not in _TEXT_EXTENSIONS and len(_HTML_TAG.findall(start)) >= 3:
        return BY_EXTENSION["html"]
    if start[:1] in ("{", "[") and (extension == "json" or _is_json(text)):
        return BY_EXTENSION["json"]
    return BY_EXTENSION["txt"]


def _is_mail(text: str, extension: str) -> bool:
    """Count mail headers before the first blank line: one is enough for a file called .eml, otherwise three, and nothing but headers.

    In a file that is called text one of them must be a header that nobody writes by hand.
    """
    known = other = technical = 0
    for line in text.lstrip("\n").split("\n", 60)[:60]:
        if not line.strip():
            break
        if line[0] in " \t" and known + other:
            continue
        match = _HEADER.match(line)
        if match is None:
            if line.startswith((">From ", "From ")):
                continue
            other += 1 if extension == "eml" else 100
        else:
            known += match[1].lower() in _MAIL_HEADERS
            technical += match[1].lower() in _TECHNICAL_HEADERS
    if extension in ("eml", "mht", "mhtml"):
        return known >= 1
    return known >= 3 and other == 0 and (technical > 0 or extension not in _TEXT_EXTENSIONS)


def _is_json(text: str) -> bool:
    if len(text) > 60_000:
        return False  # cut by the sample: a JSON file without its extension passes as plain text, which is treated the same
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
