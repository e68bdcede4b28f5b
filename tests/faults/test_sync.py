"""A sync that is killed at its worst moments: the next one brings everything to the right end, and no search misses anything on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.arguments import path_doc_id
from tests.faults.harness import Arena, text_document
from tests.running import REPOSITORY

FILES = 12


def sync(arena: Arena, folder: Path, *faults: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "sync", str(folder), "--no-wait"],
        env={**os.environ, **arena.environment, "PYTHONPATH": str(REPOSITORY), "DOCMILL_FAULTS": "\n".join(faults)},
        timeout=90, check=False,
    )  # fmt: skip
    return done.returncode


@pytest.mark.parametrize("point", ["sync_marked", "sync_submitted", "sync_deletes", "after_repair:delete_replaced_document"])
def test_a_killed_sync_is_finished_by_the_next_and_no_search_misses_a_moved_file(arena: Arena, point: str) -> None:
    folder = arena.folder / "documents"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"{number:02}.md").write_bytes(text_document(number))
    fault = f"kill@{point};once={arena.mark('kill')}"
    arena.worker(restart=True, faults=[fault] if point.startswith("after") else ())
    assert sync(arena, folder) == 0
    arena.settle()

    for number in range(4):
        (folder / f"{number:02}.md").rename(folder / f"moved {number}.md")
        (folder / f"{number + 4:02}.md").unlink()
    moved = {
        path_doc_id("default", folder / f"moved {number}.md"): path_doc_id("default", folder / f"{number:02}.md") for number in range(4)
    }
    gone = {path_doc_id("default", folder / f"{number + 4:02}.md") for number in range(4)}
    code = sync(arena, folder, *([] if point.startswith("after") else [fault]))
    assert code == (0 if point.startswith("after") else -signal.SIGKILL)

    def unserved() -> list[object]:
        """Moved files that neither document answers for."""
        served = {row[0] for row in arena.all("SELECT DISTINCT doc_id FROM document_chunks")}
        return [new for new, old in moved.items() if not served & {new, old}]

    assert unserved() == []
    assert sync(arena, folder) == 0
    missed: list[object] = []

    def ended() -> bool:
        missed.extend(unserved())
        return bool(arena.one("SELECT count(*) FROM file_extractions WHERE replaced_by IS NOT NULL OR state <> 'complete'") == 0)

    arena.wait(ended, "the moves to be finished")
    arena.settle()
    assert missed == []
    stored = {row[0] for row in arena.all("SELECT doc_id FROM file_extractions")}
    assert stored == {path_doc_id("default", path) for path in folder.iterdir()}
    assert not stored & (gone | set(moved.values()))
    again = arena.one("SELECT sum((detail->>'embedded')::int) FROM document_events WHERE stage = 'embed' AND doc_id = ANY(%s)", list(moved))
    assert again == 0, "what was moved was embedded again"
    assert arena.one("SELECT count(*) FROM document_events WHERE event = 'deleted'") == 8
    arena.accepted(dict.fromkeys(stored, b""))
    arena.judge("kill of a sync", f"killed at {point} among {FILES} files of which 4 moved and 4 vanished")
