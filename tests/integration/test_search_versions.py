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


FOUND_BY = (
    "SELECT * FROM search_by_text('version')",
    "SELECT * FROM search_by_vector('[1,0,0,0,0,0,0,0]', 'eye')",
    "SELECT * FROM search_hybrid('version', '[1,0,0,0,0,0,0,0]', 'eye')",
)


def submit_called(bench: Bench, file_name: str, content: str) -> None:
    bench.conn.execute(
        "SELECT submit_document('uploads/a', doc_id => 'a', file_name => %s, content_sha256 => %s)", [file_name, content * 64]
    )


def named(bench: Bench) -> set[tuple[str, int]]:
    """The names and versions that searches give, the same in all three."""
    found = [set(bench.all(f"SELECT f.file_name, f.version FROM ({statement}) AS f")) for statement in FOUND_BY]
    assert found[0] == found[1] == found[2]
    return found[0]


@pytest.mark.parametrize("ends", [State.FAILED, State.CANCELLED, State.COMPLETE])
async def test_what_is_found_is_called_as_the_file_was_whose_text_it_is(bench: Bench, ends: State) -> None:
    submit_called(bench, "alpha.txt", "1")
    await bench.drain()
    for number, name in enumerate(("beta.txt", "in/alpha.txt", "gamma.txt"), start=2):
        submit_called(bench, name, str(number))
        assert named(bench) == {("alpha.txt", 1)}
    if ends is State.CANCELLED:
        bench.conn.execute("SELECT cancel_document('a')")
    bench.also |= {"parse": refuse} if ends is State.FAILED else {}
    await bench.drain()
    assert bench.one("SELECT state, file_name FROM file_extractions") == (ends, "gamma.txt")
    assert named(bench) == ({("gamma.txt", 4)} if ends is State.COMPLETE else {("alpha.txt", 1)})
    bench.also.clear()
    submit_called(bench, "delta.txt", "5")
    await bench.drain()
    bench.conn.execute("UPDATE file_extractions SET file_name = 'renamed.txt'")
    assert named(bench) == {("renamed.txt", 5)}
    assert bench.one("SELECT served_file_name FROM file_extractions") == (None,)


def test_what_was_served_before_names_were_kept_is_called_as_it_was_submitted(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = migrations._own()
    submit = "SELECT submit_document('uploads/a', doc_id => %s, file_name => %s, content_sha256 => repeat(%s, 64))"
    with psycopg.connect(empty_database, autocommit=True) as conn:
        monkeypatch.setattr(migrations, "_own", lambda: [path for path in own if path.name < "0055"])
        migrations.migrate(conn)
        for doc_id, second in (("newer", "2.txt"), ("same name", "1.txt"), ("complete", None)):
            conn.execute(submit, [doc_id, "1.txt", "1"])
            conn.execute("SET session_replication_role = replica")
            conn.execute(
                "UPDATE file_extractions SET state = 'complete', milestone = 'complete', served_version = 1 WHERE doc_id = %s", [doc_id]
            )
            conn.execute("RESET session_replication_role")
            if second is not None:
                conn.execute(submit, [doc_id, second, "2"])
        monkeypatch.setattr(migrations, "_own", lambda: own)
        migrations.migrate(conn)
        found = conn.execute("SELECT doc_id, version, file_name, served_file_name FROM file_extractions ORDER BY 1").fetchall()
        assert found == [("complete", 1, "1.txt", None), ("newer", 2, "2.txt", "1.txt"), ("same name", 2, "1.txt", None)]
