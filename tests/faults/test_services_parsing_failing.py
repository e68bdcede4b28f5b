"""LlamaParse answers, but not as it should: jobs that have been paid for are waited for and not paid again, and every file is parsed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.service_parsing import BEFORE, MEANWHILE, SAID, finish_jobs, have_jobs_under_way, states, uploads, well_again
from tests.faults.services import IMPATIENT, MINUTE, SPENT, Service, service
from tests.servers.faults import NAMED, always

PAUSED = {"BREAKER_OPEN_SECONDS": "6", "BREAKER_MAX_OPEN_SECONDS": "6"}
"""Longer than a call may wait with its document in hand, as by default."""
ALERTS = "SELECT kind, count(*) FROM alerts GROUP BY 1"
CROWD = 24
"""After a pause that a 429 asked for, calls are sent 50 ms apart: so many in a second."""


REFUSALS = {"403": "403 until paid", "quota": "429 with a quota code until paid"}


def check_paid_once(outside: Service) -> None:
    """No file was sent and taken twice, and who was sent before it failed was parsed there."""
    sent = uploads(outside.server)
    assert max(sent.values()) == 1, sent
    assert outside.parsed_there() >= BEFORE


@pytest.mark.parametrize("name", list(REFUSALS))
def test_paid_jobs_wait_for_a_service_that_takes_us_again_and_spend_nothing(arena: Arena, name: str) -> None:
    with service(arena, "parse", PAUSED) as outside, arena.connect() as listener:
        listener.execute("LISTEN docmill_alerts")
        server = have_jobs_under_way(outside)
        paid_for = set(outside.documents)
        server.script(always(NAMED[name]))
        finish_jobs(server)
        outside.submit(MEANWHILE)
        new = set(outside.documents) - paid_for
        outside.hold(lambda: states(outside, new) == {"complete"}, "new files to be parsed here", 120)
        assert outside.breaker()[0] in ("open", "half_open")
        assert (outside.breaker()[1], arena.one(SPENT), outside.parsed_there()) == (True, 0, 0)
        assert states(outside, paid_for) <= {"retrying", "working", "queued"}
        assert [note.channel for note in listener.notifies(timeout=10, stop_after=1)] == ["docmill_alerts"]
        well_again(outside)
        line = outside.report(name, f"{REFUSALS[name]}; {BEFORE} jobs under way, {MEANWHILE} new files parsed here meanwhile")
        check_all_right(outside)
        check_books(outside, "refused")
        check_paid_once(outside)
        assert dict(arena.all(ALERTS)) == {"service_refused": 1}
        assert (line["attempts"], line["dead_letters"], outside.breaker()[:2]) == (0, 0, ("closed", False))
        assert {doc_id for doc_id, *_ in arena.all(SAID)} >= new
        assert line["stampede"] <= 10


def test_files_are_parsed_here_and_paid_jobs_wait_while_the_service_is_silent(arena: Arena) -> None:
    with service(arena, "parse", {**IMPATIENT, **PAUSED}) as outside:
        server = have_jobs_under_way(outside)
        paid_for = set(outside.documents)
        server.script(always(NAMED["hang_in_headers"]))
        finish_jobs(server)
        outside.submit(MEANWHILE)
        new = set(outside.documents) - paid_for
        outside.hold(lambda: states(outside, new) == {"complete"}, "new files to be parsed here", 120)
        assert (states(outside, paid_for) <= {"retrying", "working", "queued"}, outside.parsed_there()) == (True, 0)
        well_again(outside)
        line = outside.report(
            "hang_in_headers", f"takes requests and is silent; {BEFORE} jobs under way, {MEANWHILE} new files parsed here meanwhile"
        )
        check_all_right(outside)
        check_books(outside, "timeout")
        check_paid_once(outside)
        assert line["dead_letters"] == 0
        assert line["stampede"] <= 10


def test_a_download_that_drips_is_waited_for_and_not_paid_again(arena: Arena) -> None:
    # An upload's short answer comes through in time, the pages do not.
    with service(arena, "parse", {**IMPATIENT, "LLAMAPARSE_TIMEOUT_SECONDS": "4", **PAUSED}) as outside:
        server = have_jobs_under_way(outside)
        server.script(always(NAMED["drip"]))
        finish_jobs(server)
        outside.submit(MEANWHILE)
        outside.hold(lambda: outside.breaker()[0] != "closed" and outside.told_to_wait() >= BEFORE, "paid jobs to be told to wait")
        assert outside.parsed_there() == 0
        well_again(outside)
        line = outside.report("drip", f"16 bytes every 0.2 s; {BEFORE} jobs under way, {MEANWHILE} new files")
        check_all_right(outside)
        check_paid_once(outside)
        calls = outside.calls()
        assert calls == Counter({"ok": server.tally.uploads, "timeout": calls["timeout"]})
        assert 0 < calls["timeout"] <= server.tally.faults["drip"]
        assert line["dead_letters"] == 0
        assert line["stampede"] <= 10


def test_a_429_that_says_for_how_long_holds_up_paid_jobs_and_new_files_and_costs_none_an_attempt(arena: Arena) -> None:
    with service(arena, "parse", PAUSED) as outside:
        server = have_jobs_under_way(outside)
        server.script(always(NAMED["429_retry_after"]))
        finish_jobs(server)
        outside.submit(MEANWHILE)
        outside.hold(lambda: outside.told_to_wait() >= 2, "files to be told to wait")
        assert outside.breaker()[0] == "closed"
        well_again(outside)
        line = outside.report("429 with Retry-After", f"429 with Retry-After: 2; {BEFORE} jobs under way, {MEANWHILE} new files")
        check_all_right(outside)
        check_books(outside, "rate_limited")
        check_paid_once(outside)
        assert (line["attempts"], line["dead_letters"], outside.parsed_there()) == (0, 0, len(outside.documents))
        assert line["stampede"] <= CROWD


def test_files_get_through_a_parsing_service_that_comes_and_goes(arena: Arena) -> None:
    # By count, as on a busy machine a time of a few seconds passes unseen.
    with service(arena, "parse", {"BREAKER_MAX_OPEN_SECONDS": str(2 * MINUTE)}) as outside:
        outside.server.script(lambda number, _: NAMED["500"] if number % 20 >= 12 else None)
        outside.submit(24)
        outside.work()
        arena.settle(300)
        there = outside.parsed_there()
        line = outside.report("flapping", f"12 requests answered, 8 not, and so on; {there} of 24 files parsed there")
        check_all_right(outside)
        check_books(outside, "failed")
        assert max(uploads(outside.server).values()) == 1
        assert (line["dead_letters"], there > 0) == (0, True)
        assert outside.server.tally.faults["status_500"] >= 8
