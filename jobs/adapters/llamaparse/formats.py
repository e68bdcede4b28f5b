"""Which files LlamaParse serves. Pure."""

from __future__ import annotations

from jobs.adapters.sniff_types import EXTENSIONS_OF
from models.documents import FileType

SERVED = frozenset(
    {
        *("pdf", "docx", "docm", "doc", "rtf", "pptx", "pptm", "ppt", "xlsx", "xlsm", "xlsb", "xls", "ods"),
        *("html", "epub", "txt", "csv", "tsv", "xml"),
    }
)
"""Of the types that docmill knows, those that LlamaParse documents: no OpenDocument text or slides, e-mail, Markdown or JSON."""
_READABLE_AS_THEY_ARE = frozenset({FileType.TEXT, FileType.EMAIL, FileType.ZIP, FileType.UNKNOWN})


def extension_of(mime_type: str) -> str | None:
    """Return the extension under which a file of this type is sent, None for a type that is not served."""
    return next((extension for extension in EXTENSIONS_OF.get(mime_type, ()) if extension in SERVED), None)


def refusal(file_type: FileType, mime_type: str, size: int, *, max_bytes: int) -> str | None:
    """Say why a file is not sent, in words for an event; None where it is. Plain text is not: there is nothing to pay for."""
    if file_type in _READABLE_AS_THEY_ARE:
        return f"LlamaParse is not asked for {file_type.value} files: they are read as they are"
    if extension_of(mime_type) is None:
        return f"LlamaParse does not serve {mime_type}"
    if size > max_bytes:
        return f"{size:,} bytes is more than LLAMAPARSE_MAX_FILE_MB={max_bytes // 1_000_000}"
    return None
