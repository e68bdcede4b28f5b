"""Each component turns red when it is broken and green again when it is mended, over HTTP, while the server goes on."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from jobs import submit_document
from jobs.front import close_sync
from jobs.health import COMPONENTS
from jobs.serve.reading import Database, DatabaseAway
from models.settings import load_settings
from tests.faults.cluster import Cluster
from tests.running import docmill, served, wait_for, worker
from tests.servers import OpenAIServer, faults
from tests.sites import client, form_token

KEY = "sk-health-7f3a91"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()


class Installation:
    """A database, a storage, a worker and a server, all of the test's own."""

    def __init__(self, cluster: Cluster, visitor: httpx2.Client, storage: Path, conninfo: str) -> None:
        self.cluster, self.visitor, self.storage, self.conninfo = cluster, visitor, storage, conninfo

    def run(self, statement: str) -> None:
        with psycopg.connect(self.conninfo, autocommit=True) as conn:
            conn.execute(statement.encode())

    def component(self, name: str) -> tuple[int, str]:
        answer = self.visitor.get("/readyz")
        found: dict[str, Any] = answer.json()
        assert found["ready"] == (answer.status_code == 200)
        assert list(found["components"]) == list(COMPONENTS)
        assert found["components"][name]["message"]
        return answer.status_code, found["components"][name]["health"]

    def turns(self, name: str, status: int, *healths: str) -> None:
        """Wait until a component is so, and the whole with it; all others are as they were before."""
        wait_for(lambda: self.component(name) in [(status, health) for health in healths], f"{name} to turn {healths}", 60)


@contextmanager
def installed(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: str) -> Iterator[Installation]:
    """An installation with a worker at work and a server; `given` is added to its environment."""
    if not cluster.running():
        cluster.start()
    name = cluster.create_database()
    environment = {
        "DATABASE_URL": cluster.conninfo(name), "STORAGE_BASE_PATH": str(tmp_path / "storage"), "EMBEDDING_PROVIDER": "hash",
        "LEASE_SECONDS": "2", "DATABASE_TIMEOUT": "2", "WORKER_POLL_SECONDS": "0.1", **given,
    }  # fmt: skip
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    load_settings.cache_clear()
    with worker(tmp_path / "worker.log"), served(tmp_path / "serve.log") as address, client(address) as visitor:
        found = Installation(cluster, visitor, tmp_path / "storage", environment["DATABASE_URL"])
        wait_for(lambda: visitor.get("/readyz").status_code == 200, "everything to be well", 120)
        yield found
    close_sync()
    load_settings.cache_clear()
    cluster.drop_database(name)


@pytest.fixture
def installation(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    with installed(cluster, tmp_path, monkeypatch) as found:
        yield found


def break_migrations(i: Installation) -> None:
    i.run("DELETE FROM docmill_migrations WHERE name LIKE '0012%'")


def mend_migrations(i: Installation) -> None:
    i.run("INSERT INTO docmill_migrations (component, name) VALUES ('docmill', '0012_sync.sql')")


def take_storage_away(i: Installation) -> None:
    i.storage.rename(i.storage.with_name("elsewhere"))
    i.storage.write_text("a file where the folder should be")


def bring_storage_back(i: Installation) -> None:
    i.storage.unlink()
    i.storage.with_name("elsewhere").rename(i.storage)


def make_storage_read_only(i: Installation) -> None:
    # Writing into the kernel's own file system fails for root too.
    i.storage.rename(i.storage.with_name("elsewhere"))
    i.storage.symlink_to("/proc/sys")


Step = Callable[[Installation], None]


@pytest.mark.parametrize(
    ("component", "broken", "mended"),
    [
        ("migrations", break_migrations, mend_migrations),
        ("storage", take_storage_away, bring_storage_back),
        ("storage", make_storage_read_only, bring_storage_back),
    ],
    ids=["a migration is missing", "storage is gone", "storage takes no writes"],
)
def test_a_component_turns_red_when_broken_and_green_when_mended(
    installation: Installation, component: str, broken: Step, mended: Step
) -> None:
    broken(installation)
    installation.turns(component, 503, "down")
    assert installation.visitor.get("/healthz").status_code == 200
    blind = ("workers", "queues", "services", "indexes") if component == "migrations" else ()
    others = ",".join(name for name in COMPONENTS if name not in (component, *blind))
    assert installation.visitor.get(f"/readyz?only={others}").status_code == 200, "nothing else is blamed"
    mended(installation)
    installation.turns(component, 200, "ok")
    assert installation.visitor.get("/").status_code == 200


Faulty = Callable[[OpenAIServer], None]
FAULTS: dict[str, tuple[Faulty, str, str]] = {
    "answers 503": (lambda service: service.script(faults.always(faults.NAMED["503"])), "down", "503"),
    "cuts every connection": (lambda service: service.script(faults.always(faults.NAMED["reset"])), "down", ""),
    "refuses the key": (lambda service: setattr(service, "key", "another key"), "refused", "401"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_service_that_fails_turns_services_red_and_its_recovery_turns_them_green(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Told alike in SQL, by the command and over HTTP; only documents that are embedded tell whether the service is well."""
    with OpenAIServer(dimensions=32, key=KEY) as service, installed(
        cluster, tmp_path, monkeypatch, EMBEDDING_PROVIDER="openai", EMBEDDING_BASE_URL=service.url, EMBEDDING_API_KEY=KEY,
        EMBEDDING_MODEL="m", EMBEDDING_DIMENSIONS="32", EMBEDDING_MAX_TEXTS="1", BREAKER_FAILURES="2", BREAKER_OPEN_SECONDS="3",
        BREAKER_MAX_OPEN_SECONDS="3", RETRY_BASE_DELAY_SECONDS="0.1", RETRY_MAX_DELAY_SECONDS="1",
    ) as i, psycopg.connect(i.conninfo, autocommit=True) as conn:  # fmt: skip

        def submit(name: str, count: int) -> None:
            for number in range(count):
                submit_document(f"{name} {number} on pumps and valves".encode(), doc_id=f"{name}{number}", file_name="a.txt")

        def in_sql() -> list[tuple[str, str]]:
            return [tuple(row) for row in conn.execute("SELECT health, breaker FROM provider_health")]

        submit("before", 3)
        wait_for(lambda: in_sql() == [("up", "closed")], "the service to be called", 60)
        i.turns("services", 200, "ok")
        fail, breaker, said = FAULTS[fault]
        fail(service)
        submit("during", 3)
        i.turns("services", 503, "down")
        wait_for(lambda: in_sql() == [(breaker, "open")], f"provider_health to say {breaker}", 60)
        wait_for(lambda: docmill("health", "--only", "services").returncode == 1, "the command to say so", 60)
        shown = i.visitor.get("/readyz").json()["components"]["services"]["message"]
        assert service.url in shown and said in shown
        assert i.visitor.get("/readyz?only=database,storage,workers,queues").status_code == 200, "nothing else is blamed"
        assert conn.execute("SELECT count(*) FROM dead_letters").fetchone() == (0,), "it is not the documents' fault"
        service.script(faults.never)
        service.key = KEY
        i.turns("services", 200, "ok", "degraded")
        # A service of which a tenth of the last hour's calls failed is shaky until more were answered.
        submit("after", 10 * service.tally.requests)
        i.turns("services", 200, "ok")
        wait_for(lambda: in_sql() == [("up", "closed")], "provider_health to say up", 60)
        assert docmill("health", "--only", "services").returncode == 0
        wait_for(
            lambda: conn.execute("SELECT count(*) FROM file_extractions WHERE state <> 'complete'").fetchone() == (0,),
            "all to complete",
            60,
        )


def test_a_database_that_stops_is_told_on_every_page_and_all_comes_back_with_it(installation: Installation) -> None:
    installation.cluster.stop("immediate")
    installation.turns("database", 503, "down")
    assert installation.component("workers") == (503, "unknown")
    for path in ("/documents", "/document?id=x", "/workers", "/dead-letters"):
        page = installation.visitor.get(path)
        assert page.status_code == 503, path
        assert 'http-equiv="refresh"' in page.text and page.headers["retry-after"] == "5"
        assert "Traceback" not in page.text
    assert installation.visitor.get("/").status_code == 503
    assert installation.visitor.get("/healthz").status_code == 200
    scraped = installation.visitor.get("/metrics")
    assert scraped.status_code == 200
    assert 'docmill_component_up{component="database"} 0.0' in scraped.text
    installation.cluster.start()
    installation.turns("database", 200, "ok")
    assert installation.visitor.get("/documents").status_code == 200


def test_a_database_that_hangs_is_told_like_one_that_is_away_and_keeps_nobody_waiting(installation: Installation) -> None:
    for _ in range(3):
        for path in ("/documents", "/queues", "/metrics"):
            assert installation.visitor.get(path).status_code == 200
    installation.cluster.freeze()
    try:
        installation.turns("database", 503, "down")
        for path in ("/documents", "/queues", "/dead-letters"):
            assert installation.visitor.get(path, timeout=30).status_code == 503, path
        scraped = installation.visitor.get("/metrics", timeout=30)
        assert 'docmill_component_up{component="database"} 0.0' in scraped.text
        assert installation.visitor.get("/healthz").status_code == 200
    finally:
        installation.cluster.thaw()
    installation.turns("database", 200, "ok")
    wait_for(lambda: installation.visitor.get("/documents").status_code == 200, "the page to come back")


async def test_a_database_that_hangs_in_mid_transaction_ends_the_question_and_the_connection(installation: Installation) -> None:
    database = Database(load_settings().model_copy(update={"serve_query_seconds": 0.5}))
    try:
        async with asyncio.timeout(30):
            with pytest.raises(DatabaseAway):
                async with database.look() as look:
                    await look.rows("metric_batches")
                    installation.cluster.freeze()
                    await look.rows("metric_batches")
            installation.cluster.thaw()
            async with database.look() as look:
                assert await look.rows("metric_batches") == []
    finally:
        installation.cluster.thaw()
        await database.close()


def test_a_form_that_meets_no_database_is_not_sent_again_by_itself(installation: Installation) -> None:
    installation.run(
        """INSERT INTO dead_letters (doc_id, version, user_id, correlation_id, stage, error_type, error_message)
        VALUES ('a', 1, 'u', 'c', 'parse', 'PERMANENT', 'cannot be read')"""
    )
    token = form_token(installation.visitor.get("/dead-letters").text)
    installation.cluster.stop("immediate")
    answer = installation.visitor.post("/dead-letters/resolve", data={"action": "requeue", "id": "1", "csrf": token})
    assert answer.status_code == 503
    assert 'http-equiv="refresh"' not in answer.text and "by itself" not in answer.text
    installation.cluster.start()


def test_a_server_that_starts_before_its_database_serves_when_that_comes(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cluster.running():
        cluster.start()
    name = cluster.create_database()
    monkeypatch.setenv("DATABASE_URL", cluster.conninfo(name))
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path / "storage"))
    cluster.stop()
    with served(tmp_path / "serve.log") as address, client(address) as visitor:
        assert visitor.get("/documents").status_code == 503
        cluster.start()
        wait_for(lambda: visitor.get("/documents").status_code == 200, "the page to come back")


def test_a_server_that_only_shows_makes_no_schema_and_says_in_its_log_that_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    log = tmp_path / "serve.log"
    with served(log, STORAGE_BASE_PATH=str(tmp_path / "base"), SERVE_READ_ONLY="true") as address, client(address) as visitor:
        wait_for(lambda: "run `docmill migrate`" in log.read_text(), f"a line in {log}")
        answer = visitor.get("/documents")
        assert (answer.status_code, "docmill migrate" in answer.text) == (503, True)


def test_a_killed_worker_turns_workers_red_until_another_one_runs(installation: Installation, tmp_path: Path) -> None:
    with psycopg.connect(installation.conninfo, autocommit=True) as conn:
        row = conn.execute("SELECT pid FROM worker_registry").fetchone()
        assert row is not None
        os.kill(row[0], signal.SIGKILL)
        # So much later: nobody hears of it any more.
        wait_for(lambda: not Path(f"/proc/{row[0]}/cmdline").exists() or not Path(f"/proc/{row[0]}/cmdline").read_bytes(), "it to be gone")
        conn.execute("UPDATE worker_registry SET heartbeat_at = now() - interval '5 minutes'")
        installation.turns("workers", 503, "down")
        conn.execute("SELECT submit_document('uploads/x', doc_id => 'waits')")
        installation.turns("queues", 503, "down")
    with worker(tmp_path / "second.log"):
        installation.turns("workers", 200, "ok", "degraded")
        installation.turns("queues", 200, "ok")


def test_a_component_that_nobody_knows_is_refused(installation: Installation) -> None:
    answer = installation.visitor.get("/readyz?only=database,moon")
    assert answer.status_code == 400
    assert "moon" in answer.text
    shutil.rmtree(installation.storage / "temp", ignore_errors=True)
    assert installation.visitor.get("/readyz?only=storage").status_code == 200
