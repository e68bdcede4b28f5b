"""A claimed document in a worker's hands: what has been made, and what of it is durable."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from jobs import clock
from jobs.adapters.usage import Usage
from jobs.leases import Lease, no_lease
from jobs.pipeline.company import Company, Entry
from jobs.pipeline.together import Together
from jobs.places import SharedPlace, not_lent
from models.documents import Document
from models.stages import Milestone

SMALL_BYTES = 1_000_000
"""What may have been made of a document that others wait for. A small file can hold a large text."""


@dataclass(frozen=True, slots=True)
class StageEvent:
    """What the audit trail will say about a stage. Times in milliseconds, memory in MB."""

    event: str
    stage: str | None = None
    attempt: int | None = None
    duration_ms: float | None = None
    cpu_ms: float | None = None
    peak_memory_mb: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Work:
    """A claim and the document under it. `saved` is the document as the database has it; what differs from it waits in memory."""

    document: Document
    saved: Document
    claim: int
    job_id: int
    """The procrastinate job that holds the claim; the checkpoint that ends the work here finishes it."""
    priority: int
    served_version: int | None
    retry_count: int
    """Failures that counted at the saved milestone."""
    waiting_since: float | None = None
    """When the document began to wait for an outside service at the saved milestone, by `jobs.clock`; None where it does not."""
    gained: bool = False
    """Something paid for has been kept since: a wait from now on is a new one."""
    advanced: bool = False
    """A part of what the stage that runs is to make has been kept since it began, so that the next try has less to do, or it had to wait
    for another transaction: what ends it for its time is no failure of the document."""
    buffered: bool = False
    """Whether rows of this version lie in the buffer tables."""
    events: list[StageEvent] = field(default_factory=list)
    suspect: bool = False
    """A worker has crashed with this document in hand: it runs alone, with a checkpoint after each stage."""
    may_parse: bool = True
    """Parse need not wait for an equal document. Where it must, or the content was not known yet, the document is claimed anew for it."""
    is_sole: bool = False
    """It owns its content: no equal document of the user is complete, and none is worked on beside it."""
    ended: bool = False
    """A checkpoint has ended the work on it here."""
    dropped_texts: set[str] = field(default_factory=set)
    """SHA-256 of the texts that its last checkpoint takes out of service."""
    takes_any_model: bool = False
    """It has been embedded again for a model that had come to serve; whatever serves now, re-embedding does the rest."""
    kept_model: str | None = None
    kept_vectors: set[int] = field(default_factory=set)
    """Passages whose vectors of that model are durable although their stage is not through."""
    paid: bool = False
    """An outside service has been called for what is not durable yet."""
    together: Together | None = None
    """Those that it was taken up with; None where it is worked on by itself."""
    place: SharedPlace = field(default_factory=lambda: SharedPlace(1, not_lent))
    """The worker's place that it is in, with those that it was taken up with."""
    lease: Lease = field(default_factory=no_lease)
    """What keeps the claim."""
    entry: Entry = field(default_factory=lambda: Entry(Company()))
    """What counts it among those that work beside each other in this worker; of a company of its own while it is, or is to be, alone."""
    hurried: bool = False
    """It has been cut short by a worker that stops: its grace is over."""
    fenced: bool = False
    """The claim has gone to somebody else: nothing may be written any more."""
    began_at: float = field(default_factory=clock.seconds)
    """When it was claimed, by `jobs.clock`."""
    stage_began_at: float | None = None
    """When the stage that runs now, or ran last, began."""
    used: Usage = field(default_factory=Usage)
    """What that stage has cost so far."""

    def part(self) -> None:
        """Go on alone, so that no other waits for it."""
        if self.together is not None:
            self.together.leave()
            self.together = None

    def attempt_at(self, milestone: Milestone) -> int:
        """Failures that counted against the stage that is due at a milestone."""
        return self.retry_count if milestone == self.saved.milestone else 0

    def waited_at(self, milestone: Milestone) -> float:
        """Seconds that the document has waited for an outside service at the stage that is due at a milestone."""
        if self.waiting_since is None or self.gained or milestone != self.saved.milestone:
            return 0.0
        return max(0.0, clock.seconds() - self.waiting_since)

    def taken_ms(self) -> float:
        """Milliseconds since it was claimed."""
        return round((clock.seconds() - self.began_at) * 1000, 1)

    def stage_taken_ms(self) -> float | None:
        """Milliseconds since the stage began; None if none has."""
        return None if self.stage_began_at is None else round((clock.seconds() - self.stage_began_at) * 1000, 1)

    def carried_bytes(self) -> int:
        """About how much memory the results take that are not durable yet."""
        size = 0
        if self.document.markdown is not None and self.document.markdown is not self.saved.markdown:
            size += sys.getsizeof(self.document.markdown)
        if self.document.chunks is not None and self.document.chunks is not self.saved.chunks:
            size += sum(sys.getsizeof(chunk.content) for chunk in self.document.chunks)
        if self.document.vectors is not None and self.document.vectors is not self.saved.vectors:
            size += self.document.vectors.nbytes
        return size
