"""The whole main job with real worker processes on real documents."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from jobs import submit_document
from models.settings import Settings
from tests.running import REPOSITORY, wait_for, worker
from tests.unit.small_files import docx, docx_parts, package

PASSAGES = """SELECT d.file_name, c.id, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end, c.embedding::text,
    d.raw_extraction FROM document_chunks c JOIN file_extractions d USING (doc_id) ORDER BY c.doc_id, c.chunk_index"""
SAMPLES = sorted(p for p in (REPOSITORY / "samples").iterdir() if p.name != "README.md")


pytestmark = pytest.mark.usefixtures("front_door")


def unfinished(conn: psycopg.Connection) -> int:
    row = conn.execute("SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')").fetchone()
    assert row is not None
    return int(row[0])


def ingest(conn: psycopg.Connection, tmp_path: Path, files: list[Path], **environment: str) -> list[Any]:
    """Submit files and run one worker until they have ended; return all passages."""
    for path in files:
        submit_document(path)
    with worker(tmp_path / "worker.log", **environment) as process:
        wait_for(lambda: unfinished(conn) == 0, f"all documents to end; see {tmp_path / 'worker.log'}", 240, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    return conn.execute(PASSAGES).fetchall()


def test_the_samples_end_complete_and_both_modes_give_the_same_rows_and_a_second_run_does_nothing(
    conn: psycopg.Connection, tmp_path: Path
) -> None:
    inline = ingest(conn, tmp_path, SAMPLES, HANDOFF="inline")
    assert len({row[0] for row in inline}) == len(SAMPLES)
    assert conn.execute("SELECT DISTINCT state, retry_count FROM file_extractions").fetchall() == [("complete", 0)]
    jobs = conn.execute("SELECT count(*) FROM procrastinate_jobs").fetchone()
    again = [submit_document(path).outcome for path in SAMPLES]
    assert set(again) == {"unchanged"}
    assert conn.execute("SELECT count(*) FROM procrastinate_jobs").fetchone() == jobs
    conn.execute("DELETE FROM file_extractions")
    assert ingest(conn, tmp_path, SAMPLES, HANDOFF="queue") == inline


def test_the_samples_are_understood(conn: psycopg.Connection, tmp_path: Path) -> None:
    ingest(conn, tmp_path, SAMPLES)
    types = {row[0] for row in conn.execute("SELECT file_type FROM file_extractions").fetchall()}
    assert {"pdf", "word", "excel", "powerpoint", "html", "email", "text"} <= types
    languages: dict[str, str] = dict(conn.execute("SELECT file_name, raw_extraction->'language'->>'code' FROM file_extractions").fetchall())
    assert (languages["sicherheitshandbuch.pdf"], languages["supply-contract.pdf"]) == ("de", "en")
    pages = conn.execute("SELECT page_count FROM file_extractions WHERE file_name = 'supply-contract.pdf'").fetchone()
    assert pages == (4,)
    headed = conn.execute("SELECT count(*) FROM document_chunks WHERE heading_path <> '{}' AND page_start IS NOT NULL").fetchone()
    assert headed is not None
    assert headed[0] > 10
    umlauts = conn.execute("SELECT count(*) FROM document_chunks WHERE content ~ '[äöüß]' AND language = 'de'").fetchone()
    assert umlauts is not None
    assert umlauts[0] > 5


def test_workers_for_one_queue_each_finish_a_document_together(conn: psycopg.Connection, tmp_path: Path) -> None:
    for path in SAMPLES[:4]:
        submit_document(path)
    with (
        worker(tmp_path / "cpu.log", "-q", "cpu"),
        worker(tmp_path / "embed.log", "-q", "embed"),
        worker(tmp_path / "extract.log", "-q", "extract"),
    ):
        wait_for(lambda: unfinished(conn) == 0, "all documents to end", 120)
    assert conn.execute("SELECT DISTINCT state FROM file_extractions").fetchall() == [("complete",)]
    workers = conn.execute(
        "SELECT stage, count(DISTINCT worker) FROM document_events WHERE stage IN ('parse', 'embed') GROUP BY 1"
    ).fetchall()
    assert dict(workers) == {"parse": 1, "embed": 1}
    distinct = conn.execute("SELECT count(DISTINCT worker) FROM document_events WHERE stage IN ('parse', 'embed', 'extract')").fetchone()
    assert distinct == (3,)


BAD = {
    "empty.txt": (b"", "PERMANENT", "empty"),
    "blank.txt": (b" \n\t \n", "PARSE_ERROR", "text"),
    "program.md": (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 8, "PERMANENT", "not supported"),
    "picture.docx": (b"\x89PNG\r\n\x1a\n" + bytes(64), "PERMANENT", ""),
    "report.txt": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF\n", "PERMANENT", "extension"),
    "broken.pdf": (b"%PDF-1.4\nnothing more", "PARSE_ERROR", "broken.pdf"),
    "archive.zip": (b"PK\x05\x06" + bytes(18), "PERMANENT", "batch"),
    "bomb.docx": (package(docx_parts(["x"]) | {"word/document.xml": bytes(40_000_000)}), "PERMANENT", "MAX_ARCHIVE_RATIO allows 250"),
    "laughs.docx": (package(docx_parts(["x"]) | {"word/a.xml": '<!DOCTYPE a [<!ENTITY b "c">]><a/>'}), "PERMANENT", "XML entities"),
    "cut.docx": (docx("x")[:-30], "PERMANENT", "end is missing"),
    "page.html": (b"<html><p>words</p></html>", "PERMANENT", "MAX_FILE_SIZE_MB_BY_TYPE has html=0"),
}
GOOD_TEXT = {
    "utf16.txt": "Grüße aus Köln und Łódź".encode("utf-16"),
    "cp1252.txt": "Die Straße nach Köln führt über die Brücke – „schön“ ist sie für müde Füße.".encode("cp1252"),
    "bom.txt": b"\xef\xbb\xbfText with a byte order mark",
    "nul.txt": b"Text with a NUL \x00 in the middle of it",
}


def test_bad_files_fail_alone_with_a_reason_and_odd_encodings_are_read(conn: psycopg.Connection, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in {**{n: b[0] for n, b in BAD.items()}, **GOOD_TEXT}.items():
        (folder / name).write_bytes(content)
    ingest(conn, tmp_path, sorted(folder.iterdir()), MAX_FILE_SIZE_MB_BY_TYPE="html=0")
    rows = {
        row[0]: row[1:]
        for row in conn.execute(
            """SELECT d.file_name, d.state, d.error_type, d.error_message, l.stage
            FROM file_extractions d LEFT JOIN dead_letters l USING (doc_id)"""
        ).fetchall()
    }
    for name, (_, kind, words) in BAD.items():
        state, found, message, stage = rows[name]
        assert (state, found) == ("failed", kind), (name, message)
        assert name in message
        assert words in message
        assert stage in ("validate", "parse")
    for name in GOOD_TEXT:
        assert rows[name][0] == "complete", rows[name]
    text: dict[str, str] = dict(
        conn.execute("SELECT file_name, markdown FROM document_markdown JOIN file_extractions USING (doc_id)").fetchall()
    )
    assert text["utf16.txt"] == "Grüße aus Köln und Łódź"
    assert "Straße nach Köln führt über die Brücke – „schön“" in text["cp1252.txt"]
    assert text["bom.txt"] == "Text with a byte order mark"
    assert "\x00" not in text["nul.txt"]
    assert "in the middle" in text["nul.txt"]


def test_equal_content_is_known_as_a_duplicate_and_embeds_nothing_again(conn: psycopg.Connection, tmp_path: Path) -> None:
    text = b"# Title\n\nOne passage of a document that comes twice."
    for doc_id in ("first", "twin at the same time"):
        submit_document(text, doc_id=doc_id, file_name="a.md")
    ingest(conn, tmp_path, [])
    for doc_id, user in (("later", "default"), ("another user's", "bob")):
        submit_document(text, doc_id=doc_id, file_name="a.md", user_id=user)
    ingest(conn, tmp_path, [])
    rows = conn.execute(
        """SELECT d.doc_id, d.state::text, d.duplicate_of, (e.detail->>'embedded')::int, d.chunk_count
        FROM file_extractions d JOIN document_events e ON e.doc_id = d.doc_id AND e.stage = 'embed'"""
    ).fetchall()
    by_id = {row[0]: row[1:] for row in rows}
    assert by_id["later"] == ("complete", "first", 0, 1) or by_id["later"] == ("complete", "twin at the same time", 0, 1)
    assert by_id["another user's"] == ("complete", None, 1, 1)
    assert sorted(by_id[doc_id][2] for doc_id in ("first", "twin at the same time")) == [0, 1], "of two at once one is worked on"
    reused = conn.execute("SELECT doc_id, stage FROM document_events WHERE detail ? 'reused_from' ORDER BY doc_id, stage").fetchall()
    copies = sorted({"later", *(doc_id for doc_id in ("first", "twin at the same time") if by_id[doc_id][2] == 0)})
    assert reused == [(doc_id, stage) for doc_id in copies for stage in ("extract", "parse")]
    same = "SELECT count(DISTINCT (markdown, page_map, parser, markdown_sha256)), count(*) FROM document_markdown"
    assert conn.execute(same).fetchone() == (1, 4)
    assert conn.execute("SELECT count(DISTINCT raw_extraction) FROM file_extractions").fetchone() == (1,)
    assert {row[1] for row in rows} == {"complete"}
    assert conn.execute("SELECT count(*), count(DISTINCT doc_id) FROM document_chunks").fetchone() == (4, 4)


def test_a_stored_file_that_changed_after_submission_is_refused(conn: psycopg.Connection, tmp_path: Path, settings: Settings) -> None:
    doc_id = submit_document(b"the original text", file_name="a.txt")
    row = conn.execute("SELECT file_path FROM file_extractions").fetchone()
    assert row is not None
    (settings.storage_base_path / row[0]).write_bytes(b"the tampered text")
    ingest(conn, tmp_path, [])
    found = conn.execute("SELECT state, error_type, error_message FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone()
    assert found is not None
    assert found[:2] == ("failed", "PERMANENT")
    assert "changed" in found[2]


@pytest.mark.parametrize("mode", ["inline", "queue"])
def test_the_core_of_the_corpus_ends_as_its_manifest_expects(mode: str, corpus: Path, conn: psycopg.Connection, tmp_path: Path) -> None:
    with (corpus / "good" / "MANIFEST.tsv").open(encoding="utf-8", newline="") as file:
        expected = {row["path"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["core"] == "1"}
    ingest(conn, tmp_path, [corpus / "good" / path for path in expected], HANDOFF=mode)
    ended = {
        str(Path(source).relative_to(corpus / "good")): (state, message)
        for source, state, message in conn.execute("SELECT source_path, state, error_message FROM file_extractions").fetchall()
    }
    for path, row in expected.items():
        state, message = ended[path]
        # Where the manifest speaks of no text layer but poppler did find characters, the characters are right.
        if row["expected"].startswith("no text layer") and "chars=0" in row["readers"].split(";")[0]:
            assert (state, "OCR" in message) == ("failed", True), (path, message)
        else:
            assert state == "complete", (path, message)
