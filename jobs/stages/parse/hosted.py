"""Parsing by an outside service: a job is started and its id kept, so that it is paid for once, whichever worker sees its end."""

from __future__ import annotations

from contextlib import suppress

from jobs.adapters.llamaparse import HostedPages, JobLost, JobOverdue, LlamaParse, count_pages, guess_pages, refusal, to_parsed_file
from jobs.adapters.stored_file import StoredFile
from jobs.adapters.usage import in_thread
from jobs.stages import HostedJob, JobPart, Tools
from models.documents import Document, ParsedFile
from models.errors import CostLimitReached, ParseError, RequestRefused, ServiceUnavailable
from models.errors import TimeoutError as CallTimeout

_WORTH_ASKING = 2.0
"""How many times LLAMAPARSE_DEADLINE_SECONDS a job may be old before it is given up and paid for again."""


async def parse_hosted(document: Document, file: StoredFile, tools: Tools) -> ParsedFile | str:
    """Return what the service made of a file, or why the local parser is to read it, in words; "" where no service is set.

    ParseError with PARTIAL_PARSE=fail where some pages failed twice. Otherwise what LlamaParse.start and wait raise, except where the
    service refuses the file, cannot parse it or finds no text in it, or may not be called for now and has not been paid yet.
    """
    parser = tools.hosted_parser
    if parser is None:
        return ""
    assert document.file_type is not None
    assert document.mime_type is not None
    most = tools.settings.llamaparse_max_file_mb * 1_000_000
    if reason := refusal(document.file_type, document.mime_type, document.file_size or 0, max_bytes=most):
        return reason
    jobs = _Jobs(document, file, parser, tools)
    try:
        pages = await jobs.pages("file")
        if pages.failed:
            pages = pages.completed_by(await jobs.failed_again(pages))
        # No good page at all is the matter of the local parser, as a job is that failed as a whole.
        if not pages.failed or not pages.pages or tools.settings.partial_parse == "keep":
            return await in_thread(to_parsed_file, pages, parser.parser)
    except ServiceUnavailable as error:
        # Said by the breaker, not by a call; what has been paid for is waited for.
        if error.call is None and not jobs.paid:
            return f"LlamaParse is not called for now: {error}"
        raise
    except (ParseError, RequestRefused) as error:
        return str(error)
    numbers = ", ".join(str(number) for number in pages.failed_numbers[:20])
    raise ParseError(f"{document.file_name}: LlamaParse failed twice on {len(pages.failed)} pages ({numbers}); PARTIAL_PARSE=fail.")


class _Jobs:
    """The jobs for one document."""

    def __init__(self, document: Document, file: StoredFile, parser: LlamaParse, tools: Tools) -> None:
        self._document, self._file, self._parser, self._paid = document, file, parser, tools.paid
        self._sandbox, self._most_pages = tools.sandbox, tools.settings.max_pages
        self._deadline = tools.settings.llamaparse_deadline_seconds
        self._shares = () if tools.paid is None else tools.paid.shares
        self._caller = parser.caller if tools.paid is None else tools.paid.through(parser.caller)
        self._service = f"{parser.service.host} {parser.parser}"
        self.paid = False
        """Whether a job has been started that may still be of use."""

    async def pages(self, part: JobPart, numbers: list[int] | None = None) -> HostedPages:
        """Return the pages of a job that was started earlier, or else now: of the whole file, or of the numbered pages."""
        job = await self._kept(part)
        if job is None:
            assert self._document.mime_type is not None
            job_id = await self._parser.start(
                self._file,
                self._document.mime_type,
                pages=numbers or (),
                page_estimate=0 if numbers else await self._page_estimate(),
                shares=self._shares,
                caller=self._caller,
            )
            job = HostedJob(job_id)
            if self._paid is not None:
                await self._paid.keep_job(self._service, part, job_id)
        self.paid = True
        try:
            return await self._parser.wait(job.job_id, waited=job.waited, shares=self._shares, caller=self._caller)
        except (JobLost, ParseError):
            self.paid = False
            await self._drop(part)
            raise
        except JobOverdue:
            # Only where the service says so itself: in an outage jobs grow old, and have been done for long when it ends.
            if job.waited > _WORTH_ASKING * self._deadline:
                await self._drop(part)
            raise

    async def _page_estimate(self) -> int:
        """Return how many pages will be paid for: counted where the file says it, else guessed from its size."""
        document, limit = self._document, self._most_pages
        assert document.file_type is not None
        counted: int | None = None
        with suppress(ParseError, CallTimeout):  # a file that takes its reader down may still be one that the service can read
            counted = await self._sandbox.run(count_pages, self._file, document.file_type, limit)
        return counted or guess_pages(document.file_size or 0, limit)

    async def failed_again(self, pages: HostedPages) -> HostedPages:
        """Return what became of pages that had failed, tried alone; what may not be paid for any more stays failed."""
        try:
            return await self.pages("failed_pages", pages.failed_numbers)
        except (ParseError, RequestRefused, CostLimitReached):
            return HostedPages((), pages.failed)

    async def _kept(self, part: JobPart) -> HostedJob | None:
        if self._paid is None:
            return None
        return (await self._paid.kept_jobs(self._service)).get(part)

    async def _drop(self, part: JobPart) -> None:
        if self._paid is not None:
            await self._paid.drop_job(part)
