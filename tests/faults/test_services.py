"""Outside services that fail for a while in every way there is: documents wait, none is given up, none comes in a crowd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.services import IMPATIENT, TEXTS, Kind, service
from tests.servers.faults import NAMED, always

COUNT = 16
MANY, CROWD = 40, 24
"""After a pause that a 429 asked for, calls are sent 50 ms apart: of so many documents of one request each, so many at most in a second."""


@dataclass(frozen=True)
class Trouble:
    """What a service does wrong, and what the ledger calls it."""

    fault: str
    word: str
    did: str
    most_at_once: int = 10
    """Requests in the first second after it is well again: the probe, and who is let in after it."""


TROUBLES = {
    "429_retry_after": Trouble("429_retry_after", "rate_limited", "429 with Retry-After: 2", CROWD),
    "429": Trouble("429", "rate_limited", "429 without Retry-After", CROWD),
    "500": Trouble("500", "failed", "HTTP 500"),
    "502_html": Trouble("502_html", "failed", "502 with HTML"),
    "hang_in_headers": Trouble("hang_in_headers", "timeout", "takes the request and is silent"),
    "hang_in_body": Trouble("hang_in_body", "timeout", "is silent in mid-body"),
    "drip": Trouble("drip", "timeout", "16 bytes every 0.2 s"),
    "truncated": Trouble("truncated", "bad_answer", "truncated JSON"),
    "wrong_count": Trouble("wrong_count", "bad_answer", "a vector too few"),
    "bad_index": Trouble("bad_index", "bad_answer", "vectors with indexes of no text"),
    "wrong_dimension": Trouble("wrong_dimension", "bad_answer", "vectors of a wrong dimension"),
    "nan": Trouble("nan", "bad_answer", "NaN in a vector"),
    "reset": Trouble("reset", "failed", "connection reset instead of an answer"),
}
SLOW = {"hang_in_headers", "hang_in_body", "drip"}
OF_EMBEDDING = list(TROUBLES)
OF_EXTRACTION = ["429_retry_after", "429", "500", "502_html", "hang_in_headers", "hang_in_body", "drip", "truncated", "reset"]


@pytest.mark.parametrize(
    ("kind", "name"), [*(("embedding", name) for name in OF_EMBEDDING), *(("extraction", name) for name in OF_EXTRACTION)]
)
def test_every_document_outlasts_a_service_that_fails(arena: Arena, kind: Kind, name: str) -> None:
    trouble = TROUBLES[name]
    with service(arena, kind, IMPATIENT if name in SLOW else None) as outside:
        outside.server.script(always(NAMED[trouble.fault]))
        limited = trouble.word == "rate_limited"
        outside.submit(MANY if limited else COUNT, TEXTS if limited else 2 * TEXTS)
        outside.work()
        if limited:
            outside.hold(lambda: outside.told_to_wait() >= COUNT // 4, "some documents to be told to wait")
        else:
            outside.hold(lambda: outside.probed_in_vain() and outside.server.tally.requests >= 5, "a probe to fail")
        outside.recover()
        arena.settle(240)
        line = outside.report(name, trouble.did)
        check_all_right(outside)
        check_books(outside, trouble.word)
        assert line["stampede"] <= trouble.most_at_once


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
@pytest.mark.parametrize("name", ["500", "hang_in_headers"])
def test_a_document_alone_with_a_failing_service_waits_too(arena: Arena, kind: Kind, name: str) -> None:
    with service(arena, kind, IMPATIENT if name in SLOW else None) as outside:
        outside.server.script(always(NAMED[name]))
        outside.submit(1)
        outside.work(1)
        outside.hold(outside.probed_in_vain, "a probe to fail")
        outside.recover()
        arena.settle(240)
        outside.report(f"{name}, one document", TROUBLES[name].did)
        check_all_right(outside)
