"""What the database tells of a folder's archives, put together."""

from __future__ import annotations

import uuid
from typing import Any

from jobs.sync.memory import _archives

RUN = uuid.uuid4()


def row(path: str, **told: bool) -> dict[str, Any]:
    return {"entry_path": path, "run_id": RUN, "content_sha256": "1" * 64, "in_run": True, "finished": True, "unfinished": False,
            "open": False, "cancelled": False, **told}  # fmt: skip


def test_an_archive_is_whole_if_all_that_lie_in_it_are() -> None:
    rows = [row("b.zip/"), row("b.zip/in.zip/", unfinished=True, open=True), row("b.zip-old/"), row(""), row("lost.zip/in.zip/")]
    made = _archives("folder", rows, {})
    assert {name: (archive.current, archive.open) for name, archive in made.items()} == {
        "b.zip": (False, True),
        "b.zip-old": (True, False),
        "lost.zip/in.zip": (True, False),
    }
