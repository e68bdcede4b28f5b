"""The embedded server's socket knows no passwords: nobody gets to it but the user that the server runs as, and root."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.embedded import _close_to_others
from models.errors import ConfigurationError
from tests.running import REPOSITORY

NAMES = ("a folder with blanks", "Ümläute", "long" * 25, "plain")
NOBODY = 65534
LOOK = """
import json, os
from pathlib import Path
import psycopg
from psycopg.conninfo import conninfo_to_dict
from jobs.database import conninfo_of
from models.settings import load_settings

def tried(folder):
    '''What somebody else can do, tried in a process of theirs.'''
    there, mine = os.pipe()
    if os.fork() == 0:
        os.setgroups([])
        os.setgid(%(nobody)d)
        os.setuid(%(nobody)d)
        done = []
        try:
            psycopg.connect(uri).close()
            done.append("connected")
        except psycopg.OperationalError as error:
            done += [] if "Permission denied" in str(error) else [str(error)]
        try:
            (folder / "x").touch()
            done.append("wrote")
        except PermissionError:
            pass
        os.write(mine, json.dumps(done).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(there, 1000))

uri = conninfo_of(load_settings())
folder = Path(conninfo_to_dict(uri)["host"])
with psycopg.connect(uri) as conn:
    superuser = conn.execute("SELECT usesuper FROM pg_user WHERE usename = current_user").fetchone()[0]
modes = [path.stat().st_mode & 0o777 for path in (folder, folder / ".s.PGSQL.5432")]
facts = {"superuser": superuser, "folder": str(folder), "modes": modes}
if os.geteuid() == 0:
    facts["tried"] = tried(folder)
    folder.chmod(0o777)
    facts["tried in an open folder"] = tried(folder)
    folder.chmod(0o700)
print(json.dumps(facts), flush=True)
""" % {"nobody": NOBODY}  # noqa: UP031 - full of braces


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder with a short path, which the server's own user may enter; pytest's is neither."""
    made = Path(tempfile.mkdtemp(prefix="docmill-"))
    made.chmod(0o755)
    (made / "tmp").mkdir()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def environment_of(base: Path, storage: Path, tmp: str = "tmp") -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG") and name != "DATABASE_URL"}
    return {**environment, "PYTHONPATH": str(REPOSITORY), "STORAGE_BASE_PATH": str(storage), "TMPDIR": str(base / tmp)}


def look(base: Path, storage: Path, tmp: str = "tmp") -> subprocess.CompletedProcess[str]:
    """Start the server in a process of its own, with such a folder for temporary files, and look at it."""
    given = environment_of(base, storage, tmp)
    return subprocess.run([sys.executable, "-c", LOOK], env=given, cwd=base, capture_output=True, text=True, timeout=120, check=False)


def facts_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize("name", NAMES, ids=["blanks", "umlauts", "long", "plain"])
def test_nobody_else_gets_to_the_embedded_server(base: Path, name: str) -> None:
    storage = base / name
    for _ in range(2):  # the folder of the socket is there the second time
        facts = facts_of(look(base, storage))
        assert facts["superuser"] is True
        assert Path(facts["folder"]).is_relative_to(base / "tmp") == (name != "plain")
        assert facts["modes"] == [0o700, 0o700]
        if os.geteuid() == 0:
            assert facts["tried"] == []
            assert facts["tried in an open folder"] == ["wrote"], "the socket by itself lets nobody in"
    text = (storage / "postgres" / "postgresql.conf").read_text()
    assert text.count("\nunix_socket_permissions") == 1


def test_holders_from_before_a_power_failure_keep_no_server_running(base: Path) -> None:
    storage = base / "plain"
    facts_of(look(base, storage))
    # Nobody has taken themselves off the list, and the number of one of them is another process's now.
    holders = storage / "postgres" / ".handle_pids.json"
    holders.write_text(json.dumps([os.getpid()]))
    os.utime(holders, (0, 0))  # before this process began
    facts_of(look(base, storage))
    left = storage / "postgres" / "postmaster.pid"
    try:
        assert not left.exists(), "the last to hold the server stops it"
    finally:
        if left.exists():
            os.kill(int(left.read_text().split()[0]), signal.SIGINT)


def test_a_list_of_holders_that_a_power_failure_has_damaged_keeps_no_server_from_starting(base: Path) -> None:
    storage = base / "plain"
    facts_of(look(base, storage))
    (storage / "postgres" / ".handle_pids.json").write_bytes(bytes(4))
    facts_of(look(base, storage))
    assert not (storage / "postgres" / "postmaster.pid").exists()


def test_a_server_that_was_started_again_runs_until_the_last_that_held_it_before_has_ended(base: Path) -> None:
    storage = base / "plain"
    file = storage / "postgres" / "postmaster.pid"
    command = [sys.executable, "-c", LOOK + "input()"]
    with subprocess.Popen(command, env=environment_of(base, storage), cwd=base, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.read(1) == b"{"
        first = int(file.read_text().split()[0])
        os.kill(first, signal.SIGQUIT)
        ends(first)
        facts_of(look(base, storage))
        second = int(file.read_text().split()[0])
        assert second != first
        os.kill(second, 0)
        holder.communicate(b"\n", timeout=60)
    try:
        assert not file.exists(), "the last to hold the server stops it, whoever started it"
    finally:
        if file.exists():
            os.kill(second, signal.SIGINT)


def ends(pid: int) -> None:
    """Wait for the end of a process that may be no child."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"the process {pid} has not ended")


def test_a_process_of_the_servers_user_that_has_its_number_after_a_power_failure_is_named(base: Path) -> None:
    storage = base / "plain"
    facts_of(look(base, storage))
    folder = storage / "postgres"
    user = folder.stat().st_uid if os.geteuid() == 0 else None  # root has the server run as somebody else
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=user) as stranger:
        stale = f"{stranger.pid}\n{folder}\n{time.time():.0f}\n5432\n{folder}\n\n\nready   \n"
        (folder / "postmaster.pid").write_text(stale)
        done = look(base, storage)
        assert done.returncode != 0
        error = done.stderr[done.stderr.rindex("ConfigurationError: ") :]
        assert f"{folder / 'postmaster.pid'} says that the process {stranger.pid} is its server, and that is 'cat' now" in error
        assert "If no server of that folder runs, remove that file." in error
        assert (folder / "postmaster.pid").read_text() == stale
        assert stranger.poll() is None
    facts_of(look(base, storage))


def test_a_process_that_has_the_servers_number_after_a_power_failure_is_neither_taken_for_it_nor_ended(base: Path) -> None:
    storage = base / "plain"
    facts_of(look(base, storage))
    folder = storage / "postgres"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (folder / "postmaster.pid").write_text(f"{stranger.pid}\n{folder}\n{time.time():.0f}\n5432\n{folder}\n\n\nready   \n")
        done = look(base, storage)
        if os.geteuid() == 0:  # who is not takes the server's own user for the stranger's too, and Postgres then refuses to start
            facts_of(done)
        assert stranger.poll() is None


def test_a_place_that_no_socket_fits_in_is_named(base: Path) -> None:
    (base / "a blank").mkdir()
    done = look(base, base / "another blank", tmp="a blank")
    assert done.returncode != 0
    assert f"can lie neither under {base / 'another blank' / 'postgres'} nor in {base / 'a blank'}/docmill-" in done.stderr


def socket_folder(base: Path, storage: Path) -> Path:
    return base / "tmp" / f"docmill-{hashlib.sha256(os.fsencode(storage / 'postgres')).hexdigest()[:16]}"


@pytest.mark.parametrize("kind", ["a link", "a folder of somebody else's"])
def test_a_socket_folder_that_somebody_else_has_made_is_refused(base: Path, kind: str) -> None:
    storage = base / "a folder with blanks"
    folder = socket_folder(base, storage)
    if kind == "a link":
        (base / "elsewhere").mkdir()
        folder.symlink_to(base / "elsewhere")
    elif os.geteuid() == 0:
        folder.mkdir()
        os.chown(folder, NOBODY, NOBODY)
    else:
        pytest.skip("needs root")
    done = look(base, storage)
    assert done.returncode != 0
    assert f"ConfigurationError: The embedded Postgres needs the folder {folder} for its socket" in done.stderr
    assert not list((base / "elsewhere").glob("*") if kind == "a link" else folder.iterdir())


def test_a_socket_folder_that_an_older_version_left_open_is_closed(base: Path) -> None:
    storage = base / "a folder with blanks"
    folder = socket_folder(base, storage)
    folder.mkdir()
    folder.chmod(0o777)
    assert facts_of(look(base, storage))["modes"] == [0o700, 0o700]


def test_a_socket_that_is_not_the_servers_is_not_spoken_to(base: Path) -> None:
    """Where root starts the server, others can get at the folder for a moment."""
    folder, pgdata = base / "tmp", base / "postgres"
    pgdata.mkdir()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(folder / ".s.PGSQL.5432"))
        _close_to_others(pgdata, folder / ".s.PGSQL.5432")
        if os.geteuid() == 0:
            os.chown(folder / ".s.PGSQL.5432", NOBODY, NOBODY)
            with pytest.raises(ConfigurationError, match="is not the server's"):
                _close_to_others(pgdata, folder / ".s.PGSQL.5432")
    (folder / ".s.PGSQL.5432").unlink()
    (folder / ".s.PGSQL.5432").touch()
    with pytest.raises(ConfigurationError, match="is not the server's"):
        _close_to_others(pgdata, folder / ".s.PGSQL.5432")
