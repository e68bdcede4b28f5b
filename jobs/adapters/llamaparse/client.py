"""Upload, job id, polling: a job that has been paid for is found again by its id."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from jobs.adapters.exchange import DIRECT, Answer, Service, Timeouts, read_json
from jobs.adapters.llamaparse.answers import HostedPages, JobState, read_job
from jobs.adapters.llamaparse.formats import extension_of
from jobs.adapters.storage.faults import stored_file_faults
from jobs.adapters.stored_file import StoredFile
from models.calls import Caller, CallPurpose, CallShare, Reply
from models.errors import (
    ConfigurationError,
    CredentialRefused,
    DocmillError,
    FailedCall,
    ParseError,
    PermanentError,
    RateLimitError,
    RetryableError,
    ServiceUnavailable,
)
from models.errors import TimeoutError as CallTimeout
from models.settings import Settings

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LARGEST_WORD = 1_000_000  # bytes of an answer without pages
_LONGEST_PAUSE = 15.0
_PATIENCE = 5
"""Polls in a row that may fail before `wait` gives up: the job goes on meanwhile, and asking costs nothing."""


class JobLost(RetryableError):
    """The job is not there any more, or was cancelled: its id is worth nothing, and the file has to be sent again."""


class JobOverdue(CallTimeout):
    """The service said that the job is still going on, after LLAMAPARSE_DEADLINE_SECONDS. Its id stays good."""


def _lost(message: str, call: FailedCall) -> JobLost:
    error = JobLost(message)
    error.call = call
    return error


class LlamaParse:
    """One account, tier and version."""

    def __init__(
        self,
        service: Service,
        *,
        tier: str = "cost_effective",
        version: str = "latest",
        page_limit: int = 10_000,
        max_answer_mb: int = 256,
        poll_seconds: float = 1,
        deadline: float = 1500,
        caller: Caller = DIRECT,
    ) -> None:
        """`deadline` in seconds is how long `wait` waits."""
        self.service = service
        self.parser = f"llamaparse {tier} {version}"
        self.caller = caller
        # By itself a job fails when 5 % of its pages do; here each page is judged alone.
        conditions = {"job_failure_conditions": {"allowed_page_failure_ratio": 1.0}}
        self._configuration: dict[str, Any] = {"tier": tier, "version": version, "processing_control": conditions}
        self._page_limit = page_limit
        self._answer_limit = max_answer_mb * 1_000_000
        self._poll_seconds = poll_seconds
        self._deadline = deadline

    async def start(
        self,
        file: StoredFile,
        mime_type: str,
        *,
        pages: Sequence[int] = (),
        page_estimate: int = 0,
        shares: tuple[CallShare, ...] = (),
        caller: Caller | None = None,
    ) -> str:
        """Send a file, or only some of its pages (from 1), and return the id of the job: store it before anything else happens.

        `page_estimate` is what the budget and the price are asked for where all pages are sent. The file goes out as
        `document.<extension>`: its name is nobody else's business. Raises PermanentError for a file that is gone, StorageAway where
        it is the storage that is, and what Service.exchange and the caller raise.
        """
        extension = extension_of(mime_type)
        if extension is None:
            raise PermanentError(f"LlamaParse does not serve {mime_type}.")
        configuration = dict(self._configuration)
        if pages:
            configuration["page_ranges"] = {"target_pages": ",".join(str(page) for page in sorted(set(pages)))}
        purpose = CallPurpose("parse", shares, model=self.parser, pages=len(set(pages)) or page_estimate)
        # Before the call: the storage's trouble is neither the service's nor the document's.
        with stored_file_faults(file):
            opened = await asyncio.to_thread(file.open)
        with opened:
            send = partial(self._upload, opened, f"document.{extension}", mime_type, configuration)
            reply = await (caller or self.caller).call(send, purpose)
        return reply.value

    async def _upload(self, file: BinaryIO, name: str, mime_type: str, configuration: dict[str, Any]) -> Reply[str]:
        file.seek(0)  # it may be sent again after a 429
        answer = await self.service.exchange(
            "POST",
            "/api/v2/parse/upload",
            limit=_LARGEST_WORD,
            files={"file": (name, file, mime_type)},
            data={"configuration": json.dumps(configuration)},
        )
        data = read_json(self.service, answer)
        job_id = data.get("id") if isinstance(data, dict) else None
        if not isinstance(job_id, str) or not _ID.fullmatch(job_id):
            raise self.service.bad_answer("took the file but sent no job id.")
        # The job's id serves support better than the request's, and settles the price when the pages are known.
        return replace(answer.reply(job_id), request_id=job_id)

    async def poll(self, job_id: str, *, shares: tuple[CallShare, ...] = (), caller: Caller | None = None) -> HostedPages | None:
        """Return the pages of a job, None while it is working. One exchange.

        ParseError: it failed. JobLost: it is gone or cancelled. Otherwise what Service.exchange raises.
        """
        if not _ID.fullmatch(job_id):
            raise JobLost("The stored id of a LlamaParse job is none.")
        purpose = CallPurpose("parse", shares, model=self.parser, recorded=False)
        reply = await (caller or self.caller).call(partial(self._ask, job_id), purpose)
        return reply.value

    async def _ask(self, job_id: str) -> Reply[HostedPages | None]:
        try:
            answer = await self.service.exchange("GET", f"/api/v2/parse/{job_id}", limit=self._answer_limit, query="expand=markdown")
        except DocmillError as error:
            if error.call is not None and error.call.status in (404, 410):
                raise _lost(f"{self.service.name} at {self.service.host} does not know the job {job_id} any more.", error.call) from None
            raise
        state = await asyncio.to_thread(self._read, answer)
        if state.status == "FAILED":
            failed = ParseError(f"LlamaParse could not parse the file: {state.reason or 'no reason given'}")
            failed.call = FailedCall(self.service.host, sent=True, status=200)
            raise failed
        if state.status == "CANCELLED":
            raise _lost(f"The LlamaParse job {job_id} was cancelled.", FailedCall(self.service.host, sent=True, status=200))
        pages = state.pages
        reply: Reply[HostedPages | None] = answer.reply(pages, pages=0 if pages is None else len(pages.pages))
        return reply if pages is None else replace(reply, settles=job_id)

    def _read(self, answer: Answer) -> JobState:
        data = read_json(self.service, answer)
        return read_job(data, page_limit=self._page_limit, clean=self.service.clean, refuse=self.service.bad_answer)

    async def wait(
        self,
        job_id: str,
        *,
        waited: float = 0,
        shares: tuple[CallShare, ...] = (),
        caller: Caller | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> HostedPages:
        """Poll until the job is done, less and less often. `waited` are the seconds since its start that an earlier worker spent.

        JobOverdue where it is not done at the deadline. A few polls that fail are passed over, longer where the service says so; then, at
        the deadline, or where a breaker refuses to ask, their error is raised. The job goes on in any case: its id stays good.
        """
        end = time.monotonic() + self._deadline - waited
        pause, failures = self._poll_seconds, 0
        while True:
            told = 0.0
            failed: DocmillError | None = None
            try:
                pages = await self.poll(job_id, shares=shares, caller=caller)
                failures = 0
                if pages is not None:
                    return pages
            except (JobLost, CredentialRefused):
                raise
            except (RateLimitError, ServiceUnavailable, RetryableError, CallTimeout) as error:
                failures, failed = failures + 1, error
                if failures >= _PATIENCE or (isinstance(error, ServiceUnavailable) and error.call is None):
                    raise
                told = getattr(error, "retry_after", None) or 0.0
            pause = min(_LONGEST_PAUSE, pause * 1.5)
            if time.monotonic() + max(told, pause) > end:
                if failed is not None:
                    raise failed  # how far the job is, nobody has said
                raise JobOverdue(f"The LlamaParse job {job_id} was not done within LLAMAPARSE_DEADLINE_SECONDS={self._deadline:g}.")
            await sleep(max(told, pause))

    async def aclose(self) -> None:
        """Close the connections."""
        await self.service.aclose()


def make_llamaparse(settings: Settings, caller: Caller = DIRECT) -> LlamaParse | None:
    """Return the client of PARSING_PROVIDER=llamaparse, None for local. A missing key is a ConfigurationError."""
    if settings.parsing_provider == "local":
        return None
    if settings.llamaparse_api_key is None:
        raise ConfigurationError("PARSING_PROVIDER=llamaparse needs LLAMAPARSE_API_KEY or LLAMAPARSE_API_KEY_FILE.")
    seconds = settings.llamaparse_timeout_seconds
    times = Timeouts(settings.provider_connect_seconds, min(seconds, settings.provider_read_seconds), seconds)
    return LlamaParse(
        Service("LlamaParse", settings.llamaparse_base_url, settings.llamaparse_api_key, times),
        tier=settings.llamaparse_tier,
        version=settings.llamaparse_version,
        page_limit=settings.max_pages,
        max_answer_mb=settings.parse_output_mb,
        poll_seconds=settings.llamaparse_poll_seconds,
        deadline=settings.llamaparse_deadline_seconds,
        caller=caller,
    )
