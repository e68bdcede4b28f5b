"""Runs a document through its stages: claim, run, carry, checkpoint, hand on. How work ends is in `endings`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from loguru import logger
from psycopg_pool import AsyncConnectionPool

from jobs import clock
from jobs.adapters.embedders import HostedEmbedder
from jobs.leases import LeaseKeeper
from jobs.logs import bound
from jobs.pipeline.checkpoint import FencedOff, StaleVectors
from jobs.pipeline.claiming import Claiming, Job, NotPutOff
from jobs.pipeline.claims import Connection, has_stored, load_document, settle_batch
from jobs.pipeline.company import Company, Entry
from jobs.pipeline.copying import Copier
from jobs.pipeline.durable import CheckpointFailed
from jobs.pipeline.endings import Endings
from jobs.pipeline.running import StageFunction
from jobs.pipeline.sharing import Sharing
from jobs.pipeline.stage_runs import StageRuns
from jobs.pipeline.together import Together
from jobs.pipeline.work import SMALL_BYTES, Work
from jobs.places import Lend, SharedPlace, not_lent
from jobs.redaction import describe
from jobs.registry import give_back_memory
from jobs.retry import StageRetry
from jobs.stages import Tools
from jobs.tracing import span
from models.settings import Settings
from models.stages import STAGE_BY_NAME, Stage, due_stage

_UNTIL_EMBED = frozenset({"validate", "parse", "check", "chunk", "embed"})


class Runner:
    """Runs the documents of one worker process."""

    def __init__(
        self,
        *,
        settings: Settings,
        pool: AsyncConnectionPool[Connection],
        tools: Tools,
        leases: LeaseKeeper,
        retry: StageRetry,
        worker: str,
        stopping: Callable[[], bool],
        finished_jobs: set[int],
        stages: dict[str, StageFunction] | None = None,
        company: Company | None = None,
        lent_place: Lend = not_lent,
        claimed: Callable[[], None] = lambda: None,
        copier: Copier | None = None,
    ) -> None:
        """`lent_place` is open while the documents in a place do nothing but wait, for a service or for somebody's transaction. `claimed`
        is called once a job has claimed what it takes up. `copier` writes copies of texts; None: nobody does.
        """
        self._settings = settings
        self._pool = pool
        self._leases = leases
        self._worker = worker
        self._stopping = stopping
        self._endings = Endings(pool, retry=retry, worker=worker, stopping=stopping, finished_jobs=finished_jobs, copier=copier)
        self._company = company or Company()
        # What takes long for each has no use for company. Requests for embeddings are shared anyway.
        hosted = tools.hosted_parser is not None or tools.extractor is not None
        quick = tools.embedder.quick or isinstance(tools.embedder, HostedEmbedder)
        self._claiming = Claiming(settings, pool, worker=worker, stopping=stopping, may_share=quick and not hosted, claimed=claimed)
        self.takes_along = self._claiming.takes_along
        """Stages for which small documents are taken up together."""
        self._in_hand: Counter[str | None] = Counter()
        self._lent_place = lent_place
        self._sharing = Sharing(gather_seconds=settings.embedding_gather_ms / 1000, most_requests=settings.embedding_concurrent_requests)
        self._runs = StageRuns(
            settings,
            pool,
            tools=tools,
            endings=self._endings,
            retry=retry,
            sharing=self._sharing,
            worker=worker,
            lease_seconds=leases.seconds,
            stopping=stopping,
            stages=stages,
        )

    async def run(self, job: Job, doc_id: str) -> None:
        """Work on a document for a job until it ends, waits or must be handed on. Returns well however the document fares."""
        try:
            await self._run(job, doc_id)
        except NotPutOff as refused:
            self._sharing.expect(job.id, False)  # for as long as that transaction lasts no request is to wait for it
            with self._lent_place(1, 0.0):
                await self._claiming.put_off_later(job, doc_id, refused.delay)
        finally:
            self._sharing.expect(job.id, False)

    async def _run(self, job: Job, doc_id: str) -> None:
        if not await self._company.opens(self._leases.seconds):
            # What is alone here may be held by somebody's transaction for hours, and other workers have places.
            await self._claiming.give_back(job, doc_id)
            return
        async with self._company.shared() as entry:
            # From now on, because it is worth waiting for while it is claimed and loaded.
            self._sharing.expect(job.id, job.stage in _UNTIL_EMBED)
            claimed_at = clock.seconds()
            works, cancelled = await self._claiming.claim(job, doc_id)
            if not works:
                return
            if len(works) > 1:
                for work in works:
                    work.entry = Entry(self._company)
                entry.leave()
                await self._work_together(job, works, claimed_at, cancelled=cancelled)
                return
            work = works[0]
            work.place = SharedPlace(1, self._lent_place)
            self._hold(work, claimed_at)
            if not work.suspect or cancelled:
                work.entry = entry
                await self._work(job, work, cancelled=cancelled)
                return
        self._sharing.expect(job.id, False)  # not before it is alone
        await self._work(job, work)

    async def _work_together(self, job: Job, works: Sequence[Work], claimed_at: float, *, cancelled: bool) -> None:
        """Work on a job's document and on those that were taken along with it, each as if it were alone with its lease and its failures."""
        together, place = Together(len(works)), SharedPlace(len(works), self._lent_place)

        async def go(work: Work) -> None:
            work.together, work.place = together, place
            try:
                self._hold(work, claimed_at)
                await self._work(replace(job, id=work.job_id), work, cancelled=cancelled)
            finally:
                place.leave()
                work.entry.leave()
                if work is not works[0]:
                    await self._endings.end_job(work)

        here, loop = asyncio.current_task(), asyncio.get_running_loop()
        if cancelled and here is not None:
            here.uncancel()
        tasks = [asyncio.create_task(go(work)) for work in works]
        while not all(task.done() for task in tasks):
            try:
                await asyncio.wait(tasks)
            except asyncio.CancelledError:  # a shutdown: each hands on what it has
                for task in tasks:
                    loop.call_soon(task.cancel)  # not before it has begun
                if here is not None:
                    here.uncancel()
        for work, task in list(zip(works, tasks, strict=True))[1:]:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.bind(doc_id=work.document.doc_id).error("What it came to could not be written: {}", describe(error))
        await tasks[0]

    async def _work(self, job: Job, work: Work, *, cancelled: bool = False) -> None:
        document = work.document
        about = {"doc_id": document.doc_id, "batch_id": document.batch_id, "correlation_id": document.correlation_id}
        told = {**about, "user_id": document.user_id, "version": document.version, "claim": work.claim}
        self._in_hand[document.batch_id] += 1
        with bound(**about, worker=self._worker), span("document", trace=document.correlation_id, **told) as note:
            try:
                if cancelled:
                    await self._endings.cancelled(work, due_stage(work.document.milestone))
                else:
                    await self._carry(job, work)
                note(milestone=str(work.document.milestone), fenced=work.fenced)
            finally:
                self._sharing.expect(work.job_id, False)  # the batch may take a while to settle
                work.part()
                self._leases.release(work.lease)
                self._in_hand[document.batch_id] -= 1
        # While another document of it is in hand here, a batch has not ended; that one will ask.
        if document.batch_id is not None and not self._in_hand[document.batch_id]:
            del self._in_hand[document.batch_id]
            await settle_batch(self._pool, document.batch_id)

    def _hold(self, work: Work, claimed_at: float) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def lost(superseded: bool) -> None:
            work.fenced = superseded
            if task is not None:
                with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
                    loop.call_soon_threadsafe(task.cancel)

        work.lease = self._leases.hold(work.document.doc_id, work.claim, claimed_at=claimed_at, on_lost=lost)

    async def _carry(self, job: Job, work: Work) -> None:
        """Run stage after stage until the document ends or leaves this worker; whatever stops it takes the one failure path."""
        stage = claimed_for = due_stage(work.document.milestone)
        try:
            if stage is not None and not job.listens_to(stage):
                await self._endings.leave(work, stage)
                return
            async with self._place(work):
                await self._load(work, stage, with_text=self._needs_text(job, stage))
                while stage is not None:
                    self._sharing.expect(work.job_id, stage.name in _UNTIL_EMBED)
                    if stage.name == "parse" and await self._needs_no_parse(work, stage, fresh=claimed_for is stage):
                        break
                    with bound(stage=stage.name, attempt=work.attempt_at(stage.due_at)):
                        elapsed = await self._runs.run(stage, work)
                        stage = await self._after(job, work, elapsed)
        except FencedOff:
            await self._endings.tell_fenced(work, stage)
        except asyncio.CancelledError:
            await self._endings.cancelled(work, stage)
        except CheckpointFailed as error:
            await self._endings.fail_without_results(work, error)
        except Exception as error:
            await self._endings.fail(work, stage, error)

    async def _needs_no_parse(self, work: Work, stage: Stage, *, fresh: bool) -> bool:
        """End the document as a duplicate where it is to be skipped; `fresh`: it was claimed for this stage.

        One whose original has gone since it was claimed is claimed anew: another copy may have taken that place by now.
        """
        original = await self._runs.original(work.document)
        if original is not None:
            await self._endings.skip(work, original)
        elif self._settings.duplicate_policy == "skip" and not fresh and not work.is_sole:
            work.part()
            await self._endings.leave(work, stage)
        else:
            return False
        return True

    def _needs_text(self, job: Job, stage: Stage | None) -> bool:
        """Say whether a stage that runs here from now on reads the text, which may be much larger than all else."""
        if stage is None or stage.name not in ("embed", "finalize"):
            return True
        if stage.name == "finalize":
            return self._settings.storage_keep_extracted  # for the copy
        return self._settings.handoff == "inline" and job.listens_to(STAGE_BY_NAME["extract"])

    async def _load(self, work: Work, stage: Stage | None, *, with_text: bool) -> None:
        """Take in what earlier checkpoints stored: under the lease and, for a suspect, alone, because a large one can cost the process."""
        if not has_stored(work.document):
            return
        async with self._pool.connection() as conn:
            work.document = work.saved = await load_document(conn, work.document, with_text=with_text)
        work.buffered = work.document.chunks is not None
        if stage is not None and stage.name not in _UNTIL_EMBED and work.document.vectors is None:
            await self._runs.embed_once_more(work)

    @asynccontextmanager
    async def _place(self, work: Work) -> AsyncIterator[None]:
        """From its first crash on a document has its worker to itself, so that the next crash can be no other's fault."""
        if not work.suspect:
            yield
            return
        async with self._company.alone():
            await self._claiming.say_alone(work)
            yield

    async def _after(self, job: Job, work: Work, elapsed: float) -> Stage | None:
        """Checkpoint if it pays and return the next stage to run here, or None when the document is done or has left."""
        following = due_stage(work.document.milestone)
        if following is None:
            await self._complete(work)
            return None
        settings, carried = self._settings, work.carried_bytes()
        if carried > SMALL_BYTES:
            work.part()
        waits = following.name == "parse" and not work.may_parse
        if settings.handoff == "queue" or waits or self._stopping() or not job.listens_to(following):
            await self._endings.leave(work, following)
            return None
        if carried > SMALL_BYTES:
            give_back_memory()  # what the stage has left free is needed at the next one's peak, and elsewhere
        much = carried > settings.carry_limit_mb * 1_000_000
        # Of documents that are worked on together each has its part of the time: all of them are what would be done again.
        elapsed /= 1 if work.together is None else work.together.members
        if work.suspect or work.paid or much or elapsed >= settings.checkpoint_seconds:
            await self._endings.keep(work)
        return following

    async def _complete(self, work: Work) -> None:
        """Swap the version in, with vectors of the model that serves at that moment, so that readers find it from the first one on."""
        on_lost = work.lease.on_lost
        try:
            await self._endings.complete(work)
        except StaleVectors:
            work.lease.on_lost = on_lost
            await self._runs.embed_again(work)
            await self._endings.complete(work)
