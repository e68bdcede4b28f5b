"""How to sync a folder, and what a sync did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.batch import BatchSubmission
from jobs.sync.files import Stored
from jobs.sync.plan import Kept, Move, Plan


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How to sync. `checksum`: read every file. `allow_empty`: believe a folder that is empty, or looks as if something is not mounted."""

    user_id: str = "default"
    priority: int = 0
    metadata: Mapping[str, Any] | None = None
    checksum: bool = False
    allow_empty: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class SyncResult:
    """What a sync did. After a dry run only what it would do: the plan."""

    folder: Path
    batch_id: str
    plan: Plan
    batch: BatchSubmission | None = None
    """What became of the files; None after a dry run."""
    moved: list[Move] = field(default_factory=list)
    """Documents that go as soon as the one at the new place is complete."""
    deleted: list[Stored] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    """Documents whose file seems to be gone and that stay all the same."""

    def did_something(self) -> bool:
        """Say whether anything was submitted, marked or deleted."""
        changed = self.batch is not None and self.batch.run_id is not None
        return changed or bool(self.deleted or self.plan.restored)

    def has_work(self) -> bool:
        """Say whether the plan finds something to do by now."""
        plan = self.plan
        return bool(plan.new or plan.changed or plan.moved or plan.vanished or plan.restored)

    def is_unsettled(self) -> bool:
        """Say whether something was left that a look in some seconds may settle. What was moved out may take as long as a backlog does."""
        return bool(self.plan.busy or self.plan.waiting or self.plan.unpacking)
