"""A text in service has a copy for people, where the database says; whatever becomes of copies, documents do not notice."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

import jobs
from jobs.adapters.folders import list_folder, storage_folders
from jobs.adapters.storage import LocalStorage
from jobs.adapters.storage.copies import TextCopies, copy_name
from jobs.copies import Tidied, tidy_copies
from jobs.leftovers import remove_noted_files
from jobs.orphans import FEW, PARTS, find_orphans
from jobs.pipeline.copying import Copier
from models.settings import Settings
from tests.integration.conftest import Bench, made_by, sha
from tests.integration.test_small_documents import COMPLETE, TOGETHER, run_first, submit
from tests.running import docmill, wait_for, worker

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("front_door")


def copies_of(bench: Bench) -> dict[str, str]:
    """What lies in the folder of extracted texts: name -> content."""
    folder = bench.settings.storage_base_path / "extracted"
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def text_of(doc_id: str, version: int = 1) -> str:
    return f"text of {doc_id} version {version}"


def served(*texts: tuple[str, str]) -> dict[str, str]:
    return {copy_name(doc_id, sha(text)): text for doc_id, text in texts}


async def work(bench: Bench, *, keep: bool = True, copies: TextCopies | None = None, first: bool = False) -> None:
    """Do what waits, or what is taken up first, as a worker that writes copies and then stops."""
    bench.copier = Copier(copies or TextCopies(LocalStorage.prepared(bench.settings)), keep=keep)
    await (run_first(bench) if first else bench.drain())
    await bench.copier.aclose()


def tidy(bench: Bench, **given: Any) -> Tidied:
    return tidy_copies(bench.settings, bench.conn, **given)


@pytest.fixture
def warnings() -> Any:
    told: list[str] = []
    handler = logger.add(lambda message: told.append(message.record["message"]), level="WARNING")
    yield told
    logger.remove(handler)


async def test_a_text_in_service_has_a_copy_where_the_database_says(bench: Bench) -> None:
    doc_ids = ["a", "../../b", "Ä/ö\\", "x" * 200]
    for doc_id in doc_ids:
        bench.submit(doc_id)
    await work(bench)
    assert copies_of(bench) == served(*((doc_id, text_of(doc_id)) for doc_id in doc_ids))
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"```sql\n(SELECT 'extracted/'.*?);\n```", page, re.DOTALL)
    for doc_id in doc_ids:
        (path,) = bench.one(statement.replace("'some-doc-id'", "%s"), doc_id)
        assert (bench.settings.storage_base_path / path).read_text() == text_of(doc_id)
    (path,) = bench.one(statement.replace("'some-doc-id'", "%s"), "a")
    assert f"{bench.settings.storage_base_path}/{path}" in docmill("status", "a").stdout.replace("\n", "")
    found = (bench.settings.storage_base_path / path, *(bench.settings.storage_base_path / path).parents[:2])
    assert [it.stat().st_mode & 0o007 for it in found] == [0, 0, 0]


async def test_documents_that_are_completed_together_are_copied_with_one_trip_to_the_thread(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips: list[int] = []
    hand_over = Copier._hand_over

    def counted(copier: Copier) -> None:
        trips.append(len(copier._told))
        hand_over(copier)

    monkeypatch.setattr(Copier, "_hand_over", counted)
    submit(bench, 16)
    await work(bench, first=True)
    assert bench.all(TOGETHER) == [(16,)]
    assert trips == [16]
    assert len(copies_of(bench)) == 16


async def test_a_new_version_takes_the_place_of_the_old_one(bench: Bench) -> None:
    bench.submit("a")
    await work(bench)
    bench.submit("a", "b")
    await work(bench)
    assert copies_of(bench) == served(("a", text_of("a", 2)))


async def test_a_version_with_the_same_text_keeps_the_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.integration.conftest as made

    monkeypatch.setattr(made, "made_by", _as_version_1)
    bench.submit("a")
    await work(bench)
    bench.submit("a", "b")
    await work(bench)
    assert bench.one("SELECT served_version FROM file_extractions") == (2,)
    assert copies_of(bench) == served(("a", text_of("a", 1)))


def _as_version_1(stage: str, document: Any) -> Any:
    return replace(made_by(stage, replace(document, version=1)), version=document.version)


async def test_a_late_writer_puts_no_older_text_in_the_place_of_a_newer_one(bench: Bench) -> None:
    bench.submit("a")
    await work(bench, keep=False)
    bench.submit("a", "b")
    await work(bench)
    late = TextCopies(LocalStorage.prepared(bench.settings))
    late.write(copy_name("a", sha(text_of("a", 1))), text_of("a", 1))
    assert copies_of(bench) == served(("a", text_of("a", 1)), ("a", text_of("a", 2)))
    assert tidy(bench) == Tidied(removed=1)
    assert copies_of(bench) == served(("a", text_of("a", 2)))


async def test_a_duplicate_without_rows_of_its_own_has_no_copy(bench: Bench) -> None:
    for doc_id, content in (("a", "a"), ("b", "b")):
        bench.submit(doc_id, content)
    await work(bench)
    bench.submit("b", "a")
    bench.settings = bench.settings.model_copy(update={"duplicate_policy": "skip"})
    await work(bench)
    assert bench.one("SELECT state::text FROM file_extractions WHERE doc_id = 'b'") == ("duplicate",)
    assert copies_of(bench) == served(("a", text_of("a")))


async def test_a_copy_that_cannot_be_written_harms_nothing_and_comes_later(bench: Bench, warnings: list[str]) -> None:
    storage = LocalStorage.prepared(bench.settings)
    (storage.base / "extracted").write_text("a file where the folder should be")
    submit(bench, 16)
    await work(bench, first=True)
    assert bench.one(COMPLETE) == (16,)
    (warning,) = [line for line in warnings if "Copies of parsed texts" in line]
    assert "has a file where a folder is meant" in warning
    assert list((storage.base / "temp").iterdir()) == []
    (storage.base / "extracted").unlink()
    assert tidy(bench, dry_run=True) == Tidied(written=16)
    assert tidy(bench) == Tidied(written=16)
    assert tidy(bench) == Tidied()
    assert copies_of(bench) == served(*((f"d{number:02}", text_of(f"d{number:02}")) for number in range(16)))


async def test_nothing_is_written_in_the_place_of_a_storage_that_is_away(bench: Bench, warnings: list[str]) -> None:
    storage = LocalStorage.prepared(bench.settings)
    bench.submit("a")
    (storage.base / "uploads").rmdir()
    await work(bench, copies=TextCopies(storage))
    assert bench.one(COMPLETE) == (1,)
    assert list(storage.base.iterdir()) == []
    assert "is not there: is it mounted?" in warnings[-1]
    assert tidy(bench) == Tidied()


async def test_nobody_waits_for_a_storage_that_has_stopped_answering(
    bench: Bench, warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pipe does that nobody reads. Texts beyond the limit are let go; one alone may be beyond it."""

    class Stopped(TextCopies):
        def write(self, name: str, text: str) -> None:
            os.close(os.open(pipe, os.O_WRONLY))
            super().write(name, text)

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("jobs.pipeline.copying.MOST_BYTES", 1)
    bench.copier = Copier(Stopped(LocalStorage.prepared(bench.settings)), keep=True)
    submit(bench, 32)
    await bench.drain()
    assert bench.one(COMPLETE) == (32,)
    (warning,) = [line for line in warnings if "Copies of parsed texts" in line]
    assert "the storage is slower than the work" in warning
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    await bench.copier.aclose()
    os.close(reader)
    assert len(copies_of(bench)) == 1
    assert tidy(bench) == Tidied(written=31)


async def test_deleting_a_document_removes_its_copy(bench: Bench) -> None:
    for doc_id in ("a", "b"):
        bench.submit(doc_id)
    await work(bench)
    assert jobs.delete_document("a")
    assert copies_of(bench) == served(("b", text_of("b")))
    bench.conn.execute("SELECT delete_document('b')")
    remove_noted_files(bench.settings, bench.conn)
    assert copies_of(bench) == {}


async def test_a_document_that_has_been_submitted_anew_keeps_its_copy(bench: Bench) -> None:
    bench.submit("a")
    await work(bench)
    bench.conn.execute("SELECT delete_document('a')")
    bench.conn.execute("SELECT submit_document('uploads/b', doc_id => 'a', content_sha256 => %s)", ["b" * 64])
    await work(bench)
    remove_noted_files(bench.settings, bench.conn)
    assert copies_of(bench) == served(("a", text_of("a")))


async def test_cancelling_keeps_the_copy_of_what_is_served(bench: Bench) -> None:
    bench.submit("a")
    await work(bench)
    bench.submit("a", "b")
    jobs.cancel_document("a")
    await work(bench)
    assert tidy(bench) == Tidied()
    assert copies_of(bench) == served(("a", text_of("a")))


async def test_prune_removes_copies_of_what_is_gone_and_writes_those_that_are_missing(bench: Bench) -> None:
    submit(bench, 3)
    await work(bench)
    copies = TextCopies(LocalStorage.prepared(bench.settings))
    whole = copies_of(bench)
    copies.write(copy_name("gone", sha("x")), "the text of a document that was deleted")
    copies.remove(copy_name("d00", sha(text_of("d00"))))
    copies.write(copy_name("d01", sha(text_of("d01"))), "")  # as a power failure can leave it
    (copies.storage.base / "extracted" / "notes.txt").write_text("not docmill's")
    told = docmill("prune")
    assert "1 copies of texts" in told.stdout and "missing: 2 are written" in told.stdout, told.stdout + told.stderr
    assert copies_of(bench) == {**whole, "notes.txt": "not docmill's"}


async def test_the_parts_that_workers_look_at_hour_by_hour_are_all_there_is(bench: Bench) -> None:
    submit(bench, 20)
    await work(bench)
    for name in (whole := copies_of(bench)):
        TextCopies(LocalStorage.prepared(bench.settings)).remove(name)
    assert sum(tidy(bench, part=part).written for part in range(PARTS)) == 20
    assert copies_of(bench) == whole


async def test_copies_of_another_database_are_left_alone(bench: Bench) -> None:
    copies = TextCopies(LocalStorage.prepared(bench.settings))
    for number in range(FEW + 1):
        copies.write(copy_name(f"theirs {number}", sha("x")), "x")
    assert tidy(bench) == Tidied(suspicious=FEW + 1)
    assert docmill("prune").returncode == 1
    assert len(copies_of(bench)) == FEW + 1
    assert tidy(bench, believe=True) == Tidied(removed=FEW + 1)


async def test_switched_off_nothing_is_written_and_what_is_there_goes_with_its_text(bench: Bench) -> None:
    bench.submit("a")
    bench.submit("b")
    await work(bench)
    bench.settings = bench.settings.model_copy(update={"storage_keep_extracted": False})
    bench.submit("a", "b")
    bench.submit("c")
    await work(bench, keep=False)
    assert tidy(bench) == Tidied()
    assert copies_of(bench) == served(("b", text_of("b")))


def test_a_worker_writes_copies_unless_told_not_to(bench: Bench, tmp_path: Path) -> None:
    def complete() -> bool:
        return bench.one("SELECT count(*) FROM file_extractions WHERE state <> 'complete'") == (0,)

    for number, (doc_id, keep, handoff) in enumerate(
        (("a", "true", "queue"), ("a", "true", "queue"), ("b", "true", "inline"), ("c", "false", "inline"))
    ):
        (tmp_path / "a.txt").write_text(f"A text about pumps and valves, number {number}.")
        jobs.submit_document(tmp_path / "a.txt", doc_id=doc_id)
        with worker(tmp_path / "log", STORAGE_KEEP_EXTRACTED=keep, HANDOFF=handoff) as process:
            wait_for(complete, "the document to be complete", process=process)
    assert sorted(text.strip()[-2:] for text in copies_of(bench).values()) == ["1.", "2."]


def test_a_writer_that_is_killed_leaves_no_half_copy(settings: Settings) -> None:
    storage = LocalStorage.prepared(settings)
    script = f"""if True:
        import resource, signal
        from pathlib import Path
        from jobs.adapters.storage import LocalStorage
        from jobs.adapters.storage.copies import TextCopies
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        TextCopies(LocalStorage(Path({str(storage.base)!r}))).write({copy_name("a", sha("x"))!r}, "ä" * 5_000_000)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode < 0
    assert not list((storage.base / "extracted").rglob("*.md"))
    (half,) = (storage.base / "temp").iterdir()
    assert half.stat().st_size == 3_000_000
    long_ago = half.stat().st_mtime + 8 * 86_400
    nothing: Any = _NoDatabase()
    assert find_orphans(settings, nothing, now=long_ago).temporary == 1
    assert not half.exists()


class _NoDatabase:
    """Nothing is stored that it would be asked about."""


def test_a_large_text_is_written_whole(settings: Settings) -> None:
    copies = TextCopies(LocalStorage.prepared(settings))
    text = "aä€🙂" * 1_000_000
    copies.write("00/x.md", text)
    written = (copies.storage.base / "extracted/00/x.md").read_bytes()
    assert hashlib.sha256(written).digest() == hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("keep", [True, False])
def test_copies_are_not_ingested_and_what_people_have_put_beside_them_is(tmp_path: Path, keep: bool) -> None:
    settings = Settings(storage_base_path=tmp_path, storage_keep_extracted=keep)
    copies = TextCopies(LocalStorage.prepared(settings))
    copies.write(copy_name("a", sha("x")), "x")
    assert list_folder(tmp_path, leave_out=storage_folders(settings)).files == []
    (tmp_path / "extracted" / "mine.txt").write_text("mine")
    assert list_folder(tmp_path, leave_out=storage_folders(settings)).files == ["extracted/mine.txt"]


def test_copies_of_another_database_stay_also_where_each_hour_looks_at_a_few(bench: Bench) -> None:
    copies = TextCopies(LocalStorage.prepared(bench.settings))
    for number in range(60):
        copies.write(copy_name(f"elsewhere {number}", sha("x")), "x")
    found = [tidy_copies(bench.settings, bench.conn, part=part) for part in range(PARTS)]
    assert len(copies_of(bench)) == 60
    assert max(each.suspicious for each in found) == 60
