"""TLS to Postgres, over real sockets: every connection is encrypted and checked, and none goes on where that cannot be had.

The Postgres that ships with docmill is built without TLS, so here it stands behind a front that speaks TLS as a server does
(`tests.servers.PostgresTls`); where the machine has a Postgres with TLS of its own, that is asked too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import httpx2
import psycopg
import pytest

from jobs import submit_document
from jobs.front import close_sync
from models.settings import load_settings
from tests.faults.cluster import Cluster, free_port
from tests.running import database_shell, docmill, served, wait_for, worker
from tests.servers import Authority, PostgresTls

PASSWORD = "p@ss/w:rd %41 ü"
CLIENT = "a-client-of-docmill"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server that lets the role `mill` in by its password, on all addresses of this machine."""
    cluster = Cluster(listen_addresses="*")
    try:
        cluster.secure(mill=PASSWORD)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    """The name of a database of `mill`'s own with nothing in it but pgvector."""
    name = cluster.create_database("template1", "mill")
    with psycopg.connect(cluster.conninfo(name), autocommit=True) as conn:
        conn.execute("CREATE EXTENSION vector")
    yield name
    close_sync()
    load_settings.cache_clear()
    cluster.drop_database(name)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path / "storage"))
    monkeypatch.setenv("EMBEDDING_PROVIDER", "hash")
    monkeypatch.chdir(tmp_path)
    load_settings.cache_clear()


def url(database: str, port: int, host: str = "localhost", **options: object) -> str:
    return f"postgresql://mill:{quote(PASSWORD, safe='')}@{host}:{port}/{database}?{urlencode(options)}"


def test_every_connection_is_encrypted_checked_and_shows_its_certificate(
    cluster: Cluster, database: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = authority.files_for("client", common_name=CLIENT)
    with PostgresTls(cluster.port, authority.context_for("localhost", ask_clients=True)) as front:
        address = url(database, front.port, sslmode="verify-full", sslrootcert=authority.file, sslcert=certificate, sslkey=key)
        monkeypatch.setenv("DATABASE_URL", address)
        migrated = docmill("migrate")
        assert migrated.returncode == 0, migrated.stderr
        with psycopg.connect(cluster.conninfo(database), autocommit=True) as conn, worker(tmp_path / "worker.log") as process:
            submit_document(b"Pumps and valves.", file_name="a.txt", doc_id="front")
            ended = "SELECT count(*) FROM file_extractions WHERE state = 'complete' AND doc_id = 'front'"
            wait_for(lambda: conn.execute(ended).fetchone() == (1,), "the document to be complete", 90, process)
            listening = "SELECT count(*) FROM pg_stat_activity WHERE query ILIKE 'listen %' AND usename = 'mill'"
            wait_for(lambda: conn.execute(listening).fetchone() >= (1,), "the worker to listen", 60, process)  # type: ignore[operator]
        with served(tmp_path / "serve.log") as site:
            assert "a.txt" in httpx2.get(f"{site}/documents", trust_env=False, timeout=60).text
        health = docmill("health", "--only", "database")
        assert (health.returncode, health.stderr) == (0, ""), health.stderr
        assert "degraded" not in health.stdout
        if shutil.which("psql"):  # the one that ships with the embedded server knows no TLS
            with database_shell() as shell:
                told = shell.communicate("SELECT doc_id FROM file_extractions;\n", timeout=60)
            assert "front" in told[0], told
        assert set(front.peers) == {CLIENT}
        assert len(front.peers) >= 8  # migrate; the worker's pool, listener, leases, alerts; the front door; serve; health
        assert front.in_the_clear == 0
    logs = (tmp_path / "worker.log").read_text() + (tmp_path / "serve.log").read_text()
    assert "not encrypted" not in logs


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("another authority", "certificate verify failed"),
        ("another name", 'does not match host name "localhost"'),
        ("a server without TLS", "does not support SSL"),
        ("no certificate of the client", "certificate required|alert|connection to the database"),
    ],
)
def test_where_the_server_cannot_be_told_nothing_is_sent(
    cluster: Cluster, authority: Authority, tmp_path: Path, trouble: str, words: str
) -> None:
    (tmp_path / "other").mkdir()
    context = authority.context_for(
        "db.example" if trouble == "another name" else "localhost", ask_clients=trouble == "no certificate of the client"
    )
    trusted = Authority(tmp_path / "other").file if trouble == "another authority" else authority.file
    with PostgresTls(cluster.port, None if trouble == "a server without TLS" else context) as front:
        address = url("postgres", front.port, sslmode="verify-full", sslrootcert=trusted)
        done = docmill("migrate", DATABASE_URL=address)
        assert front.in_the_clear == 0
    assert done.returncode == 3, done.stderr
    assert "DATABASE_URL: no connection to the database" in done.stderr
    assert any(word in done.stderr for word in words.split("|")), done.stderr
    assert PASSWORD not in done.stderr and quote(PASSWORD, safe="") not in done.stderr


def test_the_authorities_of_the_system_are_those_of_ssl_cert_file(
    cluster: Cluster, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgresTls(cluster.port, authority.server_context) as front:
        address = url("postgres", front.port, sslrootcert="system")  # which means sslmode=verify-full
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            psycopg.connect(address)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        done = docmill("health", "--only", "database", "--json", DATABASE_URL=address)
        assert '"encrypted": true' in done.stdout, done.stdout + done.stderr


def own_address() -> str:
    """An address of this machine that is not the loopback's; a datagram socket finds out without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


def test_a_connection_in_the_clear_to_another_machine_is_complained_of(cluster: Cluster, database: str, tmp_path: Path) -> None:
    address = url(database, cluster.port, own_address())
    migrated = docmill("migrate", DATABASE_URL=address)
    assert migrated.returncode == 0, migrated.stderr
    assert "is not encrypted, and sslmode=prefer allows that" in migrated.stderr
    with worker(tmp_path / "worker.log", DATABASE_URL=address) as process:
        wait_for(lambda: "is not encrypted" in (tmp_path / "worker.log").read_text(), "the worker to say so", 60, process)
    health = docmill("health", "--only", "database", "--strict", DATABASE_URL=address)
    assert health.returncode == 1 and "degraded" in health.stdout and "sslmode=verify-full" in health.stdout, health.stdout
    decided = docmill("health", "--only", "database", "--strict", DATABASE_URL=f"{address}sslmode=disable")
    assert (decided.returncode, decided.stderr) == (0, ""), decided.stdout


@pytest.fixture
def true_server(authority: Authority) -> Iterator[int]:
    """The port of a Postgres that does TLS itself and lets in nobody without it and a certificate."""
    programs = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    if not programs or os.geteuid() != 0:
        pytest.skip("no Postgres with TLS on this machine, or no right to start it")
    account = "postgres"
    # Not below pytest's own folder: another run of pytest would take away the server's right to enter it.
    folder = Path(tempfile.gettempdir()) / f"docmill-tls-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        shutil.chown(folder, account)
    except LookupError:
        folder.rmdir()
        pytest.skip("no account postgres on this machine")
    certificate, key = authority.files_for("localhost")
    port, data = free_port(), folder / "data"

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [str(part) for part in command], user=account, cwd="/", capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(programs[-1] / "initdb", "-D", data, "--auth=trust", "-U", "postgres")
    for source, target in ((certificate, "server.crt"), (key, "server.key"), (authority.file, "root.crt")):
        shutil.copy(source, data / target)
        shutil.chown(data / target, account)
        (data / target).chmod(0o600)
    settings = {
        "ssl": "on", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key", "ssl_ca_file": "root.crt", "port": str(port),
        "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
    }  # fmt: skip
    with (data / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 cert\n")
    run(programs[-1] / "pg_ctl", "-w", "-D", data, "-l", data / "log", "start")
    try:
        yield port
    finally:
        run(programs[-1] / "pg_ctl", "-w", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def test_a_true_server_with_tls_is_spoken_to_in_the_same_way(true_server: int, authority: Authority) -> None:
    certificate, key = authority.files_for("client", common_name="postgres")
    own = f"&sslcert={certificate}&sslkey={key}"
    address = f"postgresql://postgres@localhost:{true_server}/postgres?sslmode=verify-full&sslrootcert={authority.file}"
    good = docmill("health", "--only", "database", "--json", DATABASE_URL=address + own)
    assert good.returncode == 0 and '"encrypted": true' in good.stdout, good.stdout
    for refused in (address, f"postgresql://postgres@localhost:{true_server}/postgres?sslmode=disable"):
        done = docmill("health", "--only", "database", DATABASE_URL=refused)
        assert done.returncode == 1 and "down" in done.stdout, done.stdout
