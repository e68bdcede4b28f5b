"""What a submitter calls a file is data: it becomes no path and no command, and nothing that shows it obeys it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psycopg
import pytest

from jobs import submit_batch, submit_document
from jobs.adapters.storage import safe_display_name
from models.settings import Settings
from tests.archives import Raw, raw_zip
from tests.integration.test_cli import docmill
from tests.running import wait_for, worker

pytestmark = pytest.mark.usefixtures("front_door")

NAMES = [
    "line\nbreak\r\n2026-01-01 ERROR forged.txt",
    "\x1b]0;owned\x07\x1b[2J\x9b31mred.txt",
    "invoice\u202efdp.txt",
    "\u2066isolate\u2069\ufeff\u061c.txt",
    "<script>alert(1)</script>.txt",
    '"><img src=x onerror=alert(1)>.txt',
    "$(touch owned).txt",
    "`touch owned`;touch owned&|.txt",
    "'; DROP TABLE file_extractions; --.txt",
    "%s{name}%(x)s{{7*7}}\\N{DIGIT ONE}.txt",
    "-rf --help.txt",
    "trailing dots...",
    " spaces around .txt ",
    "CON.txt",
    "aux",
    "../../../../etc/passwd",
    "..\\..\\windows\\win.ini",
    "/etc/cron.d/owned",
    "C:\\autoexec.bat",
    "..",
    ".",
    "",
    "a" * 4000 + ".txt",
    "\u00e9\u0301" * 1990,
    "[link](javascript:alert(1)).txt",
    "=HYPERLINK(1).txt",
    "\U000e0041\U000e0042 tags.txt",
    "nul\x00byte.txt",
]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def test_names_from_every_side_are_only_ever_shown(conn: psycopg.Connection, settings: Settings, tmp_path: Path) -> None:
    storage = settings.storage_base_path
    expected: dict[str, str] = {}
    for number, name in enumerate(NAMES):
        doc_id = f"python-{number}"
        submit_document(f"Words of document {number}.".encode(), doc_id=doc_id, file_name=name or None)
        expected[doc_id] = safe_display_name(name) if name else "upload"
    (storage / "inbox").mkdir()
    for number, name in enumerate(NAMES[:17]):
        (storage / "inbox" / f"{number}.txt").write_text(f"Words of file {number}.")
        if "\x00" not in name:
            conn.execute("SELECT submit_document(%s, doc_id => %s, file_name => %s)", [f"inbox/{number}.txt", f"sql-{number}", name])
    archive = tmp_path / "names.zip"
    entries = [Raw(name.encode(), f"Words of entry {number}.".encode()) for number, name in enumerate(NAMES[:20])]
    archive.write_bytes(raw_zip(entries))
    submit_batch(archive, batch_id="names")

    log = tmp_path / "worker.log"
    with worker(log, LOG_FILE_PATH="worker.json", LOG_FORMAT="json", LOG_LEVEL="DEBUG") as process:
        wait_for(lambda: ended(conn), f"all documents to end; see {log}", 240, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0

    stored: dict[str, str] = dict(conn.execute("SELECT doc_id, file_name FROM file_extractions").fetchall())
    for doc_id, name in expected.items():
        assert stored[doc_id] == name
    assert len(stored) > len(NAMES) + 17 + 15
    for name in stored.values():
        assert (
            CONTROL.search(name) is None and "/" not in name and "\\" not in name[-6:] and 0 < len(name) <= 255 and name not in (".", "..")
        )

    paths = [path.relative_to(storage).as_posix() for path in storage.rglob("*") if path.is_file()]
    generated = re.compile(r"uploads/[0-9a-f]{64}/[0-9a-f]{64}|inbox/\d+\.txt|logs/[\w.-]+|extracted/[0-9a-f/.-]+(\.md)?")
    assert [path for path in paths if not generated.fullmatch(path)] == []
    assert list(tmp_path.rglob("owned*")) == [] and not Path("owned").exists()

    for line in [
        *log.read_bytes().splitlines(),
        *(line for path in (storage / "logs").iterdir() for line in path.read_bytes().splitlines()),
    ]:
        json.loads(line)
        assert CONTROL.search(line.decode()) is None
    for arguments in (
        ["status", "names"],
        ["summary", "names"],
        ["summary", "names", "--nested"],
        ["explain", "sql-1"],
        ["search", "words"],
    ):
        shown = docmill(*arguments)
        assert shown.returncode == 0, (arguments, shown.stderr)
        assert CONTROL.search(shown.stdout + shown.stderr) is None, arguments


def ended(conn: psycopg.Connection) -> bool:
    row = conn.execute(
        """SELECT (SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying'))
            + (SELECT count(*) FROM processing_jobs WHERE status IN ('pending', 'processing'))"""
    ).fetchone()
    assert row is not None
    return bool(row[0] == 0)
