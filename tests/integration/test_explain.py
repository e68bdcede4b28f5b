"""explain_document tells the whole story of a document in sentences, where it stands, and what comes next and when."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from models.documents import Document
from models.errors import PermanentError, ServiceUnavailable
from tests.integration.conftest import Bench
from tests.integration.test_views import beat

Story = list[tuple[Any, ...]]


def explain(bench: Bench, doc_id: str = "a") -> Story:
    return bench.all("SELECT tense, at, what, worker FROM explain_document(%s)", doc_id)


def last_two(story: Story) -> tuple[str, Any, str]:
    """Where it stands, when the next thing comes, and what that is."""
    assert [line[0] for line in story[-2:]] == ["now", "next"]
    return story[-2][2], story[-1][1], story[-1][2]


async def test_a_complete_document_has_a_line_for_each_stage_in_order(bench: Bench) -> None:
    bench.submit()
    await bench.drain()
    story = explain(bench)
    past = [line[2].split(" (")[0] for line in story if line[0] == "past"]
    assert past == ["submitted as a", "validated", "parsed", "text checked", "cut into passages", "passages embedded", "data extracted",
                    "complete: searches see it"]  # fmt: skip
    assert [line[1] for line in story[:-1]] == sorted(line[1] for line in story[:-1])
    standing, when, following = last_two(story)
    assert (standing, when) == ("complete, version 1", None) and following.startswith("nothing")


async def test_a_document_that_waits_says_for_what_and_when_its_turn_comes(bench: Bench) -> None:
    bench.submit("before")
    bench.submit()
    standing, when, following = last_two(explain(bench))
    assert standing == "waits in the queue cpu for validate"
    assert when is None and "nothing before a worker is started that listens to the queue cpu" in following
    beat(bench.conn)
    _, when, following = last_two(explain(bench))
    assert when is None and following == "the next free worker of 1 takes it up; 1 jobs of the queue go before it"
    bench.conn.execute(
        """INSERT INTO document_events (doc_id, user_id, correlation_id, stage, event) SELECT 'x', 'u', 'c', 'finalize', 'completed'
        FROM generate_series(1, 600)"""
    )
    _, when, following = last_two(explain(bench))
    assert when is not None


async def test_a_retry_says_why_when_and_whether_it_counts(bench: Bench) -> None:
    async def stumble(document: Document) -> None:
        raise ServiceUnavailable("https://s does not answer", retry_after=900)

    bench.also["embed"] = stumble
    bench.submit()
    beat(bench.conn)
    found = bench.fetch()
    assert found is not None
    await bench.runner().run(*found)
    story = explain(bench)
    assert "which does not count" in story[-3][2] and "https://s does not answer" in story[-3][2]
    standing, when, following = last_two(story)
    assert "waits to be tried again at embed after RETRYABLE: https://s does not answer" in standing
    assert following == "the next free worker of 1 tries embed again"
    assert (when,) == bench.one("SELECT not_before FROM file_extractions")


async def test_a_failed_document_names_its_dead_letter_and_both_ways_out(bench: Bench) -> None:
    async def stumble(document: Document) -> None:
        raise PermanentError("no way")

    bench.also["parse"] = stumble
    bench.submit()
    await bench.drain()
    (letter,) = bench.one("SELECT id FROM dead_letters")
    standing, when, following = last_two(explain(bench))
    assert standing == "failed at parse (PERMANENT): no way" and when is None
    assert f"SELECT requeue_dead_letter({letter});" in following and f"SELECT discard_dead_letter({letter});" in following
    bench.conn.execute("SELECT discard_dead_letter(%s)", [letter])
    assert "put away" in last_two(explain(bench))[2]


async def test_a_working_document_names_its_worker_and_a_silent_worker_is_said_to_be_silent(bench: Bench) -> None:
    bench.submit()
    bench.conn.execute(
        "UPDATE file_extractions SET state = 'working', claim = claim + 1, claimed_by = 'h:1', lease_until = now() + interval '1 min'"
    )
    standing, when, _ = last_two(explain(bench))
    assert standing.startswith("in the hands of h:1") and when is None
    bench.conn.execute("UPDATE file_extractions SET lease_until = now() - interval '1 min'")
    standing, when, following = last_two(explain(bench))
    assert "has fallen silent" in standing and when is not None and "takes it over" in following


@pytest.mark.parametrize(("holds", "ago"), [("a", -60), ("other", -60), ("a", 31)])
async def test_a_document_that_a_transaction_holds_is_told_from_one_whose_worker_is_silent(bench: Bench, holds: str, ago: float) -> None:
    bench.submit()
    bench.conn.execute(
        "UPDATE file_extractions SET state = 'working', claim = claim + 1, claimed_by = 'h:1', lease_until = now() - interval '1 min'"
    )
    beat(bench.conn, ago=ago)
    bench.conn.execute("UPDATE worker_registry SET documents = %s", [[holds]])
    standing, when, following = last_two(explain(bench))
    if (holds, ago) == ("a", -60):
        assert standing == "in the hands of h:1, which lives, for validate; an open transaction holds it"
        assert when is None and "22_blocked.sql" in following
    else:
        assert "has fallen silent" in standing and "takes it over" in following


async def test_a_lost_job_a_cancelled_document_and_a_duplicate_say_what_comes_next(bench: Bench) -> None:
    bench.submit()
    beat(bench.conn)
    bench.conn.execute("UPDATE procrastinate_jobs SET status = 'doing'")
    assert "a worker has fetched its job" in last_two(explain(bench))[2]
    bench.conn.execute("DELETE FROM procrastinate_jobs")
    assert "it has lost its job" in last_two(explain(bench))[2]
    bench.conn.execute("SELECT cancel_document('a')")
    assert last_two(explain(bench))[0] == "cancelled"
    bench.conn.execute("UPDATE file_extractions SET state = 'queued'")
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now()")
    bench.conn.execute("UPDATE file_extractions SET state = 'duplicate', lease_until = NULL, duplicate_of = 'first'")
    standing, _, following = last_two(explain(bench))
    assert standing == "a duplicate of a document that is gone, or has other content by now" and "queues it" in following


async def test_a_duplicate_names_the_document_that_it_is_one_of_now(bench: Bench, database: str) -> None:
    for doc_id in ("first", "second", "a"):
        bench.submit(doc_id, "1")
    await bench.drain(duplicate_policy="skip")
    assert last_two(explain(bench))[0] == "a duplicate of first, whose passages stand for it"
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM file_extractions WHERE doc_id = 'a' FOR UPDATE")
        bench.conn.execute("SELECT delete_document('first')")
    await bench.drain(duplicate_policy="skip")
    assert last_two(explain(bench))[0] == "a duplicate of second, whose passages stand for it"


async def test_a_new_version_says_what_searches_see_meanwhile(bench: Bench) -> None:
    bench.submit(content="a")
    await bench.drain()
    bench.submit(content="b")
    assert "searches see version 1 meanwhile" in last_two(explain(bench))[0]


async def test_calls_to_services_are_part_of_the_story_those_alike_in_one_line(bench: Bench) -> None:
    bench.submit()
    bench.conn.execute(
        """INSERT INTO provider_usage (
            id, service, kind, stage, doc_ids, batch_ids, user_ids, shares, outcome, cost, give_up_at, finished_at)
        SELECT gen_random_uuid(), 's', 'embedding', 'embed', '{a,b}', '{NULL,NULL}', '{u,u}', '{0.5,0.5}', o, 0.5, now(), now()
        FROM unnest(ARRAY['ok', 'ok', 'timeout']) AS o"""
    )
    calls = sorted(line[2] for line in explain(bench) if "call" in line[2])
    assert calls == ["1 call to s: timeout", "2 calls to s: ok"]


async def test_of_a_deleted_document_the_past_is_left_and_of_an_unknown_one_nothing(bench: Bench) -> None:
    bench.submit()
    bench.conn.execute("SELECT delete_document('a')")
    story = explain(bench)
    assert "deleted by" in story[-2][2] and story[-1][0] == "now" and story[-1][2].startswith("gone")
    with pytest.raises(psycopg.errors.NoDataFound, match='there is no document "nowhere"'):
        explain(bench, "nowhere")
    with pytest.raises(psycopg.errors.NoDataFound):
        bench.one("SELECT explain_document(NULL)")


EVENTS = [
    "submitted", "resubmitted", "stage_completed", "completed", "handed_on", "retry_scheduled", "failed", "extraction_failed", "duplicate",
    "fenced_off", "rescued", "requeued", "requeued_by_operator", "discarded_by_operator", "updated_by_operator", "cancelled", "deleted",
    "replaced", "something_new",
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_has_words_also_without_its_detail(conn: psycopg.Connection, event: str) -> None:
    row = conn.execute("SELECT event_in_words(%s, NULL, NULL, '{}')", [event]).fetchone()
    assert row is not None and row[0]
