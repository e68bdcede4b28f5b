"""A folder to sync, by commands and workers that lose no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.settings import Settings
from tests.acceptance.sync.commands import put
from tests.running import REPOSITORY


@pytest.fixture(autouse=True)
def quick(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RECONCILE_SECONDS", "0.2")
    monkeypatch.setenv("SYNC_SETTLE_SECONDS", "0.4")
    monkeypatch.setenv("SYNC_RESCAN_SECONDS", "3600")  # what is seen, is seen by events


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "documents"
    (made / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.md", "b.md", "sub/c.md")):
        put(made / name, number)
    return made
