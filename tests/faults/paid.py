"""What random schedules do with documents that cost money: submit, work, kill, freeze, stop, answer, cancel, delete, let time pass."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import psycopg
import pytest

from jobs.adapters.embedders import HostedEmbedder
from jobs.adapters.embedders.hosted import Limits
from jobs.adapters.exchange import Timeouts
from jobs.adapters.llamaparse import LlamaParse
from jobs.adapters.llm import ModelExtractor, load_shape
from jobs.adapters.llm.extract import Limits as Parts
from jobs.breaker import Rules
from jobs.pipeline.runner import Runner
from jobs.reconcile import Reconciler
from jobs.services import Prices, Terms
from jobs.services import Service as Front
from jobs.stages import Tools, check, embed, extract, parse
from models.chunks import Chunk
from models.documents import Document, FileType
from models.settings import Settings
from tests.faults.fated import Fated
from tests.faults.in_process import EMPTY, Sandbox
from tests.faults.worlds import Numbered, Telling, Worker, World
from tests.integration.conftest import sha
from tests.servers import LlamaParseServer, OpenAIServer

PASSAGES = {**{name: 1 + number % 3 for number, name in enumerate("1236789abc")}, "4": 30, "5": 5}
"""Contents by their numbers of passages: small ones, a long one (4), and one with a passage that the service refuses (5)."""
USERS = {**dict.fromkeys("abcdefg", "ann"), **dict.fromkeys("xyz", "bob")}
LEASE, STAGE_SECONDS = 60, 900
PRICES = Prices(input_per_million=2000.0, output_per_million=8000.0, per_page=0.003)
UNFINISHED = "SELECT FROM file_extractions WHERE state IN ('queued', 'working', 'retrying')"


class Models(Fated, OpenAIServer):
    """Embeds and chats."""


class Pages(Fated, LlamaParseServer):
    """Parses."""


def texts_of(content: str) -> list[str]:
    poisoned = {("5", 3): " poison"}
    return [f"passage {number} of content {content}{poisoned.get((content, number), '')}" for number in range(PASSAGES[content])]


def markdown_of(content: str) -> str:
    return "".join(f"Clause {number} of {content}: the tenant pays.\n\n" for number in range(100 if content == "4" else 3))


def content_of(document: Document) -> str:
    return str(document.content_sha256)[0]


class Schedule:
    """Five documents of two users, two workers at a time."""

    def __init__(self, conninfo: str, base: Settings, **options: Any) -> None:
        self.conninfo, self.base = conninfo, base
        self.stack = ExitStack()
        self.world = World(self.stack.enter_context(pytest.MonkeyPatch.context()))
        self.conn = self.stack.enter_context(psycopg.connect(self.conninfo, autocommit=True))
        self.conn.execute(EMPTY)
        self.conn.execute("TRUNCATE provider_usage, cost_totals, circuit_breakers, provider_budgets CASCADE")
        self.submitted: dict[str, str] = {}
        self.fates: deque[str] = deque()
        self.models, self.pages = Models(dimensions=32), Pages()
        self.models.poison = "poison"
        for server in (self.models, self.pages):
            server.now, server.fates, server.seen, server.noted, server.contents = self.world.now, self.fates, [], {}, self.submitted
            self.stack.enter_context(server)
        self.workers: list[Worker] = []
        self.all: list[Worker] = []
        self.losses: list[tuple[float, str, bool]] = []
        """When what a document had paid for last may have been lost, or all of it."""
        self.cut_short: set[str] = set()
        self.since_tick = 0
        self._choose(**options)

    def _choose(self, kind: str, policy: str, handoff: str, limit: int, most: str, gather: int, required: bool) -> None:
        changes = {"duplicate_policy": policy, "handoff": handoff, "embedding_gather_ms": gather, "extraction_required": required}
        self.settings = self.base.model_copy(
            update={**changes, "lease_seconds": float(LEASE), "stage_timeout_seconds": float(STAGE_SECONDS), "watchdog_seconds": 600.0}
        )
        self.kind, self.limit, self.most = kind, limit, Decimal(most)
        self.keeper = self._worker("keeper")
        self.reconciler = Reconciler(
            self.settings.model_copy(update={"lease_seconds": 0.0, "reconcile_seconds": 5.0, "max_requeues": 1000}), self.keeper.pool
        )
        for content in PASSAGES:
            path = Path(self.settings.storage_base_path, "uploads", content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\f".join(f"<p>{part}</p>" for part in markdown_of(content).split("\n\n")[:3]), encoding="utf-8")

    def _front(self, worker: Worker, kind: Any) -> Front:
        terms = Terms(
            f"{kind} http://local key:none", kind, prices=PRICES, requests_per_minute=self.limit, total_seconds=120.0,
            max_cost_per_document=self.most, rules=Rules(probe_seconds=130),
        )  # fmt: skip
        return Numbered(worker.pool, terms, worker=worker.name, stopping=lambda: worker.stopping)

    def _make(self, worker: Worker) -> tuple[Runner, list[Front]]:
        times = Timeouts(10, 60, 120)
        fronts = {kind: self._front(worker, kind) for kind in ("embedding", "extraction", "parse")}
        tools: dict[str, Any] = {
            "sandbox": Sandbox(),
            "embedder": HostedEmbedder(Telling("Embedding", self.models.url, None, times), "m", 32, Limits(8), fronts["embedding"]),
        }
        if self.kind != "embedding":
            shape, parts = load_shape(None), Parts(max_tokens=700, max_answer_tokens=200)
            tools["extractor"] = ModelExtractor(
                Telling("Extraction", self.models.url, None, times), "m", shape, parts, fronts["extraction"]
            )
        if self.kind == "all":
            tools["hosted_parser"] = LlamaParse(Telling("LlamaParse", self.pages.url, None, times), caller=fronts["parse"])
        own = {"validate": _validate, "parse": parse.run if self.kind == "all" else _parse, "check": check.run, "chunk": _chunk}
        stages = {**own, "embed": embed.run, "extract": extract.run}
        return worker.bench.runner(worker.name, given=tools, stages=stages), list(fronts.values())

    def _worker(self, name: str) -> Worker:
        return Worker(self.world, name, self.conn, self.settings, self.conninfo, [self.models, self.pages], self._make)

    def worker(self, which: int) -> Worker | None:
        """Return a worker that may be given work."""
        self.workers = [worker for worker in self.workers if not worker.dead and (worker.tasks or not worker.stopping)]
        ready = [worker for worker in self.workers if not worker.frozen and not worker.stopping]
        if len(self.workers) < 2 or (not ready and len(self.workers) < 4):
            ready.append(self._worker(f"w{len(self.all)}"))
            self.workers.append(ready[-1])
            self.all.append(ready[-1])
        return ready[which % len(ready)] if ready else None

    def step(self) -> None:
        for worker in self.workers:
            worker.step()

    def submit(self, doc_id: str, content: str) -> None:
        if self.submitted.get(doc_id) != content:
            self._lose({doc_id}, everything=True)
        statement = "SELECT submit_document(%s, doc_id => %s, content_sha256 => %s, user_id => %s)"
        self.conn.execute(statement, [f"uploads/{content}", doc_id, content * 64, USERS[doc_id]])
        self.conn.execute("UPDATE file_extractions SET file_size = 100 WHERE doc_id = %s", [doc_id])
        self.submitted[doc_id] = content

    def work(self, which: int, count: int, fates: list[str], trap: str | None, deed: str) -> None:
        worker = self.worker(which)
        if worker is None:
            return
        self.fates.clear()
        self.fates.extend(fates)
        worker.trap = trap
        worker.take(count)
        worker.trap = None
        if worker.trapped is not None:
            point = worker.trapped.partition(":")[0]
            # A frozen worker leaves no transaction open, and where a stage ends there is no wait that could be cut short.
            unfit = {"freeze": ("in_checkpoint", "keeping", "claimed", "committed"), "stop": ("stage_done",)}
            self._do("kill" if point in unfit.get(deed, ()) else deed, worker)

    def _do(self, deed: str, worker: Worker) -> None:
        if deed == "kill":
            self._lose(worker.in_hand)
            self.cut_short.add(worker.name)
            worker.kill()
        elif deed == "freeze":
            self._lose(worker.in_hand)
            worker.trapped = None
            worker.step()  # nobody is to be locked out by a transaction of its other documents
            worker.frozen = True
        else:
            worker.trapped = None
            worker.released.set()
            worker.stop(at_once=True)
            self.cut_short.add(worker.name)

    def _lose(self, doc_ids: set[str], *, everything: bool = False) -> None:
        self.losses += [(self.world.now(), doc_id, everything) for doc_id in doc_ids]

    def answer(self, which: int, fate: str, fates: list[str]) -> None:
        held = [*self.models.held, *self.pages.held]
        if not held:
            return
        self.fates.clear()
        self.fates.extend(fates)
        held[which % len(held)].fate = fate
        self.step()

    def strike(self, which: int, deed: str) -> None:
        if not self.workers:
            return
        worker = self.workers[which % len(self.workers)]
        if worker.dead or (worker.frozen and deed != "kill"):
            return
        if deed == "stop softly":
            worker.stop(at_once=False)
        else:
            self._do(deed, worker)

    def wake(self, leases_first: bool) -> None:
        worker = next((worker for worker in self.workers if worker.frozen and not worker.dead), None)
        if worker is None:
            return
        self._lose(worker.in_hand)
        self.cut_short.add(worker.name)
        worker.wake(leases_first=leases_first)

    def time_passes(self, seconds: int) -> None:
        while seconds > 0:
            live = [worker for worker in self.workers if not worker.dead and not worker.frozen]
            # Who waits for its place in a budget is there in time.
            some = min(seconds, 2 if self.limit and any(worker.tasks for worker in live) else LEASE // 3)
            seconds -= some
            self.world.shift(self.conn, some)
            self.since_tick += some
            for worker in live if self.since_tick >= LEASE // 3 or not seconds else []:
                worker.leases.tick()
                self.since_tick = 0
            self.step()

    def reconcile(self) -> None:
        before = {row[0] for row in self.conn.execute("SELECT doc_id FROM file_extractions WHERE lease_until < now()").fetchall()}
        self._lose(before)
        self.keeper.wait_for(self.reconciler.pass_once())

    def change(self, doc_id: str, deed: str) -> None:
        row = self.conn.execute("SELECT state::text FROM file_extractions WHERE doc_id = %s", [doc_id]).fetchone()
        if row is None or (deed == "requeue" and row[0] != "failed"):
            return
        self.conn.execute(f"SELECT {deed}_document(%s)".encode(), [doc_id])
        if deed != "requeue":
            self._lose({doc_id}, everything=deed == "delete")
        if deed == "delete":
            del self.submitted[doc_id]

    def reset(self) -> None:
        self.conn.execute("SELECT reset_breaker(service) FROM circuit_breakers")

    def end_everything(self) -> None:
        """Have the services be well and the workers awake, until all documents have ended by themselves."""
        self.fates.clear()
        for note in [*self.models.held, *self.pages.held]:
            note.fate = "right"
        while any(worker.frozen and not worker.dead for worker in self.workers):
            self.wake(leases_first=True)
        for _ in range(60):
            self.step()
            if self.conn.execute(UNFINISHED).fetchone() is None and not any(worker.tasks for worker in self.workers if not worker.dead):
                return
            self.time_passes(60)
            self.reconcile()
            worker = self.worker(0)
            assert worker is not None
            worker.take(10)

    def close(self) -> None:
        for note in [*self.models.held, *self.pages.held]:
            note.fate = "right"
        for worker in [*self.all, self.keeper]:
            worker.bury()
        self.stack.close()


async def _validate(document: Document, _: Tools) -> Document:
    return replace(document, file_size=100, file_type=FileType.HTML, mime_type="text/html")


async def _parse(document: Document, tools: Tools) -> Document:
    if tools.settings.duplicate_policy == "reuse" and (original := await tools.original_text(document)) is not None:
        return parse.copied(document, original)
    return replace(document, markdown=markdown_of(content_of(document)), parser="plain 1")


async def _chunk(document: Document, _: Tools) -> Document:
    chunks = tuple(
        Chunk(uuid5(NAMESPACE_URL, f"{document.doc_id} {document.version} {number}"), number, text, sha(text))
        for number, text in enumerate(texts_of(content_of(document)))
    )
    return replace(document, chunks=chunks)
