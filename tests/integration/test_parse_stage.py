"""The stage parse with LlamaParse behind a socket, by the real runner: paid once, gone on with by others, done locally where it must."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from jobs.pipeline.runner import Runner
from jobs.stages import check, parse
from models.documents import Document, FileType
from tests.integration.conftest import Bench
from tests.integration.outside import Outside
from tests.servers import LlamaParseServer, faults

HTML = "<p>first page</p>\f<p>second page</p>\f<p>third page</p>"


@pytest.fixture
def endpoint() -> Iterator[LlamaParseServer]:
    with LlamaParseServer() as running:
        yield running


@pytest.fixture
async def outside(bench: Bench) -> AsyncIterator[Outside]:
    made = Outside(bench, passages=2)
    stored = Path(bench.settings.storage_base_path) / "uploads" / "a"
    stored.parent.mkdir(parents=True)
    stored.write_text(HTML, encoding="utf-8")
    yield made
    await made.aclose()


def runner(outside: Outside, endpoint: LlamaParseServer, sandbox: Any, key: str | None = None, **settings: Any) -> Runner:
    made = outside.runner(
        {"parse": parse.run, "check": check.run}, settings=settings, sandbox=sandbox, hosted_parser=outside.parser(endpoint.url, key)
    )

    async def validate(document: Document, _: Any) -> Document:
        kind, mime = (FileType.TEXT, "text/plain") if document.doc_id == "text" else (FileType.HTML, "text/html")
        return replace(document, file_size=len(HTML), file_type=kind, mime_type=mime)

    made._runs._stages["validate"] = validate
    embed = made._runs._stages["embed"]

    async def two(document: Document, tools: Any) -> Document:
        return await embed(document, tools)

    made._runs._stages["embed"] = two
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def parsed(outside: Outside, doc_id: str = "a") -> tuple[Any, ...]:
    return outside.bench.one("SELECT parser, markdown, parse_metadata FROM document_markdown WHERE doc_id = %s", doc_id)


@pytest.mark.parametrize("handoff", ["inline", "queue"])
async def test_a_file_is_parsed_by_the_service_and_paid_for_once(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any, handoff: str
) -> None:
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, handoff=handoff))
    assert outside.state() == ("complete", "complete", 0)
    parser, markdown, metadata = parsed(outside)
    assert parser.startswith("llamaparse ")
    assert "second page" in markdown
    assert metadata["credits"] == 9
    assert endpoint.tally.uploads == 1
    assert outside.bench.all("SELECT doc_ids, stage, kind, outcome FROM provider_usage") == [(["a"], "parse", "parse", "ok")]
    assert outside.bench.one("SELECT count(*) FROM hosted_jobs") == (0,)


async def test_a_job_goes_on_in_another_worker_without_being_paid_again(outside: Outside, endpoint: LlamaParseServer, sandbox: Any) -> None:
    endpoint.seconds = 1.0
    outside.bench.submit()
    found = outside.bench.fetch()
    assert found is not None
    dying = asyncio.create_task(runner(outside, endpoint, sandbox).run(*found))
    async with asyncio.timeout(20):
        await asyncio.to_thread(wait_for, lambda: endpoint.tally.polls >= 2)
    assert outside.bench.all("SELECT part, job_id FROM hosted_jobs") == [("file", next(iter(endpoint.jobs)))]
    dying.cancel()
    await dying
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert endpoint.tally.uploads == 1


async def test_a_job_that_is_gone_is_started_again(outside: Outside, endpoint: LlamaParseServer, sandbox: Any) -> None:
    endpoint.seconds = 60
    outside.bench.submit()
    found = outside.bench.fetch()
    assert found is not None
    working = asyncio.create_task(runner(outside, endpoint, sandbox).run(*found))
    async with asyncio.timeout(20):
        await asyncio.to_thread(wait_for, lambda: endpoint.tally.polls >= 1)
    endpoint.jobs.clear()
    endpoint.seconds = 0
    await working
    assert outside.bench.one("SELECT count(*) FROM hosted_jobs") == (0,)
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert endpoint.tally.uploads == 2


async def test_a_429_is_waited_out_without_counting(outside: Outside, endpoint: LlamaParseServer, sandbox: Any) -> None:
    endpoint.script(faults.sequence(faults.rate_limited("0.3")))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert parsed(outside)[0].startswith("llamaparse ")
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == (0,)


@pytest.mark.parametrize("fault", ["401", "502_html"])
async def test_while_the_service_may_not_be_called_files_are_parsed_locally_and_it_is_said(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any, fault: str
) -> None:
    endpoint.script(faults.always(faults.NAMED[fault]))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    parser, markdown, metadata = parsed(outside)
    assert not parser.startswith("llamaparse")
    assert "second page" in markdown
    assert "not called for now" in metadata["parsed_locally"]
    told = outside.bench.one("SELECT detail->>'parsed_locally' FROM document_events WHERE stage = 'parse' AND event = 'stage_completed'")
    assert told == (metadata["parsed_locally"],)
    assert outside.bench.one("SELECT count(*) FROM alerts") == (int(fault == "401"),)


async def test_an_outage_in_mid_job_is_waited_out_because_the_job_is_paid_for(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    endpoint.script(lambda number, seconds: faults.NAMED["500"] if 2 <= number < 14 else None)
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert parsed(outside)[0].startswith("llamaparse ")
    assert endpoint.tally.uploads == 1
    assert outside.bench.one("SELECT count(*) FROM document_events WHERE detail->>'counts' = 'true'") == (0,)


async def test_a_job_grown_old_in_an_outage_is_not_paid_again_because_the_first_question_about_it_fails(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    worker = runner(outside, endpoint, sandbox)
    hosted: Any = worker._runs._tools.hosted_parser
    hosted._deadline = 0.0  # one question a try, as after an outage that was longer than the deadline
    endpoint.script(lambda number, seconds: faults.NAMED["500"] if number in (2, 3) else None)
    outside.bench.submit()
    made_old = "UPDATE hosted_jobs SET started_at = now() - interval '1 hour'"
    await outside.work(worker, until=lambda: outside.bench.conn.execute(made_old) is None)
    assert outside.state()[:2] == ("complete", "complete")
    assert parsed(outside)[0].startswith("llamaparse ")
    assert endpoint.tally.uploads == 1


async def test_a_service_that_is_silent_twice_is_asked_again_before_files_are_parsed_locally(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    outside.terms = {"total_seconds": 1.0}
    endpoint.script(faults.first(2, faults.NAMED["hang_in_headers"]))
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state()[:2] == ("complete", "complete")
    assert parsed(outside)[0].startswith("llamaparse ")


async def test_what_the_service_does_not_serve_or_cannot_parse_is_parsed_locally(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    worker = runner(outside, endpoint, sandbox)
    outside.bench.submit("text")
    await outside.work(worker)
    assert "text files" in parsed(outside, "text")[2]["parsed_locally"]
    assert endpoint.tally.requests == 0
    endpoint.fails = "no fonts"
    outside.bench.submit("a")
    await outside.work(worker)
    assert "no fonts" in parsed(outside)[2]["parsed_locally"]
    assert outside.state()[1] == "complete"


@pytest.mark.parametrize(
    ("failures", "partial", "ends"), [(1, "fail", "complete"), (2, "keep", "complete"), (2, "fail", "failed")], ids=["once", "keep", "fail"]
)
async def test_pages_that_fail_are_tried_again_alone_and_then_the_setting_decides(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any, failures: int, partial: str, ends: str
) -> None:
    endpoint.bad_pages = {2: failures}
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, partial_parse=partial))
    assert outside.state()[1] == ends
    assert [sorted(job.wanted) for job in endpoint.jobs.values()] == [[1, 2, 3], [2]]
    if ends == "failed":
        assert "PARTIAL_PARSE=fail" in outside.bench.one("SELECT error_message FROM dead_letters")[0]
        return
    _, markdown, metadata = parsed(outside)
    assert ("second page" in markdown) == (failures == 1)
    assert [page["page"] for page in metadata.get("failed_pages", [])] == ([2] if failures == 2 else [])


async def test_a_second_try_of_pages_that_would_cost_too_much_costs_the_document_nothing(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    endpoint.bad_pages = {2: 1}
    outside.terms = {"max_cost_per_document": Decimal("0.0085")}  # two pages have cost .006, a third would cost .003
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, partial_parse="keep"))
    assert outside.state()[1] == "complete"
    assert [sorted(job.wanted) for job in endpoint.jobs.values()] == [[1, 2, 3]]
    assert [page["page"] for page in parsed(outside)[2]["failed_pages"]] == [2]


@pytest.mark.parametrize("partial", ["keep", "fail"])
async def test_a_file_of_which_no_page_comes_back_is_parsed_locally(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any, partial: str
) -> None:
    endpoint.bad_pages = dict.fromkeys((1, 2, 3), 9)
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox, partial_parse=partial))
    assert outside.state() == ("complete", "complete", 0)
    parser, markdown, metadata = parsed(outside)
    assert (parser.startswith("llamaparse "), "second page" in markdown) == (False, True)
    assert "could not parse any page" in metadata["parsed_locally"]
    assert endpoint.tally.uploads == 2


async def test_a_file_in_which_the_service_finds_no_text_is_parsed_locally(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    endpoint.blind = True
    outside.bench.submit()
    await outside.work(runner(outside, endpoint, sandbox))
    assert outside.state() == ("complete", "complete", 0)
    assert "no text" in parsed(outside)[2]["parsed_locally"]
    assert (endpoint.tally.uploads, "second page" in parsed(outside)[1]) == (1, True)


async def test_new_content_forgets_the_job_for_the_old_one(outside: Outside, endpoint: LlamaParseServer, sandbox: Any) -> None:
    outside.bench.submit()
    outside.bench.conn.execute("INSERT INTO hosted_jobs (doc_id, version, part, job_id, service) VALUES ('a', 1, 'file', 'old', 's')")
    outside.bench.submit(content="b")
    assert outside.bench.one("SELECT count(*) FROM hosted_jobs") == (0,)


async def test_a_parse_is_entered_with_an_estimate_of_its_pages_and_paid_for_by_those_that_come_back(
    outside: Outside, endpoint: LlamaParseServer, sandbox: Any
) -> None:
    endpoint.seconds = 1
    outside.bench.submit()
    look = "SELECT pages, estimated_cost::float8, cost::float8, cost_of_document('a')::float8 FROM provider_usage"
    working = asyncio.create_task(outside.work(runner(outside, endpoint, sandbox)))
    seen: list[tuple[Any, ...]] = []
    for _ in range(2000):
        if seen := outside.bench.all(look + " WHERE outcome = 'ok'"):
            break
        await asyncio.sleep(0.01)
    assert seen[0][1:] == (0.003, 0.003, 0.003)  # one page, by its size
    await working
    assert outside.state() == ("complete", "complete", 0)
    assert outside.bench.all(look) == [(3, 0.003, 0.009, 0.009)]
    assert outside.bench.all("SELECT batch_id, calls FROM cost_by_batch") == []
