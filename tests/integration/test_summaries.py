"""How batches end, and what their summaries tell."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any, LiteralString

import psycopg
import pytest

from jobs import reconcile
from tests.integration.batches import BATCH, accept, add_archive, at_once, batch_of, begin, reconciler, refuse, seal, summary
from tests.integration.conftest import Bench


async def test_the_last_document_ends_the_batch_and_writes_its_summary(bench: Bench) -> None:
    run = begin(bench.conn)
    accept(bench.conn, run, "a", "x")
    accept(bench.conn, run, "c", folder="/data/in/deep/er")
    seal(bench.conn, run, 3)
    bench.also["parse"] = refuse("x")
    await bench.drain()
    assert bench.one(BATCH) == ("completed_with_errors", True, None, 3)
    ui, nested = summary(bench)
    assert ui["batch"]["status_text"] == "completed with errors"
    assert ui["totals"]["by_error_type"] == {"PERMANENT": 1}
    assert [(c["path"], c["outcome"], c["error_message"], c["can_be_retried"]) for c in ui["files"]] == [
        ("a.txt", "succeeded", None, None),
        ("deep/er/c.txt", "succeeded", None, None),
        ("x.txt", "failed", "x.txt: no", False),
    ]
    assert ui["files"][0]["key_fields"]["language"] == "en"
    assert [moment["event"] for moment in ui["timeline"]] == ["submitted", "sealed", "first_work", "ended"]
    assert [(f["path"], f["parent"], f["files_here"], f["files_below"]) for f in nested["folders"]] == [
        ("", None, 2, 3),
        ("deep", "", 0, 1),
        ("deep/er", "deep", 1, 1),
    ]
    section = nested["folders"][2]["files"][0]["sections"]
    assert section == [{"heading": None, "heading_path": [], "passages": 5, "page_start": None, "page_end": None}]


@pytest.mark.parametrize(
    ("archives", "documents", "wanted"),
    [
        ([("", "failed", "in.zip is no zip.")], [], ("failed", True, "in.zip is no zip.", 1)),
        ([("x.zip/", "failed", "x.zip is encrypted.")], [], ("failed", True, "x.zip is encrypted.", 1)),
        ([("x.zip/", "failed", "x.zip is encrypted.")], ["a"], ("completed_with_errors", True, None, 2)),
        ([("", "failed", "in.zip ends in the middle.")], ["a"], ("completed_with_errors", True, "in.zip ends in the middle.", 2)),
        ([("", "unpacked", None), ("y.zip/", "failed", "no")], ["a", "b"], ("completed_with_errors", True, None, 3)),
        ([("", "unpacked", None)], ["a"], ("completed", True, None, 1)),
        ([], [], ("completed", True, None, 0)),
    ],
)
async def test_archives_that_failed_count_as_files(bench: Bench, archives: Any, documents: list[str], wanted: Any) -> None:
    run = begin(bench.conn)
    for archive in archives:
        add_archive(bench.conn, run, *archive)
    accept(bench.conn, run, *documents)
    seal(bench.conn, run, len(documents))
    await bench.drain()
    assert bench.one(BATCH) == wanted
    summary(bench)


@pytest.mark.parametrize("state", ["waiting", "unpacking"])
async def test_a_batch_does_not_end_before_its_archives(bench: Bench, state: str) -> None:
    run = begin(bench.conn)
    add_archive(bench.conn, run, "", state)
    accept(bench.conn, run, "a")
    seal(bench.conn, run, 0)
    await bench.drain()
    assert bench.one("SELECT settle_batch('b')") == (None,)
    assert bench.one(BATCH)[:2] == ("processing", False)
    bench.conn.execute("UPDATE batch_archives SET state = 'unpacked', ended_at = now(), unpacked_count = 1")
    assert bench.one("SELECT settle_batch('b')") == ("completed",)
    ui, _ = summary(bench)
    assert "unpacked" in [moment["event"] for moment in ui["timeline"]]


async def test_a_batch_of_which_every_document_failed_or_was_cancelled_has_failed(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    bench.also["parse"] = refuse("a", "c")
    await bench.drain()
    assert bench.one(BATCH) == ("failed", True, "every document of the batch failed", 2)
    bench.conn.execute("UPDATE file_extractions SET state = 'cancelled'")
    bench.conn.execute("SELECT settle_batch('b')")
    assert bench.one(BATCH)[2] == "every file of the batch was cancelled"
    assert summary(bench)[0]["totals"]["cancelled"] == 2


async def test_a_document_of_an_older_run_holds_up_no_batch(bench: Bench) -> None:
    old = begin(bench.conn)
    accept(bench.conn, old, "gone")
    run = begin(bench.conn)
    assert run != old
    accept(bench.conn, run, "a")
    bench.conn.execute("DELETE FROM procrastinate_jobs WHERE args ->> 'doc_id' = 'gone'")
    seal(bench.conn, run, 1)
    await bench.drain()
    assert bench.one(BATCH)[0] == "completed"
    assert [card["doc_id"] for card in summary(bench)[0]["files"]] == ["a"]


async def test_a_cancelled_batch_stays_cancelled_and_has_a_summary_too(bench: Bench) -> None:
    batch_of(bench, "a", "c")
    bench.conn.execute("UPDATE processing_jobs SET status = 'cancelled', completed_at = now()")
    await bench.drain()
    assert bench.one("SELECT settle_batch('b')") == (None,)
    assert bench.one(BATCH)[0] == "cancelled"
    assert summary(bench)[0]["batch"]["status"] == "cancelled"


async def test_last_documents_that_end_at_once_write_one_summary(bench: Bench, database: str) -> None:
    batch_of(bench, *"acdefg")
    bench.also["finalize"] = refuse("g")
    await bench.drain()
    for _ in range(20):
        bench.conn.execute("UPDATE processing_jobs SET status = 'processing', completed_at = NULL")
        bench.conn.execute("DELETE FROM run_summaries")
        answers = at_once(database, *["SELECT settle_batch('b')"] * 6)
        assert set(answers) == {"completed_with_errors"}
        assert bench.one(BATCH) == ("completed_with_errors", True, None, 6)
        assert bench.one("SELECT count(*) FROM run_summaries") == (1,)


async def test_two_documents_that_end_in_the_same_moment_leave_no_batch_open(bench: Bench, database: str) -> None:
    batch_of(bench, "a", "c")
    bench.conn.execute("UPDATE file_extractions SET state = 'working', claim = claim + 1, lease_until = now() + interval '1 min'")
    end = """UPDATE file_extractions SET milestone = 'complete', state = 'complete', lease_until = NULL, served_version = 1
        WHERE doc_id = %s"""
    gate = threading.Barrier(2)

    def finish(doc_id: str) -> None:
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute("BEGIN")
            conn.execute(end, [doc_id])
            gate.wait()
            conn.execute("COMMIT")
            conn.execute("SELECT settle_batch('b')")

    threads = [threading.Thread(target=finish, args=(doc_id,)) for doc_id in ("a", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.one(BATCH)[:2] == ("completed", True)
    summary(bench)


async def test_a_batch_that_a_long_transaction_holds_stops_nobody_and_is_settled_afterwards(bench: Bench, database: str) -> None:
    batch_of(bench, "a")
    with psycopg.connect(database) as caller:
        begin(caller)  # the batch submitted again inside of a transaction of the caller's
        await bench.drain()  # comes back: the worker does not wait for the caller
        assert bench.one("SELECT state FROM file_extractions") == ("complete",)
        assert await reconciler(bench).pass_once() == {}
        assert bench.one(BATCH)[:2] == ("processing", False)
        caller.rollback()
    assert await reconciler(bench).pass_once() == {"completed": 1}
    summary(bench)


async def test_settling_never_writes_the_summary_of_a_run_that_was_begun_anew(bench: Bench, database: str) -> None:
    for _ in range(10):
        run = batch_of(bench, "a")
        await bench.drain()
        bench.conn.execute("DELETE FROM run_summaries")
        bench.conn.execute("UPDATE processing_jobs SET status = 'processing', completed_at = NULL")
        at_once(database, "SELECT settle_batch('b')", "SELECT begin_batch('b', 'ann', NULL, 'corr')")
        now = bench.one("SELECT run_id FROM processing_jobs")[0]
        assert now != run
        assert bench.one(BATCH)[:2] == ("pending", False)
        assert bench.all("SELECT run_id FROM run_summaries WHERE run_id <> %s", run) == []


async def test_a_late_retry_updates_status_and_summary(bench: Bench) -> None:
    batch_of(bench, "a", "x")
    bench.also["parse"] = refuse("x")
    await bench.drain()
    assert summary(bench)[0]["totals"]["failed"] == 1
    first = bench.one("SELECT created_at FROM run_summaries")
    bench.also.clear()
    bench.conn.execute("SELECT requeue_document('x')")
    assert await reconciler(bench).pass_once() == {"processing": 1}, "an ended batch goes on by itself once a document of it does"
    assert bench.one(BATCH)[:2] == ("processing", False)
    await bench.drain()
    assert bench.one(BATCH) == ("completed", True, None, 2)
    assert summary(bench)[0]["totals"]["succeeded"] == 2
    assert bench.one("SELECT created_at FROM run_summaries") == first


@pytest.mark.parametrize("by_hand", [False, True], ids=["ended", "failed by hand"])
@pytest.mark.parametrize(
    ("statement", "outcome"),
    [("SELECT cancel_document('x')", "cancelled"), ("SELECT fail_document_by_operator('x', 'enough')", "failed")],
)
async def test_what_ends_before_anybody_saw_that_it_went_on_is_told_in_the_summary(
    bench: Bench, statement: LiteralString, outcome: str, by_hand: bool
) -> None:
    batch_of(bench, "a", "x")
    bench.also["parse"] = refuse("x")
    if by_hand:
        bench.conn.execute("SELECT fail_batch('b', 'no')")
    await bench.drain()
    bench.conn.execute("SELECT requeue_document('x')")
    bench.conn.execute(statement)
    assert await reconciler(bench).pass_once() == {"renewed": 1}
    ui, _ = summary(bench)
    assert ui["totals"] | {"succeeded": 1, outcome: 1, "unfinished": 0} == ui["totals"]
    card = next(card for card in ui["files"] if card["doc_id"] == "x")
    assert (card["outcome"], card["error_message"]) == (outcome, "enough" if outcome == "failed" else None)
    assert bench.one(BATCH)[:2] == ("failed" if by_hand else "completed_with_errors", True)
    assert await reconciler(bench).pass_once() == {}


async def test_requeueing_while_settling_ends_with_the_last_word_about_each_document(bench: Bench, database: str) -> None:
    batch_of(bench, "a", "x")
    bench.also["parse"] = refuse("x")
    for _ in range(10):
        await bench.drain()
        bench.conn.execute("UPDATE processing_jobs SET status = 'processing', completed_at = NULL")
        at_once(database, "SELECT settle_batch('b')", "SELECT requeue_document('x')", "SELECT reopen_batch('b')")
        await reconciler(bench).pass_once()
        assert bench.one(BATCH)[:2] == ("processing", False), "x goes on, and so does its batch"
    await bench.drain()
    assert bench.one(BATCH)[0] == "completed_with_errors"
    assert summary(bench)[0]["totals"] | {"succeeded": 1, "failed": 1, "unfinished": 0} == summary(bench)[0]["totals"]


CARDS = "SELECT jsonb_path_query_array(ui_json, '$.files[*].doc_id') FROM run_summaries"


async def test_summaries_of_many_large_runs_are_renewed_a_few_at_a_time_until_none_is_left(bench: Bench) -> None:
    for number in range(6):
        batch_of(bench, "a", "c", "d", str(number))
        await bench.drain()
    bench.conn.execute("UPDATE run_summaries SET file_count = 5000")
    bench.conn.execute("SELECT delete_document('a')")
    renewed, left = 0, [6]
    for number in range(9):
        renewed = (await reconciler(bench).pass_once()).get("renewed", 0)
        left.append(sum("a" in cards for (cards,) in bench.all(CARDS)))
        if number == 0:
            assert bench.one("SELECT total_files FROM processing_jobs") == (3,), "the present run is told at once"
            bench.conn.execute("SELECT delete_document('c')")
        if renewed:
            break
    assert left[-1] == 0
    assert all(0 <= before - after <= 4 for before, after in pairwise(left)), "two that are next and, at the first, the present one"
    assert len(left) >= 6, "what was deleted meanwhile begins a round of its own"
    assert {tuple(cards) for (cards,) in bench.all(CARDS)} == {(str(number), "d") for number in range(6)}
    assert bench.one("SELECT count(*) FROM summaries_to_renew") == (0,)
    assert await reconciler(bench).pass_once() == {}


async def test_a_round_that_finds_no_run_behind_its_mark_rewrites_none_before_it(bench: Bench) -> None:
    for _ in range(3):
        batch_of(bench, "a", "b")
        await bench.drain()
    bench.conn.execute("SELECT delete_document('a')")
    bench.conn.execute("UPDATE summaries_to_renew SET is_its_own = FALSE, after_run = 'ffffffff-ffff-ffff-ffff-ffffffffffff'")
    bench.conn.execute("INSERT INTO summaries_to_renew (batch_id, is_its_own) SELECT batch_id, FALSE FROM summaries_to_renew")
    bench.one("SELECT renew_summaries('b')")
    assert bench.all(CARDS) == [(["a", "b"],)] * 3
    assert await reconciler(bench).pass_once() == {"renewed": 1}, "what was noted meanwhile begins a round of its own"
    assert bench.all(CARDS) == [(["b"],)] * 3


async def test_deletions_that_go_on_keep_no_card_of_the_first_in_any_summary(bench: Bench) -> None:
    runs = 5
    for _ in range(runs):
        batch_of(bench, "a", *(f"d{number}" for number in range(2 * runs)))
        await bench.drain()
    bench.conn.execute("UPDATE run_summaries SET file_count = 10000")
    bench.conn.execute("SELECT delete_document('a')")
    for number in range(runs):
        await reconciler(bench).pass_once()
        bench.conn.execute("SELECT delete_document(%s)", [f"d{number}"])
    assert not any("a" in cards for (cards,) in bench.all(CARDS))


async def test_a_pass_that_has_renewed_for_long_leaves_other_batches_to_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "RENEW_SECONDS", 0.0)
    for batch_id in ("b", "other"):
        run = begin(bench.conn, batch_id)
        accept(bench.conn, run, f"{batch_id} 1", f"{batch_id} 2", batch_id=batch_id)
        seal(bench.conn, run, 2, batch_id)
        await bench.drain()
        bench.conn.execute("SELECT delete_document(%s)", [f"{batch_id} 1"])
    assert [await reconciler(bench).pass_once() for _ in range(3)] == [{"renewed": 1}, {"renewed": 1}, {}]


FAIL = """CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'always'; END $$;
CREATE TRIGGER fail BEFORE UPDATE ON run_summaries FOR EACH ROW WHEN (OLD.batch_id = '%s') EXECUTE FUNCTION fail();"""
MORE_RUNS = """INSERT INTO run_summaries OVERRIDING SYSTEM VALUE SELECT (
    jsonb_populate_record(r, jsonb_build_object('id', -n, 'run_id', gen_random_uuid(), 'file_count', 10000))
).* FROM run_summaries AS r, generate_series(1, 99) AS n WHERE r.batch_id = %s"""


@pytest.mark.parametrize("first", ["b", "other"])
@pytest.mark.parametrize("what", ["takes many calls", "fails"])
async def test_a_batch_that_is_not_through_with_one_renewal_keeps_no_other_from_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, first: str, what: str
) -> None:
    monkeypatch.setattr(reconcile, "RENEW_SECONDS", 0.0)
    for batch_id in ("b", "other"):
        run = begin(bench.conn, batch_id)
        accept(bench.conn, run, f"{batch_id} 1", f"{batch_id} 2", batch_id=batch_id)
        seal(bench.conn, run, 2, batch_id)
        await bench.drain()
    if what == "fails":
        bench.conn.execute(FAIL % first)
    else:
        bench.conn.execute(MORE_RUNS, [first])
    for batch_id in ("b", "other"):
        bench.conn.execute("SELECT delete_document(%s)", [f"{batch_id} 1"])
    for _ in range(40):  # which of the two a pass begins with is as a coin falls
        await reconciler(bench).pass_once()
        left = [batch_id for (batch_id,) in bench.all("SELECT DISTINCT batch_id FROM summaries_to_renew")]
        if left == [first]:
            break
    assert left == [first]
