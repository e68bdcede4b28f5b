"""Reading what LlamaParse says of a job. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.documents import ParsedFile, ParsedPage
from models.errors import ParseError

LARGEST_PAGE = 65_536
"""Bytes of text that LlamaParse reads off one page; a page of this size has probably lost its end."""
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class FailedPage:
    """A page that could not be parsed, and why."""

    number: int
    error: str


@dataclass(frozen=True, slots=True)
class HostedPages:
    """What a finished job gives. Pages are in order, and each number stands in one of the two."""

    pages: tuple[ParsedPage, ...]
    failed: tuple[FailedPage, ...] = ()
    credits: float | None = None
    """What the job cost, once the service has counted it."""

    @property
    def failed_numbers(self) -> list[int]:
        """The pages worth trying again alone."""
        return [page.number for page in self.failed]

    def completed_by(self, again: HostedPages) -> HostedPages:
        """Return the pages with those that came out well the second time in their places."""
        better = {page.number: page for page in again.pages if page.number in set(self.failed_numbers)}
        reasons = {page.number: page for page in again.failed}
        pages = sorted([*self.pages, *better.values()], key=lambda page: page.number)
        failed = [reasons.get(page.number, page) for page in self.failed if page.number not in better]
        cost = [credits for credits in (self.credits, again.credits) if credits is not None]
        return HostedPages(tuple(pages), tuple(failed), sum(cost) if cost else None)


@dataclass(frozen=True, slots=True)
class JobState:
    """How far a job is: still going (no pages), done, or ended without pages."""

    status: str
    reason: str = ""
    pages: HostedPages | None = None


def read_job(data: Any, *, page_limit: int, clean: Callable[[str], str], refuse: Callable[[str], Exception]) -> JobState:
    """Return the state of a job from `GET /api/v2/parse/{id}?expand=markdown`; raises what `refuse` makes for anything else."""
    job = data.get("job") if isinstance(data, dict) else None
    status = job.get("status") if isinstance(job, dict) else None
    if not isinstance(job, dict) or status not in ("PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"):
        raise refuse("sent a job without a status that is known.")
    reason = job.get("error_message")
    if status != "COMPLETED":
        return JobState(status, clean(reason) if isinstance(reason, str) else "")
    markdown = data.get("markdown")
    listed = markdown.get("pages") if isinstance(markdown, dict) else None
    if not isinstance(listed, list):
        raise refuse("sent a finished job without its pages.")
    if len(listed) > page_limit:
        raise ParseError(f"LlamaParse gave {len(listed):,} pages, more than MAX_PAGES={page_limit:,}.")
    usage = job.get("usage")
    cost = usage.get("credits") if isinstance(usage, dict) else None
    good, bad = _read_pages(listed, clean, refuse)
    number_of_credits = float(cost) if isinstance(cost, int | float) and not isinstance(cost, bool) else None
    return JobState(status, pages=HostedPages(good, bad, number_of_credits))


def _read_pages(
    listed: list[Any], clean: Callable[[str], str], refuse: Callable[[str], Exception]
) -> tuple[tuple[ParsedPage, ...], tuple[FailedPage, ...]]:
    good: dict[int, ParsedPage] = {}
    bad: dict[int, FailedPage] = {}
    for page in listed:
        number = page.get("page_number") if isinstance(page, dict) else None
        if not isinstance(page, dict) or type(number) is not int or number < 1 or number in good or number in bad:
            raise refuse("sent pages whose numbers make no sense.")
        text, error = page.get("markdown"), page.get("error")
        if page.get("success") is False:
            bad[number] = FailedPage(number, clean(error)[:_LONGEST_REASON] if isinstance(error, str) else "no reason given")
        elif isinstance(text, str):
            good[number] = ParsedPage(number, text)
        else:
            raise refuse(f"sent page {number} without markdown.")
    return tuple(good[number] for number in sorted(good)), tuple(bad[number] for number in sorted(bad))


def to_parsed_file(found: HostedPages, parser: str) -> ParsedFile:
    """Return what a parser returns. Failed pages are named in the metadata with their reasons, and are empty pages in the text, so that
    the numbers of the others stay true. Without any good page, or any text, a ParseError."""
    if not found.pages:
        first = f": {found.failed[0].error}" if found.failed else ""
        raise ParseError(f"LlamaParse could not parse any page{first}")
    pages = sorted([*found.pages, *(ParsedPage(page.number, "") for page in found.failed)], key=lambda page: page.number)
    metadata: dict[str, Any] = {}
    if found.failed:
        metadata["failed_pages"] = [{"page": page.number, "error": page.error} for page in found.failed]
    if full := [page.number for page in found.pages if len(page.markdown.encode("utf-8", "replace")) >= LARGEST_PAGE]:
        metadata["warnings"] = [f"LlamaParse reads at most 64 KB of a page; these may have lost their ends: {full[:20]}"]
    if found.credits is not None:
        metadata["credits"] = found.credits
    from jobs.adapters.parsers.source import NoText, with_text  # noqa: PLC0415 - with it come all parsers, which an idle worker does without

    try:
        return with_text(ParsedFile(pages=tuple(pages), parser=parser, paged=True, metadata=metadata))
    except NoText:
        raise ParseError("LlamaParse found no text in the file.") from None
