"""Figures of the dashboard that SQL confirms, and documents whose name or data is odd."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from models.settings import Settings
from tests.running import served
from tests.sites import Page, client, failed_document

UNFINISHED = re.compile(r"Unfinished over the last hour.*?<tbody>(.*?)</tbody>", re.DOTALL)


def minutes(html: str) -> list[int]:
    """Return how many documents were unfinished in each minute, as the table beside the chart has it: the last one first."""
    table = UNFINISHED.search(html)
    assert table is not None
    return [int(number) for number in re.findall(r"<td[^>]*>(\d+)</td>", table[1])]


def test_requeued_and_deleted_documents_change_no_minute_before(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    for doc_id in ("a", "b", "c"):
        failed_document(conn, doc_id)
    conn.execute("SELECT requeue_document(doc_id) FROM file_extractions")
    conn.execute("SELECT submit_document('uploads/x', doc_id => 'gone')")
    conn.execute("SELECT delete_document('gone')")
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        found = minutes(visitor.get("/").text)
    assert (found[0], found[-1]) == (3, 0)


def test_a_duplicate_whose_original_is_deleted_was_not_there_before(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    conn.execute("SELECT submit_document('uploads/x', doc_id => 'duplicate')")
    conn.execute(
        """INSERT INTO document_events (doc_id, user_id, correlation_id, event, detail)
        VALUES ('duplicate', 'default', 'c', 'duplicate', '{}'),
            ('duplicate', 'default', 'c', 'requeued', '{"duplicate_of": "original"}')"""
    )
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        found = minutes(visitor.get("/").text)
    assert (found[0], found[-1]) == (1, 0)


def test_a_document_whose_data_no_reader_of_json_takes_has_a_page(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    conn.execute("SELECT submit_document('uploads/x', doc_id => 'deep')")
    conn.execute("ALTER TABLE file_extractions DISABLE TRIGGER file_extractions_metadata")
    deep = '{"a":' * 3000 + "1e5000" + "}" * 3000
    conn.execute("UPDATE file_extractions SET metadata = %s::jsonb", [deep])
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        answer = visitor.get("/document", params={"id": "deep"})
    assert answer.status_code == 200
    assert "Metadata of the submitter" in answer.text


def test_what_has_no_name_to_be_seen_is_called_by_its_id(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    conn.execute("SELECT submit_document('uploads/x', doc_id => 'nameless', file_name => E'\\u3164\\u2800\\u00ad')")
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        assert ">nameless</a>" in visitor.get("/documents").text


def test_days_are_those_of_utc_wherever_the_database_is(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    conn.execute(f"ALTER DATABASE {conn.info.dbname} SET timezone = 'Pacific/Kiritimati'".encode())
    before = datetime.now(UTC)
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        text = Page(visitor.get("/providers").text).text
    assert re.findall(r"\d{4}-\d\d-\d\d", text)[-1] in {f"{moment:%Y-%m-%d}" for moment in (before, datetime.now(UTC))}


def test_the_heading_tells_how_many_alerts_there_are_beyond_those_shown(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path
) -> None:
    conn.execute(
        """INSERT INTO alert_conditions (rule, subject, message, first_seen_at, last_seen_at, opened_at)
        SELECT (SELECT min(r.rule) FROM alert_rules AS r), 'w' || n, 'Worker ' || n, now(), now(), now() FROM generate_series(1, 15) AS n"""
    )
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        assert "Open alerts: 15, the first 10" in visitor.get("/").text
