"""A storage that is not mounted, or full, for a while: what needs it waits, counts no attempt, and goes on."""

from __future__ import annotations

import psycopg
import pytest

from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.storage import LocalStorage
from jobs.health import check_health
from jobs.pipeline.runner import Runner
from jobs.stages import check, parse, validate
from jobs.worker import DocmillApp
from models.settings import Settings
from tests.integration.conftest import Bench
from tests.integration.outside import Outside

STANDS = "SELECT state::text, retry_count, error_message, waiting_since IS NOT NULL FROM file_extractions"


@pytest.fixture
def storage(bench: Bench) -> LocalStorage:
    return LocalStorage.prepared(bench.settings)


async def step(bench: Bench, runner: Runner) -> None:
    """Run the next waiting job."""
    found = bench.fetch()
    assert found is not None
    await runner.run(*found)
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0].id])


@pytest.mark.parametrize("task", ["validate", "parse"])
async def test_a_document_outlives_a_storage_that_is_not_mounted(
    outside: Outside, storage: LocalStorage, sandbox: ProcessSandbox, task: str
) -> None:
    bench = outside.bench
    stored = storage.store_upload("a", b"some words", 1000)
    bench.conn.execute("SELECT submit_document(%s, doc_id => 'a', file_name => 'a.txt')", [stored.file_path])
    stages = {"validate": validate.run, "parse": parse.run, "check": check.run}
    outside.passages = 2
    runner = outside.runner(stages, settings={"handoff": "queue"}, sandbox=sandbox)
    if task == "parse":
        await step(bench, runner)
    away = storage.base.with_name("away")
    storage.base.rename(away)
    for _ in range(bench.settings.max_retry_attempts + 2):
        await step(bench, runner)
        state, attempts, message, waits = bench.one(STANDS)
        assert (state, attempts, waits) == ("retrying", 0, True)
        assert "is not there: is it mounted?" in message
    (component,) = [each for each in await check_health(bench.settings) if each.name == "storage"]
    assert component.health == "down" and "is it mounted" in component.message
    assert not storage.base.exists()
    bench.conn.execute("UPDATE file_extractions SET waiting_since = now() - interval '20 minutes'")
    found = bench.all("SELECT rule, subject, message FROM alert_findings WHERE rule = 'storage_away'")
    assert [row[:2] for row in found] == [("storage_away", "storage")]
    assert found[0][2].startswith("1 documents and archives wait for the storage, for up to 20 min: The storage at")
    away.rename(storage.base)
    await outside.work(runner)
    assert bench.one("SELECT state::text, retry_count, waiting_since FROM file_extractions") == ("complete", 0, None)
    assert bench.one("SELECT count(*) FROM dead_letters") == (0,)


@pytest.mark.parametrize("documents", [0, 1])
def test_a_worker_makes_a_storage_only_while_there_are_no_documents(settings: Settings, conn: psycopg.Connection, documents: int) -> None:
    for number in range(documents):
        conn.execute("SELECT submit_document('uploads/x', doc_id => %s)", [str(number)])
    DocmillApp(settings, import_paths=[])._prepare_storage(conn.info.dsn)
    assert settings.storage_base_path.exists() == (documents == 0)
