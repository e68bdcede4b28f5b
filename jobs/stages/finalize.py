"""finalize: everything about the version is cross-checked; the checkpoint that follows swaps it in for readers."""

from __future__ import annotations

from jobs.stages import Tools
from models.documents import Document
from models.errors import PermanentError


def inconsistencies(document: Document) -> list[str]:
    """Return what does not fit together, in words; an empty list when all is well."""
    chunks = document.chunks or ()
    found: list[str] = []
    if not chunks:
        found.append("there are no chunks")
    if [chunk.index for chunk in chunks] != list(range(len(chunks))):
        found.append("the chunks are not numbered from 0 without gaps")
    if len({chunk.id for chunk in chunks}) != len(chunks):
        found.append("two chunks share an id")
    if document.vectors is None or len(document.vectors) != len(chunks):
        found.append(f"{len(chunks)} chunks have {0 if document.vectors is None else len(document.vectors)} vectors")
    if document.embedding_model is None:
        found.append("the embedding model is not known")
    if document.content_sha256 is None or document.file_type is None or document.mime_type is None or document.file_size is None:
        found.append("size, hash or type of the file is not known")
    if document.markdown_sha256 is None:
        found.append("the markdown was not checked")
    if document.raw_extraction is None:
        found.append("nothing was extracted")
    return found


async def run(document: Document, tools: Tools) -> Document:
    """Return the document unchanged; PermanentError where chunks, vectors, metadata and extraction do not agree."""
    if found := inconsistencies(document):
        raise PermanentError(f"{document.file_name}: cannot be finalised: {'; '.join(found)}.")
    return document
