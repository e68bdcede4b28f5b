"""Services that are there at times: after an hour, every other minute, for every fifth request; and one that is merely odd."""

from __future__ import annotations

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.services import MINUTE, Kind, Service, service
from tests.servers.faults import NAMED, always, only_every, outage

HOUR = 60 * MINUTE


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
def test_an_hours_outage_costs_no_document_and_few_calls(arena: Arena, kind: Kind) -> None:
    with service(arena, kind) as outside:
        outside.server.script(outage(0, HOUR, NAMED["502_html"]))
        down_until = outside.server.clock + HOUR
        outside.submit(30)
        outside.work()
        outside.hold(lambda: outside.server.clock > down_until, "the outage to end", 120 + HOUR)
        arena.fault()
        outside.recovered = down_until
        arena.settle(180)
        line = outside.report("an hour's outage", "502 for 60 times a minute of the settings' defaults (here 60 s)")
        check_all_right(outside)
        check_books(outside, "failed")
        assert (line["attempts"], line["dead_letters"]) == (0, 0)
        assert line["stampede"] <= 10
        # Those in hand when it opened, and a probe after 1, 2, 4, 8, 15, 15, 15 minutes; a few more were let in while it was being opened.
        assert line["calls"] - line["outcomes"]["ok"] <= 8 + 8 + 8


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
def test_documents_get_through_a_service_that_comes_and_goes(arena: Arena, kind: Kind) -> None:
    # By count, as on a busy machine a time of a few seconds passes unseen.
    with service(arena, kind, {"BREAKER_MAX_OPEN_SECONDS": str(2 * MINUTE)}) as outside:
        outside.server.script(lambda number, _: NAMED["500"] if number % 20 >= 12 else None)
        outside.submit(24)
        outside.work()
        arena.settle(300)
        outside.report("flapping", "12 requests answered, 8 not, and so on")
        check_all_right(outside)
        check_books(outside, "failed")
        assert outside.server.tally.faults["status_500"] >= 8


@pytest.mark.parametrize("kind", ["embedding", "extraction", "parse"])
def test_documents_get_through_a_service_that_answers_every_fifth_request_or_do_when_requeued(arena: Arena, kind: Kind) -> None:
    with service(arena, kind, {"BREAKER_MAX_OPEN_SECONDS": str(MINUTE)}) as outside:
        outside.server.script(only_every(5, NAMED["500"]))
        outside.submit(4, paragraphs=4)
        outside.work()
        arena.settle(300)
        requeued = requeue_until_complete(outside)
        outside.report("every fifth request", f"500 but for every fifth; {requeued} dead letters requeued")
        check_all_right(outside)
        check_books(outside, "failed")


def requeue_until_complete(outside: Service) -> int:
    """Requeue dead letters while the service is as it is, ten times at most; return how many were."""
    requeued = 0
    for _ in range(10):
        found = outside.arena.one("SELECT requeue_dead_letters()")
        if not found:
            break
        requeued += found
        outside.arena.settle(300)
    return requeued


def test_vectors_in_another_order_go_where_their_indexes_say(arena: Arena) -> None:
    with service(arena, "embedding") as outside:
        outside.server.script(always(NAMED["permuted"]))
        outside.submit(8)
        outside.work()
        arena.settle(240)
        line = outside.report("wrong order", "vectors in reverse order under right indexes")
        check_all_right(outside)
        assert (line["attempts"], set(line["outcomes"])) == (0, {"ok"})
