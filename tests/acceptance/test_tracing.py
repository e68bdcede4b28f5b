"""Spans of a real worker reach a real collector where OTEL_* says so, disturb nothing where it is down, and cost nothing elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

import jobs
from jobs import tracing
from jobs.front import close_sync
from models.settings import Settings, load_settings
from models.stages import STAGES
from tests.running import REPOSITORY, wait_for, worker
from tests.servers.otlp import Collector, Span

OPEN = "SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"
TRACE = UUID("0123456789abcdef0123456789abcdef")
STAGE_NAMES = [stage.name for stage in STAGES]


@pytest.fixture(autouse=True)
def front_door(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    load_settings.cache_clear()
    yield
    close_sync()
    load_settings.cache_clear()


def work(conn: psycopg.Connection, log: Path, **environment: str) -> None:
    with worker(log, **environment) as process:
        wait_for(lambda: conn.execute(OPEN).fetchone() == (0,), "the end", 120, process)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
def test_all_spans_of_a_document_are_one_trace_and_say_how_each_stage_went(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path, handoff: str
) -> None:
    jobs.submit_document(REPOSITORY / "samples/onboarding-guide.md", doc_id="good", correlation_id=str(TRACE), connection=conn)
    jobs.submit_document(b"%PDF-1.7\nSECRETWORD", doc_id="bad", file_name="bad.pdf", correlation_id="no uuid", connection=conn)
    with Collector() as collector:
        work(
            conn, tmp_path / "log", HANDOFF=handoff, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_RESOURCE_ATTRIBUTES="zone=north",
            OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer t0k3n-secret", OTEL_BSP_SCHEDULE_DELAY="100",
        )  # fmt: skip
        spans = collector.spans
    assert {request.headers["authorization"] for request in collector.log} == {"Bearer t0k3n-secret"}
    assert "t0k3n-secret" not in (tmp_path / "log").read_text()

    good = of_trace(spans, TRACE.hex)
    assert [span.name for span in good if span.parent_id] == STAGE_NAMES
    documents = {span.span_id: span for span in good if not span.parent_id}
    assert {span.name for span in documents.values()} == {"document"} and len(documents) == (1 if handoff == "inline" else len(STAGES))
    assert {span.parent_id for span in good if span.parent_id} == set(documents)
    assert not any(span.failed for span in good) and all(span.nanoseconds > 0 for span in good)
    parse = next(span for span in good if span.name == "parse")
    assert (
        parse.attributes["docmill.doc_id"] == "good" and parse.attributes["docmill.attempt"] == 0 and "docmill.cpu_ms" in parse.attributes
    )
    assert parse.resource["service.name"] == "docmill" and parse.resource["zone"] == "north"

    bad = of_trace(spans, f"{tracing.trace_id_of('no uuid'):032x}")
    (failed,) = (span for span in bad if span.failed)
    assert (failed.name, failed.attributes["error.type"]) == ("parse", "ParseError")
    assert "cannot be parsed" in failed.message
    assert "SECRETWORD" not in repr(spans)


def of_trace(spans: list[Span], trace_id: str) -> list[Span]:
    return [span for span in spans if span.trace_id == trace_id]


def test_a_collector_that_is_away_keeps_no_document_and_no_worker_waiting(
    settings: Settings, conn: psycopg.Connection, tmp_path: Path
) -> None:
    with Collector() as collector:
        gone = collector.url
    jobs.submit_document(b"Some text.", doc_id="a", file_name="a.txt", connection=conn)
    work(conn, tmp_path / "log", OTEL_EXPORTER_OTLP_ENDPOINT=gone, OTEL_BSP_SCHEDULE_DELAY="100", LOG_FORMAT="json")
    assert conn.execute("SELECT state::text FROM file_extractions").fetchone() == ("complete",)
    assert conn.execute("SELECT count(*) FROM worker_registry").fetchone() == (0,), "it has signed off"
    assert "Stopped worker" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("environment", "configured"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ({"OTEL_SDK_DISABLED": "TRUE", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
    ],
)
def test_spans_are_sent_only_where_the_usual_variables_say_where_to(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], configured: bool
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert tracing.is_configured() is configured


def test_where_spans_are_not_wanted_nothing_of_opentelemetry_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from jobs import tracing
tracing.start_tracing("h:1")()
with tracing.span("parse", doc_id="a") as note:
    note(cpu_ms=1)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "docmill knows otlp over http/protobuf, and console"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "over 'grpc'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "MISSING": "1"}, "Install docmill[otel]"),
    ],
)
def test_what_cannot_be_sent_is_said_and_no_worker_stays_out_for_it(environment: dict[str, str], said: str) -> None:
    code = """
import os, sys
if os.environ.get("MISSING"):
    sys.modules["opentelemetry"] = None
from jobs import tracing
tracing.start_tracing("h:1")()
with tracing.span("parse"):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY), **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
