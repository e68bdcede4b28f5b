"""Dead letters: what failed comes back at the stage that failed, once, or is put away."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest

from models.documents import Document
from models.errors import PermanentError
from sql import migrate as migrations
from tests.integration.conftest import STAGE_NAMES, Bench
from tests.running import wait_for

Refused = psycopg.errors.ObjectNotInPrerequisiteState


async def refuse(document: Document) -> None:
    raise PermanentError(f"{document.file_name}: no")


async def fail_at(bench: Bench, stage: str, *doc_ids: str, handoff: str = "inline") -> int:
    """Have documents fail at a stage, forget the calls until then, and return the number of the last dead letter."""
    bench.also[stage] = refuse
    for doc_id in doc_ids or ("a",):
        bench.submit(doc_id)
    await bench.drain(handoff=handoff)
    del bench.also[stage]
    bench.calls.clear()
    return int(bench.one("SELECT max(id) FROM dead_letters WHERE resolved_at IS NULL")[0])


def state(bench: Bench) -> tuple[Any, ...]:
    return bench.one(
        "SELECT milestone, state, claim, retry_count, error_type, error_message, processing_completed_at FROM file_extractions"
    )


@pytest.mark.parametrize("handoff", ["inline", "queue"])
@pytest.mark.parametrize("stage", STAGE_NAMES)
async def test_a_requeued_document_goes_on_at_the_stage_that_failed_and_repeats_none_before_it(
    bench: Bench, stage: str, handoff: str
) -> None:
    letter = await fail_at(bench, stage, handoff=handoff)
    bench.conn.execute("UPDATE file_extractions SET crash_count = 2, lone_crash_count = 1, requeue_count = 3, retry_count = 2")
    claim = bench.one("SELECT claim FROM file_extractions")[0]
    assert bench.one("SELECT requeue_dead_letter(%s)", letter) == (stage,)
    milestone = bench.one("SELECT milestone FROM file_extractions")[0]
    assert state(bench) == (milestone, "queued", claim + 1, 0, None, None, None)
    assert bench.one("SELECT crash_count, lone_crash_count, requeue_count, claim_job_id FROM file_extractions") == (0, 0, 0, None)
    assert bench.all("SELECT task_name FROM procrastinate_jobs WHERE status = 'todo'") == [(stage,)]
    assert bench.one("SELECT resolution, resolved_at IS NOT NULL FROM dead_letters") == ("requeued", True)
    told = bench.one("SELECT stage, claim, detail ->> 'dead_letter' FROM document_events WHERE event = 'requeued_by_operator'")
    assert told == (stage, claim + 1, str(letter))
    await bench.drain(handoff=handoff)
    assert bench.calls == STAGE_NAMES[STAGE_NAMES.index(stage) :]
    assert bench.one("SELECT state, served_version FROM file_extractions") == ("complete", 1)


async def test_a_document_can_fail_and_be_requeued_again_and_again(bench: Bench) -> None:
    for _ in range(3):
        await fail_at(bench, "embed")
        assert bench.one("SELECT requeue_document('a')") == ("embed",)
    await bench.drain()
    assert bench.all("SELECT resolution FROM dead_letters ORDER BY id") == [("requeued",)] * 3
    assert bench.one("SELECT state FROM file_extractions") == ("complete",)


async def test_of_many_who_requeue_at_once_one_does_and_the_others_are_told(bench: Bench, database: str) -> None:
    letter = await fail_at(bench, "chunk")
    outcomes: list[str] = []
    together = threading.Barrier(8)

    def requeue() -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            together.wait()
            try:
                conn.execute("SELECT requeue_dead_letter(%s)", [letter])
                outcomes.append("requeued")
            except Refused as error:
                outcomes.append("refused")
                assert "was requeued at" in str(error)

    threads = [threading.Thread(target=requeue) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["requeued"]
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (1,)
    assert bench.one("SELECT count(*) FROM document_events WHERE event = 'requeued_by_operator'") == (1,)


async def test_new_content_that_arrives_while_a_requeue_waits_wins(bench: Bench, database: str) -> None:
    letter = await fail_at(bench, "parse")
    refused: list[str] = []

    def requeue() -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            try:
                conn.execute("SELECT requeue_dead_letter(%s)", [letter])
            except Refused as error:
                refused.append(str(error))

    with psycopg.connect(database) as submitter:
        submitter.execute("SELECT submit_document('uploads/a', doc_id => 'a', content_sha256 => %s)", ["2" * 64])
        thread = threading.Thread(target=requeue)
        thread.start()
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_for(lambda: bench.one(waits) == (True,), "the requeue to wait for the lock")
        submitter.commit()
    thread.join()
    assert [("superseded by new content" in text) for text in refused] == [True]
    assert bench.one("SELECT version, milestone, state FROM file_extractions") == (2, "uploaded", "queued")
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (1,)


async def test_a_letter_that_has_been_dealt_with_is_refused_with_the_reason_and_nothing_changes(bench: Bench) -> None:
    letter = await fail_at(bench, "parse")
    bench.conn.execute("SELECT discard_dead_letter(%s)", [letter])
    before = state(bench)
    for function in ("requeue_dead_letter", "discard_dead_letter"):
        with pytest.raises(Refused, match=f'dead letter {letter} .*"a".* was discarded at'):
            bench.conn.execute(f"SELECT {function}(%s)", [letter])
        with pytest.raises(psycopg.errors.NoDataFound, match="there is no dead letter 4711"):
            bench.conn.execute(f"SELECT {function}(4711)")
        with pytest.raises(psycopg.errors.NoDataFound, match="there is no dead letter null"):
            bench.conn.execute(f"SELECT {function}(NULL)")
    with pytest.raises(Refused, match=r'document "a" is failed and has no open dead letter .*was discarded'):
        bench.conn.execute("SELECT requeue_document('a')")
    with pytest.raises(psycopg.errors.NoDataFound, match='there is no document "b"'):
        bench.conn.execute("SELECT requeue_document('b')")
    assert state(bench) == before
    assert bench.one("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'") == (0,)
    assert bench.all("SELECT event FROM document_events WHERE event LIKE '%%operator'") == [("discarded_by_operator",)]
    bench.submit("c")
    with pytest.raises(Refused, match=r'document "c" is queued and has no open dead letter\n'):
        bench.conn.execute("SELECT requeue_document('c')")


async def test_a_letter_whose_document_is_gone_or_no_longer_failed_can_only_be_discarded(bench: Bench) -> None:
    letter = await fail_at(bench, "parse", "a", "b")
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled' WHERE doc_id = 'a'")
    with pytest.raises(Refused, match='document "a", which is now cancelled'):
        bench.conn.execute("SELECT requeue_document('a')")
    bench.conn.execute("DELETE FROM file_extractions WHERE doc_id = 'b'")
    with pytest.raises(Refused, match=r'document "b" of dead letter .* no longer exists'):
        bench.conn.execute("SELECT requeue_dead_letter(%s)", [letter])
    assert bench.all("SELECT doc_id, how_to_requeue FROM dead_letter_queue") == [("b", None), ("a", None)]
    assert bench.one("SELECT requeue_dead_letters()") == (0,)
    bench.conn.execute("SELECT discard_dead_letter(id) FROM dead_letters")
    assert bench.all("SELECT id FROM dead_letter_queue") == []


@pytest.mark.parametrize("call", ["requeue_document('a')", "requeue_dead_letter($1)", "requeue_dead_letters(max_count => 1)"])
def test_calls_that_were_prepared_before_the_migration_go_on(empty_database: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = migrations._own()
    with psycopg.connect(empty_database, autocommit=True) as conn, psycopg.connect(empty_database, autocommit=True) as older:
        monkeypatch.setattr(migrations, "_own", lambda: [path for path in every if path.name < "0053"])
        migrations.migrate(conn)
        monkeypatch.undo()
        older.execute(f"PREPARE requeue (bigint) AS SELECT {call}")
        older.execute("SELECT submit_document('uploads/a', doc_id => 'a', priority => 3)")
        for migrated in (False, True):
            if migrated:
                migrations.migrate(conn)
            older.execute("SELECT fail_document_by_operator('a', 'for a test')")
            (letter,) = older.execute("SELECT max(id) FROM dead_letters").fetchone() or (None,)
            older.execute(f"EXECUTE requeue ({letter})")
            assert older.execute("SELECT state, priority FROM file_extractions").fetchone() == ("queued", 3)


@pytest.mark.parametrize(
    "call", ["requeue_dead_letter({letter}, priority => 7)", "requeue_document('a', 7)", "requeue_dead_letters(priority => 7)"]
)
async def test_a_requeued_document_can_be_given_a_priority(bench: Bench, call: str) -> None:
    letter = await fail_at(bench, "embed")
    bench.conn.execute("UPDATE file_extractions SET priority = 3")
    bench.one(f"SELECT {call.format(letter=letter)}")
    assert bench.one("SELECT priority FROM file_extractions") == (7,)
    assert bench.one("SELECT priority FROM procrastinate_jobs WHERE status = 'todo'") == (7,)
    assert bench.one("SELECT detail -> 'priority' FROM document_events WHERE event = 'requeued_by_operator'") == (7,)


@pytest.mark.parametrize("call", ["requeue_dead_letter({letter})", "requeue_document('a')", "requeue_dead_letters()"])
async def test_a_requeued_document_keeps_its_priority_where_none_is_given(bench: Bench, call: str) -> None:
    letter = await fail_at(bench, "embed")
    bench.conn.execute("UPDATE file_extractions SET priority = 3")
    bench.one(f"SELECT {call.format(letter=letter)}")
    assert bench.one("SELECT priority FROM procrastinate_jobs WHERE status = 'todo'") == (3,)
    assert bench.one("SELECT detail ? 'priority' FROM document_events WHERE event = 'requeued_by_operator'") == (False,)


async def test_filters_choose_what_is_requeued_in_bulk(bench: Bench) -> None:
    await fail_at(bench, "parse", "a", "b")
    last = await fail_at(bench, "embed", "c", "d", "e")
    bench.conn.execute("UPDATE dead_letters SET error_type = 'TIMEOUT' WHERE doc_id IN ('b', 'd')")
    bench.conn.execute("UPDATE dead_letters SET user_id = 'ann' WHERE doc_id = 'e'")
    for given, count in (
        ("error_type => 'LLM_ERROR'", 0), ("batch_id => 'none'", 0), ("max_count => 0", 0), ("stage => 'chunk'", 0),
        ("error_type => 'TIMEOUT', stage => 'embed'", 1), ("user_id => 'ann'", 1), (f"max_count => 1, up_to_id => {last}", 1),
        ("max_count => NULL", 2), ("max_count => NULL", 0),
    ):  # fmt: skip
        assert bench.one(f"SELECT requeue_dead_letters({given})") == (count,), given
    await bench.drain()
    assert sorted(bench.calls) == sorted(2 * STAGE_NAMES[1:] + 3 * STAGE_NAMES[4:])
    assert bench.one("SELECT count(*) FROM file_extractions WHERE state = 'complete'") == (5,)


async def test_bulk_requeue_passes_over_a_document_that_somebody_holds(bench: Bench, database: str) -> None:
    await fail_at(bench, "parse", "a", "b", "c")
    with psycopg.connect(database) as holder:
        holder.execute("SELECT FROM file_extractions WHERE doc_id = 'b' FOR UPDATE")
        assert bench.one("SELECT requeue_dead_letters()") == (2,)
    assert bench.one("SELECT requeue_dead_letters()") == (1,)


def begin_batch(bench: Bench, *doc_ids: str) -> None:
    run = bench.one("SELECT begin_batch('b', 'default', '/folder', 'c')")[0]
    for doc_id in doc_ids:
        bench.conn.execute("SELECT accept_document(%s,'default','f','p',NULL,1,repeat('1',64),'{}',0,'c','b',%s,500)", [doc_id, run])
    bench.conn.execute("SELECT seal_batch('b', %s, %s)", [run, len(doc_ids)])


BATCH = "SELECT status, completed_at IS NOT NULL, error_message FROM processing_jobs"


@pytest.mark.parametrize("how", ["reopen_batch('b')", "reopen_batches()"])
async def test_a_batch_that_had_ended_goes_on_and_ends_again(bench: Bench, how: str) -> None:
    bench.also["parse"] = refuse
    begin_batch(bench, "a", "b")
    await bench.drain()
    assert bench.one(BATCH) == ("failed", True, "every document of the batch failed")
    first_end = bench.one("SELECT completed_at FROM processing_jobs")
    assert bench.one("SELECT reopen_batch('b')") == (None,), "nothing was requeued yet"
    del bench.also["parse"]
    (hint,) = bench.one("SELECT how_to_requeue FROM dead_letter_queue WHERE doc_id = 'a'")
    requeue, reopen = hint.split("; ")
    assert reopen == "SELECT reopen_batch('b');"
    bench.conn.execute(requeue)
    assert bench.one(f"SELECT {how}")[0] in ("processing", 1)
    assert bench.one(BATCH) == ("processing", False, None)
    assert bench.one(f"SELECT {how}")[0] in (None, 0), "the second time there is nothing to do"
    await bench.drain()
    assert bench.one(BATCH) == ("completed_with_errors", True, None)
    assert bench.one("SELECT completed_at FROM processing_jobs") > first_end
    bench.conn.execute("SELECT requeue_document('b')")
    await bench.drain()
    assert bench.one(BATCH) == ("completed", True, None), "settled right also where nobody reopened it"
    assert bench.one(f"SELECT {how}")[0] in (None, 0)


async def test_a_batch_that_was_cancelled_or_never_sealed_is_not_reopened(bench: Bench) -> None:
    bench.also["parse"] = refuse
    begin_batch(bench, "a")
    await bench.drain()
    bench.conn.execute("SELECT requeue_document('a')")
    for change in ("status = 'cancelled'", "status = 'failed', sealed_at = NULL"):
        bench.conn.execute(f"UPDATE processing_jobs SET {change}")
        assert bench.one("SELECT reopen_batch('b')") == (None,)
    assert bench.one("SELECT reopen_batch('unknown')") == (None,)


async def test_an_entry_that_could_not_be_unpacked_keeps_its_reason_and_is_not_requeued(bench: Bench) -> None:
    letter = await fail_at(bench, "validate", "a", "c")
    nowhere, reason = f"uploads/{'0' * 64}/refused", "batch.zip, entry a.txt: its checksum is wrong."
    bench.conn.execute(
        "UPDATE file_extractions SET file_path = %s, content_sha256 = NULL, error_message = %s WHERE doc_id = 'c'", [nowhere, reason]
    )
    for statement in (f"SELECT requeue_dead_letter({letter})", "SELECT requeue_document('c')"):
        with pytest.raises(Refused, match=r"submit a repaired archive \(batch.zip, entry a.txt: its checksum is wrong"):
            bench.conn.execute(statement.encode())
    assert bench.one("SELECT requeue_dead_letters()") == (1,), "the other one"
    assert bench.one("SELECT requeue_dead_letters()") == (0,)
    assert bench.all("SELECT doc_id, state::text, error_message FROM file_extractions ORDER BY 1") == [
        ("a", "queued", None),
        ("c", "failed", reason),
    ]
    assert bench.one("SELECT resolved_at FROM dead_letters WHERE doc_id = 'c'") == (None,)
