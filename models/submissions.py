"""What became of a submission."""

from __future__ import annotations

from typing import Literal

from models.stages import State

Outcome = Literal["accepted", "unchanged", "new_version", "resumed"]


class Submission(str):
    """The doc_id, as a string, that also says what became of the submission.

    `outcome`: `accepted` (a new document), `unchanged` (same content: nothing happened), `new_version`, or `resumed` (was cancelled).
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

    @property
    def doc_id(self) -> str:
        """The document's id as a plain string."""
        return str(self)

    def __repr__(self) -> str:
        """Show all parts."""
        return f"Submission({str(self)!r}, outcome={self.outcome!r}, version={self.version}, state={self.state.value!r})"
