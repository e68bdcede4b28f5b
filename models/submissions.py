"""What became of a submission."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from models.stages import State

Outcome = Literal["accepted", "unchanged", "new_version", "resumed"]


class Submission(str):
    """The doc_id, as a string, that also says what became of the submission.

    `outcome`: `accepted` (a new document), `unchanged` (same content: nothing happened), `new_version`, or `resumed` (was cancelled).
    `correlation_id`: the document's, which logs and events have; one that was given for `unchanged` or `resumed` content is not taken.
    """

    __slots__ = ("correlation_id", "outcome", "state", "version")

    outcome: Outcome
    version: int
    state: State
    correlation_id: str

    def __new__(cls, doc_id: str, outcome: Outcome, version: int, state: State, correlation_id: str) -> Submission:
        """Make a submission's answer."""
        made = super().__new__(cls, doc_id)
        made.outcome, made.version, made.state, made.correlation_id = outcome, version, state, correlation_id
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str, Outcome, int, State, str], dict[str, Any]]:
        """Return what a copy is made with, also in another process."""
        return (str(self), self.outcome, self.version, self.state, self.correlation_id), {}

    @property
    def doc_id(self) -> str:
        """The document's id as a plain string."""
        return str(self)

    def __repr__(self) -> str:
        """Show all parts."""
        return f"Submission({str(self)!r}, outcome={self.outcome!r}, version={self.version}, state={self.state.value!r})"


BatchOutcome = Literal["accepted", "unchanged", "new_run"]


class SubmittedBatch(str):
    """The batch_id, as a string, that also says what became of the submission.

    `outcome`: `accepted` (a new batch), `unchanged` (nothing has changed since its last run: nothing happened), or `new_run`. `run_id`: the
    run that the batch is in now. `refused`: the files of a folder or list that were kept out, with the reason; those in archives that are
    kept out become failed documents. `archives`: how many zip archives are still to be unpacked by workers or have been.
    """

    __slots__ = ("archives", "outcome", "refused", "run_id")

    outcome: BatchOutcome
    run_id: UUID | None
    refused: tuple[tuple[str, str], ...]
    archives: int

    def __new__(
        cls, batch_id: str, outcome: BatchOutcome, run_id: UUID | None, *, archives: int = 0, refused: tuple[tuple[str, str], ...] = ()
    ) -> SubmittedBatch:
        """Make a submission's answer."""
        made = super().__new__(cls, batch_id)
        made.outcome, made.run_id, made.archives, made.refused = outcome, run_id, archives, refused
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str, BatchOutcome, UUID | None], dict[str, Any]]:
        """Return what a copy is made with, also in another process."""
        return (str(self), self.outcome, self.run_id), {"archives": self.archives, "refused": self.refused}

    @property
    def batch_id(self) -> str:
        """The batch's id as a plain string."""
        return str(self)

    def __repr__(self) -> str:
        """Show all parts."""
        return f"SubmittedBatch({str(self)!r}, outcome={self.outcome!r}, run_id={self.run_id}, archives={self.archives})"
