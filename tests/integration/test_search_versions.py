"""Searches while a document has a newer version than the one that they see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.stages import Tools
from models.documents import Document, FileType
from models.errors import PermanentError
from models.stages import State
from tests.integration.conftest import Bench


async def refuse(_: Document) -> None:
    raise PermanentError("no")


async def take_as_pdf(bench: Bench) -> None:
    """Run the waiting job; validate finds a PDF."""
    runner = bench.runner()
    plain = runner._runs._stages["validate"]

    async def validate(document: Document, tools: Tools) -> Document:
        return replace(await plain(document, tools), file_type=FileType.PDF, mime_type="application/pdf")

    runner._runs._stages["validate"] = validate
    found = bench.fetch()
    assert found is not None
    await runner.run(*found)


def types(bench: Bench) -> list[str]:
    """The types under which a search for the document's words finds passages."""
    statement = "SELECT t FROM unnest(ARRAY['text', 'pdf']) AS t WHERE EXISTS (SELECT FROM search_by_text('version', file_type => t))"
    return [row[0] for row in bench.all(statement)]


@pytest.mark.parametrize("ends", [State.FAILED, State.COMPLETE])
async def test_a_document_is_found_by_the_type_of_the_version_that_is_served(bench: Bench, ends: State) -> None:
    bench.submit("a", "1")
    await bench.drain()
    assert types(bench) == ["text"]
    during: list[list[str]] = []

    async def look(_: Document) -> None:
        during.append(types(bench))

    bench.also |= {"extract": look} | ({"parse": refuse} if ends is State.FAILED else {})
    bench.submit("a", "2")
    await take_as_pdf(bench)
    assert bench.one("SELECT state, file_type FROM file_extractions") == (ends, "pdf")
    assert types(bench) == (["text"] if ends is State.FAILED else ["pdf"])
    assert during in ([], [["text"]])
    bench.also.clear()
    bench.submit("a", "3")
    await bench.drain()
    assert types(bench) == ["text"]
    assert bench.one("SELECT served_file_type FROM file_extractions") == (None,)
