"""The tables behind `sniff`: magic bytes, extensions and names of types."""

from __future__ import annotations

from typing import NamedTuple

from models.documents import FileType


class Kind(NamedTuple):
    """A coarse type with its MIME type."""

    file_type: FileType
    mime_type: str


_OOXML = "application/vnd.openxmlformats-officedocument."
_ODF = "application/vnd.oasis.opendocument."

BY_EXTENSION: dict[str, Kind] = {
    "pdf": Kind(FileType.PDF, "application/pdf"),
    "docx": Kind(FileType.WORD, f"{_OOXML}wordprocessingml.document"),
    "docm": Kind(FileType.WORD, "application/vnd.ms-word.document.macroEnabled.12"),
    "doc": Kind(FileType.WORD, "application/msword"),
    "rtf": Kind(FileType.WORD, "application/rtf"),
    "odt": Kind(FileType.WORD, f"{_ODF}text"),
    "xlsx": Kind(FileType.EXCEL, f"{_OOXML}spreadsheetml.sheet"),
    "xlsm": Kind(FileType.EXCEL, "application/vnd.ms-excel.sheet.macroEnabled.12"),
    "xlsb": Kind(FileType.EXCEL, "application/vnd.ms-excel.sheet.binary.macroEnabled.12"),
    "xls": Kind(FileType.EXCEL, "application/vnd.ms-excel"),
    "ods": Kind(FileType.EXCEL, f"{_ODF}spreadsheet"),
    "pptx": Kind(FileType.POWERPOINT, f"{_OOXML}presentationml.presentation"),
    "pptm": Kind(FileType.POWERPOINT, "application/vnd.ms-powerpoint.presentation.macroEnabled.12"),
    "ppt": Kind(FileType.POWERPOINT, "application/vnd.ms-powerpoint"),
    "odp": Kind(FileType.POWERPOINT, f"{_ODF}presentation"),
    "html": Kind(FileType.HTML, "text/html"),
    "htm": Kind(FileType.HTML, "text/html"),
    "xhtml": Kind(FileType.HTML, "application/xhtml+xml"),
    "eml": Kind(FileType.EMAIL, "message/rfc822"),
    "mbox": Kind(FileType.EMAIL, "application/mbox"),
    "msg": Kind(FileType.EMAIL, "application/vnd.ms-outlook"),
    "epub": Kind(FileType.EBOOK, "application/epub+zip"),
    "txt": Kind(FileType.TEXT, "text/plain"),
    "text": Kind(FileType.TEXT, "text/plain"),
    "log": Kind(FileType.TEXT, "text/plain"),
    "md": Kind(FileType.TEXT, "text/markdown"),
    "markdown": Kind(FileType.TEXT, "text/markdown"),
    "csv": Kind(FileType.TEXT, "text/csv"),
    "tsv": Kind(FileType.TEXT, "text/tab-separated-values"),
    "tab": Kind(FileType.TEXT, "text/tab-separated-values"),
    "json": Kind(FileType.TEXT, "application/json"),
    "jsonl": Kind(FileType.TEXT, "application/x-ndjson"),
    "ndjson": Kind(FileType.TEXT, "application/x-ndjson"),
    "xml": Kind(FileType.TEXT, "application/xml"),
    "svg": Kind(FileType.TEXT, "image/svg+xml"),
    "zip": Kind(FileType.ZIP, "application/zip"),
}

CODE = frozenset({
    "asm", "awk", "bash", "bat", "c", "cc", "cfg", "cjs", "clj", "cmake", "cmd", "cnf", "conf", "config", "cpp", "cs", "css", "cxx", "dart",
    "diff", "dockerfile", "dockerignore", "editorconfig", "el", "env", "erl", "ex", "exs", "fish", "gitattributes", "gitignore", "go",
    "gradle", "graphql", "groovy", "h", "hcl", "hh", "hpp", "hs", "ini", "java", "jl", "js", "jsx", "ksh", "kt", "kts", "less", "log",
    "lua", "makefile", "mjs", "mk", "nix", "patch", "php", "pl", "pm", "properties", "proto", "ps1", "psm1", "py", "pyi", "pyw", "r",
    "rb", "rs", "sass", "scala", "scss", "sh", "sql", "swift", "tcl", "tf", "tfvars", "toml", "ts", "tsx", "vb", "vbs", "vim", "yaml",
    "yml", "zsh",
})  # fmt: skip
"""Extensions, or whole names without one, of text that programs read or write: program code, configuration, logs."""

OPENDOCUMENT: dict[str, Kind] = {
    f"{_ODF}text": BY_EXTENSION["odt"],
    f"{_ODF}text-template": BY_EXTENSION["odt"],
    f"{_ODF}spreadsheet": BY_EXTENSION["ods"],
    f"{_ODF}spreadsheet-template": BY_EXTENSION["ods"],
    f"{_ODF}presentation": BY_EXTENSION["odp"],
    f"{_ODF}presentation-template": BY_EXTENSION["odp"],
    "application/epub+zip": BY_EXTENSION["epub"],
}
"""By what the package's first member `mimetype` says; EPUB does the same."""

_ENCRYPTED = "application/x-ole-encrypted-package"

EXTENSIONS_OF: dict[str, tuple[str, ...]] = {
    **{
        mime: tuple(extension for extension, kind in BY_EXTENSION.items() if kind.mime_type == mime)
        for mime in {kind.mime_type for kind in BY_EXTENSION.values()}
    },
    BY_EXTENSION["docx"].mime_type: ("docx", "docm"),
    BY_EXTENSION["docm"].mime_type: ("docx", "docm"),
    BY_EXTENSION["xlsx"].mime_type: ("xlsx", "xlsm"),
    BY_EXTENSION["xlsm"].mime_type: ("xlsx", "xlsm"),
    BY_EXTENSION["pptx"].mime_type: ("pptx", "pptm"),
    BY_EXTENSION["pptm"].mime_type: ("pptx", "pptm"),
    "application/rtf": ("rtf", "doc"),
    "text/html": ("html", "htm", "xhtml"),
    "application/xhtml+xml": ("html", "htm", "xhtml", "xml"),
    "message/rfc822": ("eml", "mbox", "txt", "html", "htm"),
    "application/mbox": ("mbox", "eml", "txt"),
    _ENCRYPTED: ("docx", "docm", "xlsx", "xlsm", "xlsb", "pptx", "pptm", "doc", "xls", "ppt"),
    "text/plain": ("html", "htm", "eml"),  # words without a tag or a header line
}
"""The extensions that fit a content, beside that any text extension fits any text."""

NAMES: dict[str, str] = {
    "application/pdf": "PDF",
    BY_EXTENSION["docx"].mime_type: "Word (docx)",
    BY_EXTENSION["xlsx"].mime_type: "Excel (xlsx)",
    BY_EXTENSION["pptx"].mime_type: "PowerPoint (pptx)",
    "application/msword": "Word (doc)",
    "application/vnd.ms-excel": "Excel (xls)",
    "application/vnd.ms-powerpoint": "PowerPoint (ppt)",
    "application/rtf": "RTF",
    "text/html": "HTML",
    "text/plain": "plain text",
    "application/zip": "a zip archive",
    "application/octet-stream": "binary data of no known type",
}
"""What to call a type in a message for people; other types go by their MIME type."""

MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (8, b"WEBPVP8", "image/webp"),
    (8, b"WAVEfmt", "audio/wav"),
    (8, b"AVI LIST", "video/x-msvideo"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/x-matroska"),
    (0, b"OggS\x00", "audio/ogg"),
    (0, b"fLaC\x00", "audio/flac"),
    (0, b"ID3\x02", "audio/mpeg"),
    (0, b"ID3\x03", "audio/mpeg"),
    (0, b"ID3\x04", "audio/mpeg"),
    (0, b"\x1f\x8b\x08", "application/gzip"),
    (0, b"\x1f\x9d", "application/x-compress"),
    (0, b"BZh91AY&SY", "application/x-bzip2"),
    (0, b"\xfd7zXZ\x00", "application/x-xz"),
    (0, b"7z\xbc\xaf'\x1c", "application/x-7z-compressed"),
    (0, b"Rar!\x1a\x07", "application/vnd.rar"),
    (0, b"(\xb5/\xfd", "application/zstd"),
    (0, b"\x04\x22\x4d\x18", "application/x-lz4"),
    (257, b"ustar", "application/x-tar"),
    (0, b"\x7fELF", "application/x-executable"),
    (0, b"MZ\x90\x00", "application/vnd.microsoft.portable-executable"),
    (60, b"\x80\x00\x00\x00\x0e\x1f\xba", "application/vnd.microsoft.portable-executable"),
    (0, b"\xcf\xfa\xed\xfe", "application/x-mach-binary"),
    (0, b"\xca\xfe\xba\xbe\x00\x00", "application/java-vm"),
    (0, b"\x00asm\x01\x00\x00\x00", "application/wasm"),
    (0, b"SQLite format 3\x00", "application/vnd.sqlite3"),
    (0, b"PAR1", "application/vnd.apache.parquet"),
    (0, b"OTTO\x00", "font/otf"),
    (0, b"wOFF", "font/woff"),
    (0, b"wOF2", "font/woff2"),
    (0, b"\x00\x01\x00\x00\x00", "font/ttf"),
    (0, b"!BDN", "application/vnd.ms-outlook-pst"),
    (0, b"%!PS-Adobe", "application/postscript"),
    (0, b"AT&TFORM", "image/vnd.djvu"),
    (60, b"BOOKMOBI", "application/x-mobipocket-ebook"),
)
"""Offset, bytes and MIME type of what docmill recognises only to name it in a refusal."""


def is_code(file_name: str) -> bool:
    """Tell by a file's name whether its text, if it is no more than text, is for programs: a `#` there begins a comment."""
    name = file_name.strip().replace("\\", "/").rpartition("/")[2]
    return name.rpartition(".")[2].lower() in CODE


def has_headings(file_name: str, mime_type: str | None) -> bool:
    """Tell whether the text of a file may be read as Markdown's headings."""
    return mime_type != "text/plain" or not is_code(file_name)
