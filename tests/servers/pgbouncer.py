"""PgBouncer from the operating system's packages, over a server of the tests' own: one database name a way of pooling."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.faults.cluster import free_port
from tests.servers.tls import Authority

BINARY = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
USER, PASSWORD = "docmill", "a-password-of-the-tests"


def missing() -> str:
    """Why it cannot run here, or nothing."""
    return "" if Path(BINARY).exists() else "pgbouncer is not installed (Debian: apt-get install pgbouncer)"


class PgBouncer:
    """A pooler before a database: `transaction` and `session` are where it is by each way. It asks for a password (SCRAM).

    `authority` and `addresses`: it listens there with TLS, and takes nothing without.
    """

    def __init__(
        self, conninfo: str, *, system_user: str | None, connections: int = 10, authority: Authority | None = None, address: str = ""
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="docmill-pgbouncer-"))
        self.port = free_port()
        self._system_user, self._authority, self._address = system_user, authority, address
        to = conninfo_to_dict(conninfo)
        server = " ".join(f"{name}={to[name]}" for name in ("host", "port", "dbname", "user") if to.get(name))
        tls = ""
        if authority is not None:
            certificate, key = authority.files_for(*authority.names)
            shutil.copy(certificate, self.folder / "certificate.pem")
            shutil.copy(key, self.folder / "key.pem")
            tls = (
                f"client_tls_sslmode = require\nclient_tls_key_file = {self.folder}/key.pem\n"
                f"client_tls_cert_file = {self.folder}/certificate.pem\n"
            )
        (self.folder / "users.txt").write_text(f'"{USER}" "{PASSWORD}"\n')
        (self.folder / "pgbouncer.ini").write_text(
            f"[databases]\nby_transaction = {server} pool_mode=transaction pool_size={connections}\n"
            f"by_session = {server} pool_mode=session pool_size=200\n"
            f"[pgbouncer]\nlisten_addr = {'*' if address else '127.0.0.1'}\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {self.folder}/users.txt\nadmin_users = {USER}\nmax_client_conn = 1000\n"
            f"max_prepared_statements = 0\ntcp_keepidle = 10\ntcp_keepintvl = 5\ntcp_keepcnt = 3\n"
            f"logfile = {self.folder}/log\n{tls}".replace(self._unknown(), "")
        )
        if system_user is not None:
            for path in (self.folder, *self.folder.iterdir()):
                shutil.chown(path, system_user)

    @staticmethod
    def _unknown() -> str:
        """What older ones refuse in their configuration: they have no prepared statements to switch off."""
        version = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
        return "max_prepared_statements = 0\n" if tuple(map(int, version.split(".")[:2])) < (1, 21) else "\0"

    def _conninfo(self, database: str, address: str) -> str:
        secure = "" if self._authority is None else f" sslmode=verify-full sslrootcert={self._authority.file}"
        return f"host={address or '127.0.0.1'} port={self.port} dbname={database} user={USER} password={PASSWORD}{secure}"

    def transaction(self, address: str = "") -> str:
        """Where a connection of the server is lent for a transaction."""
        return self._conninfo("by_transaction", address or self._address)

    def session(self, address: str = "") -> str:
        """Where a connection of the server is lent for a session."""
        return self._conninfo("by_session", address or self._address)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def server_connections(self) -> int:
        """How many connections to the server the transactions share now."""
        with psycopg.connect(self._conninfo("pgbouncer", self._address), autocommit=True, prepare_threshold=None) as admin:
            cursor = psycopg.ClientCursor(admin)  # its console knows simple queries alone
            return sum(1 for row in cursor.execute("SHOW SERVERS").fetchall() if "by_transaction" in row)

    def __enter__(self) -> Self:
        with (self.folder / "output").open("ab") as output:
            command = [BINARY, str(self.folder / "pgbouncer.ini")]
            self._process = subprocess.Popen(command, stdout=output, stderr=output, user=self._system_user, cwd="/")
        end = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(self.session(), connect_timeout=5).close()
                return self
            except psycopg.OperationalError as error:
                if time.monotonic() > end or self._process.poll() is not None:
                    self.__exit__()
                    raise AssertionError(f"pgbouncer did not start: {error}") from error
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM if self._process.poll() is None else 0)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
