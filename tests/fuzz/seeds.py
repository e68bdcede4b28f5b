"""Where the fuzzer starts: small files of every kind, good and bad, for each target, and what it once found, from `corpus/`."""

from __future__ import annotations

import stat
import struct
from pathlib import Path

from tests.archives import Raw, raw_zip, zip_bytes
from tests.fuzz.targets import NAMES
from tests.unit.small_files import PASSWORD_ENTRY, docx, docx_parts, ole, package, pdf, pptx, xlsx

CORPUS = Path(__file__).parent / "corpus"

_MAIL = b"From: a@example.com\r\nTo: =?utf-8?q?J=C3=BCrgen?= <b@example.com>\r\nSubject: Hi\r\nMIME-Version: 1.0\r\n\r\nBody\r\n"
_HTML = b'<!DOCTYPE html><html><head><meta charset="utf-8"><title>T</title></head><body><p>Hi</p><table><tr><td>1</table></body></html>'
_FILES = {
    "a.pdf": (pdf("x"), pdf("x", encrypt=PASSWORD_ENTRY), b"junk\n" * 20 + pdf("y")),
    "a.docx": (docx("# A", "text"), ole(EncryptionInfo=b"", EncryptedPackage=b""), ole(WordDocument=b"\xec\xa5" + bytes(9) + b"\x01")),
    "a.xlsx": (xlsx(S=[["x", 1.5], ["y", 2.5]]), ole(Workbook=b"\x09\x08\x10\x00" + bytes(16) + b"\x2f\x00\x36\x00")),
    "a.zip": (
        zip_bytes({"a.txt": "one", "b/c.txt": "two"}),
        zip_bytes({"inner.zip": zip_bytes({"a.txt": "x"})}),
        b"PK\x05\x06" + bytes(18),
    ),
    "a.odt": (package({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": "<x/>"}),),
    "a.epub": (package({"mimetype": "application/epub+zip", "META-INF/container.xml": "<x/>"}),),
    "a.eml": (_MAIL,),
    ".mbox": (b"From a@example.com Mon Jan  1 00:00:00 2024\n" + _MAIL,),
    "a.html": (_HTML, _HTML.decode().encode("utf-16")),
    "a.json": (b'{"a": [1, "x"]}', b"[" * 200),
    "a.xml": (b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "a": (b"\x89PNG\r\n\x1a\n", b"\x7fELF\x02\x01\x01" + bytes(50), bytes(range(256)), b"{\\rtf1 x}", pptx("x")),
}
_TEXTS = (
    b"# Title\n\nA paragraph of some words.\n\n## B\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\n```py\nx = 1\n```\n",
    b"---\ntitle: x\n---\n\nSet\n===\n\ntext  \r\nmore\r\rend\n\n\n\n> quoted\n\n1. one\n2) two\n\n---\n***\n",
    "Ünïcödé, 文書管理、請求書は受領後三十日以内に。 👨‍👩‍👧‍👦🏳️‍🌈🇩🇪🇫🇷 e\u0301e\u0301 \u202eabc\u202c \ufeff\u2028\u2029\x85".encode(),
    "Grüße aus München, größer als zuvor".encode("cp1252"),
    "Это русский документ, который должен находиться поиском.".encode("koi8_r"),
    "これは日本語の文書です。検索できる必要があります。".encode("shift_jis"),
    "\ufeffUTF-16 with a mark\r\n".encode("utf-16-le"),
    "UTF-32 without a mark".encode("utf-32-be"),
    b"nul \x00 bytes \x00 and \xed\xa0\x80 surrogates, \xc0\x80 overlong, \xff\xfe stray",
    b"x" * 3000,
    b"| a |\n|---|\n" + b"| cell of a table that goes on |\n" * 80,
    b"word " * 600 + b"\n# heading at the end\n# and another\n",
    ("e" + "\u0301" * 300 + "🇩🇪" * 200).encode(),
    b"# a\n" * 300,
    b"```\n" + b"code that never ends\n" * 50,
    b"[" * 300 + b"*_`" * 200,
    b"x" + b" " * 2000 + b"x" + b"\t" * 900,
    ("a" + "\u0300\u0327" * 700).encode(),
    b"|" + b" a |" * 400 + b"\n|" + b"---|" * 400 + b"\n" + b"| b |\n" * 60,
    b"<!---->" * 100 + b"x",
)


def _field(kind: int, body: bytes) -> bytes:
    return struct.pack("<2H", kind, len(body)) + body


def _archives() -> list[bytes]:
    """Archives that a program would write, and one for each rule."""
    parts = docx_parts(["text"])
    return [
        zip_bytes({"a.txt": "one", "b/c.txt": "two", "d/": ""}),
        docx("text"),
        xlsx(S=[["x"]]),
        package({**parts, "word/vbaProject.bin": b"\0" * 40}),
        package({**parts, "word/document.xml": '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'}),
        raw_zip([Raw(b"../up.txt"), Raw(b"/abs.txt"), Raw(b"C:\\x.txt"), Raw(b"a\x1b[31m\n.txt"), Raw("a\u202e.txt".encode())]),
        raw_zip(
            [Raw(b"a", flags=1), Raw(b"b", method=99), Raw(b"c", method=12), Raw(b"d", method=14), Raw(b"e", crc=1), Raw(b"f", method=0)]
        ),
        raw_zip([Raw(b"l", b"/etc/passwd", 0, mode=stat.S_IFLNK | 0o777), Raw(b"p", mode=stat.S_IFIFO | 0o600)]),
        raw_zip([Raw(b"a"), Raw(b"b", lies_at=0)]),
        raw_zip([Raw(b"a.txt", b"x" * 50, size=10), Raw(b"b.txt", size=5000), Raw(b"a.txt"), Raw(b"A.txt"), Raw(b"c", compressed=9999)]),
        raw_zip(
            [Raw(b"a.txt", size=2**32 - 1, extra=_field(1, struct.pack("<3Q", 4, 4, 0))), Raw(b"b", extra=_field(0x7075, b"\x01abcdx"))]
        ),
        raw_zip([Raw("Größe.txt".encode("cp850")), Raw("議事録.docx".encode("cp932"))], before=b"MZ junk", behind=b"\0" * 10),
        raw_zip([Raw(b"bomb", b"\0" * 1_500_000)]),
        raw_zip([Raw(b"x.zip", zip_bytes({"a": "b"}))]),
        raw_zip([]),
        b"".join(bytes([kind, kind, kind, kind, 1, 1, 5, 1]) + b"%d.txt" % kind + b"content of a file" for kind in range(8)),
        b"".join(bytes([0, 0, 0, 0, 1, 1, 17, 2]) + b"word/document.xml" + b"<!DOCTYPE x [<!ENTITY a 'b'>]>  " for _ in range(2)),
    ]


def seeds(target: str) -> list[bytes]:
    """Return the inputs to start from."""
    if target == "validate":
        made = [bytes([NAMES.index(name)]) + content for name, contents in _FILES.items() for content in contents]
        made += [bytes([at % len(NAMES)]) + text for at, text in enumerate(_TEXTS)]
    elif target == "archive":
        made = _archives()
    else:
        choices = b"\xff\x00\x20\x00" if target == "chunk" else b""
        made = [choices + bytes([pages]) + bytes(range(0, 3 * pages, 3)) + text for text in _TEXTS for pages in (0, 3)]
    return [*made, *(path.read_bytes() for path in sorted((CORPUS / target).glob("*")))]
