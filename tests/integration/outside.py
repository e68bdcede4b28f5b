"""A worker's runner whose stages call outside services over sockets, with breakers that recover in parts of a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import SecretStr

from jobs.adapters.embedders import HostedEmbedder
from jobs.adapters.embedders.hosted import Limits
from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.llamaparse import LlamaParse
from jobs.adapters.llm import ModelExtractor, load_shape
from jobs.adapters.llm.extract import Limits as Parts
from jobs.breaker import Rules
from jobs.pipeline.runner import Runner
from jobs.retry import RetryPlan, StageRetry
from jobs.services import Prices, Terms
from jobs.services import Service as Front
from models.chunks import Chunk
from models.documents import Document
from tests.integration.conftest import Bench, made_by, sha

RULES = Rules(failures=5, window_seconds=60, open_seconds=0.2, max_open_seconds=0.5, probe_seconds=5)
PRICES = Prices(input_per_million=2.0, output_per_million=8.0, per_page=0.003)
TIMES = Timeouts(5, 5, 10)
MODEL = "m@32"


@dataclass
class Outside:
    """Makes runners of workers that share a database and outside services."""

    bench: Bench
    passages: int = 10
    terms: dict[str, Any] = field(default_factory=dict)
    """What is different in the terms of services made from now on."""
    fronts: list[Front] = field(default_factory=list)

    def front(self, kind: Any, worker: str = "test:1") -> Front:
        terms = Terms(f"{kind} http://local key:none", kind, prices=PRICES, rules=RULES, total_seconds=10, patience_seconds=0.05)
        self.fronts.append(Front(self.bench.pool, replace(terms, **self.terms), worker=worker))
        return self.fronts[-1]

    def embedder(self, url: str, key: str | None = None, max_texts: int = 4) -> HostedEmbedder:
        service = Service("The embedding service", url, SecretStr(key) if key else None, TIMES)
        return HostedEmbedder(service, "m", 32, Limits(max_texts=max_texts), self.front("embedding"))

    def extractor(self, url: str, key: str | None = None, schema: str | None = None, **limits: int) -> ModelExtractor:
        service = Service("The extraction service", url, SecretStr(key) if key else None, TIMES)
        return ModelExtractor(service, "m", load_shape(schema), Parts(**limits), caller=self.front("extraction"))

    def parser(self, url: str, key: str | None = None) -> LlamaParse:
        service = Service("LlamaParse", url, SecretStr(key) if key else None, TIMES)
        return LlamaParse(service, poll_seconds=0.01, deadline=20, caller=self.front("parse"))

    def runner(self, stages: dict[str, Any], worker: str = "test:1", settings: dict[str, Any] | None = None, **tools: Any) -> Runner:
        """A runner with real stages, by name, and tools for them; the other stages are plain."""

        async def chunk(document: Document, _: Any) -> Document:
            self.bench.calls.append("chunk")
            return replace(document, chunks=tuple(passage(document, index) for index in range(self.passages)))

        def counted(name: str, run: Any) -> Any:
            async def counting(document: Document, given: Any) -> Document:
                self.bench.calls.append(name)
                result: Document = await run(document, given)
                return result

            return counting

        own = {"chunk": chunk} | {name: counted(name, run) for name, run in stages.items()}
        made = self.bench.runner(worker, lent_place=tools.pop("lent_place", None), given=tools, stages=own, **(settings or {}))
        made._runs._retry = made._endings._retry = _Soon(max_attempts=3, base=0.01, max_delay=0.02)
        return made

    async def work(self, runner: Runner, *, until: Callable[[], bool] = lambda: False, seconds: float = 20) -> None:
        """Run jobs as they become due until none is left, or something is so."""
        end = time.monotonic() + seconds
        while not until() and (found := self.bench.fetch()):
            assert time.monotonic() < end, self.bench.all("SELECT doc_id, state, error_message FROM file_extractions")
            await runner.run(*found)
            self.bench.conn.execute("UPDATE procrastinate_jobs SET status = 'succeeded' WHERE id = %s", [found[0].id])
            await asyncio.sleep(0.02)

    async def aclose(self) -> None:
        for front in self.fronts:
            await front.aclose()

    def state(self, doc_id: str = "a") -> tuple[Any, ...]:
        return self.bench.one("SELECT milestone::text, state::text, retry_count FROM file_extractions WHERE doc_id = %s", doc_id)

    def calls(self) -> list[str]:
        return [row[0] for row in self.bench.all("SELECT outcome FROM provider_usage WHERE outcome <> 'not_sent' ORDER BY started_at")]


class _Soon(StageRetry):
    def plan(self, error: BaseException, attempt: int, waited: float = 0.0) -> RetryPlan | None:
        """Decide as always, and wait a hundredth of a second."""
        plan = super().plan(error, attempt, waited)
        return plan and RetryPlan(0.01, plan.counts)


def passage(document: Document, index: int) -> Chunk:
    """The fourth is the third once more."""
    text = f"passage {index if index != 3 else 2} of {document.doc_id}"
    return replace(made_by("chunk", document).chunks[0], id=_id(document, index), index=index, content=text, content_sha256=sha(text))  # type: ignore[index]


def _id(document: Document, index: int) -> Any:
    from uuid import NAMESPACE_URL, uuid5

    return uuid5(NAMESPACE_URL, f"{document.doc_id} {index}")
