"""LlamaParse away for an hour: what it has been paid for is waited for and not paid again; new files are parsed here, and that is said."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.services import MINUTE, SPENT, Service, service
from tests.servers import LlamaParseServer
from tests.servers.faults import NAMED, always

BEFORE, MEANWHILE = 6, 10
"""Files that are sent before it goes away, and files that come while it is away."""
SAID = """SELECT d.doc_id, d.parse_metadata->>'parsed_locally', e.detail->>'parsed_locally'
    FROM document_markdown AS d JOIN document_events AS e ON e.doc_id = d.doc_id AND e.stage = 'parse' AND e.event = 'stage_completed'
    WHERE NOT starts_with(d.parser, 'llamaparse ')"""


def uploads(server: LlamaParseServer) -> Counter[str]:
    """Return how often each file was sent and taken, by its first page."""
    return Counter(job.pages[0] for job in server.jobs.values())


def states(outside: Service, doc_ids: set[str]) -> set[str]:
    return {row[0] for row in outside.arena.all("SELECT state::text FROM file_extractions WHERE doc_id = ANY(%s)", list(doc_ids))}


@pytest.mark.parametrize("minutes", [60, 10])
def test_an_outage_of_the_parsing_service_pays_no_page_twice_and_new_files_are_parsed_here(arena: Arena, minutes: int) -> None:
    away = minutes * MINUTE
    # Longer than a call waits with its document in hand, as by default; and jobs that grow older than what is worth asking for.
    given = {"BREAKER_OPEN_SECONDS": "6", "LLAMAPARSE_DEADLINE_SECONDS": str(0.4 * away)}
    with service(arena, "parse", given) as outside:
        server = outside.server
        assert isinstance(server, LlamaParseServer)
        server.seconds = 3600  # until it is away
        outside.submit(BEFORE)
        outside.work(WORKER_CONCURRENCY=str(BEFORE))
        arena.wait(lambda: arena.one("SELECT count(*) FROM hosted_jobs") == BEFORE, "all files to be sent")
        paid_for = set(outside.documents)
        server.script(always(NAMED["502_html"]))
        back_at = server.clock + away
        for job in server.jobs.values():
            job.ready_at = 0  # they go on at the service, which only does not answer
        server.seconds = 0
        outside.submit(MEANWHILE)
        new = set(outside.documents) - paid_for
        outside.hold(lambda: states(outside, new) == {"complete"}, "new files to be parsed here", 120)
        assert states(outside, paid_for) <= {"retrying", "working", "queued"}
        assert outside.parsed_there() == 0
        outside.hold(lambda: server.clock > back_at, "the outage to end", 60 + away)
        lasted = server.clock - back_at + away
        outside.recover()
        arena.settle(240)
        line = outside.report(
            f"{minutes} minutes' outage", f"502 with {BEFORE} jobs under way; {MEANWHILE} new files parsed here meanwhile"
        )
        check_all_right(outside)
        check_books(outside, "failed")
        assert (line["attempts"], line["dead_letters"], arena.one(SPENT)) == (0, 0, 0)
        assert (len(uploads(server)), max(uploads(server).values()), server.tally.texts) == (BEFORE, 1, 3 * BEFORE)
        said = {doc_id: reasons for doc_id, *reasons in arena.all(SAID)}
        assert set(said) == new
        assert all(metadata == event and "not called for now" in metadata for metadata, event in said.values())
        assert line["stampede"] <= 10
        # Those in hand when it opened, and a probe a period after that.
        assert server.tally.faults["status_502"] <= BEFORE + MEANWHILE + 2 * lasted / 6
