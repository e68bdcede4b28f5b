"""What the database tells of a folder's archives, put together."""

from __future__ import annotations

import uuid
from typing import Any

from jobs.sync.memory import _archives

RUN = uuid.uuid4()


def row(path: str, **told: int) -> dict[str, Any]:
    return {"entry_path": path, "run_id": RUN, "content_sha256": "1" * 64, "in_run": True, "ended": True, "failed": False,
            "unfinished": False, "open": False, "cancelled": False, "documents": 1, **told}  # fmt: skip


def test_an_archive_should_have_become_what_it_and_those_inside_hold() -> None:
    made = _archives("folder", [row("b.zip/", documents=3), row("b.zip/in.zip/", documents=1), row("c.zip/")], {})
    assert {name: archive.unmade for name, archive in made.items()} == {"b.zip": 4, "c.zip": 1}


def test_an_archive_is_whole_if_all_that_lie_in_it_are() -> None:
    rows = [row("b.zip/"), row("b.zip/in.zip/", unfinished=True, open=True), row("b.zip-old/"), row(""), row("lost.zip/in.zip/")]
    made = _archives("folder", rows, {})
    assert {name: (archive.current, archive.open) for name, archive in made.items()} == {
        "b.zip": (False, True),
        "b.zip-old": (True, False),
        "lost.zip/in.zip": (True, False),
    }


def test_an_archive_inside_that_has_failed_keeps_the_one_around_it_from_nothing_but_is_named() -> None:
    rows = [row("b.zip/"), row("b.zip/bad.zip/", failed=True), row("b.zip/good.zip/"), row("bad.zip/", failed=True)]
    made = _archives("folder", rows, {})
    assert {name: (archive.current, set(archive.failed)) for name, archive in made.items()} == {
        "b.zip": (True, {"b.zip/bad.zip"}),
        "bad.zip": (True, {"bad.zip"}),
    }
    rows.append(row("b.zip/late.zip/", unfinished=True, open=True))
    assert not _archives("folder", rows, {})["b.zip"].current
