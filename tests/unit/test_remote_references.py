"""Whatever address a document names, no parser fetches it: a real socket listens and hears nothing."""

from __future__ import annotations

import http.client
import io
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.adapters.parsers import parse_file, parser_count
from jobs.adapters.sniff import sniff
from jobs.adapters.stored_file import StoredFile
from models.errors import DocmillError
from tests.unit.small_files import docx_parts, package, pptx, xlsx_parts

VISIBLE = "visible words"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


@dataclass
class Listener:
    """Notes every connection that reaches it and answers none."""

    port: int
    heard: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/secret"


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = Listener(server.getsockname()[1])

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    found.heard.append(connection.recv(200))

        thread = threading.Thread(target=listen)
        thread.start()
        yield found
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def relations(*targets: tuple[str, str]) -> str:
    links = "".join(
        f'<Relationship Id="r{n}" Type="{_OFFICE}/{kind}" Target="{target}" TargetMode="External"/>'
        for n, (kind, target) in enumerate(targets, 7)
    )
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{links}</Relationships>'


def word(url: str) -> bytes:
    """Template, picture, frame, imported chunk, object and a field that includes a file."""
    body = (
        '<w:p><w:r><w:drawing><a:blip xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        f'xmlns:r="{_OFFICE}" r:link="r8"/></w:drawing></w:r></w:p><w:altChunk xmlns:r="{_OFFICE}" r:id="r9"/>'
        f'<w:p><w:r><w:instrText>INCLUDEPICTURE "{url}" \\d</w:instrText></w:r></w:p>'
        f'<w:p><w:r><w:instrText>INCLUDETEXT "{url}"</w:instrText></w:r></w:p>'
    )
    kinds = ("attachedTemplate", "image", "aFChunk", "frame", "oleObject", "hyperlink", "subDocument")
    links = relations(*((kind, f"{url}/{kind}") for kind in kinds))
    parts = docx_parts([VISIBLE], body)
    return package({**parts, "word/_rels/document.xml.rels": links, "word/_rels/settings.xml.rels": links})


def sheets(url: str) -> bytes:
    """Formulas that fetch, and a workbook and a query elsewhere."""
    rows = [[VISIBLE, f'=WEBSERVICE("{url}")', f'=IMPORTDATA("{url}")', f"=cmd|' /C curl {url}'!A0"]]
    main = '<externalLink xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"/>'
    links = relations(("externalLinkPath", f"{url}/book.xlsx"), ("image", url))
    return package(
        {
            **xlsx_parts({"S": rows}),
            "xl/externalLinks/externalLink1.xml": main,
            "xl/externalLinks/_rels/externalLink1.xml.rels": links,
            "xl/connections.xml": f'<connections><connection><webPr url="{url}"/></connection></connections>',
            "xl/worksheets/_rels/sheet1.xml.rels": links,
        }
    )


def slides(url: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(pptx(VISIBLE))) as made:
        parts: dict[str, str | bytes] = {name: made.read(name) for name in made.namelist()}
    return package({**parts, "ppt/slides/_rels/slide1.xml.rels": relations(("image", url), ("video", url), ("oleObject", url))})


def page(url: str) -> bytes:
    return (
        f'<!DOCTYPE html SYSTEM "{url}/dtd"><html><head><base href="{url}/"><link rel="stylesheet" href="{url}/a.css">'
        f'<script src="{url}/a.js"></script><meta http-equiv="refresh" content="0; url={url}">'
        f'<style>@import url("{url}/b.css"); p {{background: url({url}/c.png)}}'
        f'</style></head><body background="{url}"><p>{VISIBLE}</p><img src="{url}/a.png" srcset="{url}/b.png 2x">'
        f'<iframe src="{url}"></iframe>'
        f'<object data="{url}"></object><embed src="{url}"><video poster="{url}" src="{url}"></video><svg><use href="{url}#a"/></svg>'
        f'<img src="{url[5:]}/x"></body></html>'
    ).encode()


def drawing(url: str) -> bytes:
    return (
        f'<?xml version="1.0"?><?xml-stylesheet href="{url}/a.xsl" type="text/xsl"?><!DOCTYPE svg SYSTEM "{url}/svg.dtd" '
        f'[<!ENTITY % remote SYSTEM "{url}/e.dtd">%remote;<!ENTITY x SYSTEM "{url}/x">]>'
        f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/><text>{VISIBLE} &x;</text></svg>'
    ).encode()


def opendocument(url: str) -> bytes:
    spaces = (
        'xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0" '
        'xmlns:draw="urn:oasis:names:tc:opendocument:xmlns:drawing:1.0" xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    content = (
        f"<office:document-content {spaces}><office:body><office:text><text:p>{VISIBLE}<draw:frame>"
        f'<draw:image xlink:href="{url}"/></draw:frame></text:p>'
        f'<text:section><text:section-source xlink:href="{url}/more.odt"/></text:section></office:text></office:body>'
        "</office:document-content>"
    )
    return package({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": content})


def book(url: str) -> bytes:
    listed = (
        '<package xmlns="http://www.idpf.org/2007/opf" version="2.0"><metadata/><manifest>'
        '<item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
        f'<item id="b" href="{url}/b.xhtml" media-type="application/xhtml+xml"/>'
        '</manifest><spine><itemref idref="a"/><itemref idref="b"/></spine></package>'
    )
    return package(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
            '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
            "c.opf": listed,
            "a.xhtml": page(url),
        }
    )


def mail(url: str) -> bytes:
    return (
        b"From: a@example.com\r\nTo: b@example.com\r\nSubject: x\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=B\r\n\r\n"
        b"--B\r\nContent-Type: text/html\r\n\r\n" + page(url) + b"\r\n--B\r\nContent-Type: message/external-body; access-type=URL; URL="
        + f'"{url}"\r\n\r\nContent-Type: text/plain\r\n\r\n\r\n--B--\r\n'.encode()
    )  # fmt: skip


def portable(url: str) -> bytes:
    """Actions on opening, a form to send, a remote target, a stream that lies in another file, and a font map somewhere else."""
    stream = f"BT /F1 12 Tf 72 700 Td ({VISIBLE}) Tj ET".encode()
    elsewhere = f"<< /FS /URL /F ({url}) >>"
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R /OpenAction << /S /URI /URI ({url}/open) >> /AcroForm << /XFA 6 0 R >> "
        f"/URI << /Base ({url}) >> >>".encode(),
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 5 0 R >> /XObject << /X 6 0 R >> >> "
        b"/Contents [4 0 R 6 0 R] /AA << /O << /S /JavaScript /JS (app.launchURL\\(\"" + url.encode() + b"\"\\);) >> >> "
        + f"/Annots [<< /Type /Annot /Subtype /Link /Rect [0 0 9 9] /A << /S /GoToR /F {elsewhere} /D [0 /Fit] >> >>] >>".encode(),
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R /Encoding ({url}) >>".encode(),
        f"<< /Length 0 /F {elsewhere} >>\nstream\n\nendstream".encode(),
    ]  # fmt: skip
    data, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return data + b"xref\n0 7\n0000000000 65535 f \n%strailer\n<< /Size 7 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (table, len(data))


FILES: dict[str, Callable[[str], bytes]] = {
    "a.docx": word,
    "a.xlsx": sheets,
    "a.pptx": slides,
    "a.html": page,
    "a.xhtml": page,
    "a.svg": drawing,
    "a.xml": drawing,
    "a.odt": opendocument,
    "a.epub": book,
    "a.eml": mail,
    "a.mbox": lambda url: b"From a@example.com Mon Jan  1 00:00:00 2024\n" + mail(url),
    "a.pdf": portable,
    "a.rtf": lambda url: rf'{{\rtf1 {VISIBLE} {{\field{{\*\fldinst INCLUDEPICTURE "{url}" \\d}}}}{{\*\template {url}}}}}'.encode(),
    "a.md": lambda url: f"# {VISIBLE}\n\n![x]({url})\n\n<img src={url}>\n".encode(),
    "a.csv": lambda url: f'{VISIBLE},"=WEBSERVICE(""{url}"")"\n1,2\n'.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_a_document_names_is_fetched(name: str, listener: Listener, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(FILES[name](listener.url))
    found = sniff(path, name)
    texts = []
    for skip in range(parser_count(found.file_type, found.mime_type)):  # each parser of the type, not the first alone
        try:
            parsed = parse_file(StoredFile(path), name, found.file_type, found.mime_type, skip=skip)
        except DocmillError as error:
            texts.append(str(error))
        else:
            texts.append("\n".join(page.markdown for page in parsed.pages))
    assert VISIBLE in texts[0]
    assert listener.heard == []


def test_the_listener_would_hear_it(listener: Listener) -> None:
    before = len(listener.heard)
    connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.request("GET", "/secret")
        connection.getresponse()
    connection.close()
    assert [words.split()[0] for words in listener.heard[before:]] == [b"GET"]
    listener.heard.clear()
