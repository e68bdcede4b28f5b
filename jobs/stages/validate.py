"""validate: a stored upload is what it claims to be: non-empty, within its limits, of a supported type, unchanged, not encrypted, and
no file of docmill's own or of another document.

A document that is an archive inside is unpacked here, in the sandbox, before any parser or outside service gets it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from jobs.adapters.archives import ArchiveLimits, check_package
from jobs.adapters.folders import is_own_upload, refuse_foreign_file
from jobs.adapters.sniff import Sniffed, extension_agrees, sniff
from jobs.adapters.storage import Fingerprint, fingerprint
from jobs.stages import Tools
from models.documents import Document, FileType
from models.errors import PermanentError


def refuse_file(document: Document, found: Fingerprint, limit_mb: int) -> None:
    """Raise a PermanentError when size or content break a rule."""
    name = document.file_name
    if found.size == 0:
        raise PermanentError(f"{name}: the file is empty (0 bytes).")
    if found.size > limit_mb * 1_000_000:
        raise PermanentError(f"{name}: {found.size:,} bytes is more than MAX_FILE_SIZE_MB={limit_mb} allows.")
    if document.content_sha256 is not None and found.sha256 != document.content_sha256:
        raise PermanentError(
            f"{name}: the stored file changed between submission and validation "
            f"(SHA-256 was {document.content_sha256[:12]}..., is {found.sha256[:12]}...). Submit it again."
        )


def refuse_type(name: str, sniffed: Sniffed) -> None:
    """Raise a PermanentError when the type by content is not one that can be parsed, or is not what the name says."""
    if sniffed.encrypted:
        raise PermanentError(f"{name}: the file is encrypted ({sniffed.mime_type}); submit it without a password.")
    if sniffed.file_type is FileType.ZIP:
        raise PermanentError(f"{name}: a zip archive is a batch, not a document; submit it as a batch.")
    if sniffed.file_type is FileType.UNKNOWN:
        raise PermanentError(
            f"{name}: the type is not supported ({sniffed.mime_type}). "
            "Supported: PDF, Word, Excel, PowerPoint, HTML, e-mail, EPUB, and text such as Markdown, CSV, JSON and XML."
        )
    if not extension_agrees(name, sniffed):
        raise PermanentError(
            f"{name}: the content is {sniffed.file_type} ({sniffed.mime_type}), which does not go with the extension "
            f"{PurePosixPath(name).suffix}. Give it its right name and submit it again."
        )


def refuse_size(name: str, size: int, file_type: FileType, limit_mb: int) -> None:
    """Raise a PermanentError when a file is larger than its type may be."""
    if limit_mb == 0:
        raise PermanentError(f"{name}: files of type {file_type} are not accepted (MAX_FILE_SIZE_MB_BY_TYPE has {file_type}=0).")
    if size > limit_mb * 1_000_000:
        raise PermanentError(
            f"{name}: {size:,} bytes is more than MAX_FILE_SIZE_MB_BY_TYPE allows for files of its type ({file_type}={limit_mb})."
        )


def is_package(mime_type: str) -> bool:
    """Say whether a document of this type is an archive inside."""
    return mime_type.startswith(("application/vnd.openxmlformats", "application/vnd.oasis.opendocument")) or mime_type.endswith(
        (".macroEnabled.12", "epub+zip")
    )


async def run(document: Document, tools: Tools) -> Document:
    """Return the document with size, SHA-256, file type and MIME type; PermanentError where a rule is broken."""

    def look() -> tuple[Fingerprint, Sniffed]:
        if not is_own_upload(tools.settings, document.file_path, document.doc_id):
            refuse_foreign_file(tools.settings, tools.storage.resolve(document.file_path), document.file_path, document.doc_id)
        with tools.storage.open(document.file_path) as file:
            found = fingerprint(file)
            refuse_file(document, found, tools.settings.max_file_size_mb)
            return found, sniff(file, document.file_name)

    found, sniffed = await tools.in_thread(look)
    refuse_type(document.file_name, sniffed)
    refuse_size(document.file_name, found.size, sniffed.file_type, tools.settings.file_size_limit_mb(sniffed.file_type))
    if is_package(sniffed.mime_type):
        stored = tools.storage.file(document.file_path)
        await tools.sandbox.run(check_package, stored, document.file_name, ArchiveLimits.of_document(tools.settings))
    return replace(document, file_size=found.size, content_sha256=found.sha256, file_type=sniffed.file_type, mime_type=sniffed.mime_type)
