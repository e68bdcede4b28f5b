"""A scenario with an outside service: what it does wrong until it is well again, what that cost, and whether all is right.

A minute of the settings' defaults is a second here (MINUTE), the waits inside a call and between two tries included, so that their
proportions are those of an installation. Leases are long: no worker is killed here, and a busy machine shall not look as if one were.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.harness import STILL_OPEN, WORDS, Arena, Place, Worker, text_document
from tests.servers import LlamaParseServer, LocalServer, OpenAIServer
from tests.servers.faults import never

Kind = Literal["embedding", "extraction", "parse"]
MINUTE = 1.0
KEY = "sk-service-faults-7f3a91"
DIMENSIONS = 32
TEXTS = 4
"""Most texts of one request."""
PREFIX: Mapping[Kind, str] = {"embedding": "EMBEDDING", "extraction": "EXTRACTION", "parse": "LLAMAPARSE"}
SCALED = {
    "BREAKER_OPEN_SECONDS": str(MINUTE), "BREAKER_WINDOW_SECONDS": str(MINUTE), "BREAKER_MAX_OPEN_SECONDS": str(15 * MINUTE),
    "RETRY_BASE_DELAY_SECONDS": str(2 * MINUTE / 60), "RETRY_MAX_DELAY_SECONDS": str(5 * MINUTE),
    "LEASE_SECONDS": "30",
}  # fmt: skip
PATIENT = {
    "PROVIDER_CONNECT_SECONDS": "20",
    "PROVIDER_READ_SECONDS": "20",
    "EMBEDDING_TIMEOUT_SECONDS": "20",
    "EXTRACTION_TIMEOUT_SECONDS": "20",
    "LLAMAPARSE_TIMEOUT_SECONDS": "20",
}
"""For services that answer: a busy machine is no failure of theirs."""
IMPATIENT = {
    "PROVIDER_READ_SECONDS": str(MINUTE), "EMBEDDING_TIMEOUT_SECONDS": str(5 * MINUTE), "EXTRACTION_TIMEOUT_SECONDS": str(5 * MINUTE),
    "LLAMAPARSE_TIMEOUT_SECONDS": str(5 * MINUTE),
}  # fmt: skip
"""For services that hang. The time for a whole call holds that of loading the client, which takes a second or two on a busy machine."""

SPENT = "SELECT count(*) FROM document_events WHERE event = 'retry_scheduled' AND (detail->>'counts')::boolean"
DEAD = "SELECT count(*) FROM dead_letters"
WAITED = "SELECT count(DISTINCT doc_id) FROM document_events WHERE event = 'retry_scheduled'"
ENDED = "SELECT state::text, error_message, count(*) FROM file_extractions GROUP BY 1, 2"
IN_HAND = "SELECT count(*) FROM file_extractions WHERE state = 'working'"
BREAKER = "SELECT state, refused, open_seconds, opened_count FROM circuit_breakers WHERE service LIKE %s ORDER BY changed_at DESC LIMIT 1"
CALLS = """SELECT outcome, count(*) FROM provider_usage WHERE kind = %s AND outcome <> 'not_sent'
    AND NOT (kind = 'parse' AND outcome = 'ok' AND request_id IS NULL) GROUP BY 1"""
"""Without polls that were answered, which stand there for a while after one that failed."""


def server_of(kind: Kind, **given: Any) -> LocalServer:
    """Return the local server that speaks the protocol of a kind of service; it asks for KEY."""
    if kind == "parse":
        return LlamaParseServer(**{"key": KEY, **given})
    return OpenAIServer(dimensions=DIMENSIONS, **{"key": KEY, **given})


def contents_of(kind: Kind, numbers: range, paragraphs: int) -> dict[str, bytes]:
    """Return documents that need the service: for parsing, files that it serves, of three pages."""
    if kind != "parse":
        return {f"d{number:04}": text_document(number, paragraphs=paragraphs) for number in numbers}
    pages = {n: "\f".join(f"<p>Page {page} of report {n} on the {WORDS[n % len(WORDS)]}.</p>" for page in range(3)) for n in numbers}
    return {f"d{number:04}.html": content.encode() for number, content in pages.items()}


@dataclass
class Service:
    """One kind of service in an arena, and the documents that need it."""

    arena: Arena
    kind: Kind
    server: LocalServer
    settings: Mapping[str, str]
    start: Callable[[], object]
    """Has the server listen."""
    documents: dict[str, bytes] = field(default_factory=dict)
    recovered: float | None = None
    """When it was well again, by the server's clock."""
    began: float = field(default_factory=time.monotonic)
    workers: list[Worker] = field(default_factory=list)
    on: Place | None = None
    """Where workers run, if not simply here."""

    def configure(self, url: str | None = None) -> None:
        """Have workers use the service at its address, or another."""
        address = url or (self.server.root if self.kind == "parse" else self.server.url)
        prefix = PREFIX[self.kind]
        own = {f"{prefix}_BASE_URL": address, f"{prefix}_API_KEY": KEY}
        if self.kind == "embedding":
            own |= {
                "EMBEDDING_PROVIDER": "openai",
                "EMBEDDING_MODEL": "m",
                "EMBEDDING_DIMENSIONS": str(DIMENSIONS),
                "EMBEDDING_MAX_TEXTS": str(TEXTS),
            }
        elif self.kind == "extraction":
            own |= {"EXTRACTION_PROVIDER": "openai", "EXTRACTION_MODEL": "m", "EXTRACTION_REQUIRED": "true"}
        else:
            own |= {"PARSING_PROVIDER": "llamaparse", "LLAMAPARSE_POLL_SECONDS": "0.05"}
        self.arena.environment |= {**SCALED, **PATIENT, **self.settings, **own}

    def submit(self, count: int, paragraphs: int = 2 * TEXTS) -> None:
        """Submit so many more documents, each of two requests or more to embed."""
        before = len(self.documents)
        more = contents_of(self.kind, range(before, before + count), paragraphs)
        self.documents |= more
        self.arena.submit(more)

    def work(self, count: int = 2, **environment: str) -> None:
        """Start so many workers."""
        self.workers += [self.arena.worker_on(self.on, restart=False, **environment) for _ in range(count)]

    def work_anew(self, **environment: str) -> None:
        """Have the workers end their work, and others go on, with another environment: as when somebody has mended the configuration."""
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            worker.wait()
        before, self.workers = self.workers, []
        self.work(len(before), **environment)

    def breaker(self) -> tuple[str, bool, float, int]:
        """Return the state of its breaker, whether it refuses us, for how long it was opened, and how often."""
        found: tuple[str, bool, float, int] | None = self.arena.one(BREAKER, f"{self.kind} %")
        return found or ("closed", False, 0.0, 0)

    def hold(self, condition: Callable[[], bool], what: str, timeout: float = 180) -> None:
        """Leave it as it is until something has come of it, which must not be the end of all documents."""

        def reached() -> bool:
            if condition():
                return True
            assert self.arena.one(STILL_OPEN), f"all documents ended without {what}: {self.arena.all(ENDED)} {self.calls()}"
            return False

        self.arena.wait(reached, what, timeout)

    def probed_in_vain(self) -> bool:
        """Say whether the breaker has opened, and a probe has failed since, or the refused documents wait."""
        _, _, seconds, _ = self.breaker()
        return seconds >= 2 * MINUTE

    def told_to_wait(self) -> int:
        """Return how many documents have been told to wait."""
        count: int = self.arena.one(WAITED)
        return count

    def all_wait(self) -> bool:
        """Say whether every document has been told to wait, and none is being worked on."""
        return bool(self.told_to_wait() == len(self.documents) and self.arena.one(IN_HAND) == 0)

    def recover(self) -> None:
        """Be well from now on."""
        self.server.script(never)
        self.recovered = self.server.clock
        self.arena.fault()

    def calls(self) -> Counter[str]:
        """Return how many calls the ledger has, by outcome, without those that were not sent."""
        return Counter(dict(self.arena.all(CALLS, self.kind)))

    def needed(self) -> int:
        """Return the fewest calls that could have done it: of embedding as many full requests as the texts fill, whoever shares them."""
        if self.kind == "embedding":
            return math.ceil(len(self.server.tally.seen) / TEXTS)
        return len(self.documents)

    def parsed_there(self) -> int:
        """Return how many documents have the text that the parsing service gave."""
        count: int = self.arena.one("SELECT count(*) FROM document_markdown WHERE starts_with(parser, 'llamaparse ')")
        return count

    def stampede(self) -> int | None:
        """Return the requests of the second that began with the first one after it was well again."""
        if self.recovered is None:
            return None
        back = min((at for at in self.server.tally.at if at >= self.recovered), default=self.recovered)
        return self.server.tally.in_first_second_after(back)

    def report(self, scenario: str, did: str) -> dict[str, Any]:
        """Say in a line what was done and what it took, for people and for the table, and return it."""
        calls = self.calls()
        line = {
            "scenario": f"service: {scenario}", "mode": self.arena.mode, "did": did, "documents": len(self.documents),
            "recovered_s": self.arena.seconds_to_recover, "kind": self.kind, "calls": sum(calls.values()), "needed": self.needed(),
            "stampede": self.stampede(), "dead_letters": self.arena.one(DEAD), "attempts": self.arena.one(SPENT),
            "seconds": round(time.monotonic() - self.began, 1), "outcomes": dict(calls),
        }  # fmt: skip
        print(f"\nfaults: {json.dumps(line)}", flush=True)
        if report := os.environ.get("FAULTS_REPORT"):
            with Path(report).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line


@contextmanager
def service(
    arena: Arena, kind: Kind, settings: Mapping[str, str] | None = None, *, later: bool = False, **server: Any
) -> Iterator[Service]:
    """Yield a service that is well, configured for the arena's workers; `later`: it listens only once `start` is called."""
    with ExitStack() as stack:
        local = server_of(kind, **server)
        outside = Service(arena, kind, local, settings or {}, start=lambda: stack.enter_context(local))
        if not later:
            outside.start()
        outside.configure()
        yield outside
