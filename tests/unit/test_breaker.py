"""The circuit breaker as a state machine: what holds in whatever order things happen, and how an outage goes for a thousand documents."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

from jobs.breaker import (
    RAMP_SECONDS,
    Asked,
    Breaker,
    Event,
    Failed,
    GaveUp,
    Refused,
    Rules,
    Succeeded,
    decide,
    is_news,
    passes,
    wait_of,
)

RULES = Rules(failures=5, window_seconds=60, open_seconds=60, max_open_seconds=900, probe_seconds=130)
A, B = UUID(int=1), UUID(int=2)


def failed(call: UUID = A, failures: int = 5, calls: int = 5, in_a_row: int | None = None) -> Failed:
    return Failed(call, "it is down", failures, calls, failures if in_a_row is None else in_a_row)


def opened(now: float = 0.0) -> Breaker:
    return decide(Breaker(), failed(), now, RULES)


def test_it_opens_at_so_many_failures_and_not_before() -> None:
    assert decide(Breaker(), failed(failures=4), 0, RULES) == Breaker()
    breaker = opened()
    assert (breaker.state, breaker.try_at, breaker.opened_count) == ("open", 60, 1)
    assert not passes(breaker, 10**9)


def test_failures_that_are_few_among_many_calls_do_not_open_it_and_a_row_of_them_does() -> None:
    assert decide(Breaker(), failed(failures=20, calls=6000, in_a_row=1), 0, RULES) == Breaker()
    assert decide(Breaker(), failed(failures=20, calls=6000, in_a_row=5), 0, RULES).state == "open"
    assert decide(Breaker(), failed(failures=5, calls=9, in_a_row=1), 0, RULES).state == "open"  # every other call
    assert decide(Breaker(), failed(failures=1, calls=1, in_a_row=5), 0, RULES).state == "open"  # each slower than the window is long


def test_one_call_probes_and_only_after_the_time_is_up() -> None:
    breaker = opened()
    assert decide(breaker, Asked(A), 59.9, RULES) == breaker
    probed = decide(breaker, Asked(A), 60, RULES)
    assert (probed.state, probed.probe_by) == ("half_open", A)
    assert decide(probed, Asked(B), 61, RULES) == probed


def test_a_probe_that_died_with_its_worker_gives_way_to_another_and_has_no_say_any_more() -> None:
    probed = decide(opened(), Asked(A), 60, RULES)
    again = decide(probed, Asked(B), 60 + RULES.probe_seconds, RULES)
    assert again.probe_by == B
    for late in (Succeeded(A), failed(A), GaveUp(A, 1)):
        assert decide(again, late, 200, RULES) == again


def test_success_closes_it_and_lets_calls_in_one_by_one_first() -> None:
    closed = decide(decide(opened(), Asked(A), 60, RULES), Succeeded(A), 61, RULES)
    assert closed.state == "closed" and not passes(closed, 61) and passes(closed, 61 + RAMP_SECONDS)
    started = [61 + wait_of(closed, place, 61) for place in range(2000)]
    assert started == sorted(started)
    per_second = Counter(int(at - 61) for at in started)
    assert [per_second[second] for second in range(4)] == [1, 2, 4, 8]


def test_each_failed_probe_doubles_the_time_up_to_the_most() -> None:
    breaker, now, lengths = opened(), 0.0, []
    for _ in range(7):
        lengths.append(breaker.open_seconds)
        now = breaker.try_at or now
        breaker = decide(decide(breaker, Asked(A), now, RULES), failed(A, 1, 1), now, RULES)
    assert lengths == [60, 120, 240, 480, 900, 900, 900]
    assert breaker.opened_count == 1


def test_failures_during_the_ramp_open_it_sooner_and_for_longer() -> None:
    closed = decide(decide(opened(), Asked(A), 60, RULES), Succeeded(A), 61, RULES)
    assert decide(closed, failed(B, 1, 1), 62, RULES) == closed
    again = decide(closed, failed(B, 2, 9, 1), 62, RULES)
    assert (again.state, again.open_seconds, again.opened_count) == ("open", 120, 2)
    assert decide(closed, failed(B, 5, 9), 100, RULES).open_seconds == 60


def test_a_refusal_opens_it_at_once_and_is_news_once() -> None:
    first = decide(Breaker(), Refused(A, "no key"), 0, RULES)
    assert first.state == "open" and is_news(Breaker(), first)
    assert decide(first, Refused(B, "no key"), 1, RULES) == first
    probed = decide(first, Asked(A), 60, RULES)
    second = decide(probed, Refused(A, "no key"), 61, RULES)
    assert second.open_seconds == 120 and not is_news(probed, second)
    down = opened()
    assert is_news(down, decide(down, Refused(B, "no key"), 1, RULES))


def test_a_probe_that_is_not_sent_leaves_the_time_as_it_was() -> None:
    back = decide(decide(opened(), Asked(A), 60, RULES), GaveUp(A, 7), 61, RULES)
    assert (back.state, back.try_at, back.open_seconds) == ("open", 68, 60)


calls = st.integers(1, 4).map(lambda number: UUID(int=number))
counts = st.integers(0, 12)
events = st.one_of(
    st.builds(Asked, calls), st.builds(Succeeded, calls), st.builds(Refused, calls, st.just("no")),
    st.builds(GaveUp, calls, st.floats(0, 100)), st.builds(Failed, calls, st.just("down"), counts, counts, counts),
)  # fmt: skip


@rules(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0, 200), events), max_size=60))
def test_whatever_happens_one_probe_at_a_time_and_never_stuck(story: list[tuple[float, Event]]) -> None:
    breaker, now = Breaker(), 1000.0
    for passed, event in story:
        now += passed
        after = decide(breaker, event, now, RULES)
        assert (after.state == "closed") == (after.try_at is None) == (after.reason is None or after.state == "closed")
        assert (after.state == "half_open") == (after.probe_by is not None)
        assert after.passes_from is None or after.state == "closed"
        if after.probe_by not in (None, breaker.probe_by):
            assert breaker.try_at is not None and breaker.try_at <= now  # the one before has ended or its time is over
        if breaker.state == "half_open" and after != breaker:
            assert event.call == breaker.probe_by or isinstance(event, Asked | Refused)
        if after.state != "closed":
            assert after.try_at is not None and after.try_at <= now + max(RULES.max_open_seconds, RULES.probe_seconds)
        breaker = after
    now = max(now, breaker.try_at or now) if breaker.state != "closed" else now + RAMP_SECONDS
    if breaker.state != "closed":
        probed = decide(breaker, Asked(A), now, RULES)
        assert probed.probe_by == A
        breaker, now = decide(probed, Succeeded(A), now, RULES), now + RAMP_SECONDS
    assert passes(breaker, now)


@rules(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 500), st.floats(0, 100))
def test_who_waits_behind_another_comes_back_behind_it(place: int, more: int, now: float) -> None:
    for breaker in (opened(), decide(opened(), Asked(A), 60, RULES)):
        assert 0 <= wait_of(breaker, place, now) < wait_of(breaker, place + more, now)


@dataclass
class Outage:
    """A service that is down for a while, and documents that each want one call, as the runner would defer them; time is made up."""

    down_until: float
    documents: int
    random: random.Random = field(default_factory=lambda: random.Random(5))
    breaker: Breaker = field(default_factory=Breaker)
    places: Iterator[int] = field(default_factory=itertools.count)
    failures: list[float] = field(default_factory=list)
    deferrals: Counter[int] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    sent: list[float] = field(default_factory=list)
    done: dict[int, float] = field(default_factory=dict)

    def change(self, event: Event, now: float) -> None:
        after = decide(self.breaker, event, now, RULES)
        if after != self.breaker:
            self.breaker, self.places = after, itertools.count()

    def run(self) -> None:
        due = [(self.random.uniform(0, 60), document) for document in range(self.documents)]
        heapq.heapify(due)
        while due:
            now, document = heapq.heappop(due)
            wait = self.arrive(now, document)
            if wait is not None:
                heapq.heappush(due, (now + wait, document))

    def arrive(self, now: float, document: int) -> float | None:
        call = UUID(int=document)
        probes = False
        if not passes(self.breaker, now):
            self.change(Asked(call), now)
            probes = self.breaker.probe_by == call
            if not probes:
                wait = wait_of(self.breaker, next(self.places), now)
                if wait > 5:
                    self.deferrals[document] += 1
                    return wait + self.random.uniform(0, min(wait / 2, 30))
                now += wait
        self.sent.append(now)
        if now >= self.down_until:
            self.done[document] = now
            if probes:
                self.change(Succeeded(call), now)
            return None
        self.failures.append(now)
        recent = [at for at in self.failures if at > max(now - 60, self.breaker.closed_at or 0)]
        self.change(failed(call, len(recent), len(recent)), now)
        if self.breaker.state == "closed":
            self.attempts[document] += 1
            return 2.0 * 2.0 ** self.attempts[document]
        self.deferrals[document] += 1
        wait = wait_of(self.breaker, next(self.places), now)
        return wait * 1.1 + RULES.open_seconds / 4


@pytest.mark.parametrize("down_until", [300, 3600])
def test_an_outage_defers_a_thousand_documents_rarely_and_ends_without_a_stampede(down_until: float) -> None:
    outage = Outage(down_until, 1000)
    outage.run()
    assert len(outage.done) == 1000
    in_outage = [at for at in outage.sent if at < down_until]
    after = sorted(at for at in outage.sent if at >= down_until)
    first_second = sum(at < after[0] + 1 for at in after)
    busiest = max(sum(at <= other < at + 1 for other in after) for at in after)
    most = max(outage.deferrals.values())
    print(
        f"\noutage of {down_until:g} s, 1,000 documents: calls while down {len(in_outage)}; deferrals per document at most {most}, "
        f"on average {sum(outage.deferrals.values()) / 1000:.1f}; attempts spent {sum(outage.attempts.values())}; "
        f"calls in the first second {first_second}, in the busiest {busiest}; after its end the first {after[0] - down_until:.0f} s, "
        f"the last {after[-1] - down_until:.0f} s"
    )
    assert len(in_outage) <= RULES.failures + 8  # a probe a period
    assert most <= 3 + 2 * (len(in_outage) - RULES.failures)
    assert max(outage.attempts.values()) <= 2  # far from a dead letter
    assert first_second <= 3
    assert replace(outage.breaker, reason=None).state == "closed"
