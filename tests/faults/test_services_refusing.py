"""Services that refuse the key, or say that its quota is used up: one alert, and documents that wait without spending anything."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.services import IMPATIENT, KEY, SPENT, Kind, Service, service
from tests.servers.faults import NAMED, always, first

COUNT = 16
PAUSED = {"BREAKER_OPEN_SECONDS": "6", "BREAKER_MAX_OPEN_SECONDS": "6"}
"""Longer than a call may wait with its document in hand, as by default: documents wait in the queue."""
ALERTS = "SELECT kind, count(*) FROM alerts GROUP BY 1"


def refuse(outside: Service, name: str) -> None:
    """Have the service know the key no longer, by itself, or answer as scripted."""
    if name == "401":
        outside.server.key = "sk-of-somebody-else"
    else:
        outside.server.script(always(NAMED[name]))


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
@pytest.mark.parametrize("name", ["401", "403", "quota"])
def test_documents_wait_for_a_key_that_works_again_and_spend_nothing(arena: Arena, kind: Kind, name: str) -> None:
    with service(arena, kind, PAUSED) as outside, arena.connect() as listener:
        listener.execute("LISTEN docmill_alerts")
        refuse(outside, name)
        outside.submit(COUNT)
        outside.work()
        outside.hold(outside.all_wait, "all documents to wait")
        state, refused, _, opened = outside.breaker()
        assert (state in ("open", "half_open"), refused, opened) == (True, True, 1)
        assert arena.one(SPENT) == 0
        assert [note.channel for note in listener.notifies(timeout=10, stop_after=1)] == ["docmill_alerts"]
        # Who was under way when it opened, and one probe a period after that.
        assert outside.server.tally.requests <= 8 + 10
        outside.server.key = KEY
        outside.recover()
        arena.settle(240)
        line = outside.report(name, "the key is refused until the service knows it again" if name == "401" else f"{name} until paid")
        check_all_right(outside)
        assert dict(arena.all(ALERTS)) == {"service_refused": 1}
        assert (line["attempts"], line["dead_letters"]) == (0, 0)
        assert outside.breaker()[:2] == ("closed", False)
        assert line["stampede"] <= 10
        calls = outside.calls()
        assert calls == Counter({"ok": calls["ok"], "refused": outside.server.tally.requests - calls["ok"]})


def test_files_are_parsed_here_while_the_parsing_service_refuses_the_key(arena: Arena) -> None:
    with service(arena, "parse", PAUSED) as outside:
        refuse(outside, "401")
        outside.submit(COUNT)
        outside.work()
        arena.settle(240)
        assert outside.breaker()[1:2] == (True,)
        assert dict(arena.all(ALERTS)) == {"service_refused": 1}
        assert outside.parsed_there() == 0
        outside.server.key = KEY
        outside.recover()
        arena.wait(lambda: arena.one("SELECT try_at < now() FROM circuit_breakers"), "the time to probe")
        outside.submit(4)
        arena.settle(240)
        outside.report("401", "the key is refused; files are parsed here meanwhile")
        check_all_right(outside)
        assert arena.one(SPENT) == 0
        assert outside.parsed_there() > 0
        assert outside.breaker()[:2] == ("closed", False)


@pytest.mark.parametrize(
    ("name", "word"),
    [("429", "rate_limited"), ("500", "failed"), ("hang_in_body", "timeout"), ("truncated", "bad_answer"), ("reset", "failed")],
)
def test_files_are_parsed_somewhere_whatever_the_parsing_service_does(arena: Arena, name: str, word: str) -> None:
    with service(arena, "parse", IMPATIENT if word == "timeout" else None) as outside:
        outside.server.script(first(3 if word == "rate_limited" else 12, NAMED[name]))
        outside.submit(COUNT)
        outside.work()
        arena.settle(240)
        line = outside.report(name, f"the first requests meet {name}; {outside.parsed_there()} of {COUNT} files parsed there")
        check_all_right(outside)
        check_books(outside, word)
        assert line["dead_letters"] == 0
