"""Batches with real workers: a zip of real files and of everything that can be wrong in a zip, to the end of the batch."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from jobs import submit_batch
from tests.archives import Raw, raw_zip, write_zip
from tests.running import REPOSITORY, wait_for, worker

SAMPLES = sorted(p for p in (REPOSITORY / "samples").iterdir() if p.name != "README.md")
STILL_OPEN = "SELECT count(*) FROM processing_jobs WHERE status IN ('pending', 'processing')"


pytestmark = pytest.mark.usefixtures("front_door")


def work(conn: psycopg.Connection, tmp_path: Path, **environment: str) -> None:
    """Run one worker until every batch has ended."""
    with worker(tmp_path / "worker.log", **environment) as process:
        wait_for(lambda: conn.execute(STILL_OPEN).fetchone() == (0,), f"the batch to end; see {tmp_path / 'worker.log'}", 240, process)


@pytest.mark.parametrize("mode", ["inline", "queue"])
def test_a_zip_of_real_files_ends_complete_and_the_same_zip_does_nothing(mode: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "samples.zip", {f"files/{sample.name}": sample.read_bytes() for sample in SAMPLES})
    batch = submit_batch(path)
    work(conn, tmp_path, HANDOFF=mode)
    assert conn.execute("SELECT status, total_files, completed FROM batch_status").fetchall() == [("completed", len(SAMPLES), len(SAMPLES))]
    assert conn.execute("SELECT count(*) FROM file_extractions WHERE batch_id = %s AND state = 'complete'", [batch]).fetchone() == (
        len(SAMPLES),
    )
    before = conn.execute("SELECT count(*), max(id) FROM procrastinate_jobs").fetchone()
    assert submit_batch(path).outcome == "unchanged"
    assert conn.execute("SELECT count(*), max(id) FROM procrastinate_jobs").fetchone() == before


def test_a_changed_passage_in_one_file_embeds_that_passage_alone(conn: psycopg.Connection, tmp_path: Path) -> None:
    passages = [f"## Part {number}\n\n" + f"Sentence {number} about pumps and valves. " * 30 for number in range(6)]
    files: dict[str, bytes | str] = {"a.md": "\n\n".join(passages), "b.md": "# Other\n\nAnother text."}
    submit_batch(write_zip(tmp_path / "batch.zip", files), batch_id="b")
    work(conn, tmp_path)
    passages[3] = passages[3].replace("pumps", "filters")
    submit_batch(write_zip(tmp_path / "batch.zip", {**files, "a.md": "\n\n".join(passages)}), batch_id="b")
    work(conn, tmp_path)
    embedded = conn.execute(
        """SELECT d.file_name, e.version, (e.detail->>'embedded')::int, d.chunk_count
        FROM document_events e JOIN file_extractions d USING (doc_id) WHERE e.stage = 'embed' AND e.version = 2"""
    ).fetchall()
    assert len(embedded) == 1
    name, _, sent, chunks = embedded[0]
    assert name == "a.md"
    assert 1 <= sent < chunks
    assert conn.execute("SELECT status, total_files FROM processing_jobs").fetchall() == [("completed", 2)]


def test_bad_entries_fail_alone_and_bad_archives_as_a_whole(conn: psycopg.Connection, tmp_path: Path) -> None:
    entries = [Raw(b"good.txt", b"A text about pumps."), Raw(b"../slip.txt"), Raw(b"locked.txt", flags=1), Raw(b"crc.txt", crc=1)]
    (tmp_path / "mixed.zip").write_bytes(raw_zip(entries))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "empty.zip").write_bytes(raw_zip([]))
    for name in ("mixed", "broken", "empty"):
        submit_batch(tmp_path / f"{name}.zip", batch_id=name)
    work(conn, tmp_path)
    found = {row[0]: row[1:] for row in conn.execute("SELECT batch_id, status, total_files, error_message FROM processing_jobs").fetchall()}
    assert found["mixed"][:2] == ("completed_with_errors", 4)
    assert (found["broken"][0], found["empty"][0]) == ("failed", "failed")
    assert "broken.zip: " in found["broken"][2]
    assert "empty.zip: it is empty" in found["empty"][2]
    letters = conn.execute("SELECT error_message FROM dead_letters WHERE resolved_at IS NULL").fetchall()
    assert len(letters) == 3
    assert all("mixed.zip, entry " in message for (message,) in letters)


def test_the_archives_of_the_corpus_end_with_a_reason_or_their_files(corpus: Path, conn: psycopg.Connection, tmp_path: Path) -> None:
    """What only a zip bomb would make of it never shows: no more than the limits is ever written, and every batch ends."""
    folder = corpus / "hostile" / "gen" / "zip"
    paths = [path for path in sorted(folder.iterdir()) if path.name != "bomb_many_files.zip"]  # 4,000 empty files: only time
    for path in paths:
        if path.name != "garbage_after_magic.zip":
            submit_batch(path, batch_id=path.name)
    work(conn, tmp_path)
    status: dict[str, str] = dict(conn.execute("SELECT batch_id, status FROM processing_jobs").fetchall())
    failed = {"bomb_flat.zip", "bomb_overlap_full.zip", "bomb_overlap_quoted.zip", "size_lie_huge.zip", "truncated.zip", "empty.zip"}
    assert {name for name, word in status.items() if word == "failed"} >= failed
    partly = {"bad_crc.zip", "batch_mixed.zip", "names_traversal.zip", "symlinks.zip", "encrypted_zipcrypto.zip", "unsupported_method.zip"}
    assert {name for name, word in status.items() if word == "completed_with_errors"} >= partly
    assert not list(tmp_path.rglob("unpack-*"))
