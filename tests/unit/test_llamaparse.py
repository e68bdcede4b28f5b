"""LlamaParse: a job is paid once, found again by its id, and its pages succeed or fail one by one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.llamaparse import JobLost, LlamaParse, extension_of, make_llamaparse, refusal, to_parsed_file
from jobs.adapters.llamaparse.answers import read_job
from jobs.adapters.providers import check_providers
from jobs.adapters.stored_file import StoredFile
from models.calls import CallPurpose, Reply
from models.documents import FileType
from models.errors import (
    BadAnswer,
    ConfigurationError,
    CredentialRefused,
    ParseError,
    PermanentError,
    RateLimitError,
    ServiceUnavailable,
    StorageAway,
    TimeoutError,
)
from models.settings import Settings
from tests.servers import LlamaParseServer, faults

PDF = "application/pdf"
KEY = "llx-abcdefghijklmnop"


@pytest.fixture
def server() -> Iterator[LlamaParseServer]:
    with LlamaParseServer(key=KEY) as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> StoredFile:
    path = tmp_path / "storage" / "Secret merger plan.pdf"
    path.parent.mkdir()
    path.write_text("# One\fTwo\fThree", encoding="utf-8")
    return StoredFile(path, base=path.parent)


def client(server: LlamaParseServer, *, key: str = KEY, **given: Any) -> LlamaParse:
    service = Service("LlamaParse", server.url, SecretStr(key), Timeouts(5, 10, 30))
    return LlamaParse(service, **{"poll_seconds": 0.01, "deadline": 20, **given})


async def test_a_file_becomes_pages(server: LlamaParseServer, file: StoredFile) -> None:
    called = client(server)
    job_id = await called.start(file, PDF)
    parsed = to_parsed_file(await called.wait(job_id), called.parser)
    assert [(page.number, page.markdown) for page in parsed.pages] == [(1, "# One"), (2, "Two"), (3, "Three")]
    assert parsed.parser == "llamaparse cost_effective latest"
    assert parsed.paged
    assert parsed.metadata == {"credits": 9.0}


async def test_the_upload_says_what_is_wanted_and_not_what_the_file_is_called(server: LlamaParseServer, file: StoredFile) -> None:
    await client(server, tier="agentic", version="2026-11-01").start(file, PDF)
    (job,) = server.jobs.values()
    assert (job.name, job.configuration["tier"], job.configuration["version"]) == ("document.pdf", "agentic", "2026-11-01")
    assert job.configuration["processing_control"]["job_failure_conditions"]["allowed_page_failure_ratio"] == 1.0
    assert server.log[0].headers["authorization"] == f"Bearer {KEY}"
    assert b"merger" not in server.log[0].body


async def test_a_stored_job_id_goes_on_in_another_worker_without_paying_again(server: LlamaParseServer, file: StoredFile) -> None:
    server.seconds = 1000
    job_id = await client(server).start(file, PDF)
    assert await client(server).poll(job_id) is None
    server.jobs[job_id].ready_at = 0
    pages = await client(server).wait(job_id)
    assert len(pages.pages) == 3
    assert server.tally.uploads == 1
    assert server.tally.polls >= 2


async def test_polling_slows_down_and_ends_at_the_deadline(server: LlamaParseServer, file: StoredFile) -> None:
    server.seconds = 1000
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    called = client(server, poll_seconds=1, deadline=100)
    job_id = await called.start(file, PDF)
    with pytest.raises(TimeoutError, match="LLAMAPARSE_DEADLINE_SECONDS=100"):
        await called.wait(job_id, waited=99.5, sleep=sleep)
    assert slept == []
    server.seconds = 0
    server.jobs[job_id].ready_at = 0

    async def sleep_or_finish(seconds: float) -> None:
        slept.append(seconds)
        server.jobs[job_id].ready_at = 0 if len(slept) == 8 else 1e9

    server.jobs[job_id].ready_at = 1e9
    await called.wait(job_id, sleep=sleep_or_finish)
    assert slept == sorted(slept) and slept[0] == 1.5 and slept[-1] == 15


async def test_pages_that_failed_are_named_and_can_be_tried_again_alone(server: LlamaParseServer, file: StoredFile) -> None:
    server.bad_pages = {2: 1, 3: 2}
    called = client(server)
    found = await called.wait(await called.start(file, PDF))
    assert found.failed_numbers == [2, 3]
    again = await called.wait(await called.start(file, PDF, pages=found.failed_numbers))
    assert list(server.jobs.values())[1].configuration["page_ranges"] == {"target_pages": "2,3"}
    both = found.completed_by(again)
    assert [page.markdown for page in both.pages] == ["# One", "Two"]
    parsed = to_parsed_file(both, called.parser)
    assert [(page.number, page.markdown) for page in parsed.pages] == [(1, "# One"), (2, "Two"), (3, "")]
    assert parsed.metadata["failed_pages"] == [{"page": 3, "error": "The page could not be rendered"}]
    assert both.credits == 9 + 6


async def test_a_file_without_any_good_page_is_a_parse_error(server: LlamaParseServer, file: StoredFile) -> None:
    server.bad_pages = {1: 9, 2: 9, 3: 9}
    called = client(server)
    found = await called.wait(await called.start(file, PDF))
    with pytest.raises(ParseError, match="could not parse any page: The page could not be rendered"):
        to_parsed_file(found, called.parser)


async def test_a_job_that_failed_is_a_parse_error_in_the_service_s_words(server: LlamaParseServer, file: StoredFile) -> None:
    server.fails = "PDF_IS_PROTECTED\n" + "x" * 5000
    called = client(server)
    job_id = await called.start(file, PDF)
    with pytest.raises(ParseError, match="PDF_IS_PROTECTED") as caught:
        await called.wait(job_id)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("job_id", ["00000000-0000-0000-0000-000000000000", "../../admin", ""])
async def test_a_job_that_is_gone_is_told_apart_from_a_service_that_is(server: LlamaParseServer, job_id: str) -> None:
    with pytest.raises(JobLost):
        await client(server).poll(job_id)
    assert all(".." not in request.path for request in server.log)


async def test_a_cancelled_job_is_lost(server: LlamaParseServer, file: StoredFile) -> None:
    called = client(server)
    job_id = await called.start(file, PDF)
    server.jobs[job_id].status = "CANCELLED"
    with pytest.raises(JobLost, match="cancelled"):
        await called.poll(job_id)


@pytest.mark.parametrize("fault", ["429", "500", "502_html", "reset", "truncated", "cut_off", "hang_in_headers"])
async def test_a_few_failed_polls_cost_nothing(server: LlamaParseServer, file: StoredFile, fault: str) -> None:
    called = client(server)
    if fault.startswith("hang"):
        called.service._timeouts = Timeouts(5, 0.5, 30)
    job_id = await called.start(file, PDF)

    async def sleep(seconds: float) -> None:
        """Time is not what this is about."""

    server.script(faults.first(3, faults.NAMED[fault]))
    assert len((await called.wait(job_id, sleep=sleep)).pages) == 3
    assert (server.tally.uploads, server.tally.polls) == (1, 1 if fault not in ("truncated", "cut_off") else 4)


async def test_an_outage_while_polling_is_raised_and_the_job_stays_good(server: LlamaParseServer, file: StoredFile) -> None:
    called = client(server)
    job_id = await called.start(file, PDF)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    server.script(faults.always(faults.NAMED["503_retry_after"]))
    with pytest.raises(ServiceUnavailable):
        await called.wait(job_id, sleep=sleep)
    assert waits == [3, 3, 3, 3]
    server.reset()
    assert len((await called.wait(job_id)).pages) == 3
    assert server.tally.uploads == 0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("401", CredentialRefused), ("429_retry_after", RateLimitError), ("503", ServiceUnavailable), ("truncated", BadAnswer)],
)
async def test_a_failed_upload_has_its_class(server: LlamaParseServer, file: StoredFile, fault: str, kind: type[Exception]) -> None:
    server.script(faults.always(faults.NAMED[fault]))
    with pytest.raises(kind, match=r"LlamaParse at 127\.0\.0\.1"):
        await client(server).start(file, PDF)


async def test_credits_that_are_used_up_are_a_matter_of_quota(server: LlamaParseServer, file: StoredFile) -> None:
    server.script(faults.always(faults.status(402, '{"detail": "You have exceeded your credits"}')))
    with pytest.raises(CredentialRefused, match="exceeded your credits") as caught:
        await client(server).start(file, PDF)
    assert caught.value.reason == "quota"


async def test_a_refused_key_ends_the_wait_at_once(server: LlamaParseServer, file: StoredFile) -> None:
    job_id = await client(server).start(file, PDF)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with pytest.raises(CredentialRefused) as caught:
        await client(server, key="llx-another-key-9876").wait(job_id, sleep=sleep)
    assert slept == []
    assert "another-key" not in str(caught.value)


async def test_a_file_with_too_many_pages_is_refused(server: LlamaParseServer, file: StoredFile) -> None:
    called = client(server, page_limit=2)
    job_id = await called.start(file, PDF)
    with pytest.raises(ParseError, match="3 pages, more than MAX_PAGES=2"):
        await called.wait(job_id)


@pytest.mark.parametrize(
    ("file_type", "mime_type", "size", "words"),
    [
        (FileType.PDF, PDF, 1000, None),
        (FileType.WORD, "application/msword", 1000, None),
        (FileType.PDF, PDF, 3_000_000, "more than LLAMAPARSE_MAX_FILE_MB=2"),
        (FileType.WORD, "application/vnd.oasis.opendocument.text", 1000, "does not serve"),
        (FileType.TEXT, "text/plain", 1000, "read as they are"),
        (FileType.EMAIL, "message/rfc822", 1000, "read as they are"),
    ],
)
def test_what_is_not_sent_says_why(file_type: FileType, mime_type: str, size: int, words: str | None) -> None:
    told = refusal(file_type, mime_type, size, max_bytes=2_000_000)
    assert told is None if words is None else told is not None and words in told


class Late:
    """A caller whose turn comes after something has happened."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happens, self.calls = happens, 0

    async def call(self, send: Callable[[], Awaitable[Reply[Any]]], purpose: CallPurpose) -> Reply[Any]:
        self.calls += 1
        self.happens()
        return await send()

    def __hash__(self) -> int:
        return id(self)


async def test_a_storage_that_goes_away_while_a_file_waits_for_its_turn_harms_neither_it_nor_the_service(
    server: LlamaParseServer, file: StoredFile
) -> None:
    assert file.base is not None
    caller = Late(partial(file.base.rename, file.base.with_name("away")))
    called = client(server, caller=caller)
    job_id = await called.start(file, PDF)
    assert server.jobs[job_id].pages == ["# One", "Two", "Three"]
    with pytest.raises(StorageAway):
        await called.start(file, PDF)
    file.base.mkdir()
    (file.base / "another").touch()
    with pytest.raises(PermanentError, match="does not exist"):
        await called.start(file, PDF)
    assert caller.calls == 1


async def test_a_type_that_is_not_served_is_never_sent(server: LlamaParseServer, file: StoredFile) -> None:
    assert extension_of("application/x-unheard-of") is None
    with pytest.raises(PermanentError, match="does not serve"):
        await client(server).start(file, "application/x-unheard-of")
    assert server.tally.requests == 0


@pytest.mark.parametrize(
    "pages",
    [None, [1], [{"page_number": 0, "success": True, "markdown": ""}], [{"page_number": 1, "success": True}], [{"markdown": "x"}],
     [{"page_number": 1, "success": True, "markdown": "a"}, {"page_number": 1, "success": False, "error": "b"}]],
)  # fmt: skip
def test_pages_that_make_no_sense_are_refused(pages: Any) -> None:
    data = {"job": {"status": "COMPLETED"}, "markdown": {"pages": pages}}
    with pytest.raises(BadAnswer):
        read_job(data, page_limit=10, clean=str, refuse=BadAnswer)


def test_a_page_that_is_full_is_said_to_have_lost_its_end() -> None:
    data = {"job": {"status": "COMPLETED"}, "markdown": {"pages": [{"page_number": 1, "success": True, "markdown": "x" * 65_536}]}}
    state = read_job(data, page_limit=10, clean=str, refuse=BadAnswer)
    assert state.pages is not None
    assert "64 KB" in to_parsed_file(state.pages, "p").metadata["warnings"][0]


def test_all_that_is_missing_is_listed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    check_providers(Settings())
    wrong = Settings(
        embedding_provider="openai",
        parsing_provider="llamaparse",
        extraction_provider="openai",
        llamaparse_deadline_seconds=5000,
        embedding_max_tokens=100,
        extraction_tokens_per_minute=10_000,
    )
    with pytest.raises(ConfigurationError) as caught:
        check_providers(wrong)
    for variable in (
        "EMBEDDING_API_KEY",
        "LLAMAPARSE_API_KEY",
        "EXTRACTION_API_KEY",
        "STAGE_TIMEOUT_SECONDS",
        "EMBEDDING_MAX_TOKENS=100",
        "EXTRACTION_TOKENS_PER_MINUTE",
    ):
        assert variable in str(caught.value)
    assert make_llamaparse(Settings()) is None
