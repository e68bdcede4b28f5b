"""Searches while a document has a newer version than the one that they see."""

from __future__ import annotations

from dataclasses import replace

import psycopg
import pytest

from jobs.stages import Tools
from models.documents import Document, FileType
from models.errors import PermanentError
from models.stages import State
from sql import migrate as migrations
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


def test_a_document_that_was_served_before_types_were_kept_is_found_by_its_own(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        monkeypatch.setattr(migrations, "_own", lambda: [path for path in own if path.name < "0049"])
        migrations.migrate(conn)
        conn.execute("SET session_replication_role = replica")
        for doc_id, served in (("newer", 1), ("same", 2), ("never", None)):
            conn.execute("SELECT submit_document('uploads/a', doc_id => %s, content_sha256 => repeat('1', 64))", [doc_id])
            conn.execute(
                """UPDATE file_extractions SET version = 2, served_version = %s, file_type = 'pdf', state = 'failed',
                    error_type = 'PERMANENT', error_message = 'no' WHERE doc_id = %s""",
                [served, doc_id],
            )
            for version, file_type in ((1, "text"), (2, "pdf")):
                conn.execute(
                    """INSERT INTO document_events (doc_id, version, user_id, correlation_id, stage, event, detail)
                    VALUES (%s, %s, 'default', 'c', 'validate', 'stage_completed', jsonb_build_object('file_type', %s::text))""",
                    [doc_id, version, file_type],
                )
        conn.execute("RESET session_replication_role")
        monkeypatch.setattr(migrations, "_own", lambda: own)
        migrations.migrate(conn)
        found = conn.execute("SELECT doc_id, served_file_type FROM file_extractions ORDER BY 1").fetchall()
        assert found == [("never", None), ("newer", "text"), ("same", None)]


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
    assert during == ([] if ends is State.FAILED else [["text"]])
    bench.also.clear()
    bench.submit("a", "3")
    await bench.drain()
    assert types(bench) == ["text"]
    assert bench.one("SELECT served_file_type FROM file_extractions") == (None,)
