"""What a submitter calls a file is data: it becomes no path and no command, and nothing that shows it obeys it."""

from __future__ import annotations

import json
import re
import secrets
import signal
from pathlib import Path

import psycopg
import pytest

from jobs import submit_batch, submit_document, sync_folder_async
from jobs.adapters.storage import safe_display_name
from jobs.front import close_async
from models.settings import Settings
from tests.archives import Raw, raw_zip, write_zip
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


async def test_an_archive_at_a_long_path_is_refused_alone(tmp_path: Path, conn: psycopg.Connection) -> None:
    folder = tmp_path / "folder"
    deep = folder
    for _ in range(13):
        deep /= secrets.token_hex(119)  # random, so that no index makes it shorter
    deep.mkdir(parents=True)
    write_zip(deep / "long.zip", {"a.txt": "a"})
    (deep / "a.txt").write_text("a")
    write_zip(folder / "short.zip", {"a.txt": "a"})
    for _ in range(2):
        made = submit_batch(folder)
        assert (made.archives, [name for name, _ in made.refused]) == (1, [str((deep / "long.zip").relative_to(folder))])
        assert "longer than 1,200 bytes" in made.refused[0][1]
    assert made.outcome == "unchanged"
    synced = await sync_folder_async(folder)
    assert synced.batch is not None
    assert (synced.batch.archives, synced.batch.run_id) == (["short.zip"], None)
    await close_async()
    assert conn.execute("SELECT count(*) FROM file_extractions").fetchone() == (1,)


@pytest.mark.parametrize("names", [("\udcff.txt", "\\udcff.txt"), ("a\nb.zip", "a\\nb.zip")], ids=["documents", "archives"])
async def test_of_two_files_whose_names_are_the_same_once_escaped_the_second_is_refused_and_named(
    names: tuple[str, str], tmp_path: Path, conn: psycopg.Connection
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, name in enumerate(names):
        if name.endswith(".zip"):
            write_zip(folder / name, {"x.txt": f"text {number}"})
        else:
            (folder / name).write_text(f"text {number}")
    table = "batch_archives" if names[0].endswith(".zip") else "file_extractions"
    first = submit_batch(folder)
    assert len(first.refused) == 1
    for name in names:
        assert repr(str(folder / name)) in first.refused[0][1]
    stored = conn.execute(f"SELECT content_sha256 FROM {table}").fetchall()
    assert len(stored) == 1
    again = submit_batch(folder)
    assert (again.outcome, again.refused) == ("unchanged", first.refused)
    for _ in range(2):
        synced = await sync_folder_async(folder)
        assert synced.batch is not None
        told = [str(file.error) for file in synced.batch.files if file.error is not None]
        assert (synced.batch.run_id, told, synced.deleted) == (None, [first.refused[0][1]], [])
    await close_async()
    if table == "file_extractions":
        for paths in ([folder / name for name in names], [folder / name for name in reversed(names)]):
            assert [error for _, error in submit_batch(paths).refused] == [first.refused[0][1]]
    assert conn.execute(f"SELECT DISTINCT content_sha256 FROM {table}").fetchall() == stored
    assert conn.execute("SELECT coalesce(max(version), 1) FROM file_extractions").fetchone() == (1,)


def ended(conn: psycopg.Connection) -> bool:
    row = conn.execute(
        """SELECT (SELECT count(*) FROM file_extractions WHERE state IN ('queued', 'working', 'retrying'))
            + (SELECT count(*) FROM processing_jobs WHERE status IN ('pending', 'processing'))"""
    ).fetchone()
    assert row is not None
    return bool(row[0] == 0)
