"""E-mail: one message (.eml, .mht) or a mailbox (.mbox, a page for each message). Attachments are listed by name, not opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from email import message_from_bytes
from email.errors import HeaderParseError
from email.header import decode_header
from email.message import Message
from email.utils import collapse_rfc2231_value
from itertools import zip_longest

from jobs.adapters.encoding import decode, guess_encoding
from jobs.adapters.parsers.html import declared_charset, html_to_markdown
from jobs.adapters.parsers.source import NoText, Parser, Source
from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

HEADERS = ("from", "to", "cc", "date")
MAX_HEADER_CHARACTERS = 2000
MAX_DEPTH = 100
"""How deep messages may lie in messages."""
MAX_PARTS = 5000
MAX_HTML_DEPTH = 3
"""How deep an alternative is searched for HTML; each level may mean to read it once more."""
STUB_RATIO = 3
"""HTML so many times as long as the plain text beside it is the message, and the text says no more than that there is one."""
_LINK_TARGET = re.compile(r"\]\((?:[^)\n\]]|\](?!\())*+\)")
"""Not past where another begins, so that what never closes is looked at once."""
_DATED = rb"From \S{1,200} .{0,60}\d{4}[^\n]{0,20}\n"
_FROM_LINE = re.compile(rb"\A(?:\xef\xbb\xbf)?%b|(?:(?<=\n\n)|(?<=\n\r\n))%b(?=>?[A-Za-z][\w-]{0,60}:)" % (_DATED, _DATED))
"""What a message of a mailbox follows: sender and date, behind a blank line and before headers. Other lines may begin with `From ` too."""
_UNDATED = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|(?<=\n\n)|(?<=\n\r\n))From [^\n]*\n(?=>?[A-Za-z][\w-]{0,60}:)")
"""The same in mailboxes whose programs write no date there, such as `From -`."""
_FIRST_LINE = re.compile(rb"\A(?:\xef\xbb\xbf)?\s*From [^\n]*\n")
_QUOTED_FROM = re.compile(rb"^>(?=>*From )", re.M)


def parse_message(source: Source) -> ParsedFile:
    """Return the message with its subject as heading, headers, body and names of attachments."""
    markdown, metadata = _render(_read(source.file.read_bytes()))
    return ParsedFile((ParsedPage(1, markdown),), "docmill email", paged=False, metadata=metadata)


def parse_mailbox(source: Source) -> ParsedFile:
    """Return a page for each message, labelled by its subject."""
    messages = list(_messages(source.file.read_bytes()))
    pages = []
    for number, data in enumerate(messages[: source.pages_to_read(len(messages), "messages")], start=1):
        markdown, metadata = _render(_read(data))
        pages.append(ParsedPage(number, markdown, str(metadata.get("title", "")) or None))
    if not pages:
        raise NoText("it holds no message")
    kept, cut = source.within_limit(tuple(pages), len(messages), "messages")
    return ParsedFile(kept, "docmill email", metadata={"messages": len(messages)} | cut)


def _messages(mailbox: bytes) -> Iterator[bytes]:
    """Yield the messages of a mailbox; each begins after a line of sender and date, the first one at the beginning in any case."""
    begins = list(_FROM_LINE.finditer(mailbox)) or list(_UNDATED.finditer(mailbox))
    first = mailbox[: begins[0].start()] if begins else mailbox
    if first.strip():
        yield _QUOTED_FROM.sub(b"", _FIRST_LINE.sub(b"", first))
    for this, following in zip_longest(begins, begins[1:]):
        yield _QUOTED_FROM.sub(b"", mailbox[this.end() : following.start() if following else len(mailbox)])


def _read(data: bytes) -> Message:
    """Parse a message; one that was saved as UTF-16 or UTF-32 is turned into UTF-8 first."""
    if (guess_encoding(data) or "").startswith(("utf-16", "utf-32")):
        data = decode(data).text.encode()
    try:
        return message_from_bytes(data.lstrip())
    except RecursionError as error:
        raise ParseError("its parts are nested too deeply") from error


def _render(message: Message, depth: int = 0) -> tuple[str, dict[str, object]]:
    """Return a message as markdown, and its headers and attachments for the metadata."""
    found = {name: value for name in ("subject", *HEADERS) if (value := _header(message, name))}
    blocks = [f"{'#' * min(depth + 1, 6)} {found['subject']}"] if "subject" in found else []
    lines = [f"- **{name.capitalize()}:** {found[name]}" for name in HEADERS if name in found]
    bodies, attachments = _body(message, depth)
    blocks += ["\n".join(lines)] if lines else []
    blocks += bodies
    if attachments:
        blocks.append("Attachments:\n\n" + "\n".join(f"- {name}" for name in attachments))
    metadata: dict[str, object] = {
        "title": found.get("subject"),
        "author": found.get("from"),
        "recipients": found.get("to"),
        "created": found.get("date"),
        "attachments": attachments,
    }
    return "\n\n".join(blocks) + "\n", {key: value for key, value in metadata.items() if value}


def _body(message: Message, depth: int) -> tuple[list[str], list[str]]:
    """Collect readable parts and names of attachments, in order; names also from alternatives that are not shown."""
    bodies: list[str] = []
    attachments: list[str] = []
    hidden: list[str] = []
    spare: list[Message] = []
    waiting = [(message, True)]
    seen = 0
    while waiting:
        part, shown = waiting.pop()
        seen += 1
        if seen > MAX_PARTS:
            raise ParseError(f"it has more than {MAX_PARTS:,} parts")
        kind = part.get_content_type()
        children = _children(part)
        if kind == "message/rfc822" and children and shown:
            if depth == MAX_DEPTH:
                raise ParseError(f"its messages lie in one another more than {MAX_DEPTH} deep")
            bodies.append(_render(children[0], depth + 1)[0].strip())
        elif children:
            chosen = _preferred(children) if kind == "multipart/alternative" and shown else None
            waiting += [(child, shown and chosen in (None, child)) for child in reversed(children)]
        elif shown and _is_body(part) and (text := _text(part)):
            bodies.append(text)
        else:
            (attachments if shown else hidden).extend(_attachment(part, shown))
            spare += [part] if shown and kind.startswith("text/") and part.get_content_disposition() != "attachment" else []
    attachments += [name for name in dict.fromkeys(hidden) if name not in attachments]
    return bodies or [text for part in spare if (text := _text(part))], attachments


def _children(part: Message) -> list[Message]:
    payload = part.get_payload()
    return [child for child in payload if isinstance(child, Message)] if isinstance(payload, list) else []


def _is_body(part: Message) -> bool:
    """Tell what mail programs show from what they list: text is shown even if it has a name."""
    if part.get_content_disposition() == "attachment":
        return False
    # A multipart without parts is one whose boundary is missing: the text is all there.
    return part.get_content_type().startswith(("text/plain", "text/html", "multipart/"))


def _attachment(part: Message, shown: bool) -> list[str]:
    """Return the name of a part that is an attachment; in what is not shown, pictures that belong to the HTML are none."""
    if not shown and (_is_body(part) or (part.get_content_maintype() == "image" and part["content-id"])):
        return []
    name = _file_name(part)
    if name or part.get_content_disposition() == "attachment":
        return [name or f"unnamed ({part.get_content_type()})"]
    return []


def _preferred(alternatives: list[Message]) -> Message:
    """Choose among one or more alternatives: plain text, or HTML that says much more, else whatever comes last, as RFC 2046 has it."""
    plain, words = next(
        ((part, text) for part in alternatives if part.get_content_type() == "text/plain" and (text := _text(part))), (None, "")
    )
    html, html_words = next(((part, text) for part in alternatives if (text := _html(part))), (None, ""))
    if plain and len(html_words) < STUB_RATIO * len(words):
        return plain
    return html or alternatives[-1]


def _html(part: Message) -> str:
    """Return the text of the HTML in an alternative, where it may lie among its pictures, without addresses of links."""
    found = []
    waiting = [(part, 0)]
    for _ in range(MAX_PARTS):
        if not waiting:
            break
        this, depth = waiting.pop()
        if this.get_content_type() == "text/html" and _is_body(this):
            found.append(_LINK_TARGET.sub("]", _text(this)))
        elif this.get_content_maintype() == "multipart" and depth < MAX_HTML_DEPTH:
            waiting += [(child, depth + 1) for child in reversed(_children(this))]
    return "\n\n".join(filter(None, found))


def _text(part: Message) -> str:
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    declared = part.get_param("charset")
    charset = declared if isinstance(declared, str) else None
    if part.get_content_type() == "text/html":
        return html_to_markdown(decode(data, charset or declared_charset(data)).text)[0].strip()
    return decode(data, charset).text.strip()


def _header(message: Message, name: str) -> str:
    """Return a header's text, whatever charsets it names or does not name; empty if it is missing."""
    raw = next((value for key, value in message.raw_items() if key.lower() == name), "")
    return _decode_words(decode(str(raw).encode("utf-8", "surrogateescape")).text)


def _decode_words(text: str) -> str:
    """Decode the `=?charset?q?...?=` words of a header, on one line and cut at the limit."""
    text = text[: 4 * MAX_HEADER_CHARACTERS]
    try:
        parts = decode_header(text)
    except (HeaderParseError, ValueError):
        parts = [(text, None)]
    words = [piece if isinstance(piece, str) else decode(piece, charset).text for piece, charset in parts]
    return " ".join("".join(words).split())[:MAX_HEADER_CHARACTERS]


def _file_name(part: Message) -> str:
    """Return the name that a part gives itself, as data: it may hold anything."""
    value = part.get_param("filename", None, "content-disposition") or part.get_param("name", None, "content-type")
    if value is None:
        return ""
    try:
        return _decode_words(collapse_rfc2231_value(value))
    except (LookupError, ValueError):  # an unknown charset or percent signs that say nothing
        return _decode_words(str(value[2] if isinstance(value, tuple) else value))


EMAIL = Parser("email", parse_message)
MBOX = Parser("mbox", parse_mailbox)
