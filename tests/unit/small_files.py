"""Small files of many types, written with the standard library alone."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Sequence
from html import escape

_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPES = "application/vnd.openxmlformats-officedocument."


def package(parts: dict[str, str | bytes]) -> bytes:
    """Return a zip of the parts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _types(main: str, main_type: str) -> str:
    return (
        f'<Types xmlns="{_PACKAGE}/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" ContentType="application/xml"/>'
        f'<Override PartName="/{main}" ContentType="{_TYPES}{main_type}"/></Types>'
    )


def _relations(*targets: tuple[str, str]) -> str:
    links = "".join(f'<Relationship Id="r{n}" Type="{_OFFICE}/{kind}" Target="{target}"/>' for n, (kind, target) in enumerate(targets, 1))
    return f'<Relationships xmlns="{_PACKAGE}/relationships">{links}</Relationships>'


def docx_parts(paragraphs: Sequence[str], extra: str = "") -> dict[str, str | bytes]:
    """Return the parts of a Word document; a paragraph that begins with `# ` is a heading. `extra` is raw XML for the body."""
    body = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>{escape(text[2:])}</w:t></w:r></w:p>'
        if text.startswith("# ")
        else f'<w:p><w:r><w:t xml:space="preserve">{escape(text)}</w:t></w:r></w:p>'
        for text in paragraphs
    )
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    return {
        "[Content_Types].xml": _types("word/document.xml", "wordprocessingml.document.main+xml"),
        "_rels/.rels": _relations(("officeDocument", "word/document.xml")),
        "word/_rels/document.xml.rels": _relations(("styles", "styles.xml")),
        "word/styles.xml": f'<w:styles {space}><w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/>'
        '<w:pPr><w:outlineLvl w:val="0"/></w:pPr></w:style></w:styles>',
        "word/document.xml": f'<?xml version="1.0" encoding="UTF-8"?><w:document {space}><w:body>{body}{extra}</w:body></w:document>',
    }


def docx(*paragraphs: str) -> bytes:
    """Return a Word document."""
    return package(docx_parts(paragraphs))


def xlsx_parts(sheets: dict[str, Sequence[Sequence[str | float]]]) -> dict[str, str | bytes]:
    """Return the parts of a workbook of the given rows."""
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    listed = "".join(f'<sheet name="{escape(name)}" sheetId="{n}" r:id="r{n}"/>' for n, name in enumerate(sheets, 1))
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": _types("xl/workbook.xml", "spreadsheetml.sheet.main+xml"),
        "_rels/.rels": _relations(("officeDocument", "xl/workbook.xml")),
        "xl/workbook.xml": f'<workbook {main} xmlns:r="{_OFFICE}"><sheets>{listed}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": _relations(*(("worksheet", f"worksheets/sheet{n}.xml") for n in range(1, len(sheets) + 1))),
    }
    for number, rows in enumerate(sheets.values(), 1):
        data = "".join(
            f'<row r="{r}">' + "".join(_cell(f"{chr(64 + c)}{r}", value) for c, value in enumerate(row, 1)) + "</row>"
            for r, row in enumerate(rows, 1)
        )
        parts[f"xl/worksheets/sheet{number}.xml"] = f"<worksheet {main}><sheetData>{data}</sheetData></worksheet>"
    return parts


def _cell(reference: str, value: str | float) -> str:
    if isinstance(value, str):
        return f'<c r="{reference}" t="inlineStr"><is><t>{escape(value)}</t></is></c>'
    return f'<c r="{reference}"><v>{value}</v></c>'


def xlsx(**sheets: Sequence[Sequence[str | float]]) -> bytes:
    """Return a workbook."""
    return package(xlsx_parts(sheets))


def pptx(*slides: str) -> bytes:
    """Return a presentation with a text box on each slide."""
    spaces = (
        'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main" '
        f'xmlns:r="{_OFFICE}" xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
    )
    ids = "".join(f'<p:sldId id="{255 + n}" r:id="r{n}"/>' for n in range(1, len(slides) + 1))
    parts: dict[str, str | bytes] = {
        "[Content_Types].xml": _types("ppt/presentation.xml", "presentationml.presentation.main+xml"),
        "_rels/.rels": _relations(("officeDocument", "ppt/presentation.xml")),
        "ppt/presentation.xml": f"<p:presentation {spaces}><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": _relations(*(("slide", f"slides/slide{n}.xml") for n in range(1, len(slides) + 1))),
    }
    for number, text in enumerate(slides, 1):
        parts[f"ppt/slides/slide{number}.xml"] = (
            f'<p:sld {spaces}><p:cSld><p:spTree><p:sp><p:nvSpPr><p:cNvPr id="2" name="box"/><p:cNvSpPr/><p:nvPr/></p:nvSpPr><p:spPr/>'
            f"<p:txBody><a:bodyPr/><a:p><a:r><a:t>{escape(text)}</a:t></a:r></a:p></p:txBody></p:sp></p:spTree></p:cSld></p:sld>"
        )
    return package(parts)


def pdf(*pages: str, encrypt: str = "", title: str = "", bomb: bool = False) -> bytes:
    """Return a PDF with a line of Latin text on each page; an empty text leaves the page blank. `encrypt` is a raw /Encrypt entry.

    With `bomb` there is one page more, whose forms draw each other until a line stands there 10^11 times.
    """
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    objects.append(f"<< /Title ({title}) >>".encode())
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode("latin-1") if text else b""
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> /Contents %d 0 R >>"
            % len(objects)
        )
        kids.append(f"{len(objects)} 0 R")
    if bomb:
        resources = b"/Resources << /Font << /F1 3 0 R >> /XObject << /X %d 0 R >> >>"
        form = b"<< /Type /XObject /Subtype /Form /BBox [0 0 612 792] /Length %d " + resources + b" >>"
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] " + resources + b" /Contents %d 0 R >>"
        for stream in [b"/X Do " * 10] * 11 + [b"BT /F1 12 Tf 72 700 Td (again) Tj ET"]:
            objects.append(form % (len(stream), len(objects) + 2) + b"\nstream\n%s\nendstream" % stream)
        objects.append(b"<< /Length 5 >>\nstream\n/X Do\nendstream")
        objects.append(page % (len(objects) - 12, len(objects)))
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    data = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info 4 0 R {encrypt} >>".encode()
    return data + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n%s\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        table,
        trailer,
        len(data),
    )


PASSWORD_ENTRY = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> /ID [<{'33' * 16}> <{'33' * 16}>]"
"""An encryption dictionary that the empty password does not open."""


def ole(**streams: bytes) -> bytes:
    """Return an OLE2 compound file whose root holds streams of up to 512 bytes, each in a sector of its own; at most 3 of them."""
    names = list(streams)
    fat = [0xFFFFFFFD, 0xFFFFFFFE] + [0xFFFFFFFE] * len(names)
    header = bytearray(b"\xff" * 512)
    head = (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"", 62, 3, 0xFFFE, 9, 6, b"")
    struct.pack_into("<8s16sHHHHH6sIIIIIIIIII", header, 0, *head, 0, 1, 1, 0, 0, 0xFFFFFFFE, 0, 0xFFFFFFFE, 0, 0)
    directory = _entry("Root Entry", 5, child=1, start=0xFFFFFFFE, size=0)
    for at, name in enumerate(names):
        directory += _entry(name, 2, right=at + 2 if at + 1 < len(names) else 0xFFFFFFFF, start=2 + at, size=512)
    directory = directory.ljust(512, b"\0")
    table = b"".join(struct.pack("<I", value) for value in fat).ljust(512, b"\xff")
    return bytes(header) + table + directory + b"".join(streams[name].ljust(512, b"\0") for name in names)


def _entry(name: str, kind: int, *, right: int = 0xFFFFFFFF, child: int = 0xFFFFFFFF, start: int, size: int) -> bytes:
    encoded = (name + "\0").encode("utf-16-le")
    return struct.pack("<64sHBBIII16sIQQIQ", encoded, len(encoded), kind, 1, 0xFFFFFFFF, right, child, b"", 0, 0, 0, start, size)
