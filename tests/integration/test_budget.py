"""The shared budget: never exceeded in any 60 s, by anybody, and used as far as that allows."""

from __future__ import annotations

import bisect
import itertools
import random
import threading
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st

START = datetime(2030, 1, 1, tzinfo=UTC)
SCALE = 60
"""How much faster the clock of `scaled` runs."""


def take(
    conn: psycopg.Connection,
    at: float | None,
    tokens: int = 1,
    *,
    requests: int = 0,
    limit: int = 0,
    patience: float = 5,
    service: str = "s",
) -> tuple[bool, float]:
    """Ask for a call at so many seconds after the start (None: now). Return whether it was granted, and the seconds to wait."""
    row = conn.execute(
        "SELECT granted, wait_seconds FROM take_budget(%s, %s, %s, %s, %s, %s)",
        [service, requests, limit, tokens, patience, None if at is None else START + timedelta(seconds=at)],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def most_in_a_minute(sent: list[tuple[float, int]]) -> int:
    """The largest sum of costs within any 60 s."""
    sent = sorted(sent)
    times = [at for at, _ in sent]
    return max((sum(cost for _, cost in sent[first : bisect.bisect_left(times, at + 60)]) for first, at in enumerate(times)), default=0)


steps = st.lists(st.tuples(st.floats(0, 20) | st.floats(0, 0.2) | st.just(45.0), st.integers(1, 100)), min_size=1, max_size=80)


@given(steps, st.integers(1, 40), st.integers(100, 600), st.sampled_from([0.0, 2.0, 30.0, 500.0]))
@rules(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_window_of_60_s_holds_more_than_the_limits_and_nobody_overtakes(
    conn: psycopg.Connection, story: list[tuple[float, int]], requests: int, limit: int, patience: float
) -> None:
    conn.execute("DELETE FROM provider_budgets")
    now, sent = 0.0, []
    for passed, tokens in story:
        now += passed
        granted, wait = take(conn, now, tokens, requests=requests, limit=limit, patience=patience)
        assert wait >= 0
        if granted:
            sent.append((now + wait, tokens))
        else:
            assert wait > patience
    assert most_in_a_minute([(at, 1) for at, _ in sent]) <= requests
    assert most_in_a_minute(sent) <= limit
    assert [at for at, _ in sent] == sorted(at for at, _ in sent)


@given(steps, st.integers(1, 20), st.sets(st.integers(0, 79)))
@rules(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_requests_that_are_given_back_let_no_window_hold_too_many_and_count_no_more(
    conn: psycopg.Connection, story: list[tuple[float, int]], requests: int, withdrawn: set[int]
) -> None:
    conn.execute("DELETE FROM provider_budgets")
    now, sent = 0.0, []
    for number, (passed, _) in enumerate(story):
        now += passed
        granted, wait = take(conn, now, requests=requests, patience=500)
        if granted and number in withdrawn:
            conn.execute("SELECT give_back_request('s', %s)", [START + timedelta(seconds=now + wait)])
        elif granted:
            sent.append((now + wait, 1))
    assert most_in_a_minute(sent) <= requests
    taken, slot = conn.execute("SELECT (SELECT sum(r) FROM unnest(request_slots) AS r), slot FROM provider_budgets").fetchone() or (0, 0)
    assert taken == sum(int(START.timestamp() + at) > slot - 66 for at, _ in sent)


def test_a_request_that_is_given_back_is_there_for_the_next(conn: psycopg.Connection) -> None:
    assert take(conn, 0, requests=1) == (True, 0.0)
    assert not take(conn, 10, requests=1)[0]
    conn.execute("SELECT give_back_request('s', %s)", [START])
    assert take(conn, 10, requests=1) == (True, 0.0)


def test_the_limit_is_nearly_used_up_by_those_who_always_want(conn: psycopg.Connection) -> None:
    now, sent = 0.0, []
    while now < 600:
        granted, wait = take(conn, now, 10, requests=60, limit=10_000, patience=5)
        now += wait
        if granted:
            sent.append((now, 1))
    assert most_in_a_minute(sent) <= 60
    assert len(sent) >= 0.88 * 60 * 10


def test_a_call_that_takes_most_of_a_minute_finds_room_among_many_small_ones(conn: psycopg.Connection) -> None:
    now, sent = 0.0, []
    for number in range(400):
        now += 0.3
        tokens = 900 if number == 200 else 10
        granted, wait = take(conn, now, tokens, limit=1000)
        if granted:
            sent.append((now + wait, tokens))
        if number == 200:
            assert granted and wait < 71
    assert most_in_a_minute(sent) <= 1000


def test_those_who_are_sent_back_are_given_times_one_after_the_other(conn: psycopg.Connection) -> None:
    answers = [take(conn, 0, requests=60, patience=5) for _ in range(100)]
    refused = [wait for granted, wait in answers if not granted]
    assert len(refused) > 80
    gaps = [later - earlier for earlier, later in itertools.pairwise(refused)]
    assert min(gaps) == pytest.approx(66 / 60, abs=0.001)


def test_a_pause_holds_for_everybody_and_ends_without_a_stampede(conn: psycopg.Connection) -> None:
    assert take(conn, None) == (True, 0.0)
    conn.execute("SELECT pause_budget('s', 3)")
    waits = [take(conn, None, patience=60)[1] for _ in range(40)]
    assert min(waits) > 2
    assert waits[-1] - waits[0] > 1  # 50 ms apart, minus what asking takes


def test_after_a_pause_whoever_comes_keeps_a_distance_for_some_seconds(conn: psycopg.Connection) -> None:
    take(conn, 0)
    conn.execute("UPDATE provider_budgets SET paused_until = %s", [START + timedelta(seconds=3)])
    assert [round(take(conn, 4)[1], 2) for _ in range(5)] == [0, 0.05, 0.1, 0.15, 0.2]
    assert [round(take(conn, 9)[1], 2) for _ in range(3)] == [0, 0, 0]
    conn.execute("UPDATE provider_budgets SET paused_until = clock_timestamp() - interval '1 second', last_send_at = clock_timestamp()")
    asked = "SELECT a.wait_seconds FROM generate_series(1, 20) AS n, ask_to_call('s', n, 0, 0, 1, 60) AS a"
    waits = [row[0] for row in conn.execute(asked)]
    assert waits[-1] > 0.5  # 20 calls 50 ms apart, minus what asking takes


def test_429_lowers_the_share_once_for_one_overrun_and_it_grows_back(conn: psycopg.Connection) -> None:
    take(conn, None, requests=100)
    for told, pause in ((7.0, 7.0), (None, 1.0)):
        row = conn.execute("SELECT limit_budget('s', %s)", [told]).fetchone()
        assert row == (pause,)
    share, count = conn.execute("SELECT share, limited_count FROM provider_budgets").fetchone() or (0, 0)
    assert share == pytest.approx(0.7, abs=0.001) and count == 2
    conn.execute("UPDATE provider_budgets SET limited_at = limited_at - interval '10 s'")
    conn.execute("SELECT limit_budget('s', NULL)")
    assert conn.execute("SELECT share, strikes FROM provider_budgets").fetchone() == (pytest.approx(0.49, abs=0.01), 2)
    # A tenth of the time it needs to grow back whole: a twentieth a minute.
    grown = "SELECT budget_share(0.49, now() - interval '4 min', now()), budget_share(0.49, now() - interval '1 h', now())"
    assert conn.execute(grown).fetchone() == (pytest.approx(0.69), 1.0)
    for _ in range(20):
        conn.execute("UPDATE provider_budgets SET limited_at = limited_at - interval '10 s'")
        conn.execute("SELECT limit_budget('s', 0)")
    assert conn.execute("SELECT share FROM provider_budgets").fetchone() == (pytest.approx(0.1, abs=0.001),)
    conn.execute("UPDATE provider_budgets SET paused_until = 'epoch'")
    assert take(conn, None, requests=100, patience=5)[0]


def test_a_lowered_share_holds_in_every_window_too(conn: psycopg.Connection) -> None:
    take(conn, 0, requests=100)
    conn.execute("UPDATE provider_budgets SET share = 0.5, share_at = %s", [START + timedelta(seconds=10_000)])
    now, sent = 100.0, []
    while now < 400:
        granted, wait = take(conn, now, requests=100)
        now += wait
        if granted:
            sent.append((now, 1))
    assert 44 <= most_in_a_minute(sent) <= 50


def test_what_a_call_really_used_takes_the_place_of_its_estimate(conn: psycopg.Connection) -> None:
    for difference, used in ((-60, 40), (30, 130)):
        conn.execute("DELETE FROM provider_budgets")
        take(conn, None, 100, limit=1000)
        conn.execute("SELECT settle_tokens('s', last_send_at, %s) FROM provider_budgets", [difference])
        assert conn.execute("SELECT tokens_last_minute FROM provider_budget_use").fetchone() == (used,)


def test_a_reset_frees_a_budget_whose_times_lie_in_a_future_that_was_taken_back(conn: psycopg.Connection) -> None:
    take(conn, 0, requests=1)  # in 2030
    assert not take(conn, None, requests=1)[0]
    conn.execute("SELECT reset_breaker('s')")
    assert take(conn, None, requests=1) == (True, 0.0)


@pytest.fixture
def scaled(conn: psycopg.Connection) -> None:
    """Have the budget's functions run by a clock that is SCALE times as fast."""
    conn.execute(
        f"""CREATE FUNCTION fast_clock() RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
        SELECT to_timestamp(extract(epoch FROM pg_catalog.clock_timestamp()) * {SCALE} - {SCALE - 1} * 1750000000.0) $$"""
    )
    for (text,) in conn.execute(
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname IN ('take_budget', 'limit_budget', 'pause_budget')"
    ).fetchall():
        conn.execute(text.replace("clock_timestamp()", "fast_clock()"))


@pytest.mark.usefixtures("scaled")
def test_many_connections_together_keep_the_limit_and_use_it(database: str, conn: psycopg.Connection) -> None:
    requests, limit, seconds = 120, 60_000, 240
    calls: list[bool] = []
    lock = threading.Lock()
    begun = time.monotonic()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(database, autocommit=True) as mine:
            while time.monotonic() - begun < seconds / SCALE:
                granted, wait = take(mine, None, chance.choice((50, 100, 200, 3000)), requests=requests, limit=limit, patience=10)
                with lock:
                    calls.append(granted)
                time.sleep(wait / SCALE)

    conn.execute(
        """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF new.last_send_at IS DISTINCT FROM old.last_send_at OR new.request_slots IS DISTINCT FROM old.request_slots THEN
                INSERT INTO given VALUES (new.last_send_at,
                    (SELECT sum(s) FROM unnest(new.token_slots) AS s)
                    - (SELECT sum(s) FROM unnest(shift_slots(old.token_slots, new.slot - old.slot)) AS s));
            END IF;
            RETURN new;
        END $$"""
    )
    conn.execute("CREATE TABLE given (at timestamptz, tokens bigint)")
    conn.execute("CREATE TRIGGER note AFTER UPDATE ON provider_budgets FOR EACH ROW EXECUTE FUNCTION note()")
    threads = [threading.Thread(target=work, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given_times = [(row[0], row[1]) for row in conn.execute("SELECT extract(epoch FROM at)::float8, tokens FROM given").fetchall()]
    assert len(given_times) == sum(calls)
    requests_used, tokens_used = most_in_a_minute([(at, 1) for at, _ in given_times]), most_in_a_minute(given_times)
    print(
        f"\n16 connections, {seconds} s: {sum(calls)} calls, {len(calls) - sum(calls)} sent back; "
        f"in any 60 s at most {requests_used} of {requests} requests, {tokens_used} of {limit} tokens"
    )
    assert requests_used <= requests and tokens_used <= limit
    assert max(requests_used / requests, tokens_used / limit) > 0.85
