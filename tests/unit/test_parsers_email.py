"""E-mail: headers, the readable body and names of attachments, whatever charsets and nesting the sender came up with."""

from __future__ import annotations

from collections.abc import Callable
from email import message_from_bytes
from email.message import EmailMessage
from pathlib import Path

import pytest

from jobs.adapters.parsers import parse_file
from jobs.adapters.parsers.email import _messages
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.documents import ParsedFile

Parse = Callable[[str, bytes], ParsedFile]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def run(name: str, data: bytes) -> ParsedFile:
        path = tmp_path / "stored"
        path.write_bytes(data)
        found = sniff(path, name)
        return parse_file(StoredFile(path), name, found.file_type, found.mime_type)

    return run


def message(subject: str = "Grüße aus Köln", body: str = "Hello\n") -> EmailMessage:
    mail = EmailMessage()
    mail["Subject"] = subject
    mail["From"] = "Jürgen <j@example.com>"
    mail["To"] = "b@example.com"
    mail["Date"] = "Mon, 01 Jan 2024 10:00:00 +0000"
    mail.set_content(body)
    return mail


def test_headers_body_and_attachment_names_are_there(parse: Parse) -> None:
    mail = message(body="Bitte lesen: größer.\n")
    mail.add_attachment(b"%PDF-1.4 secret content", maintype="application", subtype="pdf", filename="Übersicht.pdf")
    parsed = parse("a.eml", mail.as_bytes())
    found = parsed.pages[0].markdown
    assert found.startswith("# Grüße aus Köln\n\n- **From:** Jürgen <j@example.com>\n- **To:** b@example.com\n- **Date:** Mon, 01 Jan 2024")
    assert "Bitte lesen: größer." in found
    assert "- Übersicht.pdf" in found and "secret" not in found
    assert parsed.metadata["title"] == "Grüße aus Köln"
    assert parsed.metadata["attachments"] == ["Übersicht.pdf"]


def test_of_alternatives_the_plain_one_is_read_once(parse: Parse) -> None:
    mail = message(body="the plain words\n")
    mail.add_alternative("<p>the <b>html</b> words</p>", subtype="html")
    found = parse("a.eml", mail.as_bytes()).pages[0].markdown
    assert "the plain words" in found and "html" not in found


LONG_HTML = f"<p>{'The pump holds six bar. ' * 10}</p>"


@pytest.mark.parametrize("with_pictures", [False, True])
def test_html_that_says_much_more_than_the_plain_stub_is_read(parse: Parse, with_pictures: bool) -> None:
    mail = message(body="Your mail program cannot show HTML\n")
    mail.add_alternative(LONG_HTML, subtype="html")
    if with_pictures:
        html = mail.get_payload(1)
        assert isinstance(html, EmailMessage)
        html.add_related(b"\x89PNG", maintype="image", subtype="png", cid="<logo>")
    found = parse("a.eml", mail.as_bytes()).pages[0].markdown
    assert "six bar" in found and "cannot show" not in found


def test_addresses_of_links_do_not_make_html_longer(parse: Parse) -> None:
    mail = message(body="All of the plain words are here\n")
    mail.add_alternative(f"<p>the <a href='https://a.example/{'x' * 500}'>html</a> words</p>", subtype="html")
    assert "All of the plain words" in parse("a.eml", mail.as_bytes()).pages[0].markdown


def test_attachments_of_alternatives_that_are_not_shown_are_listed_once(parse: Parse) -> None:
    mail = message(body="the plain words\n")
    mail.add_alternative("<p>the html words</p>", subtype="html")
    html = mail.get_payload(1)
    assert isinstance(html, EmailMessage)
    html.add_attachment(b"%PDF-1.4", maintype="application", subtype="pdf", filename="offer.pdf", disposition="inline")
    html.add_attachment(b"%PDF-1.4", maintype="application", subtype="pdf", filename="terms.pdf", disposition="inline")
    html.add_attachment(b"\x89PNG", maintype="image", subtype="png", filename="logo.png", cid="<logo>", disposition="inline")
    mail.make_mixed()
    mail.add_attachment(b"%PDF-1.4", maintype="application", subtype="pdf", filename="offer.pdf")
    parsed = parse("a.eml", mail.as_bytes())
    assert parsed.metadata["attachments"] == ["offer.pdf", "terms.pdf"]
    assert "the plain words" in parsed.pages[0].markdown and "the html words" not in parsed.pages[0].markdown


@pytest.mark.parametrize(
    ("disposition", "is_body"), [("", True), ("Content-Disposition: inline\n", True), ("Content-Disposition: attachment\n", False)]
)
def test_a_named_text_is_a_body_unless_it_is_attached(parse: Parse, disposition: str, is_body: bool) -> None:
    mail = f"From: a@b.c\nSubject: S\nContent-Type: text/plain; name=note.txt\n{disposition}\nwords of the note\n"
    parsed = parse("a.eml", mail.encode())
    assert ("words of the note" in parsed.pages[0].markdown) is is_body
    assert parsed.metadata.get("attachments", []) == ([] if is_body else ["note.txt"])


@pytest.mark.parametrize("kind", ["text/calendar; method=REQUEST", "text/calendar; name=invite.ics"])
def test_an_invitation_alone_is_the_text(parse: Parse, kind: str) -> None:
    mail = f"From: a@b.c\nSubject: S\nContent-Type: {kind}\n\nBEGIN:VCALENDAR\nSUMMARY:Pump review\nEND:VCALENDAR\n"
    assert "SUMMARY:Pump review" in parse("a.eml", mail.encode()).pages[0].markdown
    beside = message(body="Please come\n")
    beside.add_attachment("BEGIN:VCALENDAR\n", subtype="calendar", filename="invite.ics")
    assert "VCALENDAR" not in parse("a.eml", beside.as_bytes()).pages[0].markdown


def test_html_alone_becomes_markdown(parse: Parse) -> None:
    mail = message()
    mail.set_content("<h2>News</h2><script>no()</script><p>Größe</p>", subtype="html", charset="iso-8859-1")
    found = parse("a.eml", mail.as_bytes()).pages[0].markdown
    assert "## News" in found and "Größe" in found and "no()" not in found


def test_a_message_in_a_message_is_read(parse: Parse) -> None:
    mail = message("outer")
    inner = message("inner", "words of the inner one\n")
    mail.add_attachment(inner)
    found = parse("a.eml", mail.as_bytes()).pages[0].markdown
    assert "# outer" in found and "## inner" in found and "words of the inner one" in found


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (b"Content-Type: text/plain; charset=no-such-charset\n", "Größe".encode(), "Größe"),
        (b'Content-Type: text/plain; charset="x\\"y"\n', b"words", "words"),
        (
            b"Content-Type: text/plain; charset=us-ascii\n",
            "Größe und Länge sind nützlich".encode("cp1252"),
            "Größe und Länge sind nützlich",
        ),
        (b"Content-Transfer-Encoding: base64\n", b"no base64 at all!", ""),
        (b"Content-Type: multipart/mixed\n", b"words without a boundary", "words without a boundary"),
        (b"Content-Type: multipart/mixed; boundary=b\n", b"--b\n\nwords that nothing ends", "words that nothing ends"),
        (b"Content-Type: not a type\n", b"words", "words"),
    ],
)
def test_faulty_messages_are_read_as_far_as_they_go(parse: Parse, headers: bytes, body: bytes, expected: str) -> None:
    parsed = parse("a.eml", b"From: a@b.c\nSubject: =?bogus?Q?caf=C3=A9?= \xfcber\n" + headers + b"\n" + body)
    assert expected in parsed.pages[0].markdown
    assert "café" in parsed.pages[0].markdown


def test_deep_nesting_ends(parse: Parse) -> None:
    parts = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(300))
    parsed = parse("a.eml", b"From: a@b.c\nSubject: deep\n" + parts + b"\nwords")
    assert "# deep" in parsed.pages[0].markdown


def test_a_header_of_a_megabyte_is_cut(parse: Parse) -> None:
    parsed = parse("a.eml", b"From: a@b.c\nSubject: " + b"long \n " * 200_000 + b"\n\nbody\n")
    assert len(parsed.pages[0].markdown) < 3000


def test_a_message_saved_as_utf16_is_read(parse: Parse) -> None:
    text = "From: a@example.com\nSubject: Größe\n\nEin Satz mit Umlauten: äöü.\n"
    found = parse("a.eml", text.encode("utf-16")).pages[0].markdown
    assert "# Größe" in found and "äöü" in found


def test_a_mailbox_has_a_page_for_each_message(parse: Parse) -> None:
    box = b"".join(b"From a@b.c Mon Jan  1 00:00:00 2024\n" + message(f"number {n}", f"body {n}\n").as_bytes() + b"\n" for n in (1, 2, 3))
    parsed = parse("a.mbox", box)
    assert parsed.paged
    assert [(page.number, page.label) for page in parsed.pages] == [(1, "number 1"), (2, "number 2"), (3, "number 3")]
    assert all(f"body {page.number}" in page.markdown for page in parsed.pages)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_line_of_a_body_that_begins_with_from_ends_no_message(parse: Parse, line_end: str) -> None:
    lines = ["From Berlin we drive on Tuesday.", "", "From Rome we fly back, all in May 2024", "", "Bye", ">From afar", "> From you"]
    body = "\n".join(["Dear all,", *lines, "", ""])
    first, second = (message(subject).as_bytes().partition(b"\n\n")[0].decode() + f"\n\n{body}" for subject in ("one", "two"))
    box = f"From a@b.c Mon Jan  1 00:00:00 2024\n{first}From - Tue Jan 02 10:00:00 2024 +0100\n{second}"
    pages = parse("a.mbox", box.replace("\n", line_end).encode()).pages
    assert [page.label for page in pages] == ["one", "two"]
    lines[5] = "From afar"
    assert all(page.markdown.splitlines()[-7:] == lines for page in pages)


def test_a_mailbox_that_begins_with_a_byte_order_mark_keeps_its_first_message(parse: Parse) -> None:
    box = b"\xef\xbb\xbfFrom a@b.c Mon Jan  1 00:00:00 2024\n" + message("one").as_bytes()
    assert [page.label for page in parse("a.mbox", box).pages] == ["one"]


@pytest.mark.parametrize("first", ["From nobody\n", "\nFrom a@b.c Mon Jan  1 2024\n", f"From {'x' * 300}@b.c Mon Jan  1 2024\n", ""])
def test_the_first_message_of_a_mailbox_is_kept_whatever_stands_before_it(first: str) -> None:
    box = f"{first}{message('one').as_string()}\nFrom a@b.c Mon Jan  1 00:00:00 2024\n{message('two').as_string()}"
    assert [message_from_bytes(found)["subject"] for found in _messages(box.encode())] == ["one", "two"]


def test_a_mailbox_without_dates_has_all_its_messages() -> None:
    box = "\n".join(f"From -\n{message(name).as_string()}" for name in ("one", "two", "three"))
    assert [message_from_bytes(found)["subject"] for found in _messages(box.encode())] == ["one", "two", "three"]
