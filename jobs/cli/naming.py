"""Which document or batch a person means by a word: a whole id, the beginning of one, or a file name."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.arguments import storable
from jobs.cli.output import aside, complain, say
from jobs.cli.session import Row, rows
from models.settings import Settings

SHOWN = 10
"""How many candidates are listed where a word could be several."""


async def documents_named(settings: Settings, word: str, limit: int) -> list[Row]:
    """Return the documents that a word may mean."""
    return await rows(settings, "find_documents", word=word, file_name=storable(word), limit=limit)


async def find_document(settings: Settings, word: str) -> str | None:
    """Return the doc_id of the one document that a word names, also of one that is gone; None after a complaint."""
    documents = await documents_named(settings, word, SHOWN + 1)
    exact = [row for row in documents if row["doc_id"] == word]
    if exact or len(documents) == 1:
        return str((exact or documents)[0]["doc_id"])
    if not documents and (await rows(settings, "was_document", doc_id=word))[0]["was"]:
        return word
    complain_of(word, documents, [], "document")
    return None


def complain_of(word: str, documents: Sequence[Row], batches: Sequence[Row], what: str = "document and no batch") -> None:
    """Say that a word names nothing, or list what it could be."""
    if not documents and not batches:
        complain(f'There is no {what} "{word}": neither an id, nor the beginning of one, nor a file name.')
        return
    complain(f'"{word}" could be any of these:')
    for row in documents[:SHOWN]:
        say("  document", row["doc_id"], row["file_name"], row["state"], console=aside())
    for row in batches[:SHOWN]:
        say("  batch   ", row["batch_id"], row["source_path"] or "", row["status"], console=aside())
    if max(len(documents), len(batches)) > SHOWN:
        say("  ...", console=aside())
