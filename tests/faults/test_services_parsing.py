"""LlamaParse away for an hour: what it has been paid for is waited for and not paid again; new files are parsed here, and that is said."""

from __future__ import annotations

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.service_parsing import BEFORE, MEANWHILE, SAID, have_jobs_under_way, meet_new_files, uploads
from tests.faults.services import MINUTE, SPENT, service
from tests.servers.faults import NAMED, always


@pytest.mark.parametrize("minutes", [60, 10])
def test_an_outage_of_the_parsing_service_pays_no_page_twice_and_new_files_are_parsed_here(arena: Arena, minutes: int) -> None:
    away = minutes * MINUTE
    # Longer than a call waits with its document in hand, as by default; and jobs that grow older than what is worth asking for.
    given = {"BREAKER_OPEN_SECONDS": "6", "LLAMAPARSE_DEADLINE_SECONDS": str(0.4 * away)}
    with service(arena, "parse", given) as outside:
        server = have_jobs_under_way(outside)
        server.script(always(NAMED["502_html"]))
        back_at = server.clock + away
        new = meet_new_files(outside, server)
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
