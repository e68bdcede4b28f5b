"""What a real worker logs: every line a JSON object, one line for each outcome, context in it, and nothing of the documents."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import psycopg
import pytest

import jobs
from jobs.front import close_sync
from models.settings import Settings, load_settings
from tests.running import REPOSITORY, wait_for, worker

OPEN = "SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"
SECRET_WORDS = "zebra quagga okapi"
SAMPLES = ("supply-contract.pdf", "warranty-policy.docx", "preisliste-2026.xlsx", "complaint-lot-2.eml", "onboarding-guide.md")


@pytest.fixture(autouse=True)
def front_door(settings: Settings) -> Iterator[None]:
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


def lines_of(*files: Path) -> list[dict[str, Any]]:
    """Every line of these files; one that is no JSON object fails the test and is shown."""
    lines = []
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                pytest.fail(f"this line is no JSON: {text!r}")
            assert isinstance(line, dict)
            lines.append(line)
    return lines


def submit(conn: psycopg.Connection, tmp_path: Path) -> dict[str, str]:
    """Submit documents with every kind of end, and return doc_id -> state that they must end with."""
    for name in SAMPLES:
        jobs.submit_document(REPOSITORY / "samples" / name, doc_id=name, correlation_id=f"trace {name}", connection=conn)
    jobs.submit_document(f"A text about {SECRET_WORDS}.".encode(), doc_id="words", file_name="words.txt", connection=conn)
    jobs.submit_document(b"", doc_id="empty", file_name="empty.pdf", connection=conn)
    jobs.submit_document(b"%PDF-1.7\n" + SECRET_WORDS.encode(), doc_id="broken", file_name="broken.pdf", connection=conn)
    jobs.submit_document(b"\x00\x01\x02" * 50, doc_id="evil", file_name='evil\n{"level": "x"}\u2028.bin', connection=conn)
    ends = dict.fromkeys((*SAMPLES, "words"), "complete") | dict.fromkeys(("empty", "broken", "evil"), "failed")
    with ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("inside.md", f"# In a zip\n\n{SECRET_WORDS}")
    jobs.submit_batch(tmp_path / "some.zip", batch_id="zipped")
    return ends


@pytest.mark.parametrize("handoff", ["inline", "queue"])
def test_a_worker_says_each_outcome_once_with_all_that_is_known_and_nothing_of_the_content(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, handoff: str
) -> None:
    ends = submit(conn, tmp_path)
    faults = "raise:RetryableError@stage_started:check;doc=words;once=" + str(tmp_path / "mark")
    with worker(
        tmp_path / "stderr", LOG_FORMAT="json", HANDOFF=handoff, LOG_FILE_PATH="docmill.log", DOCMILL_FAULTS=faults,
        RETRY_BASE_DELAY_SECONDS="0.1", PYTHONWARNINGS="default",
    ) as process:  # fmt: skip
        everything = "SELECT count(*) = 10 FROM file_extractions"
        wait_for(lambda: conn.execute(everything).fetchone() == (True,) and conn.execute(OPEN).fetchone() == (0,), "the end", 120, process)
        name = f"{os.uname().nodename}:{process.pid}"
    states: dict[str, str] = dict(conn.execute("SELECT doc_id, state::text FROM file_extractions WHERE batch_id IS NULL").fetchall())
    assert states == ends

    lines = lines_of(tmp_path / "stderr")
    assert lines == lines_of(*(settings.storage_base_path / "logs").iterdir()), "the file says the same as the console"
    assert {"time", "level", "message", "logger", "worker"} <= set.intersection(*(set(line) for line in lines))
    assert {line["worker"] for line in lines} == {name}

    told = [line for line in lines if "doc_id" in line]
    by_end = Counter((line["doc_id"], line["level"]) for line in told if line["level"] in {"SUCCESS", "ERROR"} and "batch_id" not in line)
    assert by_end == {(doc_id, "SUCCESS" if end == "complete" else "ERROR"): 1 for doc_id, end in ends.items()}
    assert Counter(line["level"] for line in told if line["doc_id"] == "words") == {"SUCCESS": 1, "WARNING": 1}
    for line in told:
        assert {"correlation_id", "stage", "attempt", "duration_ms"} <= set(line), line
        assert line["duration_ms"] > 0 and isinstance(line["attempt"], int)
    correlations: dict[str, str] = dict(conn.execute("SELECT doc_id, correlation_id FROM file_extractions").fetchall())
    assert {line["doc_id"]: line["correlation_id"] for line in told} == correlations
    (retry,) = (line for line in told if line["level"] == "WARNING")
    assert (retry["doc_id"], retry["stage"], retry["attempt"], retry["error_type"]) == ("words", "check", 0, "RETRYABLE")
    unpacked = [line for line in lines if line.get("batch_id") == "zipped"]
    assert [line["level"] for line in unpacked] == ["SUCCESS", "SUCCESS"], "the archive, and the document in it"

    # A few lines about the worker itself; none for each job.
    own = [line for line in lines if "doc_id" not in line and "batch_id" not in line]
    assert len(own) <= 8, [line["message"] for line in own]


def test_nothing_of_a_document_is_logged_at_any_level(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    submit(conn, tmp_path)
    with worker(tmp_path / "stderr", LOG_FORMAT="json", LOG_LEVEL="TRACE") as process:
        everything = "SELECT count(*) = 10 FROM file_extractions"
        wait_for(lambda: conn.execute(everything).fetchone() == (True,) and conn.execute(OPEN).fetchone() == (0,), "the end", 120, process)
    lines = lines_of(tmp_path / "stderr")
    assert any(line["level"] == "DEBUG" and "duration_ms" in line for line in lines), "each stage, for who looks for slowness"
    text = (tmp_path / "stderr").read_text()
    passages = [
        row[0] for row in conn.execute("SELECT substr(content, 20, 60) FROM document_chunks WHERE length(content) > 100").fetchall()
    ]
    assert passages and [passage for passage in passages if json.dumps(passage)[1:-1] in text or passage in text] == []
    assert not any(word in text for word in SECRET_WORDS.split())


def test_text_for_people_names_the_document_and_what_became_of_it(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    jobs.submit_document(b"", doc_id="empty", file_name="empty.pdf", connection=conn)
    with worker(tmp_path / "stderr") as process:
        wait_for(lambda: conn.execute(OPEN).fetchone() == (0,), "the end", 60, process)
    (line,) = (line for line in (tmp_path / "stderr").read_text().splitlines() if "empty" in line)
    assert "ERROR" in line and "PERMANENT failed" in line and "doc_id=empty" in line and "stage=validate" in line
